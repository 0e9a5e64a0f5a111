"""Many steps of a teacher folded into one of the student's: the loss that several methods share.

At each entry of its grid the student learns the velocity whose single step lands where the teacher's steps
landed (``chord_velocity``). *Routes* say through which timesteps the teacher goes there. Weight: truncated
SNR, max(SNR, 1) on x0. Samples that lie on a kept trajectory of the teacher's learn to land on its own
points: exact targets that cost no evaluation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor

from .denoiser import Denoiser
from .grid import Grid
from .method import Batch, draw_timesteps, guided_teacher, truncated_snr_weight, velocity_error
from .schedule import NoiseSchedule, like
from .solvers import chord_velocity, euler_step, roll
from .spec import Sampler

Routes: TypeAlias = tuple[tuple[int, ...], ...]
"""For each entry of a grid the timesteps that the teacher visits after it, all of one length; the student's
step lands on the last."""

CELLS: dict[str, int] = {"deterministic": 1, "stochastic": 2}
"""How many cells of its grid a student of each sampler jumps over at once; the last jumps are shorter."""


def routes(grid: Grid, finer: Grid, *, cells: int) -> Routes:
    """Through the entries of ``finer``, which has each cell of ``grid`` in equal parts, over ``cells`` cells.

    Where so many are not left, the teacher waits (a step of length 0) before it goes.
    """
    parts = len(finer) // len(grid)
    found: list[tuple[int, ...]] = []
    for first in range(0, len(finer), parts):
        route = finer.points[first + 1 : first + cells * parts + 1]
        found.append((*[finer.points[first]] * (cells * parts - len(route)), *route))
    return tuple(found)


@dataclass(frozen=True, eq=False)
class Posed:
    """What a student is asked: its velocity at ``x`` (B, C, H, W) with ``sigma`` (B,), and the answer."""

    x: Tensor
    sigma: Tensor
    target: Tensor

    def error(self, velocity: Tensor) -> Tensor:
        """The weighted error (B,) of a student's answer."""
        return truncated_snr_weight(self.sigma) * velocity_error(velocity, self.target)


@dataclass(frozen=True)
class FoldLoss:
    """``inside``: share of the starts within cells; ``guide``: whether the teacher is the guided pair.

    ``on_policy``: share of the samples that start where the student itself gets to from the top, as in
    Zhou et al. 2024 ("Simple and fast distillation") and DAgger. Rows on a kept trajectory then start from
    the student's state and land on the trajectory's point, so that they learn to undo the student's errors;
    the teacher is asked where it goes from the others.
    """

    grid: Grid
    routes: Routes
    schedule: NoiseSchedule
    guide: bool
    inside: float = 0.0
    on_policy: float = 0.0
    sampler: Sampler = "deterministic"
    roll: Callable[..., Tensor] = roll

    def __call__(
        self, *, student: Denoiser, teacher: Denoiser, batch: Batch, generator: torch.Generator
    ) -> Tensor:
        posed = self.pose(student=student, teacher=teacher, batch=batch, generator=generator)
        return posed.error(student.velocity(posed.x, posed.sigma, cond=batch.cond, w=batch.w))

    @torch.no_grad()
    def pose(
        self, *, student: Denoiser, teacher: Denoiser, batch: Batch, generator: torch.Generator
    ) -> Posed:
        """Starts, and where the teacher goes from them."""
        drawn = draw_timesteps(self.grid.timesteps, len(batch.x0), inside=self.inside, generator=generator)
        timestep = batch.snapped(drawn.to(batch.x0.device))
        x = batch.start(timestep, schedule=self.schedule, generator=generator)
        if self.on_policy:
            own, visited = self.visited(student, timestep, batch, generator)
            x = torch.where(own.reshape(-1, 1, 1, 1), visited, x)
            if self.sampler == "stochastic" and batch.on_trajectory is not None:
                batch = replace(batch, on_trajectory=batch.on_trajectory & ~own)
        return self.aimed(teacher, x, timestep, batch)

    @torch.no_grad()
    def aimed(self, teacher: Denoiser, x: Tensor, timestep: Tensor, batch: Batch) -> Posed:
        """Where the teacher goes from x (B, C, H, W) at the timesteps (B,)."""
        path = self.teacher_path(timestep)
        sigma_t, sigma_s = (self.schedule.sigma(t).float() for t in (path[0], path[-1]))
        landed = self.landing(teacher, x, path, batch)
        return Posed(x, sigma_t, chord_velocity(x, landed, sigma_t, sigma_s))

    def landing(self, teacher: Denoiser, x: Tensor, path: Sequence[Tensor], batch: Batch) -> Tensor:
        """Where the teacher goes from x along the path: its kept trajectory's point, or by asking it."""
        known, landed = batch.known(path[-1])
        rows = (~known).nonzero()[:, 0]
        if len(rows) == 0:
            return landed
        asked = batch.rows(rows)
        guide = guided_teacher(teacher, asked) if self.guide else teacher
        sigmas = [self.schedule.sigma(t[rows]).float() for t in path]
        return landed.index_copy(0, rows, self.roll(guide, x[rows], sigmas, cond=asked.cond, w=asked.w))

    def teacher_path(self, timestep: Tensor) -> list[Tensor]:
        """Timesteps, each (B,), from the start along the route of its cell.

        From a grid entry these are the route's own. A start inside a cell waits (a step of length 0) in place
        of those before it.
        """
        route = torch.tensor(self.routes, device=timestep.device)[self.grid.cell(timestep)]
        later = torch.maximum if self.grid.ascending else torch.minimum
        return [timestep, *(later(timestep, route[:, k]) for k in range(route.shape[1]))]

    def visited(
        self, student: Denoiser, timestep: Tensor, batch: Batch, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Which rows (B,) start from the student's own states, and those states (B, C, H, W) at their
        timesteps."""
        entries = torch.tensor(self.grid.timesteps, device=timestep.device)
        own = (torch.rand(len(timestep), generator=generator) < self.on_policy).to(timestep.device)
        own &= (timestep[:, None] == entries).any(1)
        x = batch.start(entries[:1].expand(len(own)), schedule=self.schedule, generator=generator)
        levels = [*self.grid.sigmas(self.schedule).float().to(x.device), x.new_zeros(())]
        for j in range(len(entries) - 1):
            noise = torch.randn(x.shape, generator=generator).to(x)
            rows = (own & (timestep < entries[j])).nonzero()[:, 0]
            # Asked even without a row: a student that processes divide among them is asked by all of them.
            sigma_t, sigma_m = (levels[i].expand(len(rows)) for i in (j, j + 1))
            sigma_s = levels[j + CELLS[self.sampler]].expand(len(rows))
            asked = batch.rows(rows)
            x0 = student(x[rows], sigma_t, cond=asked.cond, w=asked.w)
            step = euler_step(x[rows], x0, sigma_t, sigma_s)
            step = step + like((sigma_m**2 - sigma_s**2).clamp(min=0).sqrt(), step) * noise[rows]
            x = x.index_copy(0, rows, step)
        return own, x
