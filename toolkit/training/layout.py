"""Two namings of the same weights: diffusers' folders and Stable Diffusion's single file ("LDM" keys).

Both namings describe one tree of modules, so each conversion is one table of module names, read from the keys
that are there: any width, depth and choice of attention levels. The same table serves both directions, hence
a round trip returns the same keys and tensors. Tensors are renamed, never copied; only the VAE's attention
changes shape, (C, C) in diffusers and (C, C, 1, 1) in the single file, and OpenCLIP's text encoders keep
query, key and value in one matrix and the projection transposed.

Configurations come from shapes alone. What shapes cannot say is the family's (families.py), or Stable
Diffusion's everywhere: 32 normalisation groups, text encoders with 64 numbers a head.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..diffusion.errors import BadInput
from .families import CLIP_L, SD1, UNET_PREFIX, VAE_PREFIX, Family, TextEncoder

State = Mapping[str, Tensor]

TEXT_PREFIX = CLIP_L.prefix
COND_PROJ = UNET_PREFIX + "time_embed.cond_proj.weight"
SIZE_WIDTH = 256
"""Numbers that embed each of the six sizes which an SDXL UNet is told."""

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_VAE_RESNET = {name: name for name in ("norm1", "conv1", "norm2", "conv2")} | {
    "conv_shortcut": "nin_shortcut"
}
PROJECTION = "text_projection.weight"
_LAYER = r"encoder\.layers\.(\d+)\."
_OPEN_CLIP = {
    "embeddings.token_embedding": "token_embedding",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm": "ln_final",
    PROJECTION: "text_projection",
    "encoder.layers": "transformer.resblocks",
}
_OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


@dataclass(frozen=True)
class Level:
    """One resolution of a UNet's down path; its up path has one residual block more."""

    resnets: int
    attention: bool


def unet_to_ldm(state: State) -> dict[str, Tensor]:
    """A diffusers UNet's state with single-file keys, prefix included; ``time_embedding.cond_proj`` too."""
    table = unet_table(_levels_from_diffusers(state))
    return {UNET_PREFIX + _renamed(key, table, "UNet"): value for key, value in state.items()}


def unet_from_ldm(state: State) -> dict[str, Tensor]:
    """The UNet of a single file's state with diffusers' keys; other parts are left out.

    Raises BadInput for a key under the UNet's prefix that no such UNet has.
    """
    part = under(state, UNET_PREFIX)
    table = _inverse(unet_table(levels_from_ldm(part)))
    return {_renamed(key, table, "UNet"): value for key, value in part.items()}


def vae_to_ldm(state: State) -> dict[str, Tensor]:
    """A diffusers AutoencoderKL's state with single-file keys, its attention as 1x1 convolutions."""
    table = vae_table(
        _count(state, r"decoder\.up_blocks\.(\d+)\."), _depth(state, r"encoder\.down_blocks\.0\.resnets\.")
    )
    renamed = {VAE_PREFIX + _renamed(key, table, "VAE"): value for key, value in state.items()}
    return {
        key: value[..., None, None] if _is_vae_attention(key, value) else value
        for key, value in renamed.items()
    }


def vae_from_ldm(state: State) -> dict[str, Tensor]:
    """The VAE of a single file's state with diffusers' keys, its attention as matrices."""
    part = under(state, VAE_PREFIX)
    table = _inverse(
        vae_table(_count(part, r"decoder\.up\.(\d+)\."), _depth(part, r"encoder\.down\.0\.block\."))
    )
    flat = {key: value.flatten(1) if _is_vae_attention(key, value) else value for key, value in part.items()}
    return {_renamed(key, table, "VAE"): value for key, value in flat.items()}


def text_to_ldm(state: State, encoder: TextEncoder = CLIP_L) -> dict[str, Tensor]:
    """A CLIPTextModel's state with single-file keys; transformers 4 says ``text_model.*``, 5 ``*``."""
    bare = {key.removeprefix("text_model."): value for key, value in state.items()}
    named = _fused(bare) if encoder.naming == "open_clip" else bare
    return {encoder.prefix + key: value for key, value in named.items()}


