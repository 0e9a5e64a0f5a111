"""Teacher against students in numbers: each row is one model at one guidance, step count and strength.

Everything is compared from the same prompts, the same seeds and so the same noise, with the *reference*: the
teacher with DDIM at 50 steps at the same guidance (and strength). A row "other noise" is the reference once
more from other seeds: its distance to the reference is what is left between two sets that differ in nothing
but chance, the floor that students are measured against. img2img starts from the reference's picture of the
prompt before. Inpainting models also fill in: the middle of that picture, or what is given to fill.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias, TypeVar

import torch
from torch import Tensor

from ..diffusion.errors import BadInput
from ..runtime.files import load_tensors, read_metadata, save_tensors
from .eyes import Clip, Eyes
from .metrics import (
    Judge,
    adherence,
    colourfulness,
    contrast,
    features,
    frechet_distance,
    kernel_distance,
    precision_recall,
    psnr,
    sharpness,
)
from .painter import Fill, Painter

log = logging.getLogger("fewstep")

Row: TypeAlias = dict[str, Any]
"""task (paint or fill), model, name, noise, sampler, steps, evaluations, guidance, strength, samples,
adherence, frechet_real, frechet_teacher, frechet_ratio (to "other noise"), kernel_teacher, precision, recall,
psnr_teacher (dB), colour, contrast, sharpness (all three: the share by which they exceed the reference's),
clip_score, seconds_per_image (sampling alone)."""

REFERENCE_STEPS = 50
MIDDLE = 0.7
"""Side of the square that is filled in, where nothing else is given, in sides of the picture."""

Task = Literal["paint", "fill"]
SELDOM = 8
"""Fewer samples than this give no distance between sets."""
DRIFTS: dict[str, Callable[[Tensor], float]] = {
    "colour": colourfulness,
    "contrast": contrast,
    "sharpness": sharpness,
}


@dataclass(frozen=True, eq=False)
class Yardstick:
    """``judge`` says what pictures show; ``eyes`` (the judge's, if nothing else is given) are what distances
    between sets are measured in, ``real`` (M, F) what they see in real pictures; ``clip`` scores captions.
    Without any of them PSNR, drifts and time are measured.

    Distances are in units of the real features' mean spread, so that their size is not the eyes' choice.
    """

    judge: Judge | None = None
    real: Tensor | None = None
    eyes: Eyes | None = None
    clip: Clip | None = None

    @property
    def sees(self) -> bool:
        """Whether sets of pictures can be compared."""
        return self.eyes is not None or self.judge is not None

    @property
    def unit(self) -> float:
        """Mean standard deviation of the real features."""
        return 1.0 if self.real is None else float(self.real.std(0).mean())

    def see(self, images: Tensor) -> Tensor | None:
        """Features (N, F), in units, of pictures (N, 3, H, W)."""
        if self.eyes is not None:
            return self.eyes(images) / self.unit
        return None if self.judge is None else features(self.judge, images) / self.unit

    def to_real(self, found: Tensor | None) -> float | None:
        """Frechet distance from features in units to those of the real pictures."""
        return None if self.real is None else _between(found, self.real / self.unit, frechet_distance)

    def agreement(self, images: Tensor, captions: Sequence[str]) -> dict[str, float | None]:
        """How well pictures go with their captions."""
        return {
            "adherence": None if self.judge is None else adherence(self.judge, images, list(captions)),
            "clip_score": None if self.clip is None else self.clip.score(images, captions),
        }


@dataclass(frozen=True)
class Request:
    """``prompts`` one a sample; ``seed`` of the first, the others follow; ``steps`` of the teacher's own
    samplers."""

    prompts: tuple[str, ...]
    guidances: tuple[float, ...]
    steps: tuple[int, ...] = ()
    strengths: tuple[float, ...] = ()
    seed: int = 0
    negative: str = ""
    reference_steps: int = REFERENCE_STEPS

    @property
    def seeds(self) -> range:
        return range(self.seed, self.seed + len(self.prompts))

    @property
    def other_seeds(self) -> range:
        return range(self.seed + 10**9, self.seed + 10**9 + len(self.prompts))


@dataclass(frozen=True)
class Cell:
    """What one row paints. ``steps`` None is a student's own grid, which consistency students can leave."""

    model: Literal["teacher", "student"]
    name: str
    guidance: float
    strength: float = 1.0
    sampler: str | None = None
    steps: int | None = None
    noise: Literal["same", "other"] = "same"
    task: Task = "paint"


class Store(Protocol):
    """Keeps painted latents by what they depend on."""

    def get(self, content: str, paint: Callable[[], tuple[Tensor, float]]) -> tuple[Tensor, float]:
        """Latents (N, C, h, w) and the seconds that they took: kept ones, or painted now."""
        ...


class MemoryStore:
    """A store for as long as it lives."""

    def __init__(self) -> None:
        self.kept: dict[str, tuple[Tensor, float]] = {}

    def get(self, content: str, paint: Callable[[], tuple[Tensor, float]]) -> tuple[Tensor, float]:
        if content not in self.kept:
            self.kept[content] = paint()
        return self.kept[content]


@dataclass(frozen=True)
class FolderStore:
    """A store in a folder, so that an evaluation that was stopped goes on."""

    folder: Path

    def get(self, content: str, paint: Callable[[], tuple[Tensor, float]]) -> tuple[Tensor, float]:
        path = self.folder / f"{hashlib.sha256(content.encode()).hexdigest()[:20]}.safetensors"
        if path.exists():
            return load_tensors(path)["x0"], float(read_metadata(path)["seconds"])
        x0, seconds = paint()
        save_tensors({"x0": x0}, {"seconds": repr(seconds)}, path)
        return x0, seconds


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Models, samples and yardstick of one evaluation; ``students`` by file name.

    ``identities`` holds what tells each model (by its name) from another of the same name, such as a file's
    hash. ``fill``: what inpainting models fill in, a picture and mask for each prompt.
    """

    teacher: Painter
    students: Mapping[str, Painter]
    request: Request
    yardstick: Yardstick
    store: Store = field(default_factory=MemoryStore)
    teacher_name: str = "teacher"
    identities: Mapping[str, str] = field(default_factory=dict[str, str])
    batch: int | None = None
    fill: Fill | None = None

    def rows(self) -> Iterator[Row]:
        """The rows, each as soon as it is measured."""
        for guidance in self.request.guidances:
            yield from self._group(guidance, 1.0, None)
            for strength in self.request.strengths:
                yield from self._group(guidance, strength, self.images_to_start_from(guidance))
            if self.teacher.inpaint:
                yield from self._group(guidance, 1.0, None, self.to_fill(guidance))

    def cells(self, guidance: float, strength: float, task: Task = "paint") -> list[Cell]:
        """What is compared at one guidance and strength, the reference first."""
        reference = replace(self.reference(guidance, strength), task=task)
        cells = [reference]
        if self.yardstick.sees:
            cells.append(replace(reference, noise="other"))
        if strength == 1:
            cells += [
                replace(reference, sampler=sampler, steps=steps)
                for sampler in ("ddim", "dpmpp_2m")
                for steps in sorted(self.request.steps, reverse=True)
                if (sampler, steps) != (reference.sampler, reference.steps)
            ]
        able = [name for name, student in self.students.items() if student.runs_at(guidance)]
        cells += [Cell("student", name, guidance, strength, task=task) for name in able]
        return cells + [
            Cell("student", name, guidance, strength, steps=steps, task=task)
            for name in able
            if (spec := self.students[name].spec) is not None and spec.sampler == "consistency"
            for steps in self.request.steps
            if steps != spec.steps
        ]

    def reference(self, guidance: float, strength: float = 1.0) -> Cell:
        steps = self.request.reference_steps
        return Cell("teacher", self.teacher_name, guidance, strength, sampler="ddim", steps=steps)

    def latents(self, cell: Cell, x0: Tensor | None = None, fill: Fill | None = None) -> tuple[Tensor, float]:
        """The cell's latents (N, C, h, w) and the seconds that sampling took."""

        def paint() -> tuple[Tensor, float]:
            log.info("painting %s", _named(cell, len(self.request.prompts)))
            painted = self._painter(cell).latents(
                self.request.prompts,
                seeds=self.request.seeds if cell.noise == "same" else self.request.other_seeds,
                guidance=cell.guidance,
                steps=cell.steps,
                sampler=cell.sampler,
                negative=self.request.negative if cell.model == "teacher" else None,
                x0=x0,
                fill=fill,
                strength=cell.strength,
                batch=self.batch,
            )
            return painted.x0, painted.seconds

        return self.store.get(self._content(cell), paint)

    def images_to_start_from(self, guidance: float) -> Tensor:
        """(N, C, h, w): the reference's latent of the prompt before."""
        return self.latents(self.reference(guidance))[0].roll(1, 0)

    def to_fill(self, guidance: float) -> Fill:
        """What is filled in: what was given, or the middle of the pictures to start from."""
        if self.fill is not None:
            return self.fill
        images = self.teacher.decode(self.images_to_start_from(guidance))
        masks = torch.zeros(1, 1, *images.shape[2:])
        top, left = (round(side * (1 - MIDDLE) / 2) for side in images.shape[2:])
        masks[:, :, top : images.shape[2] - top, left : images.shape[3] - left] = 1
        return Fill(images, masks)

    def _content(self, cell: Cell) -> str:
        """All that a cell's latents depend on."""
        request = self.request
        samples = [request.prompts, request.seed, request.negative, request.reference_steps]
        models = [self.identities.get(name) for name in dict.fromkeys((cell.name, self.teacher_name))]
        return json.dumps([vars(cell), samples, models], sort_keys=True)

    def _painter(self, cell: Cell) -> Painter:
        return self.teacher if cell.model == "teacher" else self.students[cell.name]

    def _group(
        self, guidance: float, strength: float, x0: Tensor | None, fill: Fill | None = None
    ) -> Iterator[Row]:
        """The rows of one guidance and strength."""
        task: Task = "paint" if fill is None else "fill"
        count = len(self.request.prompts)
        reference: Tensor | None = None
        reference_features: Tensor | None = None
        floor: float | None = None
        for cell in self.cells(guidance, strength, task):
            x0_hat, seconds = self.latents(cell, x0, fill)
            painter = self._painter(cell)
            images = painter.decode(x0_hat, fill=fill)
            found = self.yardstick.see(images)
            apart = _apart(found, reference_features)
            if cell.noise == "other":
                floor = apart["frechet_teacher"]
            plan = painter.plan(guidance=guidance, steps=cell.steps, sampler=cell.sampler, strength=strength)
            yield {
                "task": task,
                "model": cell.model,
                "name": cell.name,
                "noise": cell.noise,
                "sampler": plan.sampler,
                "steps": cell.steps or (None if painter.spec is None else painter.spec.steps),
                "evaluations": plan.evaluations,
                "guidance": guidance,
                "strength": strength,
                "samples": count,
                **self.yardstick.agreement(images, self.request.prompts),
                "frechet_real": self.yardstick.to_real(found),
                **apart,
                "frechet_ratio": apart["frechet_teacher"] / floor
                if apart["frechet_teacher"] and floor
                else None,
                "psnr_teacher": None if reference is None else float(psnr(images, reference).mean()),
                **_drift(images, reference),
                "seconds_per_image": seconds / count,
            }
            if reference is None:
                reference, reference_features = images, found


def check_pair(teacher: Painter, students: Mapping[str, Painter], teacher_sha256: str) -> None:
    """BadInput unless the students paint latents of the teacher's shape; a warning for another teacher's
    students."""
    for name, student in students.items():
        if student.spec is None:
            raise BadInput(f"{name}: this is not a student; give a file that toolkit.distill wrote")
        if student.latent_shape() != teacher.latent_shape():
            raise BadInput(
                f"{name}: its latents are {student.latent_shape()}, the teacher's are "
                f"{teacher.latent_shape()}; give the teacher that it was distilled from"
            )
        if student.inpaint != teacher.inpaint:
            kinds = [
                "an inpainting model" if one.inpaint else "an ordinary one" for one in (student, teacher)
            ]
            raise BadInput(
                f"{name}: the student is {kinds[0]} and the teacher {kinds[1]}; give the teacher that it was "
                "distilled from"
            )
        if student.spec.teacher_sha256 != teacher_sha256:
            log.warning("%s was distilled from another teacher (%s)", name, student.spec.teacher_name)


def _apart(found: Tensor | None, reference: Tensor | None) -> dict[str, float | None]:
    """How far a set is from the reference's, by their features."""
    precision, recall = _between(found, reference, precision_recall) or (None, None)
    return {
        "frechet_teacher": _between(found, reference, frechet_distance),
        "kernel_teacher": _between(found, reference, kernel_distance),
        "precision": precision,
        "recall": recall,
    }


def _drift(images: Tensor, reference: Tensor | None) -> dict[str, float | None]:
    """By which share colour, contrast and sharpness exceed the reference's."""
    return {
        name: None if reference is None else measure(images) / max(measure(reference), 1e-9) - 1
        for name, measure in DRIFTS.items()
    }


Found = TypeVar("Found")


def _between(a: Tensor | None, b: Tensor | None, measure: Callable[[Tensor, Tensor], Found]) -> Found | None:
    if a is None or b is None or min(len(a), len(b)) < SELDOM:
        return None
    return measure(a, b)


def _named(cell: Cell, count: int) -> str:
    parts = [f"{count} x {cell.name}", f"guidance {cell.guidance:g}"]
    if cell.steps is not None:
        parts.append(f"{cell.sampler} at {cell.steps} steps")
    if cell.strength < 1:
        parts.append(f"strength {cell.strength:g}")
    if cell.noise == "other":
        parts.append("other noise")
    if cell.task == "fill":
        parts.append("filling in")
    return ", ".join(parts)


COLUMNS = {
    "sampler": ("sampler", ""),
    "steps": ("steps", ""),
    "evaluations": ("evals", ""),
    "guidance": ("guidance", "g"),
    "strength": ("strength", "g"),
    "adherence": ("adherence", ".3f"),
    "clip_score": ("CLIP", ".2f"),
    "frechet_real": ("FD real", ".2f"),
    "frechet_teacher": ("FD teacher", ".3f"),
    "frechet_ratio": ("ratio", ".2f"),
    "kernel_teacher": ("KD teacher", ".4f"),
    "precision": ("precision", ".2f"),
    "recall": ("recall", ".2f"),
    "psnr_teacher": ("PSNR", ".1f"),
    "colour": ("colour", "+.1%"),
    "contrast": ("contrast", "+.1%"),
    "sharpness": ("sharpness", "+.1%"),
    "seconds_per_image": ("s/image", ".4f"),
}
"""A row's names -> heading and format, in the order of :func:`table`."""


def table(rows: Sequence[Row]) -> str:
    """Rows as text in columns, for people; a column with nothing in it is left out."""
    shown = {name: how for name, how in COLUMNS.items() if any(row.get(name) is not None for row in rows)}
    lines = [["model", *(head for head, _ in shown.values())]]
    for row in rows:
        cells = [
            "-" if row.get(name) is None else format(row[name], form) for name, (_, form) in shown.items()
        ]
        lines.append([_model(row), *cells])
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)) for line in lines
    )


def _model(row: Row) -> str:
    model = row["name"] + (", other noise" if row["noise"] == "other" else "")
    return model + (", filling in" if row["task"] == "fill" else "")
