"""Samplers in sigma-space, with k-diffusion's signature, for every host.

``sample_*(model, x, sigmas, extra_args=None, callback=None, disable=None)``: ``model(x, sigma * ones(B),
**extra_args)`` answers with x0; ``sigmas`` is descending, on the CPU or x's device; ``callback`` gets a dict
with x, i, sigma, sigma_hat and denoised after each evaluation. ``disable`` (a progress bar switch) is
accepted and unused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..diffusion.errors import BadInput
from ..diffusion.schedule import NoiseSchedule
from ..diffusion.solvers import euler_step, start_noise
from ..diffusion.spec import Sampler

Model = Callable[..., Tensor]
Callback = Callable[[dict[str, Any]], None]


def sample_deterministic(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
) -> Tensor:
    """Euler steps (DDIM, eta 0): Meng et al.'s deterministic N-step sampler, and DDIM of a guided teacher."""
    ones = x.new_ones(len(x))
    for i in range(len(sigmas) - 1):
        sigma_t, sigma_s = sigmas[i].to(x) * ones, sigmas[i + 1].to(x) * ones
        x0 = model(x, sigma_t, **(extra_args or {}))
        _tell(callback, i, x, sigmas[i], x0)
        x = euler_step(x, x0, sigma_t, sigma_s)
    return x


def sample_dpmpp_2m(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2), for teachers; the step to sigma 0 is of first order."""
    ones = x.new_ones(len(x))
    previous: Tensor | None = None
    for i in range(len(sigmas) - 1):
        sigma_t, sigma_s = float(sigmas[i]), float(sigmas[i + 1])
        x0 = model(x, sigma_t * ones, **(extra_args or {}))
        _tell(callback, i, x, sigmas[i], x0)
        slope = x0
        if previous is not None and sigma_s > 0:
            h, h_last = math.log(sigma_t / sigma_s), math.log(float(sigmas[i - 1]) / sigma_t)
            slope = x0 + (x0 - previous) * (h / (2 * h_last))
        x = euler_step(x, slope, sigma_t * ones, sigma_s * ones)
        previous = x0
    return x


def _tell(callback: Callback | None, i: int, x: Tensor, sigma: Tensor, x0: Tensor) -> None:
    if callback is not None:
        callback({"x": x, "i": i, "sigma": sigma, "sigma_hat": sigma, "denoised": x0})


def student_sampler(sampler: Sampler) -> Callable[..., Tensor]:
    """The sampling function of a StudentSpec's ``sampler``."""
    if sampler == "deterministic":
        return sample_deterministic
    raise BadInput(f"sampler {sampler!r} is not one that this FewStep can run; update FewStep")


def start_timestep(strength: float, total: int = 1000) -> int:
    """Strength f in (0, 1] -> training timestep round(total f) - 1, at least 0."""
    if not 0 < strength <= 1:
        raise BadInput(f"strength {strength:g} was asked for; it must be above 0 and at most 1")
    return max(round(total * strength) - 1, 0)


def walk(
    timesteps: Sequence[int],
    schedule: NoiseSchedule,
    *,
    start_sigma: float | None = None,
    end_sigma: float = 0.0,
    any_start: bool = True,
) -> Tensor:
    """Descending float64 sigmas to walk from ``start_sigma`` (None: the first entry) to ``end_sigma``.

    Evaluations at the start and at the trained ``timesteps`` strictly below it; the last sigma is
    ``end_sigma``. Without ``any_start`` the start snaps to the nearest trained entry (on the logarithmic
    scale). This is the one rule for img2img, hires fix and detailers in every host.
    """
    trained = schedule.sigma(torch.tensor(list(timesteps))).tolist()
    start = trained[0] if start_sigma is None else start_sigma
    if not any_start:
        distances = [abs(math.log(sigma / start)) for sigma in trained]
        start = trained[distances.index(min(distances))]
    same = 1 + 1e-4
    inner = [sigma for sigma in trained if end_sigma * same < sigma and sigma * same < start]
    return torch.tensor([start, *inner, end_sigma], dtype=torch.float64)


def strength_sigma(strength: float, schedule: NoiseSchedule) -> float | None:
    """Where img2img of a strength in (0, 1] starts; None, the first entry of any grid, for strength 1."""
    if strength == 1:
        return None
    return float(schedule.sigma(torch.tensor(start_timestep(strength, len(schedule)))))


def initial_latent(shape: Sequence[int], *, seed: int, sigma: float, x0: Tensor | None = None) -> Tensor:
    """x (B, C, H, W) float32 on the CPU to start from: pure noise, or with a picture's latent ``x0 + sigma
    eps``.
    """
    noise = torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed))
    if x0 is not None:
        return x0.float().cpu() + sigma * noise
    return start_noise(noise, torch.full((len(noise),), sigma))
