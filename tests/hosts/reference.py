"""What a student's sampling must give, written down a second time: the papers' formulas on diffusers' UNet.

Independent of the toolkit's samplers, schedules and denoisers: unit-variance latents ``z = a x0 + s eps``
(a^2 + s^2 = 1, float64 outside the network), DDIM steps, the guidance embedding of diffusers. Latents come
and go as a host's LATENT does, not scaled by the VAE's factor.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderTiny, LatentConsistencyModelPipeline, UNet2DConditionModel
from make_checkpoint import taesd_to_single_file
from torch import Tensor

from toolkit.training.layout import unet_config_from, unet_from_ldm

SCALE = 0.18215
_BETAS = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
ALPHAS_CUMPROD = np.cumprod(1 - _BETAS)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """||found - expected|| / ||expected||; infinite for another shape."""
    if found.shape != expected.shape:
        return float("inf")
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def level(timestep: int) -> tuple[float, float]:
    """(a, s) of a training timestep; -1 is clean."""
    if timestep < 0:
        return 1.0, 0.0
    return float(ALPHAS_CUMPROD[timestep] ** 0.5), float((1 - ALPHAS_CUMPROD[timestep]) ** 0.5)


def timestep_of_strength(strength: float) -> int:
    return round(1000 * strength) - 1


def noise_of(seed: int, shape: Sequence[int]) -> Tensor:
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed))


def merged(
    state: Mapping[str, Tensor], lora: Mapping[str, Tensor], strength: float = 1.0
) -> dict[str, Tensor]:
    """A UNet's state (diffusers' keys) with a kohya LoRA added, and a guidance input if the file has one."""
    result = {key: value.double() for key, value in state.items()}
    used = {"fewstep.cond_proj.weight"} & set(lora)
    for key in state:
        module, _, kind = key.rpartition(".")
        name = "lora_unet_" + module.replace(".", "_")
        if kind == "weight" and f"{name}.lora_up.weight" in lora:
            names = [f"{name}.{part}" for part in ("lora_up.weight", "lora_down.weight", "alpha")]
            up, down, alpha = (lora[each].double() for each in names)
            result[key] += strength * alpha / len(down) * (up @ down)
            used |= set(names)
        if (full := f"{name}.{'diff' if kind == 'weight' else 'diff_b'}") in lora:
            result[key] += strength * lora[full].double()
            used.add(full)
    if missing := set(lora) - used:
        raise ValueError(f"the LoRA's keys {sorted(missing)[:3]} fit no module")
    if "fewstep.cond_proj.weight" in lora:
        result["time_embedding.cond_proj.weight"] = lora["fewstep.cond_proj.weight"].double()
    return {key: value.float() for key, value in result.items()}


class Unet:
    """diffusers' UNet of a checkpoint's tensors; ``change`` may edit its state (diffusers' keys) first."""

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        *,
        prediction_type: str = "epsilon",
        change: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict,
    ) -> None:
        config = unet_config_from(tensors)
        state = change(dict(unet_from_ldm(tensors)))
        if "time_embedding.cond_proj.weight" in state:
            config["time_cond_proj_dim"] = 256
        with torch.device("meta"):
            self.network = UNet2DConditionModel(**config).eval()
        self.network.load_state_dict({k: v.clone() for k, v in state.items()}, assign=True)
        self.has_dial = config.get("time_cond_proj_dim") is not None
        self.prediction_type = prediction_type

    @staticmethod
    def w_embedding(guidance: Sequence[float]) -> Tensor:
        """(B, 256), by diffusers' own function."""
        w = torch.tensor(guidance, dtype=torch.float32) - 1
        return LatentConsistencyModelPipeline.get_guidance_scale_embedding(None, w, 256)

    @torch.inference_mode()
    def __call__(
        self,
        z: Tensor,
        timestep: int,
        cond: Tensor,
        guidance: Sequence[float] | None,
        *,
        concat: Tensor | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> Tensor:
        """x0_hat (float64); ``guidance``: one a picture, for a network with a dial."""
        embedded = None
        if self.has_dial:
            assert guidance is not None and len(guidance) == len(z)
            embedded = self.w_embedding(guidance)
        entered = z.float() if concat is None else torch.cat([z.float(), concat.float()], dim=1)
        out = self.network(
            entered,
            torch.full((len(z),), timestep),
            encoder_hidden_states=cond.expand(len(z), -1, -1),
            timestep_cond=embedded,
            **(extra or {}),
        ).sample.double()
        a, s = level(timestep)
        return a * z - s * out if self.prediction_type == "v_prediction" else (z - s * out) / a


@dataclass
class Sampling:
    """One run of a student. ``denoise``: (z, timestep) -> x0_hat, scaled; see :func:`student`.

    ``timesteps``: evaluations, descending; ``land``: the timestep where it stops, -1 for clean.
    """

    denoise: Callable[[Tensor, int], Tensor]
    timesteps: Sequence[int]
    seed: int = 0
    land: int = -1
    stochastic: bool = False
    mask: Tensor | Callable[[int], Tensor] | None = None
    """(B or 1, 1, H, W) at the latent's size, 1 where the picture may change; soft values blend. Or one for
    each timestep.
    """

    def __call__(self, latent: Tensor, *, is_noisy: bool = False) -> Tensor:
        """From noise over ``latent`` (zeros: from nothing), or from one that carries its noise already."""
        image, noise = SCALE * latent.double(), noise_of(self.seed, latent.shape).double()
        later = torch.Generator().manual_seed(self.seed + 1)
        first = self.timesteps[0]
        a, s = level(first)
        if is_noisy:
            z, noise = a * image, torch.zeros_like(image)
        elif first == 999:
            z = noise + a * image  # unit variance at the top, where s is only nearly 1
        else:
            z = s * noise + a * image
        path = [*self.timesteps, self.land]
        for i, t in enumerate(self.timesteps):
            a, s = level(t)
            mask = self.mask(t) if callable(self.mask) else torch.ones(()) if self.mask is None else self.mask
            entered = mask * z + (1 - mask) * (a * image + s * noise)
            x0 = mask * self.denoise(entered, t) + (1 - mask) * image
            eps = (z - a * x0) / s
            a_next, s_next = level(path[i + 1])
            if self.stochastic and i + 1 < len(self.timesteps):
                a_down, s_down = level(path[i + 2])
                down = a_down * x0 + s_down * eps
                back = (s_next**2 - (a_next / a_down * s_down) ** 2) ** 0.5
                fresh = torch.randn(z.shape, generator=later).double()
                z = a_next / a_down * down + back * fresh
            else:
                z = a_next * x0 + s_next * eps
        a, _ = level(self.land)
        return (z / a / SCALE).float()


def encoding(
    denoise: Callable[[Tensor, int], Tensor], timesteps: Sequence[int], latent: Tensor, *, top: int = 999
) -> Tensor:
    """The noise of a picture's ``latent``, by DDIM upwards: as a host leaves it, at the noise level ``top``.

    The picture stands for itself at timestep 0, so it enters as ``a x0``.
    """
    path = [*timesteps, top]
    z = level(path[0])[0] * SCALE * latent.double()
    for t, following in itertools.pairwise(path):
        a, s = level(t)
        x0 = denoise(z, t)
        a_next, s_next = level(following)
        z = a_next * x0 + s_next * (z - a * x0) / s
    return (z / level(top)[0] / SCALE).float()


def student(
    unet: Unet, cond: Tensor, guidance: float | Sequence[float] | None, *, concat: Tensor | None = None
) -> Callable[[Tensor, int], Tensor]:
    """The denoiser of one prompt: one guidance for all pictures, or one for each."""

    def denoise(z: Tensor, timestep: int) -> Tensor:
        each = [guidance] * len(z) if isinstance(guidance, float | int) else guidance
        return unet(
            z, timestep, cond, each, concat=None if concat is None else concat.expand(len(z), -1, -1, -1)
        )

    return denoise


def at_latent_size(mask: Tensor, latent: Tensor) -> Tensor:
    """(B, 1, H, W) of a MASK (B, 8 H, 8 W), as hosts shrink it."""
    return torch.nn.functional.interpolate(mask[:, None], size=latent.shape[-2:], mode="bilinear")


def without_the_masked(image: Tensor, mask: Tensor) -> Tensor:
    """An inpainting model's picture: grey wherever the mask is above one half."""
    return torch.where(mask[..., None] > 0.5, 0.5, image)


def taesd(tensors: Mapping[str, Tensor]) -> AutoencoderTiny:
    """diffusers' network of the checkpoint's VAE."""
    with torch.device("meta"):
        network = AutoencoderTiny().eval()
    keys = list(network.state_dict())
    named = dict(zip(taesd_to_single_file(network.state_dict()), keys, strict=True))
    network.load_state_dict({named[key]: tensors[key].clone() for key in named}, assign=True)
    return network


@torch.inference_mode()
def encode(tensors: Mapping[str, Tensor], image: Tensor) -> Tensor:
    """LATENT of an IMAGE (B, H, W, 3) in 0..1."""
    return taesd(tensors).encode(image.movedim(-1, 1) * 2 - 1).latents
