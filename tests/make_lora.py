"""Makes LoRA files with random factors for a checkpoint, in every naming that they come in."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from toolkit.runtime.files import save_tensors
from toolkit.training.checkpoint import Checkpoint
from toolkit.training.families import Part
from toolkit.training.layout import unet_to_ldm

ATTENTION = tuple(f"attn{n}.to_{x}" for n in (1, 2) for x in ("q", "k", "v", "out.0"))
LINEAR = (*ATTENTION, "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out")
CONVOLUTION = ("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv")
TEXT = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")

STYLES = {
    "kohya": ("lora_down.weight", "lora_up.weight"),
    "single file": ("lora_down.weight", "lora_up.weight"),
    "comfyui": ("lora_down.weight", "lora_up.weight"),
    "diffusers": ("lora_A.weight", "lora_B.weight"),
    "diffusers 0.20": ("lora.down.weight", "lora.up.weight"),
    "processor": ("lora.down.weight", "lora.up.weight"),
    "peft": ("lora_A.default.weight", "lora_B.default.weight"),
}
"""Names of the two factors."""


def weights_of(checkpoint: Checkpoint, targets: Iterable[str], part: Part = "unet") -> dict[str, Tensor]:
    """The weights of the modules whose names end like a target."""
    network = checkpoint.unet() if part == "unet" else checkpoint.text_encoder(part=part)
    state = network.state_dict()
    ends = tuple(f".{target}.weight" for target in targets)
    return {key.removesuffix(".weight"): value.detach() for key, value in state.items() if key.endswith(ends)}


def random_factors(
    weights: Mapping[str, Tensor], *, kind: str = "plain", rank: int = 4, seed: int = 0
) -> dict[str, dict[str, Tensor]]:
    """Of each module its factors by their short names; ``kind``: plain, tucker, dora-in, dora-out."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) / math.sqrt(max(1, math.prod(shape[1:])))

    made: dict[str, dict[str, Tensor]] = {}
    for module, weight in weights.items():
        outputs, inputs, *kernel = weight.shape
        ones = [1] * len(kernel)
        found = {"down": noise(rank, inputs, *kernel), "up": noise(outputs, rank, *ones)}
        if kind == "tucker" and math.prod(kernel) > 1:
            found |= {"down": noise(rank, inputs, *ones), "mid": noise(rank, rank, *kernel)}
        if kind == "dora-in":
            norm = weight.transpose(0, 1).flatten(1).norm(dim=1).reshape(1, -1, *ones)
            found["dora"] = norm * (1 + 0.1 * noise(1, inputs, *ones))
        if kind == "dora-out":
            norm = weight.flatten(1).norm(dim=1).reshape(-1, 1, *ones)
            found["dora"] = norm * (1 + 0.1 * torch.randn(norm.shape, generator=generator))
        made[module] = found
    return made


def named(
    style: str,
    checkpoint: Checkpoint,
    factors: Mapping[str, Mapping[str, Tensor]],
    *,
    part: Part = "unet",
    alpha: float | None = None,
) -> dict[str, Tensor]:
    """A file's tensors: the factors under the names of a style."""
    down, up = STYLES[style]
    theirs = {"down": down, "up": up, "mid": "lora_mid.weight", "dora": "dora_scale"}
    made: dict[str, Tensor] = {}
    for module, values in factors.items():
        stem = _stem(style, module, part, checkpoint)
        dot = "_" if style == "processor" and part == "unet" else "."
        for name, value in values.items():
            made[f"{stem}{dot}{theirs.get(name, name)}"] = value
        if alpha is not None:
            made[f"{stem}.alpha"] = torch.tensor(alpha)
    if style.startswith(("diffusers", "processor")) and part != "unet":
        old = style != "diffusers"
        made = {key.replace(".lora.", ".lora_linear_layer.") if old else key: v for key, v in made.items()}
    return made


def save_lora(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Path:
    save_tensors({key: value.contiguous() for key, value in tensors.items()}, metadata or {}, path)
    return path


def _stem(style: str, module: str, part: Part, checkpoint: Checkpoint) -> str:
    text = part != "unet"
    ldm = module if text else _single_file_name(module, checkpoint)
    whole = f"text_model.{module.removeprefix('text_model.')}" if text else module
    if style in ("kohya", "single file"):
        te = {"text_encoder": "lora_te1_" if checkpoint.family == "sdxl" else "lora_te_"}
        prefix = te.get(part, "lora_te2_") if text else "lora_unet_"
        return prefix + (whole if text else ldm if style == "single file" else module).replace(".", "_")
    if style == "comfyui":
        return (
            f"text_encoders.{comfyui_name(checkpoint, part)}.transformer.{whole}"
            if text
            else f"diffusion_model.{ldm}"
        )
    if style == "peft":
        return f"base_model.model.{whole}"
    prefix = f"{part}."
    if style == "processor" and not text:
        attention, _, projection = module.rpartition(".to_")
        return f"{prefix}{attention}.processor.to_{projection.removesuffix('.0')}"
    return prefix + whole


def comfyui_name(checkpoint: Checkpoint, part: Part) -> str:
    """What ComfyUI calls a text encoder."""
    if part == "text_encoder_2":
        return "clip_g"
    return "clip_h" if checkpoint.family == "sd2" else "clip_l"


def _single_file_name(module: str, checkpoint: Checkpoint) -> str:
    state = checkpoint.unet().state_dict()
    number = list(state).index(f"{module}.weight")
    key = list(unet_to_ldm(state))[number]
    return key.removeprefix("model.diffusion_model.").removesuffix(".weight")
