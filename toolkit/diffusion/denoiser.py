"""Denoisers ``D(x; sigma, cond, w) -> x0``: teacher, student, host model and test double are all this."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from .hidden import show, watching
from .prediction import PredictionType, prediction_from_velocity, velocity_from, x0_from
from .schedule import NoiseSchedule, alpha, like

Cond: TypeAlias = Mapping[str, Tensor]
"""Opaque conditioning: named tensors, each with the batch first. "text": (B, T, C), and where rows have
unequally many tokens "length" (B,), beyond which nobody looks; SDXL's has "pooled"
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
    same with and without the text. ``rescale`` is phi of Lin et al. 2023, "Common Diffusion Noise Schedules
    and Sample Steps Are Flawed", eq. 15-16: so much of v gets the standard deviation of v_c, picture by
    picture; in v whatever the network predicts, as in ComfyUI. The features shown are guided by the same
    formula, not rescaled: the layer behind them is affine, so it makes the guided output of them.
    """

    denoiser: Denoiser
    uncond: Cond
    rescale: float = 0.0

    def velocity(self, x: Tensor, sigma: Tensor, *, cond: Cond, w: Tensor | None = None) -> Tensor:
        if w is None:
            return self.denoiser.velocity(x, sigma, cond=cond)
        shared = {name: value for name, value in cond.items() if name != "length"}
        both = concat_cond([cond, {**shared, **expand_cond(self.uncond, len(x))}])
        with watching() as seen:
            velocity = self.denoiser.velocity(torch.cat([x, x]), torch.cat([sigma, sigma]), cond=both)
        for features in seen:
            show(_guide(features, w))
        return _rescaled(_guide(velocity, w), velocity[: len(x)], self.rescale)

    def __call__(self, x: Tensor, sigma: Tensor, *, cond: Cond, w: Tensor | None = None) -> Tensor:
        velocity = self.velocity(x, sigma, cond=cond, w=w)
        return prediction_from_velocity(velocity, x, sigma, "sample")


def _guide(both: Tensor, w: Tensor) -> Tensor:
    conditional, unconditional = both.chunk(2)
    return conditional + like(w, both) * (conditional - unconditional)


def _rescaled(guided: Tensor, conditional: Tensor, share: float) -> Tensor:
    if share == 0:
        return guided
    inside = tuple(range(1, guided.ndim))
    ratio = conditional.std(inside, keepdim=True) / guided.std(inside, keepdim=True)
    return guided * (share * ratio + (1 - share))


def concat_cond(conds: Sequence[Cond]) -> Cond:
    """Conditionings one after the other along the batch; all must name the same tensors, but for "length",
    which comes of texts of unequal length.
    """
    conds = _as_long_as_each_other(conds)
    return {name: torch.cat([cond[name] for cond in conds]) for name in conds[0]}


def _as_long_as_each_other(conds: Sequence[Cond]) -> Sequence[Cond]:
    longest = max((cond["text"].shape[1] for cond in conds if "text" in cond), default=0)
    if not any("length" in cond or cond["text"].shape[1] < longest for cond in conds if "text" in cond):
        return conds
    padded: list[Cond] = []
    for cond in conds:
        text = cond["text"]
        length = torch.full((len(text),), text.shape[1], device=text.device)
        filled = F.pad(text, (0, 0, 0, longest - text.shape[1]))
        padded.append({"length": length, **cond, "text": filled})
    return padded


def expand_cond(cond: Cond, batch: int) -> Cond:
    """A one-row conditioning repeated for a batch; one that has the batch already is returned as it is."""
    return {
        name: value if len(value) == batch else value.expand(batch, *value.shape[1:])
        for name, value in cond.items()
    }
