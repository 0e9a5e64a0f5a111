"""Inpainting with a network that was not made for it: what is kept is put back before and after it looks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .denoiser import Cond, Denoiser
from .prediction import velocity_from
from .schedule import like


@dataclass(frozen=True, eq=False)
class Blended:
    """``mask D(mask x + (1 - mask) (x0 + sigma noise)) + (1 - mask) x0``, ComfyUI's rule.

    ``x0``: (B, C, H, W), the picture; ``noise``: what its sampling started from, of unit variance; ``mask``:
    (B, 1, H, W), 1 where to fill, values between are mixed. A walk that ends at sigma 0 ends on x0 outside.
    """

    denoiser: Denoiser
    x0: Tensor
    noise: Tensor
    mask: Tensor

    def __call__(self, x: Tensor, sigma: Tensor, *, cond: Cond, w: Tensor | None = None) -> Tensor:
        known = self.x0 + like(sigma, x) * self.noise
        found = self.denoiser(torch.lerp(known, x, self.mask), sigma, cond=cond, w=w)
        return torch.lerp(self.x0, found, self.mask)

    def velocity(self, x: Tensor, sigma: Tensor, *, cond: Cond, w: Tensor | None = None) -> Tensor:
        return velocity_from(self(x, sigma, cond=cond, w=w), x, sigma, "sample")
