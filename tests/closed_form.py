"""Gaussian data: the exact denoiser, flow and guided pair in closed form, in place of a teacher."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from toolkit.diffusion.denoiser import Cond
from toolkit.diffusion.grid import Grid
from toolkit.diffusion.hidden import show
from toolkit.diffusion.prediction import velocity_from
from toolkit.diffusion.schedule import NoiseSchedule, like
from toolkit.diffusion.solvers import chord_velocity, roll

SCHEDULE = NoiseSchedule.scaled_linear()


@dataclass(frozen=True, eq=False)
class GaussianTeacher:
    """Data N(mean, spread^2); the mean is ``cond["mean"]`` (B, 1, 1, 1)."""

    spread: float = 0.6

    def __call__(self, x: Tensor, sigma: Tensor, *, cond: Cond, w: Tensor | None = None) -> Tensor:
        s, mean = like(sigma, x), cond["mean"].to(x)
        show(x)
        return mean + self.spread**2 / (self.spread**2 + s**2) * (x - mean)

    def velocity(self, x: Tensor, sigma: Tensor, *, cond: Cond, w: Tensor | None = None) -> Tensor:
        return velocity_from(self(x, sigma, cond=cond, w=w), x, sigma, "sample")

    def flow(self, x: Tensor, sigma_t: Tensor, sigma_s: Tensor, *, cond: Cond) -> Tensor:
        """Where the probability flow takes x from sigma_t to sigma_s, exactly."""
        t, s, mean = like(sigma_t, x), like(sigma_s, x), cond["mean"].to(x)
        return mean + ((self.spread**2 + s**2) / (self.spread**2 + t**2)).sqrt() * (x - mean)


@dataclass(frozen=True, eq=False)
class PerfectStudent:
    """Answers with the chord to where the teacher's steps land, in whatever cell of the grid sigma lies."""

    teacher: GaussianTeacher
    grid: Grid
    finer: Grid
    cells: int = 1
    roll: Callable[..., Tensor] = roll

    def velocity(self, x: Tensor, sigma: Tensor, *, cond: Cond, w: Tensor | None = None) -> Tensor:
        landed, end = self._landed(x, sigma, cond, w)
        return chord_velocity(x, landed, sigma, end)

    def __call__(self, x: Tensor, sigma: Tensor, *, cond: Cond, w: Tensor | None = None) -> Tensor:
        landed, end = self._landed(x, sigma, cond, w)
        t, s = like(sigma, x), like(end, x)
        return (t * landed - s * x) / (t - s)

    def _landed(self, x: Tensor, sigma: Tensor, cond: Cond, w: Tensor | None) -> tuple[Tensor, Tensor]:
        k, ascending = len(self.finer) // len(self.grid), self.grid.ascending
        points = torch.tensor(self.finer.points)
        timestep = SCHEDULE.timestep(sigma)
        first = self.grid.cell(timestep) * k
        later = torch.maximum if ascending else torch.minimum
        left = (len(self.finer) - first).clamp(max=self.cells * k)
        steps = range(self.cells * k, -1, -1)
        path = [later(timestep, points[first + (left - i).clamp(min=0)]) for i in steps]
        sigmas = [SCHEDULE.sigma(t).to(sigma) for t in path]
        return self.roll(self.teacher, x, sigmas, cond=cond, w=None), sigmas[-1]


def means(batch: int, value: float | None = None) -> Cond:
    """Conditioning of a batch: means -1 .. 1, or all one value."""
    row = torch.linspace(-1, 1, batch) if value is None else torch.full((batch,), value)
    return {"mean": row.reshape(batch, 1, 1, 1)}
