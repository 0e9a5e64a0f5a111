"""Denoisers ``D(x; sigma, cond, w) -> x0``: teacher, student, host model and test double are all this."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from .hidden import show, watching
from .prediction import PredictionType, prediction_from_velocity, velocity_from, x0_from
from .schedule import NoiseSchedule, alpha, like

Cond: TypeAlias = Mapping[str, Tensor]
"""Opaque conditioning: named tensors, each with the batch first. "text": (B, T, C); SDXL's has "pooled"
(B, P) and "time_ids" (B, 6), the picture's sizes; an inpainting network's has "inpaint" (B, 1 + C, H, W), the
mask (1: to be filled) and the masked picture's latent.
"""

Network: TypeAlias = Callable[[Tensor, Tensor, Cond, Tensor | None], Tensor]
"""``(z, timestep (B,), cond, w (B,) or None) -> prediction`` at unit variance; an inpainting network's z
has the channels of "inpaint" after its own."""


class Denoiser(Protocol):
    """x: (B, C, H, W) float32 in sigma-space; sigma: (B,); w: (B,) guidance_scale - 1, or None."""

    def __call__(self, x: Tensor, sigma: Tensor, *, cond: Cond, w: Tensor | None = None) -> Tensor:
        """Predicted clean latent x0."""
        ...

    def velocity(self, x: Tensor, sigma: Tensor, *, cond: Cond, w: Tensor | None = None) -> Tensor:
        """Predicted velocity v: well conditioned at both ends of the schedule."""
        ...


@dataclass(frozen=True, eq=False)
class NetworkDenoiser:
    """A network wrapped as a denoiser: the only place where timesteps and unit-variance latents appear.

    The network gets z in the dtype that it was given to compute in; the result is float32.
    """

    network: Network
    schedule: NoiseSchedule
    prediction_type: PredictionType

    def predict(self, x: Tensor, sigma: Tensor, *, cond: Cond, w: Tensor | None = None) -> Tensor:
        """The network's own output, in its own prediction type."""
        z = like(alpha(sigma), x) * x
        if "inpaint" in cond:
            z = torch.cat([z, cond["inpaint"].to(z)], dim=1)
        return self.network(z, self.schedule.timestep(sigma), cond, w).float()

    def __call__(self, x: Tensor, sigma: Tensor, *, cond: Cond, w: Tensor | None = None) -> Tensor:
        return x0_from(self.predict(x, sigma, cond=cond, w=w), x, sigma, self.prediction_type)

    def velocity(self, x: Tensor, sigma: Tensor, *, cond: Cond, w: Tensor | None = None) -> Tensor:
        return velocity_from(self.predict(x, sigma, cond=cond, w=w), x, sigma, self.prediction_type)


@dataclass(frozen=True, eq=False)
class Guided:
    """Classifier-free guidance as a denoiser (Ho & Salimans 2022), both branches in one batched forward.

    ``v = v_c + w (v_c - v_u)`` with w = guidance_scale - 1 given at each call; w None means no guidance.
    ``uncond`` has one row, or as many as the batch; what it does not name, such as a picture's size, is the
    same with and without the text. The features shown are guided by the same formula: the layer behind them
    is affine, so it makes the guided output of them.
    """

    denoiser: Denoiser
    uncond: Cond

    def velocity(self, x: Tensor, sigma: Tensor, *, cond: Cond, w: Tensor | None = None) -> Tensor:
        if w is None:
            return self.denoiser.velocity(x, sigma, cond=cond)
        both = concat_cond([cond, {**cond, **expand_cond(self.uncond, len(x))}])
        with watching() as seen:
            velocity = self.denoiser.velocity(torch.cat([x, x]), torch.cat([sigma, sigma]), cond=both)
        for features in seen:
            show(_guide(features, w))
        return _guide(velocity, w)

    def __call__(self, x: Tensor, sigma: Tensor, *, cond: Cond, w: Tensor | None = None) -> Tensor:
        velocity = self.velocity(x, sigma, cond=cond, w=w)
        return prediction_from_velocity(velocity, x, sigma, "sample")


def _guide(both: Tensor, w: Tensor) -> Tensor:
    conditional, unconditional = both.chunk(2)
    return conditional + like(w, both) * (conditional - unconditional)


def concat_cond(conds: Sequence[Cond]) -> Cond:
    """Conditionings one after the other along the batch; all must name the same tensors."""
    return {name: torch.cat([cond[name] for cond in conds]) for name in conds[0]}


def expand_cond(cond: Cond, batch: int) -> Cond:
    """A one-row conditioning repeated for a batch; one that has the batch already is returned as it is."""
    return {
        name: value if len(value) == batch else value.expand(batch, *value.shape[1:])
        for name, value in cond.items()
    }
