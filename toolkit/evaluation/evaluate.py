"""Teacher against students in numbers: each row is one model at one guidance, step count and strength.

Everything is compared from the same prompts, the same seeds and so the same noise, with the *reference*: the
teacher with DDIM at 50 steps at the same guidance (and strength). A row "other noise" is the reference once
more from other seeds: its distance to the reference is what is left between two sets that differ in nothing
but chance, the floor that students are measured against. img2img starts from the reference's picture of the
prompt before, a second pass (hires fix) from that of the same prompt, enlarged. Inpainting models also fill
in: the middle of that picture, or what is given to fill.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..diffusion.errors import BadInput
from ..runtime.files import load_tensors, read_metadata, save_tensors
from .eyes import Clip, Eyes, TeacherEyes
from .metrics import (
    Judge,
    adherence,
    colourfulness,
    contrast,
    features,
    frechet_distance,
    kernel_distance,
    paired_distance,
    precision_recall,
    psnr,
    sharpness,
)
from .painter import Fill, Painter, Plan

log = logging.getLogger("fewstep")

Row: TypeAlias = dict[str, Any]
"""task (paint, fill or second: a second pass), model, name, noise, sampler, steps, evaluations, guidance,
strength, width, height, samples, adherence, frechet_real, frechet_teacher, frechet_ratio (to "other noise"),
kernel_teacher, precision, recall, paired_teacher (of pictures from the same noise), paired_ratio (to "other
noise"), prompt_lost (how much less of its prompt the teacher finds in a picture than in its own),
prompt_ratio (to "other noise"), psnr_teacher (dB), colour, contrast, sharpness (all three: the share by which
they exceed the reference's), clip_score, seconds_per_image (sampling alone)."""

REFERENCE_STEPS = 50
MIDDLE = 0.7
"""Side of the square that is filled in, where nothing else is given, in sides of the picture."""

Task = Literal["paint", "fill", "second"]
Size = tuple[int, int]
"""Height and width in pixels."""
LARGER = 1.5
"""Sides of a second pass, in sides of the first."""
SELDOM = 8
"""Fewer samples than this give no distance between sets."""
TASKS: dict[Task, str] = {"fill": "filling in", "second": "second pass"}
"""In words, but for the usual one."""
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
    samplers; ``own``: the sampler and steps that a person is used to; ``sizes`` beside the teacher's;
    ``second_passes``: their strengths."""

    prompts: tuple[str, ...]
    guidances: tuple[float, ...]
    steps: tuple[int, ...] = ()
    own: tuple[str, int] | None = None
    strengths: tuple[float, ...] = ()
    sizes: tuple[Size, ...] = ()
    second_passes: tuple[float, ...] = ()
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
    size: Size | None = None


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
            for size in self.request.sizes:
                yield from self._group(guidance, 1.0, None, size=size)
            if self.request.second_passes:
                enlarged, size = self.images_to_enlarge(guidance)
                for strength in self.request.second_passes:
                    yield from self._group(guidance, strength, enlarged, size=size, task="second")
            if self.teacher.inpaint:
                yield from self._group(guidance, 1.0, None, self.to_fill(guidance), task="fill")

    def cells(
        self, guidance: float, strength: float, task: Task = "paint", size: Size | None = None
    ) -> list[Cell]:
        """What is compared at one guidance, strength and size, the reference first."""
        reference = replace(self.reference(guidance, strength), task=task, size=size)
        cells = [reference]
        if self.yardstick.sees:
            cells.append(replace(reference, noise="other"))
        if self.request.own is not None:
            sampler, steps = self.request.own
            cells.append(replace(reference, sampler=sampler, steps=steps))
        if strength == 1 and size is None:
            cells += [
                replace(reference, sampler=sampler, steps=steps)
                for sampler in ("ddim", "dpmpp_2m")
                for steps in sorted(self.request.steps, reverse=True)
                if (sampler, steps) != (reference.sampler, reference.steps)
            ]
        able = [name for name, student in self.students.items() if student.runs_at(guidance)]
        students = [Cell("student", name, guidance, strength, task=task, size=size) for name in able]
        students += [
            Cell("student", name, guidance, strength, steps=steps, task=task, size=size)
            for name in able
            if (spec := self.students[name].spec) is not None and spec.sampler == "consistency"
            for steps in self.request.steps
            if steps != spec.steps
        ]
        if self.yardstick.sees:
            cells += [self.for_free(cell) for cell in students]
        return [*dict.fromkeys(cells), *students]

    def for_free(self, student: Cell) -> Cell:
        """What a person gets without the student: the teacher's DPM++ 2M in the fewest steps that take as
        many evaluations.
        """
        reference = self.reference(student.guidance, student.strength)
        cells = (replace(reference, sampler="dpmpp_2m", steps=steps) for steps in itertools.count(1))
        wanted = self.plan(student).evaluations
        cell = next(cell for cell in cells if self.plan(cell).evaluations >= wanted)
        return replace(cell, task=student.task, size=student.size)

    def plan(self, cell: Cell) -> Plan:
        """The walk of a cell's pictures."""
        return self._painter(cell).plan(
            guidance=cell.guidance, steps=cell.steps, sampler=cell.sampler, strength=cell.strength
        )

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
                size=None if x0 is not None or fill is not None else cell.size,
                batch=self.batch,
            )
            return painted.x0, painted.seconds

        return self.store.get(self._content(cell), paint)

    def images_to_start_from(self, guidance: float) -> Tensor:
        """(N, C, h, w): the reference's latent of the prompt before."""
        return self.latents(self.reference(guidance))[0].roll(1, 0)

    def images_to_enlarge(self, guidance: float) -> tuple[Tensor, Size]:
        """The reference's latents enlarged as pictures (N, C, h, w), and their size in pixels."""
        unit = 8 * self.teacher.downscale
        images = self.teacher.decode(self.latents(self.reference(guidance))[0])
        height, width = (max(1, round(LARGER * side / unit)) * unit for side in images.shape[2:])
        larger = F.interpolate(images, (height, width), mode="bicubic", antialias=True, align_corners=False)
        return self.teacher.encode(larger.clamp(0, 1)), (height, width)

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
        said = {name: value for name, value in vars(cell).items() if name != "size" or value is not None}
        return json.dumps([said, samples, models], sort_keys=True)

    def _painter(self, cell: Cell) -> Painter:
        return self.teacher if cell.model == "teacher" else self.students[cell.name]

    def _see(self, images: Tensor) -> _Seen:
        if not self.yardstick.sees:
            return _Seen(images, None, None)
        found = TeacherEyes(self.teacher).found(images, self.request.prompts)
        return _Seen(images, self.yardstick.see(images), found)

    def _group(
        self,
        guidance: float,
        strength: float,
        x0: Tensor | None,
        fill: Fill | None = None,
        *,
        task: Task = "paint",
        size: Size | None = None,
    ) -> Iterator[Row]:
        """The rows of one guidance, strength and size."""
        reference: _Seen | None = None
        floor: dict[str, float | None] = {}
        for cell in self.cells(guidance, strength, task, size):
            x0_hat, seconds = self.latents(cell, x0, fill)
            painter = self._painter(cell)
            images = painter.decode(x0_hat, fill=fill)
            seen = self._see(images)
            apart = _apart(seen, reference)
            if cell.noise == "other":
                floor = apart
            plan = self.plan(cell)
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
                "width": images.shape[3],
                "height": images.shape[2],
                "samples": len(images),
                **self.yardstick.agreement(images, self.request.prompts),
                "frechet_real": self.yardstick.to_real(seen.features) if size is None else None,
                **apart,
                "frechet_ratio": _ratio(apart["frechet_teacher"], floor.get("frechet_teacher")),
                "paired_ratio": _ratio(apart["paired_teacher"], floor.get("paired_teacher")),
                "prompt_ratio": _ratio(apart["prompt_lost"], floor.get("prompt_lost")),
                "psnr_teacher": None if reference is None else float(psnr(images, reference.images).mean()),
                **_drift(images, None if reference is None else reference.images),
                "seconds_per_image": seconds / len(images),
            }
            reference = reference or seen


