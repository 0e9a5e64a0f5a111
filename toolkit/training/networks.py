"""diffusers' modules wrapped as the house speaks of them: denoiser, text conditioning, pictures and
latents.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from ..diffusion.denoiser import Cond, Network, NetworkDenoiser
from ..diffusion.guidance import w_embedding
from ..diffusion.prediction import PredictionType
from ..diffusion.schedule import NoiseSchedule


def unet_network(unet: torch.nn.Module) -> Network:
    """A UNet2DConditionModel (or a wrapper of one) as a network; w None runs without the guidance input's
    shift.
    """

    def call(z: Tensor, timestep: Tensor, cond: Cond, w: Tensor | None) -> Tensor:
        dtype = next(unet.parameters()).dtype
        embedded = None if w is None else w_embedding(w).to(dtype)
        return unet(z.to(dtype), timestep, cond["text"].to(dtype), timestep_cond=embedded, return_dict=False)[
            0
        ]

    return call


def denoiser(
    unet: torch.nn.Module, *, schedule: NoiseSchedule, prediction_type: PredictionType
) -> NetworkDenoiser:
    return NetworkDenoiser(unet_network(unet), schedule, prediction_type)


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Precisions by the names that people give them."""

Module = TypeVar("Module", bound=torch.nn.Module)


def place(module: Module, device: torch.device | str, dtype: torch.dtype | None = None) -> Module:
    """The module moved to a device, and cast where a dtype is given."""
    torch.nn.Module.to(module, device=device, dtype=dtype)
    return module


@torch.no_grad()
def encode_texts(
    prompts: Sequence[str], *, tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel, batch: int = 64
) -> Tensor:
    """(N, T, C) float32: the last hidden states of the prompts, cut at the encoder's length T (77 in
    CLIP).
    """
    length = text_encoder.config.max_position_embeddings
    device = text_encoder.device
    rows: list[Tensor] = []
    for first in range(0, len(prompts), batch):
        tokens = tokenizer(
            list(prompts[first : first + batch]),
            padding="max_length",
            max_length=length,
            truncation=True,
            return_tensors="pt",
        )
        rows.append(text_encoder(tokens.input_ids.to(device)).last_hidden_state.float().cpu())
    return torch.cat(rows)


@torch.no_grad()
def encode_images(images: Tensor, vae: AutoencoderKL, *, batch: int = 16) -> Tensor:
    """Images (N, 3, H, W) in [0, 1] -> scaled latents x0 (N, C, h, w) float32 on the CPU (the posterior's
    mean).
    """
    parts = [
        vae.encode((part * 2 - 1).to(vae.device, vae.dtype), return_dict=False)[0].mean.float().cpu()
        for part in images.split(batch)
    ]
    return torch.cat(parts) * float(vae.config["scaling_factor"])


@torch.no_grad()
def decode_latents(x0: Tensor, vae: AutoencoderKL, *, batch: int = 16) -> Tensor:
    """Scaled latents (N, C, h, w) -> images (N, 3, H, W) float32 in [0, 1] on the CPU."""
    scale = float(vae.config["scaling_factor"])
    decode: Callable[..., Any] = vae.decode
    parts = [
        decode((part / scale).to(vae.device, vae.dtype), return_dict=False)[0].float().cpu()
        for part in x0.split(batch)
    ]
    return (torch.cat(parts) / 2 + 0.5).clamp(0, 1)
