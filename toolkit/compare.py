"""Measure the methods side by side on the demo teacher: ``python -m toolkit.compare --help``."""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import threading
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .assembly import Teacher, phases_of, settle
from .command import run
from .comparison import Row, matplotlib, plot, tables
from .contenders import CONTENDERS, Contender
from .demo import TEACHER
from .demo.drawings import draw
from .diffusion.errors import BadInput
from .evaluation.pictures import save_png, to_image
from .runtime.files import atomic_path
from .training.loop import raise_on_stops
from .training.plan import beside

log = logging.getLogger("fewstep")

DETAILS = """Every contender is a run of toolkit.distill on the demo teacher, measured by toolkit.evaluate;
their folders and logs lie in DIR. All but the README's longer run are given the same work. What is finished
stays: given again the command goes on. Another --work needs another DIR.

DIR gets comparison.md (tables), comparison.png (needs matplotlib) and rows.json.
"""
REFERENCE_SEED = 777_000
DRAWINGS = 1536
TRAINED = 3
"""Work of a trained evaluation: forward, and backward for two."""


@dataclass(frozen=True)
class Run:
    """One student, or of a chain those of all its phases, to be trained in a folder of its own."""

    contender: Contender
    steps: int
    seed: int

    @property
    def name(self) -> str:
        family = self.contender.students_of or self.contender.name
        return f"{family}-{self.steps}" + (f"-seed{self.seed}" if self.seed else "")

    def students(self, folder: Path) -> list[Path]:
        """Files, once it is trained."""
        if not self.contender.chain:
            return [folder / "student.safetensors"]
        files = (folder / "students").glob("*.safetensors")
        return sorted(files, key=lambda file: int(file.stem), reverse=True)


def main(arguments: Sequence[str] | None = None) -> None:
    raise_on_stops()
    asked = _parser().parse_args(arguments)
    chosen = _chosen(asked)
    bench = Bench(asked.out, work=asked.work, samples=asked.samples)
    bench.begin()
    runs = [one for contender in chosen if not contender.students_of for one in runs_of(contender)]
    log.info("%d contenders, %d runs, %d at once", len(chosen), len(runs), asked.jobs)
    with ThreadPoolExecutor(asked.jobs) as pool:
        for one in runs:
            bench.tasks[one.name] = pool.submit(bench.run, one, chosen)
        try:
            for task in bench.tasks.values():
                task.result()
        except BaseException:
            bench.stop()
            pool.shutdown(cancel_futures=True)
            raise
    rows = list(bench.rows(chosen))
    bench.write("rows.json", json.dumps(rows, indent=2))
    bench.write("comparison.md", tables(rows, chosen))
    plot(rows, chosen, asked.out / "comparison.png")
    log.info("%s", asked.out / "comparison.md")


def runs_of(contender: Contender) -> list[Run]:
    """Of each step count, and seed by seed; where ``seeded`` names some, only those are repeated."""
    return [
        Run(contender, steps, seed)
        for seed in range(contender.seeds)
        for steps in (contender.seeded or contender.steps if seed else contender.steps)
    ]