@dataclass(frozen=True, eq=False)
class _Seen:
    """Pictures (N, 3, H, W), what was seen in them (N, F), and how much of their prompts was found (N,)."""

    images: Tensor
    features: Tensor | None
    found: Tensor | None


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


def _apart(seen: _Seen, reference: _Seen | None) -> dict[str, float | None]:
    """How far pictures are from the reference's by their features: as sets, and each from its own."""
    found, own = seen.features, None if reference is None else reference.features
    precision, recall = _between(found, own, precision_recall) or (None, None)
    return {
        "frechet_teacher": _between(found, own, frechet_distance),
        "kernel_teacher": _between(found, own, kernel_distance),
        "precision": precision,
        "recall": recall,
        "paired_teacher": None if found is None or own is None else paired_distance(found, own),
        "prompt_lost": _lost(seen, reference),
    }


def _lost(seen: _Seen, reference: _Seen | None) -> float | None:
    """How much less of its prompt is found in a picture than in the reference's."""
    if reference is None or seen.found is None or reference.found is None:
        return None
    return float((reference.found - seen.found).clamp(min=0).double().mean())


def _ratio(value: float | None, to: float | None) -> float | None:
    return value / to if value is not None and to else None


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
    if cell.size is not None:
        parts.append(f"{cell.size[1]} x {cell.size[0]} pixels")
    if cell.task in TASKS:
        parts.append(TASKS[cell.task])
    return ", ".join(parts)


COLUMNS = {
    "sampler": ("sampler", ""),
    "steps": ("steps", ""),
    "evaluations": ("evals", ""),
    "guidance": ("guidance", "g"),
    "strength": ("strength", "g"),
    "width": ("width", ""),
    "height": ("height", ""),
    "adherence": ("adherence", ".3f"),
    "clip_score": ("CLIP", ".2f"),
    "frechet_real": ("FD real", ".2f"),
    "frechet_teacher": ("FD teacher", ".3f"),
    "frechet_ratio": ("ratio", ".2f"),
    "kernel_teacher": ("KD teacher", ".4f"),
    "precision": ("precision", ".2f"),
    "recall": ("recall", ".2f"),
    "paired_ratio": ("paired", ".2f"),
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
    if len({(row["width"], row["height"]) for row in rows}) == 1:
        shown = {name: how for name, how in shown.items() if name not in ("width", "height")}
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
    return model + (f", {TASKS[row['task']]}" if row["task"] in TASKS else "")
