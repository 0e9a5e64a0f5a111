"""Progressive distillation with a guidance input: two teacher steps become one, again and again.

Meng et al. 2023, stage 2 (algorithm 2), after Salimans & Ho 2022. The student of N steps answers, at each
entry of its grid, with the velocity whose single step lands where the teacher's steps landed
(``chord_velocity``); the same w goes into every teacher step. Weight: truncated SNR, max(SNR, 1) on x0.
Convention: trailing grids, the last step lands on exactly clean. Samples that lie on a kept trajectory of the
original teacher learn to land on its own points: exact targets that cost no evaluation and carry no error of
the phases before.

``origin`` says who is imitated first: "guided" runs stage 1 and halves from ``finest`` steps; "pair" skips
both and makes one fold straight from the guided pair, ``substeps`` teacher steps into one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from ..diffusion.denoiser import Denoiser
from ..diffusion.errors import BadInput
from ..diffusion.grid import Grid
from ..diffusion.method import (
    Batch,
    Phase,
    Setting,
    draw_timesteps,
    guided_teacher,
    truncated_snr_weight,
    velocity_error,
)
from ..diffusion.schedule import CLEAN, NoiseSchedule
from ..diffusion.solvers import chord_velocity, roll
from . import guided


@dataclass(frozen=True)
class Config:
    origin: Literal["guided", "pair"] = field(
        default="guided",
        metadata={"help": "start from a stage-1 student, or fold once straight from the CFG pair"},
    )
    finest: int = field(default=16, metadata={"help": "at least so many steps before the first halving"})
    substeps: int = field(default=4, metadata={"help": "teacher steps in one student step, with origin pair"})
    velocity_at: int = field(
        default=2,
        metadata={"help": "students of so many steps or fewer predict v; 0 keeps the teacher's prediction"},
    )
    inside: float = field(
        default=0.25,
        metadata={"help": "share of each batch that starts inside a cell: img2img at any strength"},
    )


def phases(config: Config, setting: Setting) -> tuple[Phase, ...]:
    """Stage 1 and the halvings down to ``setting.steps``, or the one fold."""
    if config.finest < 1 or config.substeps < 1:
        raise BadInput(f"finest {config.finest} and substeps {config.substeps}: both must be at least 1")
    if config.origin == "pair":
        return (_fold(config, setting, setting.steps, teacher="pair"),)
    counts = [setting.steps]
    while counts[-1] * 2 <= max(config.finest, setting.steps):
        counts.append(counts[-1] * 2)
    stage1 = guided.phase(guided.Config(), replace(setting, steps=counts[-1]))
    return (stage1, *(_fold(config, setting, count, teacher="previous") for count in reversed(counts[:-1])))


def _fold(config: Config, setting: Setting, steps: int, *, teacher: Literal["pair", "previous"]) -> Phase:
    substeps = config.substeps if teacher == "pair" else 2
    grid = Grid.trailing(steps, len(setting.schedule))
    return Phase(
        name=f"fold-{steps}",
        grid=grid,
        prediction_type="v_prediction" if steps <= config.velocity_at else setting.prediction_type,
        teacher=teacher,
        loss=FoldLoss(
            grid=grid,
            finer=Grid.trailing(steps * substeps, len(setting.schedule)),
            substeps=substeps,
            inside=config.inside,
            schedule=setting.schedule,
            guide=teacher == "pair",
        ),
        teacher_evaluations=substeps * (2 if teacher == "pair" else 1),
    )


@dataclass(frozen=True)
class FoldLoss:
    """``substeps`` teacher steps, at the entries of the ``finer`` grid, into one step of ``grid``."""

    grid: Grid
    finer: Grid
    substeps: int
    inside: float
    schedule: NoiseSchedule
    guide: bool

    def __call__(
        self, *, student: Denoiser, teacher: Denoiser, batch: Batch, generator: torch.Generator
    ) -> Tensor:
        drawn = draw_timesteps(self.grid.timesteps, len(batch.x0), inside=self.inside, generator=generator)
        timestep = batch.snapped(drawn.to(batch.x0.device))
        x = batch.start(timestep, schedule=self.schedule, generator=generator)
        path = self.teacher_path(timestep)
        sigma_t, sigma_s = (self.schedule.sigma(t).float() for t in (path[0], path[-1]))
        with torch.no_grad():
            landed = self.landing(teacher, x, path, batch)
            target = chord_velocity(x, landed, sigma_t, sigma_s)
        found = student.velocity(x, sigma_t, cond=batch.cond, w=batch.w)
        return truncated_snr_weight(sigma_t) * velocity_error(found, target)

    def landing(self, teacher: Denoiser, x: Tensor, path: Sequence[Tensor], batch: Batch) -> Tensor:
        """Where the teacher goes from x along the path: its kept trajectory's point, or by asking it."""
        known, landed = batch.known(path[-1])
        rows = (~known).nonzero()[:, 0]
        if len(rows) == 0:
            return landed
        asked = batch.rows(rows)
        guide = guided_teacher(teacher, asked) if self.guide else teacher
        sigmas = [self.schedule.sigma(t[rows]).float() for t in path]
        return landed.index_copy(0, rows, roll(guide, x[rows], sigmas, cond=asked.cond, w=asked.w))

    def teacher_path(self, timestep: Tensor) -> list[Tensor]:
        """substeps + 1 timesteps, each (B,), from the start to the lower end of its cell.

        From a grid entry these are the teacher's own entries. A start inside a cell waits (a step of length
        0) in place of the entries above it.
        """
        finer = torch.tensor([*self.finer.timesteps, CLEAN], device=timestep.device)
        first = self.grid.cell(timestep) * self.substeps
        return [timestep, *(torch.minimum(timestep, finer[first + k]) for k in range(1, self.substeps + 1))]