class Bench:
    """Runs contenders in ``out``; ``work`` for each student, in evaluations of the network."""

    def __init__(self, out: Path, *, work: int, samples: int) -> None:
        self.out, self.work, self.samples = out, work, samples
        self.running: set[subprocess.Popen[bytes]] = set()
        self.drawing, self.claiming = threading.Lock(), threading.Lock()
        self.claimed: set[str] = set()
        self.measuring: dict[int, threading.Lock] = defaultdict(threading.Lock)
        self.tasks: dict[str, Future[None]] = {}
        self.stopped = False

    def begin(self) -> None:
        """BadInput for a folder of another work or number of samples."""
        said = json.dumps({"work": self.work, "samples": self.samples})
        path = self.out / "compare.json"
        if path.exists() and path.read_text(encoding="utf-8") != said:
            raise BadInput(
                f"{self.out} holds a comparison of {path.read_text(encoding='utf-8')}, and {said} was asked "
                "for; choose another --out"
            )
        self.write("compare.json", said)
        self.teacher = Teacher.open({"demo": True})

    def write(self, name: str, text: str) -> None:
        with atomic_path(self.out / name) as partial:
            partial.write_text(text, encoding="utf-8")

    def train(self, one: Run) -> None:
        """The run, or what is left of it."""
        folder = self.out / one.name
        if (folder / "report.html").exists():
            return
        options: dict[str, Any] = {
            "steps": one.steps,
            "seed": one.seed,
            "report_prompts": 0,
            "cache_dir": str(self.out / "cache"),
            **one.contender.options,
            "out": str(folder),
        }
        if one.contender.draws:
            options["data"] = str(self.drawings())
        if one.contender.starts_from:
            options["init"] = str(self.start_of(one))
        if (folder / "config.toml").exists():
            said = ["--demo", "--method", str(options["method"]), "--out", str(folder), "--resume"]
        else:
            updates = one.contender.updates or self.updates(options)
            said = ["--demo", *_arguments({**options, "updates": updates})]
        self._call(one.name, "toolkit.distill", said)

    def start_of(self, one: Run) -> Path:
        """The student that a run goes on from, of the same seed; what makes it was begun before."""
        maker = next(other for other in CONTENDERS if other.name == one.contender.starts_from)
        earlier = next(
            run for run in runs_of(maker) if run.seed == one.seed and (maker.chain or run.steps == one.steps)
        )
        if earlier.name in self.tasks:
            self.tasks[earlier.name].result()
        return self.out / earlier.name / "students" / f"{one.steps}.safetensors"

    def updates(self, options: Mapping[str, Any]) -> tuple[int, ...]:
        """Of each phase, so that the phases have equal parts of the work."""
        settings, _ = settle({"demo": True, **options}, {}, self.teacher)
        share = 0.0 if settings.data else settings.trajectory_share
        phases = phases_of(settings, self.teacher)
        part = self.work / len(phases) / settings.batch_size
        return tuple(max(1, round(part / (TRAINED + beside(phase, share)))) for phase in phases)

    def run(self, one: Run, chosen: Sequence[Contender]) -> None:
        """A run, and after a contender's last one its measuring, and that of whom its students serve too."""
        self.train(one)
        for contender in chosen:
            if one.contender.name in (contender.name, contender.students_of) and self.claim(contender):
                self.measure(contender)

    def claim(self, contender: Contender) -> bool:
        """Whether the caller is to measure it: all is trained, and nobody was told so before."""
        with self.claiming:
            free = contender.name not in self.claimed and self.trained(contender)
            if free:
                self.claimed.add(contender.name)
            return free

    def trained(self, contender: Contender) -> bool:
        return all((self.out / one.name / "report.html").exists() for one in runs_of(contender))

    def measure(self, contender: Contender) -> None:
        """Its students, which are trained."""
        folder = self._measured(contender)
        if (folder / "done").exists():
            return
        samples = contender.samples or self.samples
        students = [file for one in runs_of(contender) for file in one.students(self.out / one.name)]
        said = {
            "teacher": TEACHER,
            "student": students,
            "guidance": contender.guidances,
            "steps": contender.measured_at,
            "strength": contender.strengths,
            "own": "none",
            "samples": samples,
            "seed": REFERENCE_SEED,
            "cache_dir": self.out / "painted",
            "out": folder,
        }
        with self.measuring[samples]:  # one after the other, so that the teacher paints once
            self._call(f"{contender.name}-measured", "toolkit.evaluate", _arguments(said))
        self.write(f"measured/{contender.name}/done", "")
        log.info("%s: measured", contender.name)

    def rows(self, contenders: Sequence[Contender]) -> Iterator[Row]:
        """What was measured, each with its contender, run and seed; the teacher's once for each setting."""
        teachers: set[tuple[Any, ...]] = set()
        for contender in contenders:
            text = (self._measured(contender) / "results.json").read_text(encoding="utf-8")
            results = json.loads(text)
            runs = [one for one in runs_of(contender) for _ in one.students(self.out / one.name)]
            of = dict(zip(results["students"], runs, strict=True))
            for row in results["rows"]:
                if row["model"] == "student":
                    one = of[row["name"]]
                    yield {**row, "contender": contender.name, "run": one.name, "seed": one.seed}
                    continue
                key = tuple(row[name] for name in ("noise", "sampler", "steps", "guidance", "strength"))
                if key not in teachers:
                    teachers.add(key)
                    yield {**row, "contender": "teacher", "run": "teacher", "seed": None}

    def drawings(self) -> Path:
        """A folder of captioned drawings, as many as the teacher makes pictures."""
        folder = self.out / "drawings"
        with self.drawing:
            if folder.exists():
                return folder
            images, captions = draw(DRAWINGS, seed=5)
            with atomic_path(folder) as partial:
                for number, (image, caption) in enumerate(zip(images, captions, strict=True)):
                    save_png(to_image(image), partial / f"{number:04d}.png")
                    (partial / f"{number:04d}.txt").write_text(caption, encoding="utf-8")
        return folder

    def stop(self) -> None:
        """End what runs; each can be resumed."""
        self.stopped = True
        for process in list(self.running):
            process.terminate()

    def _measured(self, contender: Contender) -> Path:
        return self.out / "measured" / contender.name

    def _call(self, name: str, module: str, arguments: Sequence[str]) -> None:
        """A command of the toolkit in a process of its own, its words in a log."""
        if self.stopped:
            raise KeyboardInterrupt
        path = self.out / "logs" / f"{name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", module, *arguments]
        here = {**os.environ, "OMP_NUM_THREADS": "1"}
        root = Path(__file__).resolve().parent.parent
        search = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
        with path.open("ab") as output:
            process = subprocess.Popen(
                command, stdout=output, stderr=output, env={**here, "PYTHONPATH": search}
            )
            self.running.add(process)
            code = process.wait()
            self.running.discard(process)
        if code:
            raise BadInput(f"{name}: {module} ended with exit code {code}; {path} says why")


