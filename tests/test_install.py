"""Installing FewStep changes nothing that a host has, and `toolkit.start` installs all that its jobs need."""

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from toolkit import start

ROOT = Path(__file__).resolve().parent.parent

# What ComfyUI installations hold: name -> (version, what it requires). The first carries the lower bounds of
# ComfyUI 0.3.64's own requirements; the others what pip chose when those releases were new.
PLAIN = {
    "certifi": "2023.11.17",
    "charset-normalizer": "3.3.2",
    "fsspec": "2023.12.2",
    "idna": "3.6",
    "packaging": "23.2",
    "psutil": "5.9.8",
    "regex": "2023.12.25",
    "tqdm": "4.66.1",
    "typing-extensions": "4.9.0",
    "urllib3": "2.1.0",
}
HUB_1 = ["filelock>=3.10.0", "fsspec>=2023.5.0", "packaging>=20.9", "pyyaml>=5.1", "tqdm>=4.42.1"]
HUB_0 = ["filelock", "fsspec>=2023.5.0", "packaging>=20.9", "pyyaml>=5.1", "requests", "tqdm>=4.42.1"]
TRANSFORMERS = ["numpy>=1.17", "packaging>=20.0", "pyyaml>=5.1", "regex!=2019.12.17", "tqdm>=4.27"]
HOSTS: dict[str, dict[str, tuple[str, list[str]]]] = {
    "ComfyUI 0.3.64, oldest packages": {
        "torch": ("2.3.0", ["filelock", "typing-extensions>=4.8.0", "fsspec"]),
        "numpy": ("1.25.0", []),
        "pillow": ("9.5.0", []),
        "pyyaml": ("6.0.1", []),
        "filelock": ("3.13.1", []),
        "requests": ("2.31.0", ["charset-normalizer<4,>=2", "idna<4,>=2.5", "urllib3<3,>=1.21.1"]),
        "safetensors": ("0.4.2", []),
        "tokenizers": ("0.15.1", ["huggingface_hub<1.0,>=0.16.4"]),
        "huggingface-hub": ("0.20.3", [*HUB_0, "typing-extensions>=3.7.4.3"]),
        "transformers": (
            "4.37.2",
            [*TRANSFORMERS, "huggingface-hub<1.0,>=0.19.3", "tokenizers<0.19,>=0.14", "safetensors>=0.4.1"],
        ),
    },
    "ComfyUI 0.3.64, packages of its day": {
        "torch": ("2.8.0+cu129", ["filelock", "typing-extensions>=4.8.0", "fsspec"]),
        "numpy": ("2.3.3", []),
        "pillow": ("11.3.0", []),
        "pyyaml": ("6.0.3", []),
        "filelock": ("3.20.0", []),
        "requests": ("2.32.5", ["charset-normalizer<4,>=2", "idna<4,>=2.5", "urllib3<3,>=1.21.1"]),
        "safetensors": ("0.6.2", []),
        "tokenizers": ("0.22.1", ["huggingface-hub<2.0,>=0.16.4"]),
        "huggingface-hub": ("0.35.3", [*HUB_0, "typing-extensions>=3.7.4.3"]),
        "transformers": (
            "4.57.0",
            [
                *TRANSFORMERS,
                "huggingface-hub<1.0,>=0.34.0",
                "tokenizers<=0.23.0,>=0.22.0",
                "safetensors>=0.4.3",
            ],
        ),
    },
    "ComfyUI 0.3.75": {
        "torch": ("2.9.1+cu130", ["filelock", "typing-extensions>=4.8.0", "fsspec"]),
        "numpy": ("2.3.5", []),
        "pillow": ("12.0.0", []),
        "pyyaml": ("6.0.3", []),
        "filelock": ("3.20.0", []),
        "requests": ("2.32.5", ["charset-normalizer<4,>=2", "idna<4,>=2.5", "urllib3<3,>=1.21.1"]),
        "safetensors": ("0.7.0", []),
        "tokenizers": ("0.22.1", ["huggingface-hub<2.0,>=0.16.4"]),
        "huggingface-hub": ("0.36.0", [*HUB_0, "typing-extensions>=3.7.4.3"]),
        "transformers": (
            "4.57.3",
            [
                *TRANSFORMERS,
                "huggingface-hub<1.0,>=0.34.0",
                "tokenizers<=0.23.0,>=0.22.0",
                "safetensors>=0.4.3",
            ],
        ),
    },
    "ComfyUI 0.18.1": {
        "torch": ("2.10.0+cu130", ["filelock", "typing-extensions>=4.8.0", "fsspec"]),
        "numpy": ("2.4.2", []),
        "pillow": ("12.1.1", []),
        "pyyaml": ("6.0.3", []),
        "filelock": ("3.20.0", []),
        "safetensors": ("0.7.0", []),
        "tokenizers": ("0.22.2", ["huggingface-hub<2.0,>=0.16.4"]),
        "huggingface-hub": ("1.7.1", [*HUB_1, "typing-extensions>=4.1.0"]),
        "transformers": (
            "5.3.0",
            [
                *TRANSFORMERS,
                "huggingface-hub<2.0,>=1.3.0",
                "tokenizers<=0.23.0,>=0.22.0",
                "safetensors>=0.4.3",
            ],
        ),
    },
}

