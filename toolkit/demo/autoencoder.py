"""The demo's autoencoder: diffusers' `AutoencoderKL` at factor 4, 32 x 32 pixels to 8 x 8 x 4 latents.

Trained with an absolute pixel error, the distance of the judge's activations and a light Kullback-Leibler
term. At the end the latents' mean and scale are folded into quant_conv and post_quant_conv, so that every
channel of SD's scaling factor times the latents of real drawings has zero mean and unit variance: no file
needs a scale of its own.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn

from .drawings import SIZE, render, scenes
from .judge import Judge

SCALING_FACTOR = 0.18215
CHANNELS = (32, 32, 64)
_log = logging.getLogger("fewstep")


def new_autoencoder() -> AutoencoderKL:
    """An untrained autoencoder whose configuration can be read off its weights."""
    config: dict[str, Any] = {
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ("DownEncoderBlock2D",) * len(CHANNELS),
        "up_block_types": ("UpDecoderBlock2D",) * len(CHANNELS),
        "block_out_channels": CHANNELS,
        "layers_per_block": 1,
        "latent_channels": 4,
        "norm_num_groups": 32,
        "sample_size": SIZE,
        "scaling_factor": SCALING_FACTOR,
    }
    return AutoencoderKL(**config)


def train_autoencoder(
    judge: Judge,
    keep: Path,
    *,
    updates: int = 4500,
    warmup: int = 600,
    batch: int = 16,
    pictures: int = 24_000,
    seed: int = 21,
    rate: float = 2e-3,
) -> AutoencoderKL:
    """A trained autoencoder, latents not yet normalised; `judge` has a say after `warmup` updates.

    The state is kept in the file `keep` every 500 updates, and training goes on from there if the file
    exists.
    """
    torch.manual_seed(seed)
    images = render(scenes(pictures, seed=seed), seed=seed)
    model: Any = new_autoencoder()
    model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=updates, pct_start=0.04)
    start = 0
    if keep.exists():
        state = torch.load(keep, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        start = state["update"]
    average = 0.0
    for update in range(start, updates):
        generator = torch.Generator().manual_seed(seed * 1_000_000 + update)
        rows = torch.randint(pictures, (batch,), generator=generator)
        real = images[rows].contiguous(memory_format=torch.channels_last)
        posterior = model.encode(real * 2 - 1).latent_dist
        latents = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=generator)
        made = (model.decode(latents).sample + 1) / 2
        pixel = (made - real).abs().mean() + 2 * (made - real).square().mean()
        loss = pixel + 2e-4 * posterior.kl().mean() / latents[0].numel()
        if update >= warmup:
            loss = loss + 0.1 * _distance(judge, made, real)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        average += (float(pixel.detach()) - average) / min(update - start + 1, 100)
        if update % 100 == 0:
            _log.info("autoencoder %d/%d: pixel loss %.4f", update, updates, average)
        if (update + 1) % 500 == 0:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save({**state, "schedule": schedule.state_dict(), "update": update + 1}, keep)
    return model.eval().requires_grad_(False)


def _distance(critic: Judge, made: Tensor, real: Tensor) -> Tensor:
    """Mean squared distance of the judge's two maps and its features, a scalar."""
    fine, coarse = critic.maps(made)
    with torch.no_grad():
        fine_real, coarse_real = critic.maps(real)
        features_real = critic.features_of(coarse_real)
        scale = features_real.square().mean()
    features = (critic.features_of(coarse) - features_real).square().mean() / scale
    return F.mse_loss(fine, fine_real) + F.mse_loss(coarse, coarse_real) + features


@torch.no_grad()
def encode(model: AutoencoderKL, images: Tensor, *, batch: int = 256) -> Tensor:
    """Means of the latents (N, 4, 8, 8) of images in [0, 1], before the scaling factor."""
    network: Any = model
    return torch.cat([network.encode(part * 2 - 1).latent_dist.mean for part in images.split(batch)])


@torch.no_grad()
def decode(model: AutoencoderKL, latents: Tensor, *, batch: int = 256) -> Tensor:
    """Images (N, 3, 32, 32) in [0, 1] of latents without the scaling factor."""
    network: Any = model
    return torch.cat([(network.decode(part).sample.clamp(-1, 1) + 1) / 2 for part in latents.split(batch)])


@torch.no_grad()
def normalise(model: AutoencoderKL, images: Tensor) -> None:
    """Fold the latents' per-channel mean and scale on `images` into the two 1 x 1 convolutions, in place."""
    latents = encode(model, images)
    mean = latents.mean((0, 2, 3))
    scale = latents.std((0, 2, 3)) * SCALING_FACTOR
    into, out, count = _weights(model.quant_conv), _weights(model.post_quant_conv), len(mean)
    into["bias"][:count] = (into["bias"][:count] - mean) / scale
    into["weight"][:count] /= scale.view(-1, 1, 1, 1)
    into["bias"][count:] -= 2 * scale.log()  # the log-variances
    out["bias"] += out["weight"][:, :, 0, 0] @ mean
    out["weight"] *= scale.view(1, -1, 1, 1)


def _weights(layer: nn.Module | None) -> dict[str, Tensor]:
    """The layer's own parameters by name."""
    assert layer is not None
    return {name: value.detach() for name, value in layer.named_parameters()}
