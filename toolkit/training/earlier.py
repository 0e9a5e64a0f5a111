"""An earlier student that a run starts from (``--init``): a finished one of the same teacher.

Its weights stand where the teacher's would. Of a chain of halvings it takes the place of the phase that made
it, so that only the later ones are left; any other run goes through all its phases.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from torch import Tensor

from ..diffusion.errors import BadInput
from ..diffusion.guidance import bias_shift
from ..diffusion.method import Phase
from ..diffusion.spec import StudentSpec
from ..runtime.files import load_tensors, read_spec
from .adapters import COND_PROJ
from .checkpoint import Checkpoint, open_checkpoint
from .student_lora import LINEAR, LORA_COND_PROJ, LORA_DIFF, LORA_DIFF_BIAS, kohya_name, lora_path, unet_of


@dataclass(frozen=True, eq=False)
class Earlier:
    """``path``: the file that is read, of a LoRA run the LoRA beside the merged student; its spec says what
    else it was trained for.
    """

    path: Path
    spec: StudentSpec
    teacher: Checkpoint

    @classmethod
    def open(cls, path: Path, teacher: Checkpoint, asked: Mapping[str, Any]) -> Earlier:
        """BadInput for what a run of this teacher cannot start from; ``asked``: settings by name."""
        spec = read_spec(path)
        if spec is None:
            raise BadInput(
                f"--init {path}: this is no student; give the student.safetensors of an earlier run"
            )
        wants_lora = asked.get("student") == "lora" or (asked.get("rank") and asked.get("student") is None)
        beside = lora_path(path)
        if spec.container == "checkpoint" and spec.lora_rank and asked.get("student") != "full":
            if beside.exists() and (found := read_spec(beside)) is not None:
                path, spec = beside, found
        if problem := _problem(spec, teacher) or _mismatch(spec, asked, wants_lora=bool(wants_lora)):
            raise BadInput(f"--init {path}: {problem}")
        return cls(path, spec, teacher)

    @property
    def defaults(self) -> dict[str, Any]:
        """What the run does as this student did, where nothing else is said."""
        spec = self.spec
        values: dict[str, Any] = {
            "steps": spec.steps,
            "guidance": (spec.guidance_min, spec.guidance_max),
            "guidance_default": spec.guidance_default,
            "negative": spec.negative,
            "student": "lora" if spec.container == "lora" else "full",
        }
        if spec.sampler != "consistency":
            values["sampler"] = spec.sampler
        if spec.container == "lora":
            values["rank"] = spec.lora_rank
        return values

    def place(self, phases: Sequence[Phase]) -> int | None:
        """Which of the phases it would have come out of, if another one imitates that phase's student."""
        for index, (phase, later) in enumerate(pairwise(phases)):
            same = phase.grid.timesteps == self.spec.timesteps and phase.sampler == self.spec.sampler
            if same and later.teacher == "previous":
                return index
        return None

    def remaining(
        self, phases: Sequence[Phase], *, guidance: tuple[float, float], negative: str
    ) -> tuple[Phase, ...]:
        """The phases that are left to do. A student that predicts v goes on doing so, and one of as few steps
        as a phase's or fewer is not converted. BadInput where it is to be imitated beyond what it can do.
        """
        if phases[0].dial != (self.spec.w_embedding is not None):
            has, wants = ("a", "none") if self.spec.w_embedding is not None else ("no", "one")
            raise BadInput(
                f"--init {self.path}: this student has {has} guidance dial and the run asks for {wants}; "
                "leave out --guidance and --method, or start without --init"
            )
        low, high = guidance
        if (place := self.place(phases)) is not None:
            if low < self.spec.guidance_min or high > self.spec.guidance_max:
                raise BadInput(
                    f"--init {self.path}: this student was trained for guidance {self.spec.guidance_min:g} "
                    f"to {self.spec.guidance_max:g} and is to be imitated from {low:g} to {high:g}; leave "
                    "out --guidance"
                )
            if negative != self.spec.negative:
                raise BadInput(
                    f"--init {self.path}: this student was trained with the negative prompt "
                    f"{self.spec.negative!r} and is to be imitated; leave out --negative"
                )
            phases = phases[place + 1 :]
        kept = self.spec.prediction_type
        return tuple(
            dataclasses.replace(phase, prediction_type=kept)
            if kept == "v_prediction" or len(phase.grid) >= self.spec.steps
            else phase
            for phase in phases
        )

    def state(self) -> dict[str, Tensor]:
        """Its weights, as a phase's state has them."""
        if self.spec.container == "lora":
            return _adapter_state(load_tensors(self.path), unet_of(self.teacher), self.spec)
        return unet_of(open_checkpoint(self.path))


