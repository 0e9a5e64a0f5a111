"""Which student belongs to the checkpoint that a person has selected: matched by the teacher's hash."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..diffusion.errors import BadInput
from ..diffusion.spec import StudentSpec
from .student import StudentFile, read_student


@dataclass
class Library:
    """Reads files' headers, each once as long as it does not change."""

    known: dict[Path, tuple[tuple[int, int], StudentFile | None]] = field(
        default_factory=dict[Path, tuple[tuple[int, int], StudentFile | None]]
    )

    def look(self, path: Path) -> StudentFile | None:
        """What a file says of itself; None for one that is no safetensors file or cannot be read."""
        try:
            stat = path.stat()
        except OSError:
            return None
        version = (stat.st_mtime_ns, stat.st_size)
        if path not in self.known or self.known[path][0] != version:
            self.known[path] = (version, _read(path))
        return self.known[path][1]

    def students_of(self, teacher_sha256: str, paths: Iterable[Path]) -> dict[Path, StudentSpec]:
        """The checkpoints among ``paths`` that were distilled from the teacher."""
        found: dict[Path, StudentSpec] = {}
        for path in paths:
            file = self.look(path)
            if file is None or file.spec is None or file.kind == "lora":
                continue
            if teacher_sha256 and file.spec.teacher_sha256 == teacher_sha256:
                found[path] = file.spec
        return found


def pick(students: Mapping[Path, StudentSpec], *, steps: int, preferred: Path | None) -> tuple[Path, str]:
    """One of a teacher's students, and a sentence where it is not the one that ``steps`` asks for.

    The one of that many steps; else the preferred one; else the one of most steps. Of several alike, a live
    dial goes before a baked guidance, then the first by name.
    """

    def rank(path: Path) -> tuple[bool, bool, bool, int, str]:
        spec = students[path]
        runs = spec.steps == steps or spec.sampler == "consistency"
        return (not runs, path != preferred, not spec.has_dial, -spec.steps, path.name)

    found = min(students, key=rank)
    spec = students[found]
    if spec.steps == steps or spec.sampler == "consistency":
        return found, ""
    there = ", ".join(str(count) for count in sorted({each.steps for each in students.values()}))
    return found, (
        f"{steps} steps were asked for, and this checkpoint's students have {there}: {found.name} with "
        f"{spec.steps} was taken"
    )


def _read(path: Path) -> StudentFile | None:
    if path.suffix != ".safetensors":
        return None
    try:
        return read_student(path)
    except BadInput:
        return None
