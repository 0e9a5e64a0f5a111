"""The noise schedule: training timestep <-> sigma, in float64.

A schedule is the table ``alphas_cumprod`` of a discrete variance-preserving process (Ho et al. 2020).
``alpha = sqrt(alphas_cumprod)``, ``sigma = sqrt(1 - alphas_cumprod) / alpha``, ``snr = sigma ** -2``.
The clean end, sigma 0, is the timestep -1: the landing point of every trailing grid.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LAST_ALPHA_CUMPROD = 4.8973451890853435e-08
"""Stands for the zero of a zero-terminal-SNR schedule, as in ComfyUI: sigma about 4519 instead of
infinity.
"""

CLEAN = -1
"""The timestep of noise-free data."""


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """``alphas_cumprod``: (T,) float64, descending, on the CPU."""

    alphas_cumprod: Tensor

    @classmethod
    def scaled_linear(
        cls, *, beta_start: float = 0.00085, beta_end: float = 0.012, timesteps: int = 1000
    ) -> NoiseSchedule:
        """Stable Diffusion's: betas linear in their square root (Rombach et al. 2022)."""
        betas = torch.linspace(beta_start**0.5, beta_end**0.5, timesteps, dtype=torch.float64) ** 2
        return cls(torch.cumprod(1 - betas, dim=0))

    def zero_terminal_snr(self) -> NoiseSchedule:
        """Shift and scale sqrt(alphas_cumprod) so that the last is 0 (Lin et al. 2023, algorithm 1), then
        clamp it.
        """
        root = self.alphas_cumprod.sqrt()
        root = (root - root[-1]) * root[0] / (root[0] - root[-1])
        return NoiseSchedule((root**2).clamp(min=LAST_ALPHA_CUMPROD))

    def __len__(self) -> int:
        return len(self.alphas_cumprod)

    @property
    def sigmas(self) -> Tensor:
        """(T,) float64, ascending: sigma of the timesteps 0 .. T-1."""
        return ((1 - self.alphas_cumprod) / self.alphas_cumprod).sqrt()

    def sigma(self, timestep: Tensor) -> Tensor:
        """float64 sigma of integer timesteps -1 .. T-1 (any shape; -1, the clean end, gives 0)."""
        table = torch.cat([torch.zeros(1, dtype=torch.float64), self.sigmas]).to(timestep.device)
        return table[timestep + 1]

    def timestep(self, sigma: Tensor) -> Tensor:
        """Integer timestep 0 .. T-1 whose sigma is nearest on the logarithmic scale, as hosts choose it."""
        log_sigmas = self.sigmas.log().to(sigma.device)
        log_sigma = sigma.double().clamp(min=1e-10).log()
        above = torch.searchsorted(log_sigmas, log_sigma).clamp(1, len(self) - 1)
        nearer_below = log_sigma - log_sigmas[above - 1] <= log_sigmas[above] - log_sigma
        return torch.where(nearer_below, above - 1, above)


def alpha(sigma: Tensor) -> Tensor:
    """Signal level of the unit-variance latent: ``1 / sqrt(1 + sigma^2)``."""
    return (1 + sigma**2).rsqrt()


def like(values: Tensor, x: Tensor) -> Tensor:
    """Per-sample values (B,) shaped (B, 1, 1, 1) and in x's dtype, to multiply x (B, C, H, W)."""
    return values.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))
