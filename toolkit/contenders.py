"""Who takes part in the comparison of methods (``python -m toolkit.compare``): settings of ``--demo`` runs.

Each is given as many updates as the same work allows it. Work is counted in evaluations of the network, a
trained one for three (forward, and backward for two); the teacher's pictures, which all but the last group
share, are not counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

GUIDANCES = (2.0, 4.0, 8.0)
STEPS = (8, 4, 2, 1)


@dataclass(frozen=True)
class Contender:
    """``steps``: a student of each, for ``seeds`` seeds, and for more seeds of those in ``seeded``;
    ``options`` of ``toolkit.distill``, by name. ``updates`` fixes them, one number a phase, where the
    contender is not held to the common work. ``measured_at``: of the teacher's samplers, and of students that
    run at any number; ``samples`` None as the comparison wants it. ``chain``: the students of every phase are
    measured. ``draws``: learns from drawings. ``students_of``: another's students are measured, no own ones;
    ``starts_from``: each goes on from that one's student of as many steps.
    """

    name: str
    says: str
    options: Mapping[str, Any]
    steps: tuple[int, ...] = (4, 2)
    seeds: int = 1
    seeded: tuple[int, ...] = ()
    guidances: tuple[float, ...] = GUIDANCES
    strengths: tuple[float, ...] = ()
    measured_at: tuple[int, ...] = ()
    samples: int | None = None
    updates: tuple[int, ...] = ()
    chain: bool = False
    draws: bool = False
    students_of: str = ""
    starts_from: str = ""
    group: str = "methods at equal work"


SFDDM: Mapping[str, Any] = {"method": "sfddm"}
HALVING: Mapping[str, Any] = {"method": "progressive", "origin": "guided"}
CONSISTENCY: Mapping[str, Any] = {"method": "consistency"}
LONG: Mapping[str, Any] = {**HALVING, "finest": 16, "pictures": 6144, "trajectory_share": 0.5, "ema": 0.995}
LONG_UPDATES = (3000, 1200, 2000, 2500, 2500)
SHARPENED: Mapping[str, Any] = {**SFDDM, "sharpen": 0.25}
SHARPENED_UPDATES = (100, 600)

ABLATIONS = "what decides the defaults (one fold, but for what is named)"
RECIPE = "the README's longer run"
DIAL = "the README's longer run, at other guidances"
ANY = "any number of steps by one fold"

CONTENDERS: tuple[Contender, ...] = (
    Contender("fold", "`sfddm`: one fold", SFDDM, STEPS, seeds=3, seeded=(4, 2, 1), measured_at=(*STEPS,)),
    Contender(
        "recipe",
        "stage 1, four halvings",
        LONG,
        steps=(1,),
        seeds=3,
        guidances=(4.0,),
        samples=2048,
        updates=LONG_UPDATES,
        chain=True,
        group=RECIPE,
    ),
    Contender(
        "halving",
        "`progressive`: stage 1, halvings from 16",
        HALVING,
        STEPS,
        seeds=3,
        seeded=(4, 2),
    ),
    Contender(
        "any",
        "`sfddm`",
        SFDDM,
        steps=(16, 12, 10, 7, 6, 5, 3),
        guidances=(4.0,),
        measured_at=tuple(range(1, 17)),
        group=ANY,
    ),
    Contender("lcm", "`consistency` (LCM), one for all", CONSISTENCY, (4,), measured_at=STEPS),
    Contender("released", "`sfddm --sfddm-target released`", {**SFDDM, "sfddm_target": "released"}),
    Contender("pcm", "`consistency --ends phase` (PCM)", {**CONSISTENCY, "ends": "phase"}),
    Contender("tcd", "`consistency --ends free` (TCD)", {**CONSISTENCY, "ends": "free"}, (4,)),
    Contender("lora", "`--student lora`, rank 32", {**SFDDM, "student": "lora"}, group=ABLATIONS),
    Contender("data", "`--data`: 1,536 captioned drawings", SFDDM, draws=True, group=ABLATIONS),
    Contender("on-policy", "`--on-policy 0.5`", {**SFDDM, "on_policy": 0.5}, (2,), group=ABLATIONS),
    Contender("epsilon", "`--velocity-at 0`: epsilon", {**SFDDM, "velocity_at": 0}, (2, 1), group=ABLATIONS),
    Contender("velocity", "`--velocity-at 8`: v", {**SFDDM, "velocity_at": 8}, (4,), group=ABLATIONS),
    Contender(
        "halving-once",
        "`progressive --finest 8`: stage 1, halvings from 8",
        {**HALVING, "finest": 8},
        steps=(2,),
        group=ABLATIONS,
    ),
    Contender(
        "pair",
        "`progressive --origin pair`: DDIM in place of DPM++ 2M",
        {"method": "progressive", "origin": "pair"},
        steps=(4,),
        group=ABLATIONS,
    ),
    Contender(
        "stochastic", "`--sampler stochastic`", {**SFDDM, "sampler": "stochastic"}, (4,), group=ABLATIONS
    ),
    Contender(
        "asking",
        "`--trajectory-share 0`: the teacher is always asked",
        {**SFDDM, "trajectory_share": 0.0},
        steps=(4,),
        group=ABLATIONS,
    ),
    Contender("features", "`--feature-weight 0.1`", {**SFDDM, "feature_weight": 0.1}, (4,), group=ABLATIONS),
    Contender(
        "early",
        "`--timesteps 999 899 749 499`",
        {**SFDDM, "timesteps": (999, 899, 749, 499)},
        steps=(4,),
        group=ABLATIONS,
    ),
    Contender(
        "late",
        "`--timesteps 999 599 299 99`",
        {**SFDDM, "timesteps": (999, 599, 299, 99)},
        steps=(4,),
        group=ABLATIONS,
    ),
    Contender(
        "lcm-own",
        "`consistency --consistency-loss lcm`: LCM's own loss",
        {**CONSISTENCY, "consistency_loss": "lcm"},
        steps=(4,),
        measured_at=STEPS,
        group=ABLATIONS,
    ),
    Contender(
        "unguided",
        "`sfddm --guidance 1 1`: no dial",
        {**SFDDM, "guidance": (1.0, 1.0), "guidance_default": 1.0},
        steps=(4,),
        guidances=(1.0,),
        group="without guidance",
    ),
    Contender(
        "sharpened",
        "then `sfddm --sharpen 0.25`",
        SHARPENED,
        steps=(2, 1),
        seeds=3,
        guidances=(4.0,),
        samples=2048,
        updates=SHARPENED_UPDATES,
        starts_from="recipe",
        group=RECIPE,
    ),
    Contender(
        "recipe-dial",
        "stage 1, four halvings",
        LONG,
        steps=(1,),
        seeds=3,
        guidances=(1.0, 2.0, 8.0),
        chain=True,
        students_of="recipe",
        group=DIAL,
    ),
    Contender(
        "sharpened-dial",
        "then `sfddm --sharpen 0.25`",
        SHARPENED,
        steps=(2, 1),
        seeds=3,
        guidances=(1.0, 2.0, 8.0),
        students_of="sharpened",
        group=DIAL,
    ),
    Contender(
        "recipe-strengths",
        "stage 1, four halvings",
        LONG,
        steps=(1,),
        seeds=3,
        guidances=(4.0,),
        strengths=(0.2, 0.35, 0.5, 0.7),
        samples=512,
        chain=True,
        students_of="recipe",
        group="image to image by the same students, at guidance 4",
    ),
)
