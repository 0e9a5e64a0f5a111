"""One network that takes the guidance weight as an input and matches the guided pair.

Meng et al. 2023, "On Distillation of Guided Diffusion Models", stage 1 (algorithm 1): the student with input
w learns ``v_c + w (v_c - v_u)`` of the teacher at every timestep. The student starts as the conditional
teacher, with a zero projection of w. Convention: the error is that of the network's own output ("natural"
weight), which for an epsilon teacher was measured to beat the velocity by far (methods with few steps convert
later).
"""

from __future__ import annotations

from dataclasses import dataclass, field

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
    natural_weight,
    velocity_error,
)
from ..diffusion.prediction import PredictionType
from ..diffusion.schedule import NoiseSchedule


@dataclass(frozen=True)
class Config:
    top_share: float = field(
        default=0.05, metadata={"help": "share of the batch at the noisiest timestep, where sampling starts"}
    )


def phases(config: Config, setting: Setting) -> tuple[Phase, ...]:
    if not setting.guided:
        raise BadInput(
            "method guided teaches a network its guidance, and --guidance 1 1 leaves none; give a wider range"
        )
    return (phase(config, setting),)


def phase(config: Config, setting: Setting) -> Phase:
    return Phase(
        name="guided",
        grid=Grid.trailing(setting.steps, len(setting.schedule)),
        prediction_type=setting.prediction_type,
        teacher="pair",
        loss=GuidedLoss(config, setting.schedule, setting.prediction_type),
        teacher_evaluations=2,
        asks_always=True,
        lr_scale=1.5,
        sampler=setting.sampler,
    )


@dataclass(frozen=True)
class GuidedLoss:
    config: Config
    schedule: NoiseSchedule
    prediction_type: PredictionType

    def __call__(
        self, *, student: Denoiser, teacher: Denoiser, batch: Batch, generator: torch.Generator
    ) -> Tensor:
        top = len(self.schedule) - 1
        timestep = draw_timesteps(
            [top], len(batch.x0), inside=1 - self.config.top_share, generator=generator
        ).to(batch.x0.device)
        sigma = self.schedule.sigma(timestep).float()
        x = batch.start(timestep, schedule=self.schedule, generator=generator)
        with torch.no_grad():
            target = guided_teacher(teacher, batch).velocity(x, sigma, cond=batch.cond, w=batch.w)
        found = student.velocity(x, sigma, cond=batch.cond, w=batch.w)
        return natural_weight(sigma, self.prediction_type) * velocity_error(found, target)
