"""What weights are, told from their keys and shapes alone, and which keys are missing, extra or misshapen."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from ..diffusion.errors import BadInput
from .layout import (
    TEXT_PREFIX,
    UNET_PREFIX,
    VAE_PREFIX,
    text_config_from,
    text_from_ldm,
    text_to_ldm,
    unet_config_from,
    unet_to_ldm,
    vae_config_from,
    vae_to_ldm,
)
from .weights import Config

Container = Literal[
    "checkpoint", "unet", "vae", "text encoder", "lora", "embedding", "ControlNet", "motion module", "unknown"
]
Part = Literal["unet", "vae", "text_encoder"]

FAMILIES = {
    "sd1": "Stable Diffusion 1",
    "sd2": "Stable Diffusion 2",
    "sdxl": "SDXL",
    "sdxl-refiner": "SDXL refiner",
    "sd3": "Stable Diffusion 3",
    "flux": "Flux",
    "transformer": "diffusion transformer",
}
INPUTS = {4: "", 9: "inpainting", 8: "InstructPix2Pix", 5: "depth", 7: "upscaler"}
"""What a UNet with so many input channels is for."""

PREFIXES: dict[Part, str] = {"unet": UNET_PREFIX, "vae": VAE_PREFIX, "text_encoder": TEXT_PREFIX}

_UNUSED = re.compile(
    r"(model_ema\.|first_stage_model\.loss\.|posterior_)|"
    r"(betas|\w*alphas_cumprod(_prev)?|logvar|lvlb_weights|global_step|v_pred|ztsnr|model\.diffusion_model\.fewstep\.spec)$|"
    r"cond_stage_model\.(logit_scale|.*position_ids|.*text_projection(\.weight)?)$"
)
"""Keys that checkpoints carry and inference does not use: training buffers, the running average, markers."""


@dataclass(frozen=True, eq=False)
class Recognised:
    """``tensors``: under single-file keys if the container is a checkpoint or one of its parts."""

    container: Container
    family: str | None
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True)
class Problems:
    """Keys that a part needs and lacks, that no part knows, and sentences on those with a wrong shape."""

    missing: tuple[str, ...]
    extra: tuple[str, ...]
    misshapen: tuple[str, ...]


def recognise(tensors: Mapping[str, Tensor]) -> Recognised:
    """What these weights are; never raises for foreign ones."""
    if container := _foreign_container(tensors):
        return Recognised(container, None, tensors)
    if family := _foreign_family(tensors):
        return Recognised("checkpoint", family, tensors)
    ldm = _single_file_keys(tensors)
    parts = {part for part, prefix in PREFIXES.items() if any(key.startswith(prefix) for key in ldm)}
    if "unet" in parts:
        family = "sd2" if _context(ldm) == 1024 else "sd1"
        return Recognised("checkpoint" if len(parts) > 1 else "unet", family, ldm)
    if parts == {"vae"}:
        return Recognised("vae", None, ldm)
    if parts == {"text_encoder"}:
        return Recognised("text encoder", None, ldm)
    return Recognised("unknown", None, tensors)


def config_of(part: Part, tensors: Mapping[str, Tensor], configs: Mapping[str, Config]) -> dict[str, Any]:
    """Constructor arguments of a part: from shapes, the rest from a folder's JSON where there is one."""
    infer, said = {
        "unet": (unet_config_from, ("attention_head_dim", "norm_num_groups", "norm_eps", "sample_size")),
        "vae": (vae_config_from, ("scaling_factor", "norm_num_groups", "sample_size")),
        "text_encoder": (text_config_from, ("num_attention_heads", "hidden_act", "layer_norm_eps")),
    }[part]
    config = configs.get(part, {})
    return infer(tensors) | {name: config[name] for name in said if config.get(name) is not None}


def build(part: Part, config: Mapping[str, Any]) -> Any:
    """The part's network on the meta device, in evaluation mode; BadInput for sizes that cannot be."""
    makers: dict[Part, Callable[[], Any]] = {
        "unet": lambda: UNet2DConditionModel(**config),
        "vae": lambda: AutoencoderKL(**config),
        "text_encoder": lambda: CLIPTextModel(CLIPTextConfig(**config)),
    }
    try:
        with torch.device("meta"):
            return makers[part]().eval()
    except (ValueError, TypeError, RuntimeError, ZeroDivisionError) as error:
        raise BadInput(f"the shapes fit no Stable Diffusion {part.replace('_', ' ')} ({error})") from None


def expected_keys(part: Part, network: torch.nn.Module) -> dict[str, Tensor]:
    """The network's state under single-file keys."""
    convert = {"unet": unet_to_ldm, "vae": vae_to_ldm, "text_encoder": text_to_ldm}[part]
    return convert({key: value for key, value in network.state_dict().items() if "position_ids" not in key})


