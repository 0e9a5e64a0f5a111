"""Where a student stands, without a judge: between its teacher with another seed, which nobody can tell from
the teacher, and the teacher's DPM++ 2M with as many evaluations, which a person has for free.

Figures are *scaled* so that the first is 0 and the second 1. docs/judging.md explains them to people.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .evaluate import DRIFTS, Row

SEEN = 0.02
"""Drifts below this share are taken for chance, however near another seed comes."""


@dataclass(frozen=True, eq=False)
class Standing:
    """Rows of one guidance, strength, size and task: a student's, of the teacher from ``other`` noise, and
    what is there ``for_free``."""

    student: Row
    other: Row
    for_free: Row

    @property
    def score(self) -> float:
        """How far a student's pictures are from the teacher's own, as a share of how far another seed's are:
        what students are ranked by, the least first.
        """
        return self._apart(self.student)

    @property
    def score_for_free(self) -> float:
        """The same of what is there for free."""
        return self._apart(self.for_free)

    def _apart(self, row: Row) -> float:
        """Geometric mean of how far pictures are, in features and in pixels, and of how much less they show
        of their prompts. Measured to agree with the judge: docs/judging.md.
        """
        pixels = 10 ** ((self.other["psnr_teacher"] - row["psnr_teacher"]) / 20)
        apart = math.sqrt(row["paired_ratio"] * pixels)
        # Of few pictures it can be that none shows less than the teacher's own: no measure then.
        told = all(one["prompt_ratio"] for one in (self.student, self.for_free))
        return math.sqrt(apart * row["prompt_ratio"]) if told else apart

    def scaled(self, name: str) -> float | None:
        """``name``: frechet or a drift; None where DPM++ 2M is hardly worse than another seed."""
        if name == "frechet":
            value, least, most = (row["frechet_ratio"] for row in (self.student, self.other, self.for_free))
        else:
            value, most = abs(self.student[name]), abs(self.for_free[name])
            least = self.chance(name)
        if value is None or most is None or most < least + SEEN:
            return None
        return (value - least) / (most - least)

    def chance(self, name: str) -> float:
        """The drift that says nothing."""
        return max(abs(self.other[name]), SEEN)

    @property
    def drifts(self) -> list[str]:
        """In words, those beyond chance."""
        return [
            f"{abs(self.student[name]):.0%} {'more' if self.student[name] > 0 else 'less'} {name}"
            for name in DRIFTS
            if abs(self.student[name]) > self.chance(name)
        ]

    @property
    def sentence(self) -> str:
        """For people."""
        end = f", with {_listed(self.drifts)}" if self.drifts else ""
        return f"{_where(self.student)} {self._outcome()}: {self._figures()}{end}."

    def told(self) -> dict[str, Any]:
        """For programs."""
        names = ("task", "name", "steps", "evaluations", "guidance", "strength", "width", "height", "samples")
        return {
            **{name: self.student[name] for name in names},
            "for_free_steps": self.for_free["steps"],
            "for_free_evaluations": self.for_free["evaluations"],
            "score": self.score,
            "score_for_free": self.score_for_free,
            "frechet_ratio": self.student["frechet_ratio"],
            "frechet_ratio_for_free": self.for_free["frechet_ratio"],
            **{f"{name}_scaled": self.scaled(name) for name in ("frechet", *DRIFTS)},
            "sentence": self.sentence,
        }

    def _outcome(self) -> str:
        own, free = self.student["frechet_ratio"], self.for_free["frechet_ratio"]
        if own is not None and own <= 1 and not self.drifts:
            return "the student passes for its teacher" + (", and so does DPM++ 2M" if free <= 1 else "")
        if self.score < self.score_for_free and (own is None or own < free):
            return "the student is nearer to its teacher than DPM++ 2M is with as many evaluations"
        return "the student is no nearer to its teacher than DPM++ 2M is with as many evaluations"

    def _figures(self) -> str:
        own, free = self.student["frechet_ratio"], self.for_free["frechet_ratio"]
        together = (
            ""
            if own is None
            else f"; all together, {_times(own)} as far as those of another seed ({_times(free)})"
        )
        return (
            f"each picture is {self.score:.0%} as far from the teacher's as one of another seed (DPM++ 2M in "
            f"{_steps(self.for_free)}: {self.score_for_free:.0%}){together}"
        )


def standings(rows: Sequence[Row]) -> list[Standing]:
    """Of all students whose rows were measured with eyes."""
    found: list[Standing] = []
    for student in rows:
        if student["model"] != "student":
            continue
        group = [row for row in rows if row["model"] == "teacher" and _group(row) == _group(student)]
        other = next((row for row in group if row["noise"] == "other"), None)
        free = [
            row
            for row in group
            if row["sampler"] == "dpmpp_2m" and row["evaluations"] >= student["evaluations"]
        ]
        if other is not None and free:
            found.append(Standing(student, other, min(free, key=lambda row: row["evaluations"])))
    return found


def _group(row: Row) -> tuple[Any, ...]:
    return tuple(row.get(name) for name in ("task", "guidance", "strength", "width", "height"))


def _where(row: Row) -> str:
    task = {"fill": "Filling in", "second": "Second pass"}.get(row["task"])
    parts = [f"{_steps(row)} and guidance {row['guidance']:g}"]
    if row["strength"] < 1:
        parts.append(f"strength {row['strength']:g}")
    parts.append(f"{row['width']} x {row['height']}")
    return (f"{task}: at " if task else "At ") + ", ".join(parts) + ","


def _steps(row: Row) -> str:
    return f"{row['steps']} step{'s' if row['steps'] > 1 else ''}"


def _times(ratio: float) -> str:
    return f"{ratio:.2g} times" if ratio < 10 else f"{ratio:.0f} times"


def _listed(parts: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(parts[:-1]), parts[-1]]))
