"""A look at a run in its first minutes: is it going well, or should it stop before it costs a night?

Three signs: whether all weights are finite; whether the loss falls; and how far the pictures' latents are
from those that are learned from, in mean and spread a channel. A loss that has the student itself as its
target says nothing (of five consistency runs that ended well, one's rose sixfold), so it is not asked there;
all others, in 35 runs on the demo, had fallen or risen by less than 10 % a third into their first phase.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..diffusion.denoiser import Denoiser
from ..diffusion.method import Phase
from ..diffusion.schedule import NoiseSchedule
from ..diffusion.solvers import start_noise
from ..runtime.samplers import later_noise, student_sampler
from .samples import GuidanceRange, Samples

MINUTES, SHARE, LEAST = 15.0, 0.1, 20
"""The pilot ends after so many minutes, or after this share of a short run's updates, but not before so many
updates: fewer losses cannot be compared."""

RISE, ERRORS = 1.5, 3.0
"""A loss has risen where it is so many times what it was, by so many standard errors."""

FAR, WORSE = 1.0, 1.25
"""Of :func:`distance`; and how many times the first distance a later one may be."""


@dataclass(frozen=True)
class Finding:
    """What the pilot says; ``well`` False: the run should stop."""

    well: bool
    says: str


@dataclass
class Pilot:
    """``updates``: of the whole run; ``start``: how far the first pictures were (:func:`distance`), None
    where none are made.
    """

    updates: int
    start: float | None
    losses: list[float] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)

    def is_due(self) -> bool:
        enough = len(self.losses) >= max(LEAST, SHARE * self.updates)
        return enough or time.monotonic() - self.began > 60 * MINUTES

    def judge(self, *, finite: bool, own_target: bool, now: float | None) -> Finding:
        """``finite``: all weights are; ``own_target``: the loss is measured against what the student itself
        says; ``now``: how far the pictures are at present.
        """
        if not finite:
            return Finding(False, "weights became infinite or NaN")
        said = [_loss_said(self.losses, own_target=own_target), Finding(True, "all weights are finite")]
        if now is not None and self.start is not None:
            said.append(_pictures_said(self.start, now))
        if bad := [finding.says for finding in said if not finding.well]:
            return Finding(False, "; ".join(bad))
        return Finding(True, ", ".join(finding.says for finding in said))


def _loss_said(losses: Sequence[float], *, own_target: bool) -> Finding:
    if own_target:
        return Finding(True, "the loss, which has the student itself as its target, is not judged")
    if len(losses) < LEAST:
        return Finding(True, f"{len(losses)} updates are too few to judge the loss")
    part = len(losses) // 3
    first, last = losses[:part], losses[-part:]
    before, after = statistics.fmean(first), statistics.fmean(last)
    error = math.sqrt((statistics.variance(first) + statistics.variance(last)) / part)
    told = f"from {before:.3g} to {after:.3g}"
    if after > RISE * before and after - before > ERRORS * error:
        return Finding(False, f"the loss rose {told}")
    if before - after > 2 * error:
        return Finding(True, f"the loss fell {told}")
    return Finding(True, f"the loss went {told}, which is within its noise")


def _pictures_said(before: float, now: float) -> Finding:
    if not math.isfinite(now) or now > max(FAR, WORSE * before):
        return Finding(
            False,
            f"the pictures' mean and spread went away from those of the data ({before:.2g} before, {now:.2g} "
            f"now, and {FAR:g} is far)",
        )
    near = "near" if now <= FAR else "no farther than before from"
    return Finding(True, f"the pictures' mean and spread are {near} those of the data ({now:.2g})")


def distance(pictures: Tensor, data: Tensor) -> float:
    """Of two sets (B, C, H, W), over their channels at most: how often the spread is doubled or halved, or
    by how many spreads the mean is off.
    """
    (mean, spread), (mean_0, spread_0) = ((x.mean((0, 2, 3)), x.std((0, 2, 3))) for x in (pictures, data))
    scaled = (spread / spread_0).log2().abs()
    return float(torch.maximum(scaled, (mean - mean_0).abs() / spread_0).max())


@torch.no_grad()
def painted(
    student: Denoiser,
    phase: Phase,
    samples: Samples,
    *,
    count: int,
    schedule: NoiseSchedule,
    guidance: GuidanceRange,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """The student's latents for the texts and guidances of a few samples, and those samples'."""
    numbers = max(samples.buckets, key=len)[:count]
    generator = torch.Generator().manual_seed(0)
    made: list[Tensor] = []
    data: list[Tensor] = []
    sigmas = phase.grid.sigmas(schedule)
    for number in numbers.split(1):
        rows = samples.rows(number)
        scale = rows.get("guidance", guidance.draw(1, generator=generator))
        noise = torch.randn(rows["x0"].shape, generator=generator)
        walk = student_sampler(phase.sampler, noise=later_noise([int(number)]))
        extra = {
            "cond": {name: value.to(device) for name, value in samples.cond(rows).items()},
            "w": (scale - 1).to(device) if phase.dial else None,
        }
        x = start_noise(noise, sigmas[:1].float()).to(device)
        made.append(walk(student, x, sigmas, extra_args=extra).float().cpu())
        data.append(rows["x0"].float())
    return torch.cat(made), torch.cat(data)
