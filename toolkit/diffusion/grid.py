"""Grids: the descending noise levels that a student was trained on, ending at clean (sigma 0)."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from .schedule import CLEAN, NoiseSchedule


def trailing_timesteps(steps: int, total: int = 1000) -> tuple[int, ...]:
    """``round(total - j * total / steps) - 1`` for j = 0 .. steps-1, exact, ties to even (Lin et al. 2023).

    Being rounded from the same rational numbers, the grid of N is every k-th entry of the grid of k N.
    """
    return tuple(round(Fraction(total * (steps - j), steps)) - 1 for j in range(steps))


@dataclass(frozen=True)
class Grid:
    """``timesteps``: descending, within 0 .. T-1; the landing point after the last one is clean."""

    timesteps: tuple[int, ...]

    @classmethod
    def trailing(cls, steps: int, total: int = 1000) -> Grid:
        return cls(trailing_timesteps(steps, total))

    def __len__(self) -> int:
        return len(self.timesteps)

    def sigmas(self, schedule: NoiseSchedule) -> Tensor:
        """(N + 1,) float64, descending, the last 0."""
        return schedule.sigma(torch.tensor([*self.timesteps, CLEAN]))

    def cell(self, timestep: Tensor) -> Tensor:
        """(B,) index j of the cell (g[j+1], g[j]] that holds each timestep (B,); none lies above g[0]."""
        ascending = torch.tensor(list(reversed(self.timesteps)), device=timestep.device)
        return len(self) - 1 - torch.searchsorted(ascending, timestep)
