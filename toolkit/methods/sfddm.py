"""Single-fold distillation: one run to any number of steps, or to any list of timesteps.

After Hong et al., "SFDDM: Single-fold Distillation for Diffusion Models" (ECML PKDD 2025). Two targets:

* "rollout", the paper's promise: from each entry of the student's grid the guided teacher is rolled over the
  gap to the next one, and the student's one step must land there (diffusion/folding). ``feature_weight`` adds
  an L1 of the hidden features to the teacher's at the same input.
* "released", what the authors' code does: the student sees the teacher's own input at the remapped time and
  matches its output and hidden features, L1 each. Initialised from its teacher an unguided student has zero
  loss before training, and its optimum is the teacher with DDIM on the same few timesteps, no better; with a
  guidance input all that is left to learn is the guidance. It is here to be measured against.

``sharpen`` adds a phase of distribution matching (diffusion/matching), which wins at 1 and 2 steps.

Convention: trailing grids unless ``timesteps`` says otherwise; the last step lands on exactly clean.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from ..diffusion.denoiser import Denoiser
from ..diffusion.errors import BadInput
from ..diffusion.folding import CELLS, FoldLoss, routes
from ..diffusion.grid import Grid
from ..diffusion.hidden import watching
from ..diffusion.matching import DistributionMatching
from ..diffusion.method import Batch, Phase, Setting, draw_timesteps, guided_teacher, natural_weight
from ..diffusion.prediction import PredictionType
from ..diffusion.schedule import NoiseSchedule, like
from ..diffusion.solvers import roll_2m


@dataclass(frozen=True)
class Config:
    sfddm_target: Literal["rollout", "released"] = field(
        default="rollout",
        metadata={"help": "roll the teacher over each gap, or match it at the same input as the authors did"},
    )
    timesteps: tuple[int, ...] = field(
        default=(), metadata={"help": "the student's timesteps, descending, in place of the trailing grid"}
    )
    substeps: int = field(
        default=0,
        metadata={
            "help": "teacher steps (DPM++ 2M) in one gap; 0: so many that it walks 8 in all, at least 3"
        },
    )
    feature_weight: float = field(
        default=0.0, metadata={"help": "of the hidden features' error, with target rollout"}
    )
    velocity_at: int = field(
        default=2,
        metadata={"help": "students of so many steps or fewer predict v; 0 keeps the teacher's prediction"},
    )
    inside: float = field(
        default=0.25,
        metadata={"help": "share of each batch that starts inside a cell: img2img at any strength"},
    )
    on_policy: float = field(
        default=0.0, metadata={"help": "share that starts where the student itself gets to from noise"}
    )
    sharpen: float = field(
        default=0.0,
        metadata={
            "help": "weight of distribution matching in a last phase, for 1 or 2 steps; 0: no such phase"
        },
    )


def phases(config: Config, setting: Setting) -> tuple[Phase, ...]:
    """The fold, and if asked for the sharpening."""
    fold = _fold(config, setting)
    return (fold, sharpened(fold, setting, config.sharpen)) if config.sharpen else (fold,)


def sharpened(fold: Phase, setting: Setting, weight: float) -> Phase:
    """A fold of the pair once more, with distribution matching."""
    if setting.sampler != "deterministic":
        raise BadInput(f"--sharpen {weight:g}: only for deterministic students; leave it out")
    if weight < 0:
        raise BadInput(f"--sharpen {weight:g}: expected 0 (none) or more, such as 0.25")
    steps = len(fold.grid)
    beside = (steps - 1) + 3 + 3 + setting.cost("pair", 1) + 1  # painting, learning, judging; 3: trained
    return replace(
        fold,
        name=f"sharpen-{steps}",
        lr_scale=0.5,
        own_evaluations=fold.own_evaluations + beside,
        criticism=DistributionMatching(fold.grid, setting.schedule, setting.prediction_type, weight),
    )


def _fold(config: Config, setting: Setting) -> Phase:
    grid = _grid(config, setting)
    steps, cells = len(grid), CELLS[setting.sampler]
    substeps = config.substeps or max(3, -(-8 // steps))
    path = routes(grid, grid.refined(-(-substeps // cells), len(setting.schedule)), cells=cells)
    loss: RolloutLoss | ReleasedLoss
    if config.sfddm_target == "released":
        prediction: PredictionType = setting.prediction_type
        loss = ReleasedLoss(grid, setting.schedule, config.inside, prediction)
        evaluations, own = setting.cost("pair", 1), 0.0
    else:
        prediction = "v_prediction" if steps <= config.velocity_at else setting.prediction_type
        fold = FoldLoss(
            grid=grid,
            routes=path,
            schedule=setting.schedule,
            guide=True,
            inside=config.inside,
            on_policy=config.on_policy,
            sampler=setting.sampler,
            roll=roll_2m,
        )
        loss = RolloutLoss(fold, config.feature_weight)
        evaluations = setting.cost("pair", len(path[0]))
        own = config.on_policy * (steps - 1) / 2
    return Phase(
        name=f"single-fold-{steps}",
        grid=grid,
        prediction_type=prediction,
        teacher="pair",
        loss=loss,
        teacher_evaluations=evaluations,
        asks_always=config.sfddm_target == "released" or config.feature_weight > 0,
        own_evaluations=own,
        sampler=setting.sampler,
        any_start=config.inside > 0,
        dial=setting.guided,
    )


def _grid(config: Config, setting: Setting) -> Grid:
    """The student's grid; BadInput for a list that is none."""
    top, listed = len(setting.schedule) - 1, tuple(config.timesteps)
    if config.substeps < 0 or config.feature_weight < 0:
        raise BadInput(
            f"substeps {config.substeps} and feature weight {config.feature_weight:g}: expected 0 or more"
        )
    if not listed:
        return Grid.trailing(setting.steps, top + 1)
    if len(listed) != setting.steps:
        raise BadInput(f"--timesteps names {len(listed)}; give --steps {len(listed)} with it")
    if listed[0] != top or min(listed) < 0 or any(a <= b for a, b in pairwise(listed)):
        raise BadInput(
            f"--timesteps {' '.join(map(str, listed))}: expected a falling list that begins at {top}, where "
            "sampling starts from noise, and ends at 0 or above"
        )
    return Grid(listed)


