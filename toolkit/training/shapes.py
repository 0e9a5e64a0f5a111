"""Checkpoints of true size with random weights, to measure with: nothing to download, nothing to write."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checkpoint import Checkpoint
from .families import SD1, SDXL, Family, Part
from .recognise import build, expected_keys

_VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}
_CLIP_L = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
}
_BIG_G = {
    **_CLIP_L,
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
}
_SD15_UNET = {
    "block_out_channels": (320, 640, 1280, 1280),
    "cross_attention_dim": 768,
    "layers_per_block": 2,
    "attention_head_dim": 8,
}
SDXL_UNET = {
    "block_out_channels": (320, 640, 1280),
    "cross_attention_dim": 2048,
    "layers_per_block": 2,
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 1280 + 6 * 256,
}


@dataclass(frozen=True)
class Shape:
    """The networks of a family at their usual size; ``configs``: constructor arguments by part."""

    family: Family
    configs: Mapping[Part, Mapping[str, Any]]


SHAPES: Mapping[str, Shape] = {
    "sd15": Shape(SD1, {"unet": _SD15_UNET, "vae": _VAE, "text_encoder": _CLIP_L}),
    "sdxl": Shape(SDXL, {"unet": SDXL_UNET, "vae": _VAE, "text_encoder": _CLIP_L, "text_encoder_2": _BIG_G}),
}


def random_checkpoint(name: str, *, dtype: torch.dtype = torch.float16) -> Checkpoint:
    """A teacher of :data:`SHAPES`; it has no tokenizer, and its pictures show nothing."""
    shape = SHAPES[name]
    generator = torch.Generator().manual_seed(0)
    tensors = {
        key: _random(key, value.shape, generator).to(dtype)
        for part, config in shape.configs.items()
        for key, value in expected_keys(part, build(part, config, shape.family), shape.family).items()
    }
    return Checkpoint(
        path=Path(name),
        name=name,
        kind="teacher",
        family=shape.family.key,
        inpaint=False,
        prediction_type="epsilon",
        ztsnr=False,
        spec=None,
        resolution=shape.family.resolution,
        tensors=tensors,
        configs={},
        tokenizer_from=None,
    )


def _random(key: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Of a scale under which activations stay of order 1."""
    if len(shape) < 2:
        return torch.full(shape, 1.0 if key.endswith("weight") else 0.0)
    return torch.randn(shape, generator=generator) / max(1, shape[1:].numel()) ** 0.5