def text_from_ldm(state: State, encoder: TextEncoder = CLIP_L) -> dict[str, Tensor]:
    """A text encoder of a single file's state, keys without ``text_model.``; what it does not use is left
    out.

    Early files lack the ``text_model.`` level. The buffer ``position_ids`` is no weight.
    """
    part = under(state, encoder.prefix) or under(state, encoder.prefix.removesuffix("text_model."))
    if encoder.naming == "open_clip":
        part = _split(part)
    layers = used_layers(part, encoder)
    return {
        key: value
        for key, value in part.items()
        if not key.endswith(("position_ids", "attn_mask", "logit_scale"))
        and (encoder.pooled or key != PROJECTION)
        and not ((match := re.match(_LAYER, key)) and int(match[1]) >= layers)
    }


def used_layers(bare: State, encoder: TextEncoder) -> int:
    """How many of the layers in the file are run.

    ViT-H with 23 layers comes from a diffusers folder, where the 24th, unused one is dropped already.
    """
    layers = _count(bare, _LAYER)
    width = bare["final_layer_norm.weight"].shape[0] if "final_layer_norm.weight" in bare else 0
    return layers if (layers, width) == (23, 1024) else layers - encoder.unused_layers


def with_unused_layers(bare: State, encoder: TextEncoder) -> dict[str, Tensor]:
    """The state of a text encoder that was cut to its used layers, with layers of zeros after them.

    Zeros make a residual layer do nothing, so a host that runs it all the same gets the same answer.
    """
    layers = _count(bare, _LAYER)
    last = {key: value for key, value in bare.items() if key.startswith(f"encoder.layers.{layers - 1}.")}
    more = {
        key.replace(f".{layers - 1}.", f".{layers + n}.", 1): torch.zeros_like(value)
        for n in range(encoder.unused_layers)
        for key, value in last.items()
    }
    return {**bare, **more}


