"""What a distillation method is made of: a batch, and phases that each end in a usable student."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from .denoiser import Cond, Denoiser, Guided
from .grid import Grid
from .prediction import PredictionType
from .schedule import CLEAN, NoiseSchedule, alpha, like
from .solvers import start_noise
from .spec import Sampler


@dataclass(frozen=True)
class Batch:
    """x0: (B, C, H, W) clean latents; cond: B rows; uncond: one row; w: (B,) guidance_scale - 1, None where
    nobody is guided.

    ``states`` (B, K, C, H, W), where given, are points of the teacher's own trajectory to x0 at the timesteps
    ``state_timesteps`` (descending) under the same w. The rows ``on_trajectory`` (B,) start from such points
    and know where the teacher goes from there, so that it need not be asked again. ``cfg_rescale``: of the
    teacher's guidance.
    """

    x0: Tensor
    cond: Cond
    uncond: Cond
    w: Tensor | None
    states: Tensor | None = None
    state_timesteps: tuple[int, ...] = ()
    on_trajectory: Tensor | None = None
    cfg_rescale: float = 0.0

    def start(self, timestep: Tensor, *, schedule: NoiseSchedule, generator: torch.Generator) -> Tensor:
        """x at the timesteps (B,): ``x0 + sigma eps``, or the kept trajectory's point where there is one.

        Of the noised rows at the very top, half are pure noise: sampling starts there, although the top of
        the schedule still holds a trace of the picture (alpha 0.068 in Stable Diffusion). Noise is drawn on
        the CPU.
        """
        noise = torch.randn(self.x0.shape, generator=generator).to(self.x0.device)
        sigma = schedule.sigma(timestep).float()
        x = self.x0 + like(sigma, noise) * noise
        pure = (torch.rand(len(x), generator=generator) < 0.5).to(x.device) & (timestep == len(schedule) - 1)
        x = torch.where(pure.reshape(-1, 1, 1, 1), start_noise(noise, sigma), x)
        known, point = self.known(timestep)
        return torch.where(known.reshape(-1, 1, 1, 1), point, x)

    def rows(self, rows: Tensor) -> Batch:
        """The batch of some rows, without their trajectories."""
        cond = {name: value[rows] for name, value in self.cond.items()}
        w = None if self.w is None else self.w[rows]
        return Batch(x0=self.x0[rows], cond=cond, uncond=self.uncond, w=w, cfg_rescale=self.cfg_rescale)

    def known(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """Which rows (B,) have their trajectory's point at the timesteps (B,), and the points (B, C, H, W).

        The clean end, -1, is x0 itself. Where nothing is known the point means nothing.
        """
        if self.states is None or self.on_trajectory is None:
            return torch.zeros_like(timestep, dtype=torch.bool), self.x0
        kept = torch.tensor([*self.state_timesteps, CLEAN], device=timestep.device)
        matches = timestep[:, None] == kept
        points = torch.cat([self.states, self.x0[:, None].to(self.states)], dim=1)
        point = points[torch.arange(len(timestep)), matches.int().argmax(1)].to(self.x0)
        return matches.any(1) & self.on_trajectory, point

    def snapped(self, timestep: Tensor) -> Tensor:
        """The timesteps (B,), those of rows on the trajectory moved to the nearest point of it."""
        if self.states is None or self.on_trajectory is None:
            return timestep
        kept = torch.tensor(self.state_timesteps, device=timestep.device)
        nearest = kept[(timestep[:, None] - kept).abs().argmin(1)]
        return torch.where(self.on_trajectory, nearest, timestep)


class Loss(Protocol):
    """One method's objective at one phase."""

    def __call__(
        self, *, student: Denoiser, teacher: Denoiser, batch: Batch, generator: torch.Generator
    ) -> Tensor:
        """Loss of each sample (B,), float32. Random numbers come from the CPU generator alone."""
        ...


