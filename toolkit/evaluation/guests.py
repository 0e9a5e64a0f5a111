"""Whether a student answers to a LoRA as its teacher does: both with it, from the same noise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from ..training.checkpoint import Checkpoint
from ..training.lora import LoraFile, merge_loras

STRENGTHS = (0.4, 0.7, 1.0, 1.2)


@dataclass(frozen=True)
class Answer:
    """``error``: of student + LoRA against teacher + LoRA, relative to what the LoRA changes in the teacher;
    ``plain_error``: of student against teacher without it, on the same scale. ``equivalent``: the strength
    at which the LoRA changes the teacher's pictures as much, in the teacher's own direction; it reads low
    where pictures of the two models differ for other reasons.
    """

    strength: float
    error: float
    plain_error: float
    equivalent: float


def answers_to(
    lora: LoraFile,
    *,
    teacher: Checkpoint,
    student: Checkpoint,
    latents: Callable[[Checkpoint], Tensor],
    strengths: Sequence[float] = STRENGTHS,
) -> list[Answer]:
    """``latents`` paints the same prompts from the same noise with whichever model."""
    plain_teacher, plain_student = latents(teacher), latents(student)
    found: list[Answer] = []
    for strength in strengths:
        theirs = latents(merge_loras(teacher, [(lora, strength)]))
        ours = latents(merge_loras(student, [(lora, strength)]))
        change = theirs - plain_teacher
        size = float(change.norm())
        along = float(((ours - plain_student) * change).sum()) / max(size, 1e-12) ** 2
        found.append(
            Answer(
                strength=strength,
                error=float((ours - theirs).norm()) / max(size, 1e-12),
                plain_error=float((plain_student - plain_teacher).norm()) / max(size, 1e-12),
                equivalent=strength * along,
            )
        )
    return found