def unet_config_from(state: State, family: Family = SD1) -> dict[str, Any]:
    """Arguments of ``UNet2DConditionModel`` for a single file's state (tensors may be on the meta device)."""
    part = under(state, UNET_PREFIX)
    levels = levels_from_ldm(part)
    firsts = _first_blocks(levels)
    down = ["CrossAttnDownBlock2D" if level.attention else "DownBlock2D" for level in levels]
    up = ["CrossAttnUpBlock2D" if level.attention else "UpBlock2D" for level in reversed(levels)]
    depths: list[Any] = [
        _depth(part, rf"input_blocks\.{first}\.1\.transformer_blocks\.") or 1 for first in firsts
    ]
    depths[-1] = _depth(part, r"middle_block\.1\.transformer_blocks\.") or depths[-1]
    uneven = _uneven_depths(part, levels)
    widths = tuple(_shape(part, UNET_PREFIX, f"input_blocks.{n}.0.in_layers.2.weight")[0] for n in firsts)
    resnets = [level.resnets for level in levels]
    proj_in = next((value for key, value in part.items() if key.endswith(".1.proj_in.weight")), None)
    context = next((value for key, value in part.items() if key.endswith(".attn2.to_k.weight")), None)
    cond_proj = part.get("time_embed.cond_proj.weight")
    label = part.get("label_emb.0.0.weight")
    sizes: dict[str, Any] = {} if label is None else {"projection_class_embeddings_input_dim": label.shape[1]}
    if label is not None:
        sizes |= {"addition_embed_type": "text_time", "addition_time_embed_dim": SIZE_WIDTH}
    return {
        **sizes,
        "in_channels": _shape(part, UNET_PREFIX, "input_blocks.0.0.weight")[1],
        "out_channels": _shape(part, UNET_PREFIX, "out.2.weight")[0],
        "block_out_channels": widths,
        "layers_per_block": resnets[0] if len(set(resnets)) == 1 else tuple(resnets),
        "down_block_types": tuple(down),
        "mid_block_type": _mid_block(part),
        "up_block_types": tuple(up),
        "transformer_layers_per_block": depths[0] if len(set(depths)) == 1 else tuple(depths),
        **uneven,
        "cross_attention_dim": context.shape[1] if context is not None else 768,
        "attention_head_dim": family.heads or tuple(max(1, width // 64) for width in widths),
        "norm_num_groups": 32,
        "use_linear_projection": proj_in is not None and proj_in.ndim == 2,
        "time_embedding_dim": _shape(part, UNET_PREFIX, "time_embed.0.weight")[0],
        "time_cond_proj_dim": None if cond_proj is None else cond_proj.shape[1],
    }


def vae_config_from(state: State, family: Family = SD1) -> dict[str, Any]:
    """Arguments of ``AutoencoderKL`` for a single file's state."""
    part = under(state, VAE_PREFIX)
    levels = _count(part, r"encoder\.down\.(\d+)\.")
    return {
        "in_channels": _shape(part, VAE_PREFIX, "encoder.conv_in.weight")[1],
        "out_channels": _shape(part, VAE_PREFIX, "decoder.conv_out.weight")[0],
        "latent_channels": _shape(part, VAE_PREFIX, "decoder.conv_in.weight")[1],
        "block_out_channels": tuple(
            _shape(part, VAE_PREFIX, f"encoder.down.{i}.block.0.conv1.weight")[0] for i in range(levels)
        ),
        "layers_per_block": _depth(part, r"encoder\.down\.0\.block\."),
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "norm_num_groups": 32,
        "scaling_factor": family.scaling_factor,
    }


def text_config_from(state: State, encoder: TextEncoder = CLIP_L) -> dict[str, Any]:
    """Arguments of ``CLIPTextConfig`` for a single file's state."""
    part = text_from_ldm(state, encoder)

    def shape(key: str) -> tuple[int, ...]:
        if key in part:
            return tuple(part[key].shape)
        theirs = _renamed(key, _OPEN_CLIP, "text encoder") if encoder.naming == "open_clip" else key
        raise _missing(encoder.prefix + theirs)

    vocabulary, hidden = shape("embeddings.token_embedding.weight")
    return {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": shape("encoder.layers.0.mlp.fc1.weight")[0],
        "num_hidden_layers": _count(part, _LAYER),
        "num_attention_heads": max(1, hidden // 64),
        "max_position_embeddings": shape("embeddings.position_embedding.weight")[0],
        "projection_dim": shape(PROJECTION)[0] if encoder.pooled else hidden,
        "hidden_act": encoder.activation,
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
        "pad_token_id": vocabulary - 1,
    }


def unet_table(levels: tuple[Level, ...]) -> dict[str, str]:
    """Module names of a UNet: diffusers' -> the single file's, without prefix.

    The single file numbers the blocks of the down path (a downsampler counts) and of the up path through all
    levels.
    """
    table = {
        "conv_in": "input_blocks.0.0",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "time_embedding.cond_proj": "time_embed.cond_proj",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
        "mid_block.attentions.0": "middle_block.1",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
    }
    table |= _expanded("mid_block.resnets.0", "middle_block.0", _RESNET)
    table |= _expanded("mid_block.resnets.1", "middle_block.2", _RESNET)
    for i, (level, first) in enumerate(zip(levels, _first_blocks(levels), strict=True)):
        for j in range(level.resnets):
            table |= _expanded(f"down_blocks.{i}.resnets.{j}", f"input_blocks.{first + j}.0", _RESNET)
            table[f"down_blocks.{i}.attentions.{j}"] = f"input_blocks.{first + j}.1"
        table[f"down_blocks.{i}.downsamplers.0.conv"] = f"input_blocks.{first + level.resnets}.0.op"
    block = 0
    for i, level in enumerate(reversed(levels)):
        for j in range(level.resnets + 1):
            table |= _expanded(f"up_blocks.{i}.resnets.{j}", f"output_blocks.{block}.0", _RESNET)
            if level.attention:
                table[f"up_blocks.{i}.attentions.{j}"] = f"output_blocks.{block}.1"
            block += 1
        table[f"up_blocks.{i}.upsamplers.0.conv"] = (
            f"output_blocks.{block - 1}.{2 if level.attention else 1}.conv"
        )
    return table


def vae_table(levels: int, layers: int) -> dict[str, str]:
    """Module names of a VAE: diffusers' -> the single file's, whose decoder counts from the finest level."""
    table = {name: name for name in ("quant_conv", "post_quant_conv")}
    for side in ("encoder", "decoder"):
        table |= {f"{side}.conv_in": f"{side}.conv_in", f"{side}.conv_out": f"{side}.conv_out"}
        table[f"{side}.conv_norm_out"] = f"{side}.norm_out"
        table |= _expanded(f"{side}.mid_block.attentions.0", f"{side}.mid.attn_1", _VAE_ATTENTION)
        for j in range(2):
            table |= _expanded(f"{side}.mid_block.resnets.{j}", f"{side}.mid.block_{j + 1}", _VAE_RESNET)
    for i in range(levels):
        up = levels - 1 - i
        for j in range(layers):
            table |= _expanded(
                f"encoder.down_blocks.{i}.resnets.{j}", f"encoder.down.{i}.block.{j}", _VAE_RESNET
            )
        for j in range(layers + 1):
            table |= _expanded(
                f"decoder.up_blocks.{i}.resnets.{j}", f"decoder.up.{up}.block.{j}", _VAE_RESNET
            )
        table[f"encoder.down_blocks.{i}.downsamplers.0.conv"] = f"encoder.down.{i}.downsample.conv"
        table[f"decoder.up_blocks.{i}.upsamplers.0.conv"] = f"decoder.up.{up}.upsample.conv"
    return table


def levels_from_ldm(part: Iterable[str]) -> tuple[Level, ...]:
    """The down path that single-file UNet keys (without prefix) describe; BadInput if there is none."""
    keys = set(part)
    levels, resnets, attention = list[Level](), 0, False
    for block in range(1, _count(keys, r"input_blocks\.(\d+)\.")):
        if f"input_blocks.{block}.0.op.weight" in keys:
            levels.append(Level(resnets, attention))
            resnets, attention = 0, False
        else:
            resnets += 1
            attention = attention or f"input_blocks.{block}.1.norm.weight" in keys
    if not resnets:
        raise BadInput("the keys describe no Stable Diffusion UNet (no residual blocks under input_blocks)")
    return (*levels, Level(resnets, attention))


def _uneven_depths(part: State, levels: tuple[Level, ...]) -> dict[str, Any]:
    """How diffusers is told of attention whose depth changes within a level or on the way up (SSD-1B)."""

    def depths(path: str, numbers: range) -> tuple[int, ...]:
        return tuple(_depth(part, rf"{path}\.{n}\.1\.transformer_blocks\.") or 1 for n in numbers)

    firsts = _first_blocks(levels)
    down = [
        depths("input_blocks", range(first, first + level.resnets))
        for first, level in zip(firsts, levels, strict=True)
    ]
    up: list[tuple[int, ...]] = []
    block = 0
    for level in reversed(levels):
        up.append(depths("output_blocks", range(block, block + level.resnets + 1)))
        block += level.resnets + 1
    if all(
        {*way_up} == {*way_down} and len({*way_up}) == 1
        for way_up, way_down in zip(up, reversed(down), strict=True)
    ):
        return {}
    return {"transformer_layers_per_block": tuple(down), "reverse_transformer_layers_per_block": tuple(up)}


def _mid_block(part: State) -> str | None:
    """diffusers' class of the middle: attention between two residual blocks, one of these alone, or nothing
    (the pruned SDXLs)."""
    if "middle_block.1.norm.weight" in part:
        return "UNetMidBlock2DCrossAttn"
    return "UNetMidBlock2D" if "middle_block.0.in_layers.0.weight" in part else None


def _fused(bare: State) -> dict[str, Tensor]:
    """transformers' names of a text encoder -> OpenCLIP's, with query, key and value in one."""
    table = _OPEN_CLIP | _open_clip_layers(bare, _LAYER)
    named: dict[str, Tensor] = {}
    for key, value in bare.items():
        if match := re.match(rf"{_LAYER}self_attn\.(q|k|v)_proj\.(weight|bias)$", key):
            if match[2] == "q":
                three = [bare[key.replace(".q_proj.", f".{name}_proj.")] for name in "qkv"]
                named[f"transformer.resblocks.{match[1]}.attn.in_proj_{match[3]}"] = _joined(three)
        else:
            named[_renamed(key, table, "text encoder")] = value.T if key == PROJECTION else value
    return named


def _split(part: State) -> dict[str, Tensor]:
    """OpenCLIP's names of a text encoder -> transformers', views of the same tensors; others as they are."""
    table = _inverse(_OPEN_CLIP | _open_clip_layers(part, r"transformer\.resblocks\.(\d+)\."))
    bare: dict[str, Tensor] = {}
    for key, value in part.items():
        if match := re.match(r"transformer\.resblocks\.(\d+)\.attn\.in_proj_(weight|bias)$", key):
            for name, third in zip("qkv", value.chunk(3), strict=False):
                bare[f"encoder.layers.{match[1]}.self_attn.{name}_proj.{match[2]}"] = third
        else:
            module, _, kind = key.rpartition(".")
            ours = table.get(key) or (f"{table[module]}.{kind}" if module in table else key)
            bare[ours] = value.T if key == "text_projection" else value
    return bare


def _open_clip_layers(keys: Iterable[str], pattern: str) -> dict[str, str]:
    return {
        f"encoder.layers.{n}.{ours}": f"transformer.resblocks.{n}.{theirs}"
        for n in range(_count(keys, pattern))
        for ours, theirs in _OPEN_CLIP_LAYER.items()
    }


def _joined(tensors: list[Tensor]) -> Tensor:
    """Concatenated; as bytes where torch cannot concatenate the dtype (float8)."""
    if tensors[0].element_size() == 1:
        return torch.cat([tensor.view(torch.uint8) for tensor in tensors]).view(tensors[0].dtype)
    return torch.cat(tensors)


def under(state: State, prefix: str) -> dict[str, Tensor]:
    """The entries under a prefix, without it."""
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def _levels_from_diffusers(keys: Iterable[str]) -> tuple[Level, ...]:
    keys = set(keys)
    return tuple(
        Level(
            resnets=_depth(keys, rf"down_blocks\.{i}\.resnets\."),
            attention=f"down_blocks.{i}.attentions.0.norm.weight" in keys,
        )
        for i in range(_count(keys, r"down_blocks\.(\d+)\."))
    )


def _first_blocks(levels: tuple[Level, ...]) -> list[int]:
    """Number of each level's first block in the single file's down path; block 0 is conv_in."""
    firsts = [1]
    for level in levels[:-1]:
        firsts.append(firsts[-1] + level.resnets + 1)
    return firsts


def _expanded(ours: str, theirs: str, inner: Mapping[str, str]) -> dict[str, str]:
    return {f"{ours}.{a}": f"{theirs}.{b}" for a, b in inner.items()}


def _inverse(table: Mapping[str, str]) -> dict[str, str]:
    return {theirs: ours for ours, theirs in table.items()}


def _renamed(key: str, table: Mapping[str, str], part: str) -> str:
    """The key with its longest module name that the table knows replaced."""
    module = key
    while module:
        if module in table:
            return table[module] + key.removeprefix(module)
        module = module.rpartition(".")[0]
    raise BadInput(f"the key {key} belongs to no Stable Diffusion {part} that is known here")


def _is_vae_attention(key: str, value: Tensor) -> bool:
    return re.search(r"\.attn_1\.(q|k|v|proj_out)\.weight$", key) is not None and value.ndim in (2, 4)


def _shape(part: State, prefix: str, key: str) -> tuple[int, ...]:
    if key not in part:
        raise _missing(prefix + key)
    return tuple(part[key].shape)


def _missing(key: str) -> BadInput:
    return BadInput(f"the key {key} is missing, so this is no complete Stable Diffusion checkpoint")


def _count(keys: Iterable[str], pattern: str) -> int:
    """One more than the largest number that the pattern's group finds at the start of a key."""
    found = [int(match[1]) for key in keys if (match := re.match(pattern, key))]
    return max(found, default=-1) + 1


def _depth(keys: Iterable[str], prefix: str) -> int:
    """How many numbered children a module has; ``prefix`` is a pattern."""
    return _count(keys, prefix + r"(\d+)\.")