class Criticism(Protocol):
    """An objective that needs a second network trained beside the student, which learns what that paints."""

    @property
    def alone(self) -> float:
        """Share of the phase's updates in which it learns alone first."""
        ...

    def paint(self, student: Denoiser, batch: Batch, *, generator: torch.Generator) -> Tensor:
        """What the student paints, with a gradient."""
        ...

    def learn(self, x0: Tensor, *, critic: Denoiser, batch: Batch, generator: torch.Generator) -> Tensor:
        """Loss of the second network for each sample (B,)."""
        ...

    def judge(
        self, x0: Tensor, *, teacher: Denoiser, critic: Denoiser, batch: Batch, generator: torch.Generator
    ) -> Tensor:
        """Loss of the student for each sample (B,), beside the phase's own."""
        ...


@dataclass(frozen=True)
class Phase:
    """One training phase; its finished student walks ``grid``.

    ``teacher`` says who is imitated: "pair" is the original teacher with classifier-free guidance, "previous"
    the student of the phase before. ``teacher_evaluations`` counts network evaluations of the teacher a
    sample and update (the pair counts two an evaluation of the guided denoiser), for samples on a trajectory
    too if ``asks_always``; ``own_evaluations`` those of the student beside the one that is trained. What the
    finished student's file says: ``sampler``, whether it starts anywhere (``any_start``) and whether it has a
    guidance input (``dial``). An encoder's grid ascends. ``caption_dropout``: the share of samples that it
    wants without their caption. With a ``criticism`` a second network is trained beside the student.
    """

    name: str
    grid: Grid
    prediction_type: PredictionType
    teacher: Literal["pair", "previous"]
    loss: Loss
    teacher_evaluations: int
    asks_always: bool = False
    own_evaluations: float = 0.0
    lr_scale: float = 1.0
    caption_dropout: float = 0.0
    sampler: Sampler = "deterministic"
    any_start: bool = True
    dial: bool = True
    criticism: Criticism | None = None


@dataclass(frozen=True)
class Setting:
    """What a method is told of the run when it plans its phases. ``sampler``: the one that its student is
    for; ``guided``: whether the guidance stays adjustable, else the student is an unguided one.
    """

    schedule: NoiseSchedule
    prediction_type: PredictionType
    steps: int
    sampler: Sampler = "deterministic"
    guided: bool = True

    def cost(self, teacher: Literal["pair", "previous"], evaluations: int) -> int:
        """Network evaluations of so many of a phase's teacher."""
        return evaluations * (2 if teacher == "pair" and self.guided else 1)


def guided_teacher(denoiser: Denoiser, batch: Batch) -> Denoiser:
    """The teacher as classifier-free guidance runs it on this batch."""
    return Guided(denoiser, batch.uncond, batch.cfg_rescale)


def velocity_error(velocity: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each sample (B,), float32."""
    return ((velocity.float() - target.float()) ** 2).flatten(1).mean(1)


def natural_weight(sigma: Tensor, prediction_type: PredictionType) -> Tensor:
    """Turns a v-error into the plain error of the network's own output: alpha^2 for epsilon, 1 for v."""
    return alpha(sigma) ** 2 if prediction_type == "epsilon" else torch.ones_like(sigma)


def truncated_snr_weight(sigma: Tensor) -> Tensor:
    """``max(SNR, 1)`` on x0 as a weight on v-error: ``max(alpha^2, sigma_vp^2)``, within [0.5, 1]."""
    signal = alpha(sigma) ** 2
    return torch.maximum(signal, 1 - signal)


def draw_timesteps(
    entries: Sequence[int], batch: int, *, inside: float, low: int = 0, generator: torch.Generator
) -> Tensor:
    """(B,) training timesteps: grid entries, each equally often; a share ``inside`` uniform over low .. T-1
    instead.

    The second kind starts inside the grid's cells, as img2img, hires fix and detailers do.
    """
    at_entries = torch.tensor(entries)[torch.randint(len(entries), (batch,), generator=generator)]
    anywhere = torch.randint(low, max(entries) + 1, (batch,), generator=generator)
    return torch.where(torch.rand(batch, generator=generator) < inside, anywhere, at_entries)
