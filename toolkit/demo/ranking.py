"""Does the verdict, which needs no judge, rank students as the demo's judge does?

    python -m toolkit.demo.ranking runs/compare/*/student.safetensors -o runs/ranking

Beside the students that are given, good and under-trained ones, spoilt ones are ranked: the first's pictures
blurred, colour-shifted and so on, and itself listening to twice the guidance that it is asked for. The
verdict's ranking is by the score of `evaluation.standing`, through the teacher's own UNet. The judge has two:
by adherence, and by the Frechet distance of its features to the teacher's pictures; its ranking is the mean
of both. Ranks are compared by Spearman's correlation.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..command import run
from ..evaluation.evaluate import Evaluation, FolderStore, Request, Row, Store, Yardstick
from ..evaluation.eyes import TeacherEyes
from ..evaluation.painter import Painted, Painter
from ..evaluation.standing import standings
from ..runtime.files import atomic_path, sha256_of
from ..training.checkpoint import open_checkpoint
from . import TEACHER, TOKENIZER
from .drawings import prompts
from .judge import load_judge

_log = logging.getLogger("fewstep")
GUIDANCE = 4.0
Change = Callable[[Tensor], Tensor]


def blurred(side: int) -> Change:
    edge = side // 2
    return lambda images: F.avg_pool2d(F.pad(images, (edge,) * 4, mode="reflect"), side, stride=1)


def tinted(red: float, green: float, blue: float) -> Change:
    return lambda images: (images * torch.tensor([red, green, blue])[:, None, None]).clamp(0, 1)


def saturated(share: float) -> Change:
    return lambda images: images.mean(1, keepdim=True).lerp(images, share).clamp(0, 1)


def contrasted(share: float) -> Change:
    return lambda images: ((images - 0.5) * share + 0.5).clamp(0, 1)


CHANGES: Mapping[str, Change] = {
    "half blurred": lambda images: (images + blurred(3)(images)) / 2,
    "blurred": blurred(3),
    "very blurred": blurred(5),
    "warm": tinted(1.1, 1, 0.9),
    "red": tinted(1.2, 0.9, 0.8),
    "pale": saturated(0.6),
    "harsh": contrasted(1.6),
}


@dataclass(frozen=True, eq=False)
class Spoilt(Painter):
    """A student whose pictures are changed, or that hears ``louder`` times the guidance."""

    change: Change | None = None
    louder: float = 1.0

    @classmethod
    def of(cls, painter: Painter, *, change: Change | None = None, louder: float = 1.0) -> Spoilt:
        kept = {each.name: getattr(painter, each.name) for each in fields(Painter)}
        return cls(**kept, change=change, louder=louder)

    def latents(self, prompts: Sequence[str], **how: Any) -> Painted:
        return super().latents(prompts, **{**how, "guidance": self.louder * how["guidance"]})

    def decode(self, x0: Tensor, **how: Any) -> Tensor:
        images = super().decode(x0, **how)
        return images if self.change is None else self.change(images)


def spoilt(painter: Painter) -> dict[str, Painter]:
    """What becomes of a student, by name."""
    changed = {name: Spoilt.of(painter, change=change) for name, change in CHANGES.items()}
    return {**changed, "over-guided": Spoilt.of(painter, louder=2.0)}


@dataclass(frozen=True)
class Place:
    """A student: what the verdict measures, and what the judge does."""

    name: str
    score: float
    judge_distance: float
    adherence: float


def places(
    teacher: Painter,
    students: Mapping[str, Painter],
    request: Request,
    *,
    store: Store,
    identities: Mapping[str, str],
) -> list[Place]:
    """Each student's place, measured once without and once by the judge on the same pictures."""

    def rows(yardstick: Yardstick) -> list[Row]:
        measured = Evaluation(teacher, students, request, yardstick, store=store, identities=dict(identities))
        return list(measured.rows())

    found = standings(rows(Yardstick(eyes=TeacherEyes(teacher, batch=64))))
    judged = {row["name"]: row for row in rows(Yardstick(load_judge())) if row["model"] == "student"}
    return [
        Place(name, each.score, judged[name]["frechet_teacher"], judged[name]["adherence"])
        for each in found
        if (name := each.student["name"]) in students
    ]


def agreement(places: Sequence[Place]) -> dict[str, float]:
    """Spearman's correlation of the verdict's ranking with the judge's two and with their mean, and of those
    with each other."""
    score = [place.score for place in places]
    far, wrong = [place.judge_distance for place in places], [-place.adherence for place in places]
    both = [sum(ranks) for ranks in zip(*(_ranks(values).tolist() for values in (far, wrong)), strict=True)]
    return {
        "judge": spearman(score, both),
        "distance": spearman(score, far),
        "adherence": spearman(score, wrong),
        "distance_adherence": spearman(far, wrong),
    }


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Correlation of the ranks, equal values sharing their mean one."""
    return float(torch.corrcoef(torch.stack([_ranks(values) for values in (a, b)]))[0, 1])


def _ranks(numbers: Sequence[float]) -> Tensor:
    values = torch.tensor(numbers, dtype=torch.float64)
    return (values[:, None] > values).sum(1) + (values[:, None] == values).sum(1) / 2


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m toolkit.demo.ranking",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("students", type=Path, nargs="+", metavar="FILE")
    parser.add_argument("--samples", type=int, default=256, metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="DIR")
    asked = parser.parse_args()
    teacher = Painter.open(open_checkpoint(TEACHER, tokenizer=TOKENIZER))
    files: dict[str, Path] = {str(file): file for file in asked.students}
    painters = {
        name: Painter.open(open_checkpoint(file, tokenizer=TOKENIZER)) for name, file in files.items()
    }
    first = next(iter(painters))
    students = painters | {f"{first}, {name}": each for name, each in spoilt(painters[first]).items()}
    found = places(
        teacher,
        students,
        Request(tuple(prompts(asked.samples, seed=asked.seed + 1)), (GUIDANCE,), seed=asked.seed),
        store=FolderStore(asked.out / "painted"),
        identities={name: sha256_of(files[name.split(", ")[0]]) for name in students},
    )
    for place in sorted(found, key=lambda place: place.score):
        _log.info(
            "%7.2f  judge %8.2f  %5.1f %%  %s",
            place.score,
            place.judge_distance,
            100 * place.adherence,
            place.name,
        )
    result = {"spearman": agreement(found), "students": [vars(place) for place in found]}
    _log.info("%s", result["spearman"])
    with atomic_path(asked.out / "ranking.json") as partial:
        partial.write_text(json.dumps(result, indent=2), encoding="utf-8")


if __name__ == "__main__":
    run(main)