# What an index offered for `diffusers>=0.30` when this was written, cut down to what matters here.
INDEX = {
    "diffusers": ("0.42.1", ["huggingface-hub<3.0,>=1.32.0", "safetensors>=0.8.0"]),
    "huggingface-hub": ("2.4.0", ["filelock>=3.10.0"]),
    "safetensors": ("0.8.0", []),
}


def core_metadata(name: str, version: str, requires: Sequence[str]) -> str:
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    return "\n".join(lines + [f"Requires-Dist: {line}" for line in requires]) + "\n"


def make_host(folder: Path, packages: dict[str, tuple[str, list[str]]]) -> Path:
    """The Python of a new environment in which pip sees these packages as installed, without their code."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = start.environment_python(folder.parent, windows=os.name == "nt")
    asked = "import sysconfig; print(sysconfig.get_path('purelib'))"
    place = Path(
        subprocess.run([python, "-c", asked], check=True, capture_output=True, text=True).stdout.strip()
    )
    for name, (version, requires) in packages.items():
        info = place / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(core_metadata(name, version, requires), encoding="utf-8")
        (info / "INSTALLER").write_text("pip\n", encoding="utf-8")
    return python


def make_index(folder: Path, packages: dict[str, tuple[str, list[str]]]) -> Path:
    """A folder of wheels for pip's --find-links that hold nothing but their metadata."""
    folder.mkdir()
    for name, (version, requires) in packages.items():
        stem = f"{name.replace('-', '_')}-{version}"
        with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{stem}.dist-info/METADATA", core_metadata(name, version, requires))
            tags = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
            wheel.writestr(f"{stem}.dist-info/WHEEL", tags)
            wheel.writestr(f"{stem}.dist-info/RECORD", "")
    return folder


