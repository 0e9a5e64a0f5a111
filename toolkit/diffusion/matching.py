"""Distribution matching: a student's pictures are pulled to where its teacher finds more of its own kind.

Yin et al. 2024, "One-step Diffusion with Distribution Matching Distillation". A *critic*, a denoiser that
learns the student's own pictures, says where those lie dense, the guided teacher where the teacher's do; the
difference of the two at a noised picture is the gradient that the picture gets. It adds what the mean squared
error of a fold lacks at 1 and 2 steps, where many pictures fit one noise as well as not: contrast and detail.
No discriminator, no real data. Conventions here: the same w goes to critic and teacher, the fold's loss stays
beside it (so that one noise still means one picture), and the critic begins as the teacher.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from .denoiser import Denoiser
from .grid import Grid
from .method import Batch, guided_teacher, natural_weight, velocity_error
from .prediction import PredictionType, velocity_from
from .schedule import NoiseSchedule, like
from .solvers import euler_step, start_noise

ENDS = 20
"""Timesteps at either end of the schedule that no picture is judged at: nothing is left to see, or to do."""


@dataclass(frozen=True)
class DistributionMatching:
    """Of a deterministic student on ``grid``; ``prediction_type``: the teacher's, and so the critic's.

    ``weight``: of the judgement beside the fold's error. ``alone``: the share of a phase's updates in which
    the critic learns alone first.
    """

    grid: Grid
    schedule: NoiseSchedule
    prediction_type: PredictionType
    weight: float
    alone: float = 0.4

    def paint(self, student: Denoiser, batch: Batch, *, generator: torch.Generator) -> Tensor:
        """x0 (B, C, H, W) of the student's own, from new noise; the gradient reaches its last step."""
        count = len(batch.x0)
        noise = torch.randn(batch.x0.shape, generator=generator).to(batch.x0.device)
        levels = [sigma.expand(count) for sigma in self.grid.sigmas(self.schedule).float().to(noise.device)]
        x = start_noise(noise, levels[0])
        with torch.no_grad():
            for sigma_t, sigma_s in pairwise(levels[:-1]):
                x = euler_step(x, student(x, sigma_t, cond=batch.cond, w=batch.w), sigma_t, sigma_s)
        return student(x, levels[-2], cond=batch.cond, w=batch.w)

    def learn(self, x0: Tensor, *, critic: Denoiser, batch: Batch, generator: torch.Generator) -> Tensor:
        """The critic's error (B,) on the student's pictures x0, at any noise."""
        x, sigma = self._noised(x0, 0, generator)
        target = velocity_from(x0, x, sigma, "sample")
        found = critic.velocity(x, sigma, cond=batch.cond, w=batch.w)
        return natural_weight(sigma, self.prediction_type) * velocity_error(found, target)

    def judge(
        self, x0: Tensor, *, teacher: Denoiser, critic: Denoiser, batch: Batch, generator: torch.Generator
    ) -> Tensor:
        """Of each picture (B,): a loss whose gradient points from where the critic takes it to where the
        teacher does, in units of its distance from the latter."""
        with torch.no_grad():
            x, sigma = self._noised(x0, ENDS, generator)
            theirs = guided_teacher(teacher, batch)(x, sigma, cond=batch.cond, w=batch.w)
            own = critic(x, sigma, cond=batch.cond, w=batch.w)
            far = (x0 - theirs).abs().flatten(1).mean(1).clamp(min=1e-3)
            goal = x0 - (own - theirs) / like(far, x0)
        return self.weight / 2 * (x0 - goal).square().flatten(1).mean(1)

    def _noised(self, x0: Tensor, ends: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The pictures at random noise levels (B,), and those."""
        timestep = torch.randint(ends, len(self.schedule) - ends, (len(x0),), generator=generator)
        sigma = self.schedule.sigma(timestep).float().to(x0.device)
        noise = torch.randn(x0.shape, generator=generator).to(x0.device)
        return x0 + like(sigma, x0) * noise, sigma