def _problem(spec: StudentSpec, teacher: Checkpoint) -> str | None:
    """Why a student cannot be the start of a run with this teacher."""
    if spec.direction == "encode":
        return "this is an encoder, and no method starts from one; give a student that makes pictures"
    if spec.container == "checkpoint" and spec.baked_guidance is not None:
        return "one guidance is baked into this file; give the student that it was exported from"
    if spec.teacher_sha256 != teacher.sha256:
        return (
            f"this student was distilled from {spec.teacher_name} (SHA-256 {spec.teacher_sha256[:12]}), and "
            f"the teacher of this run is {teacher.name} ({teacher.sha256[:12]}); give its own as --ckpt"
        )
    if spec.loras != teacher.loras:
        names = [
            ", ".join(f"{lora.name}:{lora.strength:g}" for lora in loras) or "none"
            for loras in (spec.loras, teacher.loras)
        ]
        return f"LoRAs merged into its teacher: {names[0]}; in this run: {names[1]}; give the same --lora"
    for option, theirs, ours in (
        ("--clip-skip", spec.clip_skip, teacher.clip_skip),
        ("--cfg-rescale", spec.cfg_rescale, teacher.cfg_rescale),
    ):
        if theirs != ours:
            return f"its run had {option} {theirs:g}, and this one has {ours:g}; give the same"
    if spec.embeddings != tuple(each.applied for each in teacher.embeddings):
        names = ", ".join(each.name for each in spec.embeddings) or "none"
        return f"textual inversions of its training: {names}; give the same --embedding"
    return None


def _mismatch(spec: StudentSpec, asked: Mapping[str, Any], *, wants_lora: bool) -> str | None:
    """Why a LoRA cannot go on as what was asked for."""
    if spec.container == "lora":
        if asked.get("student") == "full":
            return "this is a LoRA, and --student full was asked for; give the merged student beside it"
        if asked.get("rank") not in (None, spec.lora_rank):
            return (
                f"this LoRA has rank {spec.lora_rank}, and --rank {asked['rank']} was asked for; leave it out"
            )
    elif wants_lora and spec.lora_rank:
        return (
            "this is a merged student, and the LoRA of its run is not beside it; give the -lora.safetensors"
        )
    elif wants_lora:
        return "every weight of this student was trained, so no LoRA can go on from it; use --student full"
    return None


def _adapter_state(
    lora: Mapping[str, Tensor], base: Mapping[str, Tensor], spec: StudentSpec
) -> dict[str, Tensor]:
    """What :func:`.student_lora.lora_tensors` wrote, as :class:`.adapters.OneNetwork` names it."""
    modules = {kohya_name(key.removesuffix(".weight")): key.removesuffix(".weight") for key in base}
    state: dict[str, Tensor] = {}
    for key, value in lora.items():
        name, _, part = key.partition(".")
        if part == "lora_down.weight":
            state[f"{modules[name]}.lora_A.weight"] = value.float()
        elif part == "lora_up.weight":
            state[f"{modules[name]}.lora_B.weight"] = value.float()
    weight = base[f"{LINEAR}.weight"].float() + lora[LORA_DIFF].float()
    bias = base[f"{LINEAR}.bias"].double() + lora[LORA_DIFF_BIAS].double()
    if spec.w_embedding is not None:
        cond_proj = lora[LORA_COND_PROJ].float()
        state[COND_PROJ] = cond_proj
        baked = spec.guidance_default if spec.baked_guidance is None else spec.baked_guidance
        bias = bias - bias_shift(weight, cond_proj, baked - 1, scale=spec.w_embedding.scale)
    return state | {f"{LINEAR}.weight": weight, f"{LINEAR}.bias": bias.float()}
