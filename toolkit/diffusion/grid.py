"""Grids: the noise levels that a student was trained on, descending to clean (sigma 0).

An encoder's ascend: it turns pictures into noise, evaluated first at timestep 0, where the picture stands for
itself, and its last step lands on the top of the schedule.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

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
    """``timesteps``: descending (an encoder's: ascending), within 0 .. T-1, to the landing point ``end``."""

    timesteps: tuple[int, ...]
    end: int = CLEAN

    @classmethod
    def trailing(cls, steps: int, total: int = 1000) -> Grid:
        return cls(trailing_timesteps(steps, total))

    @classmethod
    def encoding(cls, steps: int, total: int = 1000) -> Grid:
        """The trailing grid walked backwards."""
        top, *rest = trailing_timesteps(steps, total)
        return cls((0, *reversed(rest)), end=top)

    @property
    def ascending(self) -> bool:
        return self.end > self.timesteps[-1]

    @property
    def points(self) -> tuple[int, ...]:
        """The entries and the end."""
        return (*self.timesteps, self.end)

    def refined(self, parts: int, total: int = 1000) -> Grid:
        """Each cell in so many parts; trailing grids stay trailing."""
        if self == Grid.trailing(len(self), total):
            return Grid.trailing(parts * len(self), total)
        inner = [
            round(Fraction(a * (parts - i) + b * i, parts))
            for a, b in pairwise(self.points)
            for i in range(parts)
        ]
        return Grid(tuple(inner), self.end)

    def __len__(self) -> int:
        return len(self.timesteps)

    def sigmas(self, schedule: NoiseSchedule) -> Tensor:
        """(N + 1,) float64, the last that of the end: 0 where it is clean."""
        return schedule.sigma(torch.tensor(self.points))

    def cell(self, timestep: Tensor) -> Tensor:
        """(B,) index j of the cell (g[j+1], g[j]], of an encoder [g[j], g[j+1]), that holds each timestep
        (B,); none lies before g[0].
        """
        if self.ascending:
            entries = torch.tensor(self.timesteps, device=timestep.device)
            return torch.searchsorted(entries, timestep, right=True) - 1
        ascending = torch.tensor(list(reversed(self.timesteps)), device=timestep.device)
        return len(self) - 1 - torch.searchsorted(ascending, timestep)
