"""Random model files for a ComfyUI, in the format of the interface: each is made when a test first asks.

All are of the shape "comfy": the smallest that a stock ComfyUI takes for Stable Diffusion 1.5, in float32.
Their weights are such that activations are of order 1 and the guidance matters as much as the timestep.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import ControlNetModel
from make_checkpoint import SHAPES, make_spec, make_tensors, random_values
from torch import Tensor

from toolkit.diffusion.guidance import bias_shift
from toolkit.diffusion.spec import StudentSpec
from toolkit.runtime.files import load_tensors, read_spec, save_tensors
from toolkit.training.adapters import LoraShape, OneNetwork
from toolkit.training.checkpoint import open_checkpoint, student_metadata, write_checkpoint
from toolkit.training.layout import COND_PROJ, UNET_PREFIX, unet_from_ldm, unet_to_ldm
from toolkit.training.student_lora import lora_path, save_lora_student

SIZE = (64, 64)
"""Pixels: latents of 8 x 8."""

CONTROLNET: dict[str, Any] = {
    "attention_head_dim": 8,
    **{name: value for name, value in SHAPES["comfy"].unet.items() if name != "up_block_types"},
}
"""Constructor arguments of diffusers' ControlNetModel."""

BAKED_GUIDANCE = 4.0
LORA_BAKED_GUIDANCE = 7.5
_TIME_WEIGHT, _TIME_BIAS = (f"{UNET_PREFIX}time_embed.0.{name}" for name in ("weight", "bias"))
_TIME_LORA = "lora_unet_time_embedding_linear_1"


@dataclass(frozen=True, eq=False)
class Model:
    """A file in one of the host's model folders; ``name``: as the host's lists show it."""

    path: Path
    spec: StudentSpec | None = None

    @property
    def name(self) -> str:
        return self.path.name

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        return load_tensors(self.path)


class Models:
    """``models.epsilon``, ``models.teacher``, ...: a file in ``folder``/checkpoints, loras or controlnet."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cached_property
    def teacher(self) -> Model:
        return self.checkpoint("teacher", _unet(1))

    @cached_property
    def inpaint_teacher(self) -> Model:
        return self.checkpoint("inpaint_teacher", _unet(2, in_channels=9))

    @cached_property
    def epsilon(self) -> Model:
        """Deterministic, 4 steps, guidance 1 to 15."""
        return self.student("epsilon", _unet(3, dial=1.0), make_spec())

    @cached_property
    def velocity(self) -> Model:
        return self.student("velocity", _unet(4, dial=1.0), make_spec(prediction_type="v_prediction"))

    @cached_property
    def stochastic(self) -> Model:
        return self.student("stochastic", _unet(5, dial=1.0), make_spec(sampler="stochastic"))

    @cached_property
    def three_steps(self) -> Model:
        """``epsilon`` with a grid of its own, on which no scheduler by rule lies."""
        return self.student("three_steps", _unet(3, dial=1.0), make_spec(timesteps=(999, 640, 230)))

    @cached_property
    def inpaint(self) -> Model:
        return self.student("inpaint", _unet(6, in_channels=9, dial=1.0), make_spec(inpaint=True))

    @cached_property
    def encoder(self) -> Model:
        return self.student("encoder", _unet(7), encoder_spec())

    @cached_property
    def velocity_encoder(self) -> Model:
        return self.student("velocity_encoder", _unet(8), encoder_spec(prediction_type="v_prediction"))

    @cached_property
    def nameless(self) -> Model:
        """``epsilon`` as a merger leaves it: without metadata."""
        return self.checkpoint("nameless", _unet(3, dial=1.0))

    @cached_property
    def baked(self) -> Model:
        """``epsilon`` at one guidance, without the dial."""
        unet = dict(_unet(3, dial=1.0))
        cond_proj = unet.pop(COND_PROJ)
        shift = bias_shift(unet[_TIME_WEIGHT], cond_proj, BAKED_GUIDANCE - 1)
        unet[_TIME_BIAS] = (unet[_TIME_BIAS].double() + shift).float()
        spec = make_spec(baked_guidance=BAKED_GUIDANCE, guidance_default=BAKED_GUIDANCE)
        return self.student("baked", unet, spec)

    @cached_property
    def style_lora(self) -> Model:
        """A person's LoRA: low-rank on attention and on the time embedding."""
        return self.lora("style", style_lora_tensors(), {})

    @cached_property
    def student_lora(self) -> Model:
        """For ``teacher``: attention low-rank, the time embedding in full, the dial, and its shift baked."""
        tensors = student_lora_tensors(_unet(1))
        spec = make_spec(container="lora", baked_guidance=LORA_BAKED_GUIDANCE, lora_rank=4)
        return self.lora("student", tensors, student_metadata(spec, SIZE), spec)

    @cached_property
    def trained(self) -> Model:
        """A student of ``teacher`` as a run with ``--student lora`` writes it, merged: every kind of layer
        that such a run trains.
        """
        vae = (
            self.folder / "small_vae.safetensors"
        )  # the teacher's own is TAESD, which the toolkit cannot open
        save_tensors(make_tensors("tiny", parts=("vae",)), {}, vae)
        teacher = open_checkpoint(self.teacher.path, vae=vae)
        holder = OneNetwork(
            lambda: teacher.unet(conditioned=True),
            LoraShape(rank=4),
            seed=15,
            device=torch.device("cpu"),
            dtype=torch.float32,
            autocast=lambda network: network,
        )
        generator = torch.Generator().manual_seed(15)
        scales = {"lora_A": 0.1, "lora_B": 0.1, "cond_proj": 1 / 16, "linear_1": 0.02}
        state = {
            name: value.detach()
            + next(scale for part, scale in scales.items() if part in name)
            * torch.randn(value.shape, generator=generator)
            for name, value in holder.pair(None, teacher="pair").trained.items()
        }
        spec = make_spec(lora_rank=4, guidance_default=LORA_BAKED_GUIDANCE)
        path = self.folder / "checkpoints" / "trained.safetensors"
        save_lora_student(path, state, spec=spec, source=teacher, dtype=torch.float32)
        return Model(path, spec)

    @cached_property
    def trained_lora(self) -> Model:
        """The LoRA file of ``trained``, moved to where hosts look for LoRAs."""
        made, path = lora_path(self.trained.path), self.folder / "loras" / "trained-lora.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        made.replace(path)
        return Model(path, read_spec(path))

    @cached_property
    def controlnet(self) -> Model:
        with torch.device("meta"):
            network = ControlNetModel(**CONTROLNET)
        generator = torch.Generator().manual_seed(14)
        keys = controlnet_to_ldm(network.state_dict())
        tensors = {key: random_values(key, tuple(value.shape), generator) for key, value in keys.items()}
        path = self.folder / "controlnet" / "small.safetensors"
        save_tensors(tensors, {}, path)
        return Model(path)

    def checkpoint(self, name: str, unet: Mapping[str, Tensor]) -> Model:
        """Write a checkpoint without a spec: a teacher, or whatever else the tensors are."""
        path = self.folder / "checkpoints" / f"{name}.safetensors"
        save_tensors({**unet, **_carried()}, {"modelspec.resolution": f"{SIZE[0]}x{SIZE[1]}"}, path)
        return Model(path)

    def student(self, name: str, unet: Mapping[str, Tensor], spec: StudentSpec) -> Model:
        path = self.folder / "checkpoints" / f"{name}.safetensors"
        write_checkpoint(path, tensors={**unet, **_carried()}, spec=spec, resolution=SIZE)
        return Model(path, spec)

    def lora(
        self,
        name: str,
        tensors: Mapping[str, Tensor],
        metadata: Mapping[str, str],
        spec: StudentSpec | None = None,
    ) -> Model:
        path = self.folder / "loras" / f"{name}.safetensors"
        save_tensors(tensors, metadata, path)
        return Model(path, spec)


