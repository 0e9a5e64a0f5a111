"""Masks that inpainting students are trained with, and what an inpainting network is told of a picture.

A mask is 1 where the picture is to be filled. Of those drawn here a quarter is the whole picture, as Stable
Diffusion's inpainting models were trained (it is also text to image with such a network), 0.35 are boxes (a
quarter of them turned inside out: outpainting, new backgrounds) and 0.4 are strokes of a brush.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

FULL, BOXES = 0.25, 0.35
"""Shares of masks over the whole picture and of boxes; the rest are strokes."""

INSIDE_OUT = 0.25
"""Share of the boxes that are kept and all around them filled."""

SHARES = f"{FULL:.0%} the whole picture, {BOXES:.0%} boxes, {1 - FULL - BOXES:.0%} strokes of a brush"

GREY = 0.5
"""What stands in the masked picture's place: nothing at all, in [-1, 1]."""


@dataclass(frozen=True)
class Pictures:
    """A VAE as two functions between pictures (N, 3, H, W) in [0, 1] and latents; ``downscale``: pixels a
    latent cell."""

    encode: Callable[[Tensor], Tensor]
    decode: Callable[[Tensor], Tensor]
    downscale: int

    def nothing(self, count: int, height: int, width: int) -> Tensor:
        """:func:`inpaint_cond` of pictures of which nothing is known."""
        grey, mask = torch.full((1, 3, height, width), GREY), torch.ones(1, 1, height, width)
        return inpaint_cond(grey, mask, self.encode).expand(count, -1, -1, -1)


def draw_masks(seeds: Sequence[int], height: int, width: int) -> Tensor:
    """(N, 1, H, W) float32 of 0 and 1, each from its own seed."""
    return torch.stack([_draw_mask(height, width, torch.Generator().manual_seed(seed)) for seed in seeds])


def inpaint_cond(images: Tensor, masks: Tensor, encode: Callable[[Tensor], Tensor]) -> Tensor:
    """(N, 5, h, w): the mask at the latents' size, and the latent of the picture that is grey under it.

    ``images``: (N or 1, 3, H, W) in [0, 1]; ``masks``: (N or 1, 1, H, W); ``encode``: pictures -> latents.
    """
    masked = encode(torch.where(masks > 0.5, GREY, images))
    mask = at_latent_size(masks, masked).round()
    return torch.cat([mask.expand(len(masked), -1, -1, -1), masked], dim=1)


def at_latent_size(masks: Tensor, latents: Tensor) -> Tensor:
    """Masks (N, 1, H, W) at the latents' height and width, as ComfyUI shrinks them."""
    return F.interpolate(masks, size=latents.shape[-2:], mode="bilinear").to(latents)


def _draw_mask(height: int, width: int, generator: torch.Generator) -> Tensor:
    """(1, H, W)"""

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator))

    kind = uniform(0, 1)
    if kind < FULL:
        return torch.ones(1, height, width)
    drawn = Image.new("L", (width, height))
    brush = ImageDraw.Draw(drawn)
    if kind < FULL + BOXES:
        for _ in range(int(uniform(1, 3))):
            across, down = width * uniform(0.25, 0.85), height * uniform(0.25, 0.85)
            left, top = uniform(0, width - across), uniform(0, height - down)
            brush.rectangle((left, top, left + across, top + down), fill=255)
        mask = _tensor_of(drawn)
        return 1 - mask if uniform(0, 1) < INSIDE_OUT else mask
    for _ in range(int(uniform(1, 5))):
        _stroke(brush, width, height, uniform)
    return _tensor_of(drawn)


def _stroke(
    brush: ImageDraw.ImageDraw, width: int, height: int, uniform: Callable[[float, float], float]
) -> None:
    """A round brush drawn along a path that turns a little at each of its corners."""
    side = min(width, height)
    radius = side * uniform(0.05, 0.14)
    x, y, heading = uniform(0, width), uniform(0, height), uniform(0, 2 * math.pi)
    for _ in range(int(uniform(3, 10))):
        heading += uniform(-1.2, 1.2)
        length = side * uniform(0.1, 0.3)
        to_x = min(max(x + length * math.cos(heading), 0), width)
        to_y = min(max(y + length * math.sin(heading), 0), height)
        brush.line((x, y, to_x, to_y), fill=255, width=max(1, round(2 * radius)))
        for at_x, at_y in ((x, y), (to_x, to_y)):
            brush.ellipse((at_x - radius, at_y - radius, at_x + radius, at_y + radius), fill=255)
        x, y = to_x, to_y


def _tensor_of(drawn: Image.Image) -> Tensor:
    values = torch.frombuffer(bytearray(drawn.tobytes()), dtype=torch.uint8)
    return values.reshape(1, drawn.height, drawn.width).float() / 255
