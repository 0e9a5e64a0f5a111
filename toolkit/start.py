"""From a fresh clone to a result in one command, with nothing but Python 3.11 or newer installed.

    python -m toolkit.start demo     install what is missing, then make the demo's student, picture and report
    python -m toolkit.start test     install what is missing, then run the tests
    python -m toolkit.start distill  install what is missing, then python -m toolkit.distill with what follows
                                     (distill.sh and distill.bat call this, from any folder)

The first call makes the environment .venv in the repository's root and lets pip install the tested versions
(constraints.txt) into it. That is the only thing that uses the network, and it happens once: until those
files change, later calls go straight to the job. What follows the job's name goes to it unchanged:

    python -m toolkit.start demo --out runs/first --seed 7
    python -m toolkit.start test -k grid

Which torch comes: where nvidia-smi finds a card, a CUDA build for its driver (several gigabytes with NVIDIA's
libraries); else pip's choice, from PyPI the CUDA build on Linux, the CPU build on Windows and macOS (some
hundred megabytes). PIP_EXTRA_INDEX_URL, set before the first call, decides instead:
https://download.pytorch.org/whl/cpu, say.

Whoever has an environment of their own needs none of this: install requirements-training.txt there and call
`python -m toolkit.distill` and `python -m pytest`.
"""

import argparse
import hashlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

ROOT = Path(__file__).resolve().parent.parent
OLDEST_PYTHON = (3, 11)
INSTALL_PYTHON = "winget install -e --id Python.Python.3.12"


@dataclass(frozen=True)
class Job:
    """What one word on the command line stands for."""

    help: str
    packages: tuple[str, ...]
    """pip's arguments for what the job needs."""
    command: tuple[str, ...]
    """The job itself, as arguments of Python."""
    here: bool = False
    """Whether it runs in the caller's folder, for what is named on its command line; else in the root."""


JOBS = {
    "demo": Job(
        help="distil the embedded teacher: a student file, a picture and a report, in minutes",
        packages=("-r", "requirements-training.txt"),
        command=("-m", "toolkit.distill", "--demo"),
    ),
    "distill": Job(
        help="distil a checkpoint of yours: what follows goes to python -m toolkit.distill",
        packages=("-r", "requirements-training.txt"),
        command=("-m", "toolkit.distill"),
        here=True,
    ),
    "test": Job(
        help="run the tests",
        packages=("-r", "requirements-training.txt", "pytest", "pytest-xdist"),
        command=("-m", "pytest", "-n", "logical", "--maxprocesses", "4", "--dist", "worksteal"),
    ),
}


def environment_python(root: Path, *, windows: bool) -> Path:
    """The Python of the environment .venv under `root`."""
    return root / ".venv" / ("Scripts/python.exe" if windows else "bin/python")


def fingerprint(job: Job, root: Path) -> str:
    """Changes whenever installing again could change what is installed."""
    digest = hashlib.sha256(repr((job.packages, sys.version_info[:2])).encode())
    for path in [*sorted(root.glob("requirements*.txt")), root / "constraints.txt"]:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def is_embedded(prefix: Path, *, has_venv: bool) -> bool:
    """Whether this is a Python that stands in a portable program's folder (ComfyUI's python_embeded) and can
    make no environment."""
    return prefix.name.lower().startswith("python_embed") or (
        not has_venv and next(prefix.glob("python*._pth"), None) is not None
    )


def embedded_answer(prefix: Path, arguments: Sequence[str]) -> str:
    """What to type instead: that Python belongs to ComfyUI, and packages put into it can break it."""
    words = subprocess.list2cmdline([*(arguments[1:] if arguments[:1] == ["distill"] else [])])
    return (
        f"{prefix.name} is the Python of a portable ComfyUI, which can make no environment and is left as it "
        "is; install another one by typing the first line, and then, in a new window, the second\n"
        f"    {INSTALL_PYTHON}\n"
        f'    "{ROOT / "distill.bat"}" {words}'.rstrip()
    )


