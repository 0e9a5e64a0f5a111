"""An encoder: turns a picture into the noise that its teacher's flow makes it of, in a few steps.

Meng et al. 2023 distil reverse DDIM for editing: encoded with one text and decoded with another, a picture
keeps what the texts have in common. One fold (diffusion/folding): the grid ascends, from timestep 0, where
the picture stands for itself, to the top; from each entry the teacher is rolled back up to the next one by
DPM++ 2M, and the student's one step must land there. Convention: no guidance and so no dial, for guided
encoding inverts badly (Starodubcev et al. 2024); targets in v-form, which hold at the clean end.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..diffusion.denoiser import Denoiser
from ..diffusion.errors import BadInput
from ..diffusion.folding import FoldLoss, routes
from ..diffusion.grid import Grid
from ..diffusion.method import Batch, Phase, Setting, draw_timesteps
from ..diffusion.solvers import roll_2m


@dataclass(frozen=True)
class Config:
    substeps: int = field(
        default=0,
        metadata={"help": "teacher steps in one of the encoder's; 0: so many that it walks 16 in all"},
    )


def phases(config: Config, setting: Setting) -> tuple[Phase, ...]:
    """One phase."""
    if config.substeps < 0 or setting.sampler != "deterministic":
        raise BadInput(
            f"substeps {config.substeps} and sampler {setting.sampler}: an encoder needs 0 or more, and is "
            "deterministic"
        )
    total = len(setting.schedule)
    grid = Grid.encoding(setting.steps, total)
    path = routes(grid, grid.refined(config.substeps or -(-16 // len(grid)), total), cells=1)
    fold = FoldLoss(grid=grid, routes=path, schedule=setting.schedule, guide=True, roll=roll_2m)
    return (
        Phase(
            name=f"encoder-{setting.steps}",
            grid=grid,
            prediction_type=setting.prediction_type,
            teacher="pair",
            loss=EncodingLoss(fold),
            teacher_evaluations=len(path[0]),
            asks_always=True,
            any_start=False,
            dial=False,
        ),
    )


@dataclass(frozen=True)
class EncodingLoss:
    """The fold, unguided, from pictures without noise at timestep 0 and noised ones above."""

    fold: FoldLoss

    def __call__(
        self, *, student: Denoiser, teacher: Denoiser, batch: Batch, generator: torch.Generator
    ) -> Tensor:
        batch = replace(batch, w=None, states=None, on_trajectory=None)
        entries = self.fold.grid.timesteps
        drawn = draw_timesteps(entries, len(batch.x0), inside=0.0, generator=generator)
        timestep = drawn.to(batch.x0.device)
        noised = batch.start(timestep, schedule=self.fold.schedule, generator=generator)
        x = torch.where((timestep == 0).reshape(-1, 1, 1, 1), batch.x0, noised)
        posed = self.fold.aimed(teacher, x, timestep, batch)
        return posed.error(student.velocity(posed.x, posed.sigma, cond=batch.cond))
