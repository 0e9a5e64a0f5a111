"""What weights are, told from their keys and shapes alone, and which keys are missing, extra or misshapen."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..diffusion.errors import BadInput
from .families import FAMILIES, SD1, UNET_PREFIX, VAE_PREFIX, Family, Part, TextEncoder
from .layout import (
    PROJECTION,
    TEXT_PREFIX,
    text_config_from,
    text_from_ldm,
    text_to_ldm,
    unet_config_from,
    unet_to_ldm,
    vae_config_from,
    vae_to_ldm,
    with_unused_layers,
)
from .weights import Config

Container = Literal[
    "checkpoint", "unet", "vae", "text encoder", "lora", "embedding", "ControlNet", "motion module", "unknown"
]
INPUTS = {4: "", 9: "inpainting", 8: "InstructPix2Pix", 5: "depth", 7: "upscaler"}
"""What a UNet with so many input channels is for."""

TEXT_PREFIXES = tuple(encoder.prefix for family in FAMILIES.values() for encoder in family.text_encoders)
"""Of every family's text encoders."""

_UNUSED = re.compile(
    r"(model_ema\.|first_stage_model\.loss\.|posterior_)|"
    r"(betas|\w*alphas_cumprod(_prev)?|logvar|lvlb_weights|global_step|v_pred|ztsnr)$|"
    r"(model\.diffusion_model\.)?fewstep\.spec$|"
    r"denoiser\.sigmas$|"
    r"(cond_stage_model|conditioner\.embedders\.\d)\."
    r"(.*logit_scale|.*attn_mask|.*position_ids|.*text_projection(\.weight)?)$"
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
    unet, vae, text = (
        any(key.startswith(prefixes) for key in ldm) for prefixes in (UNET_PREFIX, VAE_PREFIX, TEXT_PREFIXES)
    )
    if unet:
        return Recognised("checkpoint" if vae or text else "unet", _family(ldm), ldm)
    if vae and not text:
        return Recognised("vae", None, ldm)
    if (text and not vae) or any(key.endswith("transformer.resblocks.0.ln_1.weight") for key in ldm):
        return Recognised("text encoder", None, ldm)
    return Recognised("unknown", None, tensors)


def text_state(tensors: Mapping[str, Tensor], encoder: TextEncoder) -> dict[str, Tensor]:
    """The weights of one text encoder under single-file keys, from a file that holds it in any naming.

    A file of one text encoder alone is taken for the one that is asked for. Empty if there is none.
    """
    ldm = _with_text_level(tensors)
    if found := {key: value for key, value in ldm.items() if key.startswith(encoder.prefix)}:
        return found
    for prefix in ("text_encoders.", ""):
        host = f"{prefix}clip_{'l' if encoder.naming == 'transformers' else 'g'}.transformer."
        if any(key.startswith(host) for key in tensors):
            tensors = {k.removeprefix(host): v for k, v in tensors.items() if k.startswith(host)}
    for prefix in ("model.", ""):
        if f"{prefix}positional_embedding" in tensors and encoder.naming == "open_clip":
            return {
                encoder.prefix + key.removeprefix(prefix): value
                for key, value in tensors.items()
                if key.startswith(prefix) and not key.startswith(f"{prefix}visual.")
            }
    bare = {key.removeprefix("text_model."): value for key, value in tensors.items()}
    if "embeddings.token_embedding.weight" not in bare:
        return {}
    kept = ("embeddings.", "encoder.layers.", "final_layer_norm.", PROJECTION)
    bare = {key: value for key, value in bare.items() if key.startswith(kept) and "position_ids" not in key}
    whole = (
        bare["embeddings.token_embedding.weight"].shape[1] == 1024
        and "encoder.layers.23.layer_norm1.bias" in bare
    )
    return text_to_ldm(bare if whole else with_unused_layers(bare, encoder), encoder)


def config_of(
    part: Part, tensors: Mapping[str, Tensor], configs: Mapping[str, Config], family: Family = SD1
) -> dict[str, Any]:
    """Constructor arguments of a part: from shapes, the rest from a folder's JSON where there is one."""
    config = configs.get(part, {})
    if part == "unet":
        found = unet_config_from(tensors, family)
        said = ("attention_head_dim", "norm_num_groups", "norm_eps", "sample_size")
    elif part == "vae":
        found = vae_config_from(tensors, family)
        said = ("scaling_factor", "norm_num_groups", "sample_size", "force_upcast")
    else:
        found = text_config_from(tensors, family.encoder(part))
        said = ("num_attention_heads", "hidden_act", "layer_norm_eps")
    return found | {name: config[name] for name in said if config.get(name) is not None}


def build(part: Part, config: Mapping[str, Any], family: Family = SD1) -> Any:
    """The part's network on the meta device, in evaluation mode; BadInput for sizes that cannot be."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    try:
        with torch.device("meta"):
            if part == "unet":
                return UNet2DConditionModel(**config).eval()
            if part == "vae":
                return AutoencoderKL(**config).eval()
            pooled = family.encoder(part).pooled
            network: Any = CLIPTextModelWithProjection if pooled else CLIPTextModel
            return network(CLIPTextConfig(**config)).eval()
    except (ValueError, TypeError, RuntimeError, ZeroDivisionError) as error:
        raise BadInput(f"the shapes fit no Stable Diffusion {part.replace('_', ' ')} ({error})") from None


def expected_keys(part: Part, network: torch.nn.Module, family: Family = SD1) -> dict[str, Tensor]:
    """The network's state under single-file keys."""
    state = {key: value for key, value in network.state_dict().items() if "position_ids" not in key}
    if part == "unet":
        return unet_to_ldm(state)
    return vae_to_ldm(state) if part == "vae" else text_to_ldm(state, family.encoder(part))


def problems(
    tensors: Mapping[str, Tensor],
    configs: Mapping[str, Config],
    *,
    family: Family = SD1,
    parts: Iterable[Part] | None = None,
) -> Problems:
    """Compare single-file weights with the networks that they describe; ``parts``: default those there."""
    present: list[Part] = [
        part for part, prefix in family.prefixes.items() if any(key.startswith(prefix) for key in tensors)
    ]
    expected: dict[str, Tensor] = {}
    for part in parts or present:
        network = build(part, config_of(part, tensors, configs, family), family)
        expected |= expected_keys(part, network, family)
    unused = _unused_layers(tensors, family)
    return Problems(
        missing=tuple(sorted(set(expected) - set(tensors))),
        extra=tuple(
            sorted(key for key in tensors if key not in expected | unused and not _UNUSED.match(key))
        ),
        misshapen=tuple(
            f"{key} has shape {_sizes(tensors[key])}, and {_sizes(value)} was expected"
            for key, value in expected.items()
            if key in tensors and not _fits(tensors[key], value)
        ),
    )


def _unused_layers(tensors: Mapping[str, Tensor], family: Family) -> dict[str, Tensor]:
    """The text encoders' layers that no network here runs, under single-file keys."""
    found: dict[str, Tensor] = {}
    for encoder in family.text_encoders:
        layer = encoder.prefix + "transformer.resblocks."
        numbers = [int(key.removeprefix(layer).split(".")[0]) for key in tensors if key.startswith(layer)]
        last = tuple(f"{layer}{max(numbers, default=0) - n}." for n in range(encoder.unused_layers))
        found |= {key: value for key, value in tensors.items() if last and key.startswith(last)}
    return found


def _fits(found: Tensor, expected: Tensor) -> bool:
    """Equal shapes, but for trailing ones: a VAE's attention may be a matrix or a 1x1 convolution."""
    a, b = tuple(found.shape), tuple(expected.shape)
    return a == b or (len(b) == 4 and b[2:] == (1, 1) and a == b[:2])


def _sizes(tensor: Tensor) -> str:
    return "x".join(str(size) for size in tensor.shape) or "()"


def _foreign_container(tensors: Mapping[str, Tensor]) -> Container | None:
    if any(re.search(_LORA, key) for key in tensors):
        return "lora"
    if any(key.startswith(("control_model.", "controlnet_cond_embedding.")) for key in tensors):
        return "ControlNet"
    if any("motion_modules." in key for key in tensors):
        return "motion module"
    if len(tensors) <= 4 and any(key in tensors for key in ("emb_params", "clip_l", "clip_g", "*")):
        return "embedding"
    return None


_LORA = r"[._](lora[._](down|up|A|B)\b|lora_linear_layer\.|hada_w1_a|lokr_w1)|^lora_(unet|te)"


def _foreign_family(tensors: Mapping[str, Tensor]) -> str | None:
    """A family that is told apart and not opened."""
    if any("joint_blocks." in key for key in tensors):
        return "sd3"
    if any("individual_token_refiner" in key or ".time_stack." in key for key in tensors):
        return "svd" if any(".time_stack." in key for key in tensors) else "video"
    if any("double_blocks." in key for key in tensors):
        return "flux"
    if any(re.match(r"(model\.diffusion_model\.)?transformer_blocks\.0\.", key) for key in tensors):
        return "transformer"
    if any(re.match(r"(model\.diffusion_model\.)?blocks\.0\.", key) for key in tensors):
        return "video" if any("patch_embedding." in key for key in tensors) else "transformer"
    if any(key.endswith(("clf.1.weight", "clip_txt_mapper.weight")) for key in tensors):
        return "cascade"
    if "edm_mean" in tensors:
        return "playground"
    if any(re.search(_SIZES, key) for key in tensors):
        context = _context(tensors)
        if context == 1280 or any(key.startswith("conditioner.embedders.0.model.") for key in tensors):
            return "sdxl-refiner"
        if context == 1024 or any(key.startswith("embedder.model.visual.") for key in tensors):
            return "unclip"
    return None


_SIZES = r"(^|\.)(label_emb\.0\.0|add_embedding\.linear_1)\.weight$"


def _family(ldm: Mapping[str, Tensor]) -> str:
    """By what its UNet is told and how it attends; by the text encoder where there is one."""
    if any(re.search(_SIZES, key) or key.startswith("conditioner.embedders.1.") for key in ldm):
        return "sdxl"
    if any(key.startswith("cond_stage_model.model.") for key in ldm) or _context(ldm) == 1024:
        return "sd2"
    if any(key.startswith(TEXT_PREFIX) for key in ldm):
        return "sd1"
    linear = (value.ndim == 2 for key, value in ldm.items() if key.endswith(".1.proj_in.weight"))
    return "sd2" if next(linear, False) else "sd1"


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
    """Early files lack ``text_model.`` in the text encoder's keys; Stable Diffusion 2 saved in SDXL's manner
    names its encoder as SDXL's first."""
    sgm = "conditioner.embedders.0.model."
    if any(key.startswith(sgm) for key in tensors):
        return {key.replace(sgm, "cond_stage_model.model."): value for key, value in tensors.items()}
    if any(key.startswith(TEXT_PREFIXES) for key in tensors):
        return tensors
    early = TEXT_PREFIX.removesuffix("text_model.")
    rest = {key: value for key, value in tensors.items() if not key.startswith(early)}
    return rest | text_to_ldm(text_from_ldm(tensors))
