"""Progressive distillation with a guidance input: two teacher steps become one, again and again.

Meng et al. 2023, stage 2 (algorithm 2), after Salimans & Ho 2022. Each halving is a fold (diffusion/folding):
the student of N steps lands, from each entry of its grid, where two steps of the student of 2 N landed; the
same w goes into every teacher step. For their stochastic sampler (algorithm 3) it lands two cells further
down, which is again two steps of the teacher's, and one from the last entry. Convention: trailing grids, the
last step lands on exactly clean.

``origin`` says who is imitated first: "guided" runs stage 1 and halves from ``finest`` steps; "pair" skips
both and makes one fold straight from the guided pair, ``substeps`` teacher steps into one. Unguided there is
no stage 1: its student would be the teacher.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from ..diffusion.errors import BadInput
from ..diffusion.folding import CELLS, FoldLoss, routes
from ..diffusion.grid import Grid
from ..diffusion.method import Phase, Setting
from . import guided, sfddm


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
    """Stage 1 and the halvings down to ``setting.steps``, or the one fold; if asked for the sharpening."""
    folds = _folds(config, setting)
    if not config.sharpen:
        return folds
    whole = sfddm.Config(velocity_at=config.velocity_at, inside=config.inside, sharpen=config.sharpen)
    return (*folds, sfddm.phases(whole, setting)[-1])


def _folds(config: Config, setting: Setting) -> tuple[Phase, ...]:
    if config.finest < 1 or config.substeps < 1:
        raise BadInput(f"finest {config.finest} and substeps {config.substeps}: both must be at least 1")
    if config.origin == "pair":
        return (_fold(config, setting, setting.steps, config.substeps, teacher="pair"),)
    counts = [setting.steps]
    finest = max(config.finest, setting.steps * (1 if setting.guided else 2))
    while counts[-1] * 2 <= finest:
        counts.append(counts[-1] * 2)
    later = [_fold(config, setting, count, 2, teacher="previous") for count in reversed(counts[:-1])]
    if not setting.guided:
        return (replace(later[0], teacher="pair"), *later[1:])
    return (guided.phase(guided.Config(), replace(setting, steps=counts[-1])), *later)


def _fold(
    config: Config, setting: Setting, steps: int, substeps: int, *, teacher: Literal["pair", "previous"]
) -> Phase:
    total, cells = len(setting.schedule), CELLS[setting.sampler]
    grid = Grid.trailing(steps, total)
    path = routes(grid, Grid.trailing(steps * -(-substeps // cells), total), cells=cells)
    return Phase(
        name=f"fold-{steps}",
        grid=grid,
        prediction_type="v_prediction" if steps <= config.velocity_at else setting.prediction_type,
        teacher=teacher,
        loss=FoldLoss(
            grid=grid,
            routes=path,
            schedule=setting.schedule,
            guide=teacher == "pair",
            inside=config.inside,
            on_policy=config.on_policy,
            sampler=setting.sampler,
        ),
        teacher_evaluations=setting.cost(teacher, len(path[0])),
        own_evaluations=config.on_policy * (steps - 1) / 2,
        sampler=setting.sampler,
        any_start=config.inside > 0,
        dial=setting.guided,
    )
