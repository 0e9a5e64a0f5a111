"""What every host says of a student, in the same words."""

from __future__ import annotations

from ..diffusion.spec import StudentSpec

UNGUIDED = "guidance 1 is unguided: the student does as its teacher does without cfg"

DIAL_MISSING = "this student's guidance input is missing (a pruner dropped it): its guidance dial is gone"


def negative_ignored(spec: StudentSpec) -> str:
    baked = f'; "{spec.negative}" is baked in' if spec.negative else ""
    return f"the negative prompt has no effect on this student{baked}"


def trained_with(spec: StudentSpec) -> list[str]:
    """How prompts were read and guided in training, as far as it is not as usual."""
    lines = [f"clip skip {spec.clip_skip}"] if spec.unusual_clip_skip else []
    if spec.cfg_rescale:
        lines.append(f"rescaled cfg {spec.cfg_rescale:g} of the teacher, distilled in")
    lines += [f"textual inversion of the training prompts: {each.name}" for each in spec.embeddings]
    return lines


def clip_skip_differs(spec: StudentSpec) -> str:
    return f"this student was trained with clip skip {spec.clip_skip}"


def baked_ignores(spec: StudentSpec, cfg: float) -> str:
    return (
        f"this file has guidance {spec.baked_guidance:g} baked in: cfg {cfg:g} has no effect; set cfg 1, "
        "or use the student that it was exported from"
    )


def no_dial(cfg: float) -> str:
    return f"this student has no guidance dial: cfg {cfg:g} has no effect"


def metadata_gone(spec: StudentSpec) -> str:
    """``spec``: the guess that was made instead."""
    return (
        f"this student's metadata is gone (a merger or pruner dropped it): taken for a {spec.steps}-step "
        f"student of {spec.prediction_type}, guidance 1 to 15; `python -m toolkit.inspect FILE "
        "--attach-spec SPEC.json` mends the file"
    )


def not_the_students_sampler(spec: StudentSpec, used: str, wanted: str) -> str:
    timesteps = ", ".join(map(str, spec.timesteps))
    return (
        f"this student was made for the sampler {wanted} and the timesteps {timesteps}; {used} with these "
        f"steps and this scheduler is not that: choose the sampler {wanted}"
    )