def would_install(python: Path, *arguments: str) -> dict[str, str]:
    """name -> version of what `pip install` would put into that environment, without the network."""
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--dry-run", "--quiet"]
    command += ["--no-index", "--report", "-", *arguments]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PIP_")}
    environment |= {"PIP_CONFIG_FILE": os.devnull, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    chosen = [item["metadata"] for item in json.loads(done.stdout)["install"]]
    return {canonicalize_name(item["name"]): item["version"] for item in chosen}


def all_packages(host: str) -> dict[str, tuple[str, list[str]]]:
    return {name: (version, []) for name, version in PLAIN.items()} | HOSTS[host]


@pytest.mark.parametrize("host", HOSTS)
def test_a_manager_that_installs_requirements_txt_changes_nothing_in_a_host(
    host: str, tmp_path: Path
) -> None:
    python = make_host(tmp_path / ".venv", all_packages(host))
    assert would_install(python, "-r", "requirements.txt") == {}


def test_a_package_that_a_host_lacks_can_replace_what_it_has_whatever_the_lower_bound(tmp_path: Path) -> None:
    """Why diffusers is not in requirements.txt; and a replacement does not escape the test above."""
    python = make_host(tmp_path / ".venv", all_packages("ComfyUI 0.3.75"))
    index = make_index(tmp_path / "index", INDEX)
    chosen = would_install(python, "--find-links", str(index), "diffusers>=0.30")
    assert chosen == {"diffusers": "0.42.1", "huggingface-hub": "2.4.0", "safetensors": "0.8.0"}


def test_outside_comfyui_the_root_imports_nothing(tmp_path: Path) -> None:
    """By path, under the path's own name, as ComfyUI does it, but without its folder_paths."""
    script = f"""
import importlib.util, sys
name = {str(ROOT).replace(".", "_x_")!r}
spec = importlib.util.spec_from_file_location(name, {str(ROOT / "__init__.py")!r})
module = importlib.util.module_from_spec(spec)
sys.modules[name] = module
spec.loader.exec_module(module)
assert not hasattr(module, "comfy_entrypoint")
"""
    command = [sys.executable, "-I", "-S", "-c", script]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def requirements(name: str) -> list[Requirement]:
    """The lines of a requirements file that apply here, those of the files that it includes among them."""
    found: list[Requirement] = []
    for line in (ROOT / name).read_text(encoding="utf-8").splitlines():
        text = line.partition("#")[0].strip()
        if text.startswith("-r "):
            found += requirements(text.removeprefix("-r ").strip())
        elif text:
            found.append(Requirement(text))
    return [line for line in found if applies(line)]


def applies(line: Requirement) -> bool:
    return line.marker is None or line.marker.evaluate({"extra": ""})


def test_the_constraints_pin_all_that_the_toolkit_and_its_tests_bring() -> None:
    pins = {canonicalize_name(line.name) for line in requirements("constraints.txt")}
    waiting = [*requirements("requirements-training.txt"), Requirement("pytest"), Requirement("pytest-xdist")]
    seen: set[str] = set()
    while waiting:
        name = canonicalize_name(waiting.pop().name)
        if name in seen or name.startswith(("cuda-", "nvidia-", "triton")):  # torch pins those itself
            continue
        seen.add(name)
        waiting += filter(applies, map(Requirement, metadata.requires(name) or []))
    assert seen - pins == set()


def test_the_tested_versions_satisfy_every_bound() -> None:
    pins = {
        canonicalize_name(line.name): next(iter(line.specifier)) for line in requirements("constraints.txt")
    }
    assert {pin.operator for pin in pins.values()} == {"=="}
    for line in requirements("requirements-dev.txt"):
        assert Version(pins[canonicalize_name(line.name)].version) in line.specifier, line


class Recorder:
    """Stands in for running commands: notes them and answers with an exit code."""

    def __init__(self, root: Path, *, fails_at: str = "") -> None:
        self.root = root
        self.fails_at = fails_at
        self.commands: list[list[str]] = []

    def __call__(self, command: Sequence[str]) -> int:
        self.commands.append(list(command))
        python = start.environment_python(self.root, windows=False)
        if "venv" in command:
            python.parent.mkdir(parents=True)
            python.touch()
        return 1 if self.fails_at and self.fails_at in command else 0


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("requirements.txt", "requirements-training.txt", "constraints.txt"):
        (tmp_path / name).write_text("torch\n", encoding="utf-8")
    return tmp_path


def test_the_first_start_makes_the_environment_and_installs_and_the_second_does_neither(root: Path) -> None:
    run = Recorder(root)
    assert start.install("test", root, windows=False, run=run) == 0
    venv, pip = run.commands
    assert venv == [sys.executable, "-m", "venv", str(root / ".venv")]
    assert pip[0] == str(start.environment_python(root, windows=False))
    assert pip[1:] == [
        "-m",
        "pip",
        "install",
        "-r",
        "requirements-training.txt",
        "pytest",
        "pytest-xdist",
        "-c",
        "constraints.txt",
    ]
    assert start.install("test", root, windows=False, run=run) == 0
    assert len(run.commands) == 2
    for job in ("demo", "distill"):  # of the same packages
        assert start.install(job, root, windows=False, run=run) == 0
        assert len(run.commands) == 3


def test_pip_is_told_of_the_index_that_has_the_cards_torch(root: Path) -> None:
    run = Recorder(root)
    assert start.install("distill", root, windows=False, run=run, index="https://example.org/cu130") == 0
    assert run.commands[1][-2:] == ["--extra-index-url", "https://example.org/cu130"]


def test_changed_versions_are_installed_again_into_the_same_environment(root: Path) -> None:
    run = Recorder(root)
    start.install("demo", root, windows=False, run=run)
    (root / "constraints.txt").write_text("torch==2.13.0\n", encoding="utf-8")
    start.install("demo", root, windows=False, run=run)
    assert ["venv" in command for command in run.commands] == [True, False, False]


def test_an_installation_that_failed_is_taken_up_again(root: Path) -> None:
    assert start.install("demo", root, windows=False, run=Recorder(root, fails_at="pip")) == 1
    again = Recorder(root)
    assert start.install("demo", root, windows=False, run=again) == 0
    assert ["pip" in command for command in again.commands] == [True]


def test_a_half_made_environment_is_removed_and_a_persons_own_is_not(root: Path) -> None:
    assert start.install("demo", root, windows=False, run=Recorder(root, fails_at="venv")) == 1
    assert not (root / ".venv").exists()
    (root / ".venv").mkdir()
    (root / ".venv" / "notes.txt").touch()
    assert start.install("demo", root, windows=False, run=Recorder(root, fails_at="venv")) == 1
    assert (root / ".venv" / "notes.txt").exists()


def test_what_follows_the_job_goes_to_it_unchanged() -> None:
    assert start.parse(["test", "-k", "grid and not slow", "-x"]) == (
        "test",
        ["-k", "grid and not slow", "-x"],
    )
    assert start.parse(["demo", "--out", "a b", "--help"]) == ("demo", ["--out", "a b", "--help"])
    assert start.parse(["demo"]) == ("demo", [])


@pytest.mark.parametrize("arguments", [[], ["deno"]])
def test_an_unknown_job_is_bad_input(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        start.parse(arguments)
    assert stop.value.code == 2
    assert "JOB" in capsys.readouterr().err


def test_the_environments_python_is_found_on_windows_too() -> None:
    assert start.environment_python(Path("r"), windows=True) == Path("r/.venv/Scripts/python.exe")
    assert start.environment_python(Path("r"), windows=False) == Path("r/.venv/bin/python")


def test_the_exit_code_of_a_command_comes_back() -> None:
    assert start.run([sys.executable, "-c", "raise SystemExit(5)"]) == 5


def test_a_job_in_the_callers_folder_finds_the_toolkit(tmp_path: Path) -> None:
    asked = (
        "import os, importlib.util as u; "
        f"assert os.path.samefile(os.getcwd(), {str(tmp_path)!r}); "
        f"assert os.path.samefile(u.find_spec('toolkit').origin, {str(ROOT / 'toolkit' / '__init__.py')!r})"
    )
    assert start.run([sys.executable, "-c", asked], folder=tmp_path) == 0


@pytest.mark.skipif(os.name == "nt", reason="Windows has no signals that end a process")
def test_a_command_ended_by_a_signal_counts_as_a_shell_counts() -> None:
    assert start.run([sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"]) == 137


def test_an_old_python_is_told_what_is_needed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(start, "OLDEST_PYTHON", (99, 0))
    assert start.main(["demo"]) == 2
    assert "need 99.0 or newer" in capsys.readouterr().err
