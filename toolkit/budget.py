"""A run that fits a number of hours (``--hours``): which method, how many updates and pictures.

Costs are those that the plan measures. Phases keep their proportions; the method is chosen only where nothing
was said that decides it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .assembly import Teacher, data_request, measure_costs, phases_of, plan_run, settle
from .diffusion.errors import BadInput
from .methods import find_methods, options_of
from .training.image_samples import ImageSampleRequest
from .training.plan import Costs, Plan
from .training.presets import Room
from .training.settings import Settings

MARGIN = 0.1
"""Of the time, for loading, saving and what the plan misjudges."""

REPORT_EVALUATIONS = 1200
"""Of the network for each prompt of the report, about: mostly the teacher's 50 steps over the dial."""

LEAST_SHARE, MOST_SHARE = 0.25, 4.0
"""Of a method's usual updates: fewer or more were not tried."""

CHAIN_SHARE = 0.5
"""A chain of phases needs so much of its updates; with less time one fold comes nearer to the teacher."""

DATA_SHARE, LEAST_PICTURES = 1 / 3, 256
"""Of the time, for the teacher's own pictures; so many of them at least."""


@dataclass(frozen=True)
class Offer:
    """What one method costs, in seconds: ``training`` at its ``usual`` updates, one number a phase; ``data``
    for so many ``pictures`` of the teacher's, which are fixed where ``data`` cannot be saved on.
    """

    method: str
    usual: tuple[int, ...]
    training: float
    data: float
    pictures: int
    fixed: bool = False


@dataclass(frozen=True)
class Fit:
    """An offer cut to the time, and the sentence that says why."""

    method: str
    updates: tuple[int, ...]
    pictures: int
    says: str


def fit(offers: Sequence[Offer], *, hours: float, report: float, asked: bool) -> Fit:
    """The first of the offers that has enough of its updates in the time; BadInput, with what would fit,
    where none has. ``report``: seconds for the pictures at the end; ``asked``: the method was said.
    """
    room = 3600 * hours * (1 - MARGIN) - report
    shares: list[float] = []
    for number, offer in enumerate(offers):
        pictures = _pictures(offer, room)
        share = (room - offer.data * pictures / offer.pictures) / offer.training
        shares.append(share)
        if share >= (LEAST_SHARE if number == len(offers) - 1 else CHAIN_SHARE):
            used = min(share, MOST_SHARE)
            says = f"{hours:g} h allow {_of_usual(used)} the usual updates of method {offer.method}"
            if number:
                says = (
                    f"{says}, which was chosen because {offers[0].method} would have only "
                    f"{_of_usual(max(0.0, shares[0]))} its own"
                )
            elif not asked and len(offers) > 1:
                says = f"{says}, which was chosen because that is enough for all of its phases"
            if share > MOST_SHARE:
                says += f"; {share:.2g} times would fit, and more than {MOST_SHARE:g} was never tried"
            if pictures < offer.pictures:
                says += f"; {pictures} of the teacher's pictures instead of {offer.pictures}"
            return Fit(offer.method, tuple(max(1, round(u * used)) for u in offer.usual), pictures, says)
    raise BadInput(
        f"--hours {hours:g} is too short on this machine: {_least(offers[-1], report)}; give that much, or "
        "try a smaller --resolution"
    )


def _of_usual(share: float) -> str:
    return f"{share:.0%} of" if share < 1 else f"{share:.2g} times"


def _pictures(offer: Offer, room: float) -> int:
    """As many as their share of the time and the least training allow, the usual number at most."""
    seconds = max(0.0, min(DATA_SHARE * room, room - LEAST_SHARE * offer.training))
    if offer.fixed or offer.data <= seconds:
        return offer.pictures
    return min(offer.pictures, max(LEAST_PICTURES, int(offer.pictures * seconds / offer.data)))


def _least(offer: Offer, report: float) -> str:
    pictures = offer.pictures if offer.fixed else min(offer.pictures, LEAST_PICTURES)
    seconds = offer.data * pictures / offer.pictures + LEAST_SHARE * offer.training + report
    hours = math.ceil(10 * seconds / (1 - MARGIN) / 3600) / 10
    data = f" and {pictures} of the teacher's pictures" if offer.data else ""
    return f"{_of_usual(LEAST_SHARE)} the usual updates of method {offer.method}{data} take about {hours:g} h"


def fit_run(
    hours: float,
    given: Mapping[str, Any],
    config: Mapping[str, Any],
    teacher: Teacher,
    room: Room,
) -> tuple[dict[str, Any], str, Costs]:
    """Flags in place of ``--hours``, the sentence of their choice, and what was measured for it."""
    if not hours > 0:
        raise BadInput(f"--hours {hours:g}: expected a number above 0")
    said = {**config, **given}
    if said.get("updates"):
        raise BadInput("--hours chooses the updates itself; leave out --updates, or --hours")
    own = {option.name for option in options_of(find_methods()["progressive"])}
    asked = bool(said.get("method") or said.get("init") or own & said.keys())
    methods: list[str | None] = [None] if asked else ["progressive", "sfddm"]
    runs = [
        settle({**given, **({"method": method} if method else {})}, config, teacher, room)[0]
        for method in methods
    ]
    costs = _measured(runs[0], teacher, room)
    offers: list[Offer] = []
    for settings in runs:
        phases = phases_of(settings, teacher)
        request = data_request(settings, phases, teacher)
        plan = plan_run(settings, phases, teacher, request, costs, room)
        fixed = isinstance(request, ImageSampleRequest) or "pictures" in said or not plan.sample_seconds
        offers.append(_offer(settings, plan, fixed=fixed))
    report = REPORT_EVALUATIONS * runs[0].report_prompts * costs.evaluation_seconds
    found = fit(offers, hours=hours, report=report, asked=asked)
    flags: dict[str, Any] = {"updates": list(found.updates)}
    if not asked:
        flags["method"] = found.method
    if found.pictures != offers[0].pictures:
        flags["pictures"] = found.pictures
    return flags, found.says, costs


def _measured(settings: Settings, teacher: Teacher, room: Room) -> Costs:
    phases = phases_of(settings, teacher)
    request = data_request(settings, phases, teacher)
    return measure_costs(settings, phases, teacher, request, room)


def _offer(settings: Settings, plan: Plan, *, fixed: bool) -> Offer:
    training = plan.seconds - plan.sample_seconds
    return Offer(settings.method, settings.updates, training, plan.sample_seconds, settings.pictures, fixed)