@dataclass(frozen=True)
class RolloutLoss:
    """The fold, and the hidden features of the teacher at the same input."""

    fold: FoldLoss
    feature_weight: float

    def __call__(
        self, *, student: Denoiser, teacher: Denoiser, batch: Batch, generator: torch.Generator
    ) -> Tensor:
        posed = self.fold.pose(student=student, teacher=teacher, batch=batch, generator=generator)
        with watching() as ours:
            found = student.velocity(posed.x, posed.sigma, cond=batch.cond, w=batch.w)
        if not self.feature_weight:
            return posed.error(found)
        _, theirs = _observed(teacher, posed.x, posed.sigma, batch)
        return posed.error(found) + self.feature_weight * _distance(ours[-1], theirs)


@dataclass(frozen=True)
class ReleasedLoss:
    """``mean|o_s - o_t| + mean|h_s - h_t|`` at the same input, o in the network's own prediction type."""

    grid: Grid
    schedule: NoiseSchedule
    inside: float
    prediction_type: PredictionType

    def __call__(
        self, *, student: Denoiser, teacher: Denoiser, batch: Batch, generator: torch.Generator
    ) -> Tensor:
        drawn = draw_timesteps(self.grid.timesteps, len(batch.x0), inside=self.inside, generator=generator)
        timestep = batch.snapped(drawn.to(batch.x0.device))
        sigma = self.schedule.sigma(timestep).float()
        x = batch.start(timestep, schedule=self.schedule, generator=generator)
        target, theirs = _observed(teacher, x, sigma, batch)
        with watching() as ours:
            found = student.velocity(x, sigma, cond=batch.cond, w=batch.w)
        scale = like(natural_weight(sigma, self.prediction_type).sqrt(), found)
        return _distance(scale * found, scale * target) + _distance(ours[-1], theirs)


@torch.no_grad()
def _observed(teacher: Denoiser, x: Tensor, sigma: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """The guided teacher's velocity and hidden features."""
    with watching() as seen:
        velocity = guided_teacher(teacher, batch).velocity(x, sigma, cond=batch.cond, w=batch.w)
    return velocity, seen[-1]


def _distance(a: Tensor, b: Tensor) -> Tensor:
    """Mean absolute difference of each sample (B,), float32."""
    return (a.float() - b.float()).abs().flatten(1).mean(1)
