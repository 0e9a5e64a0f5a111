"""What a finished run shows of itself: pictures side by side from the same noise, a short table, one
sentence.

Meant to be cheap: a few prompts in the pictures, and as many samples in the table as the caller gives prompts
for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from PIL import Image
from torch import Tensor

from .evaluate import Cell, Evaluation, Request, Row, Yardstick
from .painter import Painter
from .pictures import grid, stack

Picture = tuple[str, Image.Image]


@dataclass(frozen=True)
class Showcase:
    """``pictures``: (caption, image); ``rows`` as of an evaluation; ``verdict``: None if nothing could be
    compared."""

    pictures: tuple[Picture, ...]
    rows: tuple[Row, ...]
    verdict: str | None


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
    seed: int = 0,
    reference_steps: int = 50,
) -> Showcase:
    """Compare the students of a run, by their steps, with their teacher.

    ``prompts`` are for the pictures; the table is measured at ``guidance`` on ``sample_prompts`` (on
    ``prompts`` where there are none), with a judge if the yardstick has one. Guidances that a student was not
    trained for are left out.
    """
    named = {_name(steps): student for steps, student in sorted(students.items(), reverse=True)}
    small = Evaluation(
        teacher=teacher,
        students=named,
        request=Request(
            prompts=tuple(prompts),
            guidances=(guidance,),
            steps=tuple(students),
            seed=seed,
            negative=negative,
            reference_steps=reference_steps,
        ),
        yardstick=yardstick or Yardstick(),
    )
    last = min(students)
    within = [g for g in guidances if students[last].runs_at(g)]
    large = (
        replace(small, request=replace(small.request, prompts=tuple(sample_prompts)))
        if sample_prompts
        else small
    )
    rows = tuple(large.rows())
    pictures = (
        _guidance_picture(small, _name(last), within),
        _steps_picture(small, guidance, sorted(students, reverse=True)),
        _strength_picture(small, _name(last), guidance, strengths),
    )
    return Showcase(pictures, rows, verdict(rows))


def verdict(rows: Sequence[Row]) -> str | None:
    """One sentence: does the student of the fewest steps beat the teacher's DDIM at the same number of
    steps?"""
    students = [row for row in rows if row["model"] == "student" and row["strength"] == 1]
    if not students:
        return None
    student = min(students, key=lambda row: row["steps"])
    peers = {
        (row["sampler"], row["steps"]): row
        for row in rows
        if row["model"] == "teacher" and row["noise"] == "same" and row["strength"] == 1
        if row["guidance"] == student["guidance"]
    }
    ddim = peers.get(("ddim", student["steps"]))
    if ddim is None:
        return None
    reference = max(
        (row for (sampler, _), row in peers.items() if sampler == "ddim"), key=lambda row: row["steps"]
    )
    if student["adherence"] is None:
        return _psnr_verdict(student, ddim, reference)
    return _adherence_verdict(student, ddim, reference)


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


def _guidance_picture(evaluation: Evaluation, student: str, guidances: Sequence[float]) -> Picture:
    columns: list[Tensor] = []
    labels: list[str] = []
    for g in guidances:
        columns += [
            _images(evaluation, evaluation.reference(g)),
            _images(evaluation, Cell("student", student, g)),
        ]
        labels += [f"teacher, guidance {g:g}", f"student, guidance {g:g}"]
    steps = evaluation.request.reference_steps
    caption = f"Guidance, each pair from the same noise: the teacher at {steps} DDIM steps, the {student}."
    return caption, _in_columns(columns, evaluation.request.prompts, labels)


def _steps_picture(evaluation: Evaluation, guidance: float, counts: Sequence[int]) -> Picture:
    """One block a prompt: samplers in rows, step counts in columns, the reference before them."""
    reference = evaluation.reference(guidance)
    lines = {
        "teacher, DDIM": [replace(reference, steps=count) for count in counts],
        "teacher, DPM++ 2M": [replace(reference, sampler="dpmpp_2m", steps=count) for count in counts],
        "student": [Cell("student", _name(count), guidance) for count in counts],
    }
    painted = {label: [_images(evaluation, cell) for cell in cells] for label, cells in lines.items()}
    first = _images(evaluation, reference)
    columns = [f"{reference.steps} steps", *(f"{count} step{'s' if count > 1 else ''}" for count in counts)]
    blocks = [
        (
            prompt,
            grid(
                [
                    [
                        first[row] if label == "teacher, DDIM" else None,
                        *(images[row] for images in columns_of),
                    ]
                    for label, columns_of in painted.items()
                ],
                rows=list(painted),
                columns=columns,
            ),
        )
        for row, prompt in enumerate(evaluation.request.prompts[:3])
    ]
    return f"Step counts at guidance {guidance:g}, from the same noise.", stack(blocks)


def _strength_picture(
    evaluation: Evaluation, student: str, guidance: float, strengths: Sequence[float]
) -> Picture:
    source = evaluation.images_to_start_from(guidance)
    columns = [evaluation.teacher.decode(source)]
    labels = ["from"]
    for strength in strengths:
        for who, cell in (
            ("teacher", evaluation.reference(guidance, strength)),
            ("student", Cell("student", student, guidance, strength)),
        ):
            columns.append(_images(evaluation, cell, source))
            labels.append(f"{who}, strength {strength:g}")
    caption = (
        f"Image to image at guidance {guidance:g}: from the first picture to the prompt at the left, teacher "
        f"with {evaluation.request.reference_steps} DDIM steps and {student} from the same noise."
    )
    return caption, _in_columns(columns, evaluation.request.prompts, labels)


def _images(evaluation: Evaluation, cell: Cell, x0: Tensor | None = None) -> Tensor:
    return evaluation.teacher.decode(evaluation.latents(cell, x0)[0])


def _in_columns(columns: Sequence[Tensor], prompts: Sequence[str], labels: Sequence[str]) -> Image.Image:
    return grid(
        [[column[row] for column in columns] for row in range(len(prompts))], rows=prompts, columns=labels
    )


def _name(steps: int) -> str:
    return f"{steps}-step student"


def _steps(row: Row) -> str:
    return f"{row['steps']} step{'s' if row['steps'] > 1 else ''}"