def _arguments(options: Mapping[str, Any]) -> list[str]:
    """Options as a command line."""
    words: list[str] = []
    for name, value in options.items():
        several = isinstance(value, (tuple, list))
        words += ["--" + name.replace("_", "-"), *(map(str, value) if several else [str(value)])]
    return words


def _chosen(asked: argparse.Namespace) -> list[Contender]:
    known = {contender.name: contender for contender in CONTENDERS}
    if unknown := [name for name in asked.only if name not in known]:
        raise BadInput(f"--only {unknown[0]}: no such contender; there are {', '.join(known)}")
    for name in ("work", "samples", "jobs"):
        if getattr(asked, name) < 1:
            raise BadInput(f"--{name} {getattr(asked, name)}: expected 1 or more")
    matplotlib()
    asked.only += [known[name].students_of for name in asked.only if known[name].students_of]
    return [contender for contender in CONTENDERS if not asked.only or contender.name in asked.only]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m toolkit.compare",
        description="Measure the methods side by side on the demo teacher, at equal work.",
        epilog=DETAILS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="everything that is written")
    add(
        "--only",
        nargs="+",
        default=[],
        metavar="NAME",
        help="of " + ", ".join(contender.name for contender in CONTENDERS) + " (default: all)",
    )
    add(
        "--work",
        type=int,
        default=50_000,
        metavar="N",
        help="of each student, in evaluations of the network; a trained one is three (default 50000)",
    )
    add("--samples", type=int, default=1024, metavar="N", help="pictures a row (default 1024)")
    add("--jobs", type=int, default=1, metavar="N", help="runs at once, each in one thread (default 1)")
    return parser


if __name__ == "__main__":
    run(main)