def style_lora_tensors() -> dict[str, Tensor]:
    return _low_rank(11, ["time_embedding.linear_1"], scale=0.3)


def student_lora_tensors(teacher: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A student's LoRA for a UNet of these tensors."""
    generator = torch.Generator().manual_seed(12)
    weight, bias = teacher[_TIME_WEIGHT].float(), teacher[_TIME_BIAS].float()
    diff = 0.02 * torch.randn(weight.shape, generator=generator)
    cond_proj = torch.randn((weight.shape[1], 256), generator=generator) / 16
    shift = bias_shift(weight + diff, cond_proj, LORA_BAKED_GUIDANCE - 1)
    return _low_rank(13, [], scale=0.3) | {
        f"{_TIME_LORA}.diff": diff,
        f"{_TIME_LORA}.diff_b": (0.1 * torch.randn(bias.shape, generator=generator).double() + shift).float(),
        "fewstep.cond_proj.weight": cond_proj,
    }


def controlnet_to_ldm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A diffusers ControlNet's state under the original keys: hosts know diffusers' only in common sizes."""
    own = {key: value for key, value in state.items() if key.startswith("controlnet_")}
    shared = unet_to_ldm({key: value for key, value in state.items() if key not in own})
    made = {key.replace(UNET_PREFIX, "control_model."): value for key, value in shared.items()}
    for key, value in own.items():
        key = re.sub(r"^controlnet_down_blocks\.(\d+)", r"zero_convs.\1.0", key)
        key = key.replace("controlnet_mid_block", "middle_block_out.0")
        key = key.replace("controlnet_cond_embedding.conv_in", "input_hint_block.0")
        key = key.replace("controlnet_cond_embedding.conv_out", "input_hint_block.14")
        key = re.sub(
            r"^controlnet_cond_embedding\.blocks\.(\d+)",
            lambda found: f"input_hint_block.{2 * int(found[1]) + 2}",
            key,
        )
        made[f"control_model.{key}"] = value
    return made


@cache
def _carried() -> dict[str, Tensor]:
    """The VAE and the text encoder, which all files share."""
    return make_tensors("comfy", seed=100, parts=("vae", "text_encoder"))


def encoder_spec(**choices: Any) -> StudentSpec:
    return make_spec(
        method="inversion",
        direction="encode",
        timesteps=(0, 249, 499, 749),
        any_start=False,
        w_embedding=None,
        guidance_max=1.0,
        **choices,
    )


def _unet(seed: int, **choices: Any) -> dict[str, Tensor]:
    return make_tensors("comfy", seed=seed, parts=("unet",), **choices)


def _low_rank(seed: int, more: list[str], *, scale: float, rank: int = 4) -> dict[str, Tensor]:
    """kohya's keys for the first transformer's query and output projections and for ``more`` modules."""
    generator = torch.Generator().manual_seed(seed)
    weights = unet_from_ldm(_unet(1))
    block = "down_blocks.0.attentions.0.transformer_blocks.0"
    modules = [f"{block}.{name}" for name in ("attn1.to_q", "attn1.to_out.0", "attn2.to_q", "attn2.to_k")]
    made: dict[str, Tensor] = {}
    for module in [*modules, *more]:
        out, into = weights[f"{module}.weight"].shape
        name = "lora_unet_" + module.replace(".", "_")
        made[f"{name}.lora_down.weight"] = torch.randn((rank, into), generator=generator) / into**0.5
        made[f"{name}.lora_up.weight"] = scale * torch.randn((out, rank), generator=generator)
        made[f"{name}.alpha"] = torch.tensor(rank / 2)
    return made
