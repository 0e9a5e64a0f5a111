"""Consistency distillation: points next to each other on the teacher's flow must land in the same place.

At x, on the noise level of t, the guided teacher makes one short DDIM step to t_n, an entry of a fine grid of
``solver_steps``; the student's jump from x to s must land where its own jump from there lands (no gradient).
As everywhere, the jump is one Euler step, the error the velocity's (``chord_velocity``), under truncated SNR,
and w is an input. ``ends`` says where s is:

* "clean": LCM (Luo et al. 2023). Sampled by going to clean and noising anew, at any number of steps.
* "phase": PCM (Wang et al. 2024), without its discriminator: the lower end of the student's own cell, as in
  progressive distillation; sampled by Euler steps on the student's grid.
* "free": TCD (Zheng et al. 2024): any entry below t_n, evenly. The network is not told which, so that it
  learns the mean of the chords to all of them; where the flow bends, no student has zero loss. Sampled on the
  student's grid, deterministically or with TCD's noise ("stochastic", its s one cell further down).

Convention: no average of the student as target (as in LCM's and PCM's LoRA training), no c_skip: at clean the
jump has length 0. ``consistency_loss`` "lcm" is LCM's pseudo-Huber distance of x0 in place of the SNR weight,
to measure against: it neglects low noise, and its students gained less from more steps (docs/methods.md).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from ..diffusion.denoiser import Denoiser
from ..diffusion.errors import BadInput
from ..diffusion.folding import Posed
from ..diffusion.grid import Grid
from ..diffusion.method import Batch, Phase, Setting, draw_timesteps, guided_teacher
from ..diffusion.schedule import CLEAN, NoiseSchedule, alpha, like
from ..diffusion.solvers import chord_velocity, euler_step, roll
from ..diffusion.spec import Sampler

HUBER = 0.001

Ends = Literal["clean", "phase", "free"]


@dataclass(frozen=True)
class Config:
    ends: Ends = field(
        default="clean",
        metadata={"help": "where jumps end: clean (LCM), the student's own step (PCM), anywhere below (TCD)"},
    )
    solver_steps: int = field(default=50, metadata={"help": "DDIM steps of the teacher from noise to clean"})
    consistency_loss: Literal["snr", "lcm"] = field(
        default="snr", metadata={"help": "truncated SNR on the velocity, or LCM's Huber distance of x0"}
    )
    velocity_at: int = field(
        default=2,
        metadata={"help": "students of so many steps or fewer predict v; 0 keeps the teacher's prediction"},
    )


def phases(config: Config, setting: Setting) -> tuple[Phase, ...]:
    """One phase."""
    total = len(setting.schedule)
    if not setting.steps <= config.solver_steps <= total:
        raise BadInput(
            f"solver steps {config.solver_steps}: expected {setting.steps}, the student's own, to {total}"
        )
    if setting.sampler == "stochastic" and config.ends != "free":
        raise BadInput(
            f"--sampler stochastic: consistency students of --ends {config.ends} have their own sampler; "
            "leave it out, or choose --ends free"
        )
    sampler: Sampler = "consistency" if config.ends == "clean" else setting.sampler
    few = setting.steps <= config.velocity_at
    grid = Grid.trailing(setting.steps, total)
    return (
        Phase(
            name=f"consistency-{setting.steps}",
            grid=grid,
            prediction_type="v_prediction" if few else setting.prediction_type,
            teacher="pair",
            loss=ConsistencyLoss(
                grid=grid,
                solver=Grid.trailing(config.solver_steps, total),
                schedule=setting.schedule,
                ends=config.ends,
                loss=config.consistency_loss,
            ),
            teacher_evaluations=setting.cost("pair", 1),
            asks_always=True,
            own_evaluations=1,
            sampler=sampler,
            dial=setting.guided,
        ),
    )


@dataclass(frozen=True)
class ConsistencyLoss:
    grid: Grid
    solver: Grid
    schedule: NoiseSchedule
    ends: Ends
    loss: Literal["snr", "lcm"] = "snr"

    def __call__(
        self, *, student: Denoiser, teacher: Denoiser, batch: Batch, generator: torch.Generator
    ) -> Tensor:
        posed = self.pose(student=student, teacher=teacher, batch=batch, generator=generator)
        velocity = student.velocity(posed.x, posed.sigma, cond=batch.cond, w=batch.w)
        if self.loss == "snr":
            return posed.error(velocity)
        x0_error = like(alpha(posed.sigma) * posed.sigma, velocity) * (velocity - posed.target)
        return ((x0_error**2 + HUBER**2).sqrt() - HUBER).flatten(1).mean(1)

    @torch.no_grad()
    def pose(
        self, *, student: Denoiser, teacher: Denoiser, batch: Batch, generator: torch.Generator
    ) -> Posed:
        """Starts, and where the student itself lands from a step further along the teacher's flow."""
        drawn = draw_timesteps(self.solver.timesteps, len(batch.x0), inside=0.0, generator=generator)
        timestep = batch.snapped(drawn.to(batch.x0.device))
        below, end = self.below(timestep, generator)
        t, n, s = (self.schedule.sigma(step).float() for step in (timestep, below, end))
        x = batch.start(timestep, schedule=self.schedule, generator=generator)
        x_n = roll(guided_teacher(teacher, batch), x, [t, n], cond=batch.cond, w=batch.w)
        jumped = euler_step(x_n, student(x_n, n, cond=batch.cond, w=batch.w), n, s)
        landed = torch.where((n == s).reshape(-1, 1, 1, 1), x_n, jumped)
        return Posed(x, t, chord_velocity(x, landed, t, s))

    def below(self, timestep: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Where the teacher's step ends and where the jumps do, each (B,)."""
        solver = torch.tensor(self.solver.points, device=timestep.device)
        # The first entry that lies below: of a timestep between two, that is the lower one.
        first = self.solver.cell(timestep) + 1
        if self.ends == "clean":
            return solver[first], torch.full_like(timestep, CLEAN)
        if self.ends == "phase":
            end = torch.tensor(self.grid.points, device=timestep.device)[self.grid.cell(timestep) + 1]
            return torch.maximum(solver[first], end), end
        share = torch.rand(len(timestep), generator=generator).to(timestep.device)
        return solver[first], solver[first + (share * (len(solver) - first)).long()]
