"""What a finished run shows of itself: pictures side by side from the same noise, a short table, one
sentence.

Meant to be cheap: a few prompts in the pictures, and as many samples in the table as the caller gives prompts
for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from PIL import Image
from torch import Tensor

from ..diffusion.errors import BadInput
from ..training.masks import GREY
from ..training.settings import OWN
from .evaluate import Cell, Evaluation, Request, Row, Yardstick
from .eyes import TeacherEyes
from .painter import TEACHER_SAMPLERS, Fill, Painter, unit_noise
from .pictures import grid, stack
from .standing import standings

Picture = tuple[str, Image.Image]


@dataclass(frozen=True)
class Showcase:
    """``pictures``: (caption, image); ``rows`` as of an evaluation; ``verdict``: None if nothing could be
    compared; ``sentences``: one for each student and way of use."""

    pictures: tuple[Picture, ...]
    rows: tuple[Row, ...]
    verdict: str | None
    sentences: tuple[str, ...] = ()


def showcase(
    teacher: Painter,
    students: Mapping[int, Painter],
    *,
    prompts: Sequence[str],
    sample_prompts: Sequence[str] = (),
    yardstick: Yardstick | None = None,
    guidance: float,
    guidances: Sequence[float] = (1.0, 2.0, 4.0, 8.0),
    strengths: Sequence[float] = (0.2, 0.35, 0.5, 0.7),
    negative: str = "",
    own: tuple[str, int] | None = None,
    seed: int = 0,
    reference_steps: int = 50,
    fill: Callable[[Sequence[str]], Fill] | None = None,
) -> Showcase:
    """Compare the students of a run, by their steps, with their teacher.

    ``prompts`` are for the pictures; the table is measured at ``guidance`` on ``sample_prompts`` (on
    ``prompts`` where there are none), with a judge if the yardstick has one, by the teacher's own eyes if
    there is no yardstick. Guidances that a student was not trained for are left out. ``own``: the sampler and
    steps that people are used to. ``fill``: what inpainting models fill in for prompts.
    """
    small = Evaluation(
        teacher=teacher,
        students={f"{steps}-step student": students[steps] for steps in sorted(students, reverse=True)},
        request=Request(
            prompts=tuple(prompts),
            guidances=(guidance,),
            steps=tuple(students),
            seed=seed,
            own=own,
            negative=negative,
            reference_steps=reference_steps,
        ),
        yardstick=yardstick or Yardstick(eyes=TeacherEyes(teacher)),
        fill=fill(prompts) if fill else None,
    )
    large = (
        replace(
            small,
            request=replace(small.request, prompts=tuple(sample_prompts)),
            fill=fill(sample_prompts) if fill else None,
        )
        if sample_prompts
        else small
    )
    rows = tuple(large.rows())
    within = [g for g in guidances if students[min(students)].runs_at(g)] or [guidance]
    pictures = side_by_side(small, guidance=guidance, guidances=within, strengths=strengths)
    if fill is None and students[min(students)].runs_at(guidance):
        pictures = (*pictures, between_noises(small, f"{min(students)}-step student", guidance=guidance))
    return Showcase(pictures, rows, verdict(rows), tuple(each.sentence for each in standings(rows)))


def own_setting(said: str) -> tuple[str, int] | None:
    """Sampler and steps of ``--own``; BadInput for what is none."""
    if said == "none":
        return None
    sampler, _, steps = said.partition(":")
    if sampler not in TEACHER_SAMPLERS or not steps.isdecimal() or not 1 <= int(steps) <= 1000:
        raise BadInput(
            f"--own {said}: expected one of {', '.join(TEACHER_SAMPLERS)}, a colon and 1 to 1000 steps, such "
            f"as {OWN}, or none"
        )
    return sampler, int(steps)


def between_noises(evaluation: Evaluation, student: str, *, guidance: float, columns: int = 7) -> Picture:
    """The first prompt's pictures on the way from one noise to another, by the teacher and a student: both
    should change alike, and smoothly. ``cos(a) n_0 + sin(a) n_1`` keeps the noise of unit variance.
    """
    request, teacher = evaluation.request, evaluation.teacher
    first, last = unit_noise((2, *teacher.latent_shape()), seeds=[request.seed, request.other_seeds[0]])
    angles = torch.linspace(0, math.pi / 2, columns)[:, None, None, None]
    noise, seeds = angles.cos() * first + angles.sin() * last, range(columns)
    prompts = [request.prompts[0]] * columns
    steps, negative = request.reference_steps, request.negative
    rows = [
        teacher.latents(prompts, seeds=seeds, noise=noise, guidance=guidance, steps=steps, negative=negative),
        evaluation.students[student].latents(prompts, seeds=seeds, noise=noise, guidance=guidance),
    ]
    cells = [list(teacher.decode(painted.x0)) for painted in rows]
    labels = [f"{90 * column / (columns - 1):g} degrees" for column in range(columns)]
    caption = f"From one noise to another at guidance {guidance:g}: {request.prompts[0]}."
    return caption, grid(cells, rows=[f"teacher, {steps} steps", student], columns=labels)


def side_by_side(
    evaluation: Evaluation,
    *,
    guidance: float,
    guidances: Sequence[float],
    strengths: Sequence[float],
    prompts: int = 6,
) -> tuple[Picture, ...]:
    """Teacher and students from the same noise over guidance, step counts and strengths.

    Only the first ``prompts``. Over guidance and strength the student of the fewest steps is shown.
    """
    able = {name: student for name, student in evaluation.students.items() if student.runs_at(guidance)}
    if not able:
        return ()
    last = min(able, key=lambda name: _step_count(able[name]))
    shown = _Shown(evaluation, last, guidance, prompts)
    pictures = [shown.over_guidance(guidances), shown.over_steps(able)]
    if strengths:
        pictures.append(shown.over_strength(strengths))
    if evaluation.teacher.inpaint:
        pictures.append(shown.filling_in(able))
    return tuple(pictures)


def verdict(rows: Sequence[Row]) -> str | None:
    """One sentence: does the student of the fewest steps beat the teacher's DDIM at the same number of
    steps? Another for filling in, where there are such rows."""
    plain = [row for row in rows if row["strength"] == 1 and _size(row) == _size(rows[0])]
    sentences = [
        _verdict([row for row in plain if row.get("task", "paint") == "paint"]),
        _verdict([row for row in plain if row.get("task") == "fill"]),
    ]
    if sentences[1]:
        sentences[1] = f"Filling in a picture: {sentences[1]}"
    return " ".join(sentence for sentence in sentences if sentence) or None


def _verdict(rows: Sequence[Row]) -> str | None:
    students = [row for row in rows if row["model"] == "student"]
    if not students:
        return None
    student = min(students, key=lambda row: row["steps"])
    peers = {
        (row["sampler"], row["steps"]): row
        for row in rows
        if row["model"] == "teacher" and row["noise"] == "same"
        if row["guidance"] == student["guidance"]
    }
    ddim = peers.get(("ddim", student["steps"]))
    if ddim is None:
        return None
    reference = max(
        (row for (sampler, _), row in peers.items() if sampler == "ddim"), key=lambda row: row["steps"]
    )
    if student["adherence"] is None:
        if standing := next((each for each in standings(rows) if each.student is student), None):
            return standing.sentence
        if ddim is reference:  # what the student is measured against, and nothing to compare it with
            return None
        return _psnr_verdict(student, ddim, reference)
    return _adherence_verdict(student, ddim, reference)


def _size(row: Row) -> tuple[int, int] | None:
    return (row["width"], row["height"]) if "width" in row else None


def _adherence_verdict(student: Row, ddim: Row, reference: Row) -> str:
    share, other, count = student["adherence"], ddim["adherence"], student["samples"]
    error = math.sqrt((share * (1 - share) + other * (1 - other)) / count)
    if share - other > 2 * error:
        outcome = "the student beats the teacher's DDIM"
    elif other - share > 2 * error:
        outcome = "the student does not reach the teacher's DDIM"
    else:
        outcome = f"{count} samples show no difference between the student and the teacher's DDIM"
    return (
        f"At {_steps(student)} and guidance {student['guidance']:g} {outcome}: {share:.0%} of {count} "
        f"pictures show what their prompt says against {other:.0%}, with {student['evaluations']} against "
        f"{ddim['evaluations']} network evaluations a picture (the teacher's {reference['steps']} steps: "
        f"{reference['adherence']:.0%})."
    )


def _psnr_verdict(student: Row, ddim: Row, reference: Row) -> str:
    near, far = student["psnr_teacher"], ddim["psnr_teacher"]
    outcome = "nearer to" if near > far else "no nearer to"
    return (
        f"At {_steps(student)} and guidance {student['guidance']:g} the student's pictures are {outcome} "
        f"the teacher's {reference['steps']}-step ones than its DDIM at the same number of steps: "
        f"PSNR {near:.1f} dB against {far:.1f} dB over {student['samples']} pictures."
    )


@dataclass(frozen=True, eq=False)
class _Shown:
    """The first ``count`` prompts of an evaluation, at its ``guidance`` if nothing else is said."""

    evaluation: Evaluation
    student: str
    guidance: float
    count: int

    @property
    def prompts(self) -> tuple[str, ...]:
        return self.evaluation.request.prompts[: self.count]

    def over_guidance(self, guidances: Sequence[float]) -> Picture:
        columns: list[Tensor] = []
        labels: list[str] = []
        for g in guidances:
            columns.append(self.images(self.evaluation.reference(g)))
            columns.append(self.images(Cell("student", self.student, g)))
            labels += [f"teacher, guidance {g:g}", f"student, guidance {g:g}"]
        steps = self.evaluation.request.reference_steps
        caption = (
            f"Over guidance, from the same noise: the teacher with {steps} DDIM steps, and {self.student}."
        )
        return caption, self.in_columns(columns, labels)

    def over_steps(self, students: Mapping[str, Painter]) -> Picture:
        """One block a prompt: samplers in rows, step counts in columns, the reference before them."""
        reference = self.evaluation.reference(self.guidance)
        request = self.evaluation.request
        own = {} if request.own is None else {request.own[0]: {request.own[1]}}
        counts = sorted(
            {*request.steps, *map(_step_count, students.values()), *set().union(*own.values())}
            - {reference.steps},
            key=int,
            reverse=True,
        )
        lines: dict[str, dict[int, Tensor]] = {
            name: {
                n: self.images(replace(reference, sampler=sampler, steps=n))
                for n in counts
                if n in {*request.steps, *own.get(sampler, ())}
            }
            for name, sampler in (("teacher, DDIM", "ddim"), ("teacher, DPM++ 2M", "dpmpp_2m"))
        }
        for name, student in students.items():
            lines.setdefault(_free_line(lines, _step_count(student)), {})[_step_count(student)] = self.images(
                Cell("student", name, self.guidance)
            )
        first = self.images(reference)
        labels = [f"{reference.steps} steps", *(f"{n} step{'s' if n > 1 else ''}" for n in counts)]
        blocks: list[Picture] = []
        for row, prompt in enumerate(self.prompts[:3]):
            cells = [
                [first[row] if index == 0 else None, *(line[n][row] if n in line else None for n in counts)]
                for index, line in enumerate(lines.values())
            ]
            blocks.append((prompt, grid(cells, rows=list(lines), columns=labels)))
        return f"Over step counts at guidance {self.guidance:g}, from the same noise.", stack(blocks)

    def over_strength(self, strengths: Sequence[float]) -> Picture:
        source = self.evaluation.images_to_start_from(self.guidance)
        columns = [self.evaluation.teacher.decode(source[: self.count])]
        labels = ["from"]
        for strength in strengths:
            columns.append(self.images(self.evaluation.reference(self.guidance, strength), source))
            columns.append(self.images(Cell("student", self.student, self.guidance, strength), source))
            labels += [f"teacher, strength {strength:g}", f"student, strength {strength:g}"]
        steps = self.evaluation.request.reference_steps
        caption = (
            f"Image to image at guidance {self.guidance:g}, from the first picture towards the prompt at the "
            f"left and from the same noise: the teacher with {steps} DDIM steps, and {self.student}."
        )
        return caption, self.in_columns(columns, labels)

    def filling_in(self, students: Mapping[str, Painter]) -> Picture:
        fill = self.evaluation.to_fill(self.guidance)
        reference = replace(self.evaluation.reference(self.guidance), task="fill")
        names = sorted(students, key=lambda name: _step_count(students[name]), reverse=True)
        columns = [
            fill.images[: self.count],
            torch.where(fill.masks > 0, GREY, fill.images)[: self.count],
            self.images(reference, fill=fill),
            *(self.images(Cell("student", n, self.guidance, task="fill"), fill=fill) for n in names),
        ]
        files = [name.removesuffix(".safetensors") for name in names]
        labels = ["from", "what is kept", f"teacher, {reference.steps} steps", *files]
        caption = (
            f"Filling in at guidance {self.guidance:g}, what the prompt at the left says in place of what is "
            "grey, from the same noise."
        )
        return caption, self.in_columns(columns, labels)

    def images(self, cell: Cell, x0: Tensor | None = None, fill: Fill | None = None) -> Tensor:
        x0_hat = self.evaluation.latents(cell, x0, fill)[0]
        return self.evaluation.teacher.decode(x0_hat, fill=fill)[: self.count]

    def in_columns(self, columns: Sequence[Tensor], labels: Sequence[str]) -> Image.Image:
        rows = [[column[row] for column in columns] for row in range(len(self.prompts))]
        return grid(rows, rows=self.prompts, columns=labels)


def _step_count(student: Painter) -> int:
    if student.spec is None:
        raise ValueError("a student without a spec")
    return student.spec.steps


def _free_line(lines: Mapping[str, Mapping[int, Tensor]], steps: int) -> str:
    """The name of the first line of students that has no picture at this step count yet."""
    number = 1
    while steps in lines.get(name := "student" if number == 1 else f"student {number}", {}):
        number += 1
    return name


def _steps(row: Row) -> str:
    return f"{row['steps']} step{'s' if row['steps'] > 1 else ''}"
