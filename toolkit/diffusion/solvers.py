"""Steps along the flow, and the target that replaces several of them by one.

In sigma-space DDIM with eta 0 (Song et al. 2021) is an Euler step. The clean end is sigma 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from .denoiser import Cond, Denoiser
from .schedule import alpha, like


def euler_step(x: Tensor, x0: Tensor, sigma_t: Tensor, sigma_s: Tensor) -> Tensor:
    """``x_s = x0 + (sigma_s / sigma_t) (x - x0)``; sigma_t > 0, either direction."""
    return torch.lerp(x0, x, like(sigma_s / sigma_t, x))


def roll(denoiser: Denoiser, x: Tensor, sigmas: Sequence[Tensor], *, cond: Cond, w: Tensor | None) -> Tensor:
    """x after Euler steps through the noise levels ``sigmas``, each (B,); one evaluation a step."""
    for sigma_t, sigma_s in pairwise(sigmas):
        x = euler_step(x, denoiser(x, sigma_t, cond=cond, w=w), sigma_t, sigma_s)
    return x


def roll_2m(
    denoiser: Denoiser, x: Tensor, sigmas: Sequence[Tensor], *, cond: Cond, w: Tensor | None
) -> Tensor:
    """:func:`roll` with DPM-Solver++(2M) (Lu et al. 2022, algorithm 2), in either direction.

    The first step of each sample, those after a wait (a step of length 0) and the one to sigma 0 are of first
    order.
    """
    previous, h_last = x, torch.zeros_like(sigmas[0])
    for sigma_t, sigma_s in pairwise(sigmas):
        x0 = denoiser(x, sigma_t, cond=cond, w=w)
        h = torch.where(sigma_s > 0, (sigma_t / sigma_s).log(), 0.0)
        ratio = torch.where(h_last != 0, h / (2 * h_last), 0.0)
        x = euler_step(x, x0 + like(ratio, x) * (x0 - previous), sigma_t, sigma_s)
        previous, h_last = x0, h
    return x


def chord_velocity(x_t: Tensor, x_s: Tensor, sigma_t: Tensor, sigma_s: Tensor) -> Tensor:
    """The velocity at x_t with which ONE Euler step from sigma_t lands on x_s (progressive distillation's
    target).

    ``v = (cos d z_t - z_s) / sin d`` with ``z = alpha x``, ``sin d = alpha_t alpha_s (sigma_t - sigma_s)``
    and ``cos d = alpha_t alpha_s (1 + sigma_t sigma_s)`` (Salimans & Ho 2022, appendix D, solved for v): no
    division by alpha or sigma, so it holds at both ends. Levels (B,); sigma_t != sigma_s.
    """
    a_t = alpha(sigma_t)
    weight_t = a_t * (1 + sigma_t * sigma_s) / (sigma_t - sigma_s)
    weight_s = 1 / (a_t * (sigma_t - sigma_s))
    return like(weight_t, x_t) * x_t - like(weight_s, x_s) * x_s


def start_noise(noise: Tensor, sigma: Tensor) -> Tensor:
    """Pure noise at the top of the schedule, ``x = eps sqrt(1 + sigma^2)``: unit-variance z, as hosts
    start.
    """
    return noise / like(alpha(sigma), noise)