def problems(
    tensors: Mapping[str, Tensor], configs: Mapping[str, Config], *, parts: Iterable[Part] | None = None
) -> Problems:
    """Compare single-file weights with the networks that they describe; ``parts``: default those there."""
    present: list[Part] = [
        part for part, prefix in PREFIXES.items() if any(key.startswith(prefix) for key in tensors)
    ]
    expected: dict[str, Tensor] = {}
    for part in parts or present:
        expected |= expected_keys(part, build(part, config_of(part, tensors, configs)))
    return Problems(
        missing=tuple(sorted(set(expected) - set(tensors))),
        extra=tuple(sorted(key for key in tensors if key not in expected and not _UNUSED.match(key))),
        misshapen=tuple(
            f"{key} has shape {_sizes(tensors[key])}, and {_sizes(value)} was expected"
            for key, value in expected.items()
            if key in tensors and not _fits(tensors[key], value)
        ),
    )


def _fits(found: Tensor, expected: Tensor) -> bool:
    """Equal shapes, but for trailing ones: a VAE's attention may be a matrix or a 1x1 convolution."""
    a, b = tuple(found.shape), tuple(expected.shape)
    return a == b or (len(b) == 4 and b[2:] == (1, 1) and a == b[:2])


def _sizes(tensor: Tensor) -> str:
    return "x".join(str(size) for size in tensor.shape) or "()"


def _foreign_container(tensors: Mapping[str, Tensor]) -> Container | None:
    if any(re.search(r"\.(lora_(down|up|A|B)\b|hada_w1_a|lokr_w1)|^lora_(unet|te)", key) for key in tensors):
        return "lora"
    if any(key.startswith(("control_model.", "controlnet_cond_embedding.")) for key in tensors):
        return "ControlNet"
    if any("motion_modules." in key for key in tensors):
        return "motion module"
    if len(tensors) <= 4 and any(key in tensors for key in ("emb_params", "clip_l", "clip_g", "*")):
        return "embedding"
    return None


def _foreign_family(tensors: Mapping[str, Tensor]) -> str | None:
    if any("joint_blocks." in key for key in tensors):
        return "sd3"
    if any("double_blocks." in key for key in tensors):
        return "flux"
    if any(re.match(r"(model\.diffusion_model\.)?transformer_blocks\.0\.", key) for key in tensors):
        return "transformer"
    if any(key.startswith("conditioner.embedders.1.") for key in tensors):
        return "sdxl"
    if any(key.startswith("conditioner.embedders.0.model.") for key in tensors):
        return "sdxl-refiner"
    if any(re.search(r"(^|\.)(label_emb\.0\.0|add_embedding\.linear_1)\.weight$", key) for key in tensors):
        return "sdxl-refiner" if _context(tensors) == 1280 else "sdxl"
    if any(key.startswith("cond_stage_model.model.") for key in tensors):
        return "sd2"
    return None


def _context(tensors: Mapping[str, Tensor]) -> int | None:
    """Width of the text conditioning that a UNet attends to."""
    keys = (value for key, value in tensors.items() if key.endswith(".attn2.to_k.weight"))
    return next((value.shape[1] for value in keys), None)


def _single_file_keys(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Any known naming of a checkpoint or of one part as single-file keys; others as they are."""

    def prefixed(prefix: str) -> dict[str, Tensor]:
        return {prefix + key: value for key, value in tensors.items()}

    if any(key.startswith(UNET_PREFIX) for key in tensors):
        return _with_text_level(tensors)
    if "diffusion_model.input_blocks.0.0.weight" in tensors:
        return prefixed("model.")
    if "input_blocks.0.0.weight" in tensors:
        return prefixed(UNET_PREFIX)
    if "down_blocks.0.resnets.0.conv1.weight" in tensors and "time_embedding.linear_1.weight" in tensors:
        return unet_to_ldm(tensors)
    if "encoder.down.0.block.0.conv1.weight" in tensors:
        return prefixed(VAE_PREFIX)
    if "encoder.down_blocks.0.resnets.0.conv1.weight" in tensors:
        return vae_to_ldm(tensors)
    if any(key.startswith("text_model.") for key in tensors):
        return text_to_ldm({key: value for key, value in tensors.items() if key.startswith("text_model.")})
    if "embeddings.token_embedding.weight" in tensors:
        return text_to_ldm(tensors)
    return _with_text_level(tensors)


def _with_text_level(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Early files lack ``text_model.`` in the text encoder's keys."""
    if any(key.startswith(TEXT_PREFIX) for key in tensors):
        return tensors
    early = TEXT_PREFIX.removesuffix("text_model.")
    rest = {key: value for key, value in tensors.items() if not key.startswith(early)}
    return rest | text_to_ldm(text_from_ldm(tensors))