def install(
    name: str,
    root: Path,
    *,
    windows: bool,
    run: Callable[[Sequence[str]], int],
    index: str | None = None,
) -> int:
    """Make .venv and install the job's packages, unless an earlier call did; the exit code of venv or pip.

    `index` is another place where pip looks for packages. `run` executes a command in `root` and returns its
    exit code. A note in .venv is written only after pip succeeded, so an interrupted installation is taken up
    again.
    """
    job = JOBS[name]
    python = environment_python(root, windows=windows)
    packages = hashlib.sha256(repr(job.packages).encode()).hexdigest()[:8]  # jobs can have the same
    note = root / ".venv" / f"fewstep-{packages}.txt"
    wanted = fingerprint(job, root)
    if note.exists() and note.read_text(encoding="utf-8") == wanted and python.exists():
        return 0
    if not python.exists():
        _say("making the environment .venv")
        is_ours = not (root / ".venv").exists()
        code = run([sys.executable, "-m", "venv", str(root / ".venv")])
        if code != 0:
            if is_ours:
                shutil.rmtree(root / ".venv", ignore_errors=True)
            _say("Python could not make the environment, see above (on Debian: apt install python3-venv)")
            return code
    more = () if index is None else ("--extra-index-url", index)
    _say("installing the tested versions with pip (once; the first time up to several gigabytes)")
    code = run([str(python), "-m", "pip", "install", *job.packages, "-c", "constraints.txt", *more])
    if code != 0:
        _say("pip could not install everything, see above; the same command goes on from there")
        return code
    note.write_text(wanted, encoding="utf-8")
    return 0


def run(command: Sequence[str], *, folder: Path = ROOT) -> int:
    """Run a command and wait for it; its exit code, 128 + n where signal n ended it. In another folder than
    the repository's root it finds the toolkit all the same.

    Ctrl+C reaches the command itself, which may take a moment to save its state; SIGTERM is handed on to it.
    Waiting threads sleep instead of spinning: on a busy machine torch's threads else hold each other up.
    """
    environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    if folder != ROOT:
        paths = [str(ROOT), os.environ.get("PYTHONPATH")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    process = subprocess.Popen(command, cwd=folder, env=environment)

    def hand_on(number: int, frame: FrameType | None) -> None:
        process.terminate()

    signal.signal(signal.SIGTERM, hand_on)
    while True:
        try:
            code = process.wait()
        except KeyboardInterrupt:
            continue
        return code if code >= 0 else 128 - code


def parse(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """The job's name and what is handed on to it."""
    head, _, details = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m toolkit.start",
        description=head,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    jobs = parser.add_subparsers(dest="job", required=True, metavar="JOB")
    for name, job in JOBS.items():
        jobs.add_parser(name, help=job.help, add_help=False)
    options, rest = parser.parse_known_args(arguments)
    return options.job, rest


def main(arguments: Sequence[str]) -> int:
    has_venv = all(importlib.util.find_spec(name) is not None for name in ("venv", "ensurepip"))
    if is_embedded(Path(sys.prefix), has_venv=has_venv):
        _say(embedded_answer(Path(sys.prefix), arguments))
        return 2
    name, rest = parse(arguments)
    if sys.version_info < OLDEST_PYTHON:
        found, wanted = (".".join(map(str, version[:2])) for version in (sys.version_info, OLDEST_PYTHON))
        _say(f"this is Python {found}; the tested versions of the packages need {wanted} or newer")
        return 2
    from . import cards  # not above: an embedded Python runs this file by its path, and knows no package

    windows = os.name == "nt"
    index = cards.index(cards.ask(), windows=windows)
    code = install(name, ROOT, windows=windows, run=run, index=index)
    if code != 0:
        return code
    job = JOBS[name]
    python = str(environment_python(ROOT, windows=windows))
    return run([python, *job.command, *rest], folder=Path.cwd() if job.here else ROOT)


def _say(message: str) -> None:
    print(f"fewstep: {message}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
