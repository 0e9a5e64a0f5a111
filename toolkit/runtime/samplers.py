"""Samplers in sigma-space, with k-diffusion's signature, for every host.

``sample_*(model, x, sigmas, extra_args=None, callback=None, disable=None)``: ``model(x, sigma * ones(B),
**extra_args)`` answers with x0; ``sigmas`` is descending, on the CPU or x's device; ``callback`` gets a dict
with x, i, sigma, sigma_hat and denoised after each evaluation. ``disable`` (a progress bar switch) is
accepted and unused. Samplers that add noise draw it from ``noise(x)``, of unit variance and x's shape.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..diffusion.errors import BadInput
from ..diffusion.schedule import NoiseSchedule
from ..diffusion.solvers import euler_step, start_noise
from ..diffusion.spec import Sampler

Model = Callable[..., Tensor]
Noise = Callable[[Tensor], Tensor]
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


def sample_stochastic(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    *,
    noise: Noise,
    beyond: float = 0.0,
) -> Tensor:
    """Meng et al.'s stochastic N-step sampler: two cells down, then one cell of noise up.

    The student was trained to jump two cells; ``sigma_up^2 = sigma[i+1]^2 - sigma[i+2]^2`` brings the noise
    level back to the next entry. ``beyond``: the trained entry below the last of ``sigmas``, for a walk that
    stops early.
    """
    ones = x.new_ones(len(x))
    levels = [*sigmas.tolist(), beyond]
    for i in range(len(sigmas) - 1):
        sigma_t, sigma_m, sigma_s = levels[i], levels[i + 1], min(levels[i + 1 : i + 3])
        x0 = model(x, sigma_t * ones, **(extra_args or {}))
        _tell(callback, i, x, sigmas[i], x0)
        x = euler_step(x, x0, sigma_t * ones, sigma_s * ones)
        if sigma_m > sigma_s:
            x = x + math.sqrt(sigma_m**2 - sigma_s**2) * noise(x)
    return x


def sample_consistency(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    *,
    noise: Noise,
) -> Tensor:
    """Multistep consistency sampling (Song et al. 2023, algorithm 1): to clean, then all the noise anew."""
    ones = x.new_ones(len(x))
    for i in range(len(sigmas) - 1):
        x0 = model(x, sigmas[i].to(x) * ones, **(extra_args or {}))
        _tell(callback, i, x, sigmas[i], x0)
        x = x0 + float(sigmas[i + 1]) * noise(x) if sigmas[i + 1] > 0 else x0
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


def student_sampler(sampler: Sampler, *, noise: Noise, beyond: float = 0.0) -> Callable[..., Tensor]:
    """The sampling function of a StudentSpec's ``sampler``, with its noise bound."""
    if sampler == "deterministic":
        return sample_deterministic
    if sampler == "stochastic":
        return partial(sample_stochastic, noise=noise, beyond=beyond)
    if sampler == "consistency":
        return partial(sample_consistency, noise=noise)
    raise BadInput(f"sampler {sampler!r} is not one that this FewStep can run; update FewStep")


def later_noise(seeds: Sequence[int]) -> Noise:
    """Noise for samplers that add some: of each sample's own seed + 1, float32 from the CPU.

    Fewer seeds than samples: one stream for the whole batch, as hosts draw it.
    """
    generators = [torch.Generator().manual_seed(seed + 1) for seed in seeds]

    def draw(x: Tensor) -> Tensor:
        if len(generators) == len(x):
            rows = [torch.randn(x[:1].shape, generator=generator) for generator in generators]
            return torch.cat(rows).to(x)
        return torch.randn(x.shape, generator=generators[0]).to(x)

    return draw


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
    ``end_sigma``. A start above the first entry, and without ``any_start`` any start, snaps to the nearest
    trained entry (on the logarithmic scale). This is the one rule for img2img, hires fix and detailers in
    every host.
    """
    trained = schedule.sigma(torch.tensor(list(timesteps))).tolist()
    start = trained[0] if start_sigma is None else start_sigma
    if not any_start or start > trained[0]:
        distances = [abs(math.log(sigma / start)) for sigma in trained]
        start = trained[distances.index(min(distances))]
    same = 1 + 1e-4
    inner = [sigma for sigma in trained if end_sigma * same < sigma and sigma * same < start]
    return torch.tensor([start, *inner, end_sigma], dtype=torch.float64)


def entry_below(timesteps: Sequence[int], schedule: NoiseSchedule, sigma: float) -> float:
    """The highest trained noise level below ``sigma``, or 0."""
    trained = schedule.sigma(torch.tensor(list(timesteps))).tolist()
    return max((level for level in trained if level * (1 + 1e-4) < sigma), default=0.0)


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
