"""Captioned 32 x 32 drawings: the data the demo teacher is trained on.

A drawing is one object (shape, colour, size) on a background: "a large red circle on a striped background".
The rest is not in the caption: the position, one of five, and continuous jitter of hue, place, radius,
rotation, shading and texture. So one caption has many pictures. Shapes are intersections and unions of
half-planes, whose signed distance in pixels gives exact antialiasing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SIZE = 32
"""Side of a drawing, in pixels."""

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "size": ("small", "large"),
    "colour": ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink"),
    "shape": ("circle", "square", "triangle", "star", "cross"),
    "background": ("white", "grey", "black", "striped", "checkered", "faded"),
    "position": ("left", "right", "top", "bottom", "centre"),
}
"""Words by attribute; no word belongs to two attributes."""

SPOKEN: tuple[str, ...] = ("size", "colour", "shape", "background")
"""Attributes that captions name. Not the position: in 4,000 updates the teacher learnt all the others and did
not begin to mind that word, which by itself explains 1 % of the latents' variance."""

DROPPABLE: tuple[str, ...] = ("size", "background")
"""Attributes that a training caption may leave out."""

_HUES = (0.0, 0.075, 0.155, 0.34, 0.5, 0.62, 0.755, 0.9)
_SATURATIONS = (0.92, 0.95, 0.92, 0.88, 0.85, 0.9, 0.75, 0.5)
_VALUES = (0.88, 0.97, 0.95, 0.68, 0.88, 0.88, 0.72, 1.0)
CENTRES = ((-6.0, 0.0), (6.0, 0.0), (0.0, -6.0), (0.0, 6.0), (0.0, 0.0))
"""Where the words of "position" put the object, in pixels right of and below the middle."""

_CHUNK = 2048

Uniform = Callable[[float, float], Tensor]
"""Draws (N, 1, 1) numbers between two bounds."""


@dataclass(frozen=True)
class Scenes:
    """Attributes of N drawings: for each name of ATTRIBUTES int64 indices (N,) into its words."""

    labels: dict[str, Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.labels.values())))


def scenes(count: int, *, seed: int) -> Scenes:
    """Independent uniform attributes for `count` drawings."""
    generator = torch.Generator().manual_seed(seed)
    return Scenes(
        {name: torch.randint(len(words), (count,), generator=generator) for name, words in ATTRIBUTES.items()}
    )


def captions(of: Scenes, *, seed: int, noise: float = 0.0, drop: float = 0.0) -> list[str]:
    """One caption a scene.

    Each attribute is replaced by a uniformly drawn *wrong* word with probability `noise`; each attribute of
    DROPPABLE is left out with probability `drop`.
    """
    generator = torch.Generator().manual_seed(seed)
    said: dict[str, list[str]] = {}
    for name in SPOKEN:
        words, label = ATTRIBUTES[name], of.labels[name]
        shift = torch.randint(1, len(words), label.shape, generator=generator)
        wrong = torch.rand(label.shape, generator=generator) < noise
        dropped = torch.rand(label.shape, generator=generator) < (drop if name in DROPPABLE else 0.0)
        spoken = torch.where(wrong, (label + shift) % len(words), label)
        spoken = torch.where(dropped, -1, spoken)
        said[name] = ["" if index < 0 else words[index] for index in spoken.tolist()]
    return [_sentence(*parts) for parts in zip(*(said[name] for name in SPOKEN), strict=True)]


def draw(count: int, *, seed: int, caption_noise: float = 0.0) -> tuple[Tensor, list[str]]:
    """`count` drawings, float32 (N, 3, 32, 32) in [0, 1], and their captions.

    `caption_noise` is the probability that an attribute is misnamed, and also that a droppable one is not
    named.
    """
    what = scenes(count, seed=seed)
    return render(what, seed=seed), captions(what, seed=seed + 1, noise=caption_noise, drop=caption_noise)


def prompts(count: int, *, seed: int) -> list[str]:
    """`count` correct captions that name every spoken attribute, for evaluation."""
    return captions(scenes(count, seed=seed), seed=seed)


def altered(captions: list[str], *, seed: int) -> tuple[list[str], list[str]]:
    """For captions that name every spoken attribute: one of them changed to another of its words, and its
    name.
    """
    generator = torch.Generator().manual_seed(seed)
    names = torch.randint(len(SPOKEN), (len(captions),), generator=generator)
    shifts = torch.rand(len(captions), generator=generator)
    changed = [SPOKEN[int(name)] for name in names]
    said: list[str] = []
    for caption, name, shift in zip(captions, changed, shifts, strict=True):
        words = ATTRIBUTES[name]
        index = labels(caption)
        index[name] = (index[name] + 1 + int(shift * (len(words) - 1))) % len(words)
        said.append(_sentence(*(ATTRIBUTES[spoken][index[spoken]] for spoken in SPOKEN)))
    return said, changed


def labels(caption: str) -> dict[str, int]:
    """Attributes that a caption names, as indices into the words of ATTRIBUTES; other words are ignored."""
    spoken = set(caption.lower().replace(",", " ").split())
    return {name: index for name in SPOKEN for index, word in enumerate(ATTRIBUTES[name]) if word in spoken}


def render(what: Scenes, *, seed: int) -> Tensor:
    """The drawings of the scenes, float32 (N, 3, 32, 32) in [0, 1]; `seed` fixes the jitter."""
    generator = torch.Generator().manual_seed(seed ^ 0x5EED)
    pieces = [
        _render({name: label[start : start + _CHUNK] for name, label in what.labels.items()}, generator)
        for start in range(0, len(what), _CHUNK)
    ]
    return torch.cat(pieces) if pieces else torch.zeros(0, 3, SIZE, SIZE)


def _sentence(size: str, colour: str, shape: str, background: str) -> str:
    thing = " ".join(word for word in (size, colour, shape) if word)
    place = f" on a {background} background" if background else ""
    return f"{'an' if thing[0] in 'aeiou' else 'a'} {thing}{place}"


def _render(what: dict[str, Tensor], generator: torch.Generator) -> Tensor:
    count = len(what["shape"])

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, 1, 1, generator=generator)

    axis = torch.arange(SIZE, dtype=torch.float32) - (SIZE - 1) / 2
    x, y = axis.view(1, 1, SIZE), axis.view(1, SIZE, 1)
    ground = _background(what["background"], x, y, uniform)

    centre = torch.tensor(CENTRES)[what["position"]]
    radius = torch.where(what["size"].view(-1, 1, 1) == 1, uniform(8.6, 10.2), uniform(5.2, 6.3))
    u = (x - centre[:, 0].view(-1, 1, 1) - uniform(-1.3, 1.3)) / radius
    v = (y - centre[:, 1].view(-1, 1, 1) - uniform(-1.3, 1.3)) / radius
    angle = uniform(-0.3, 0.3)
    p, q = u * angle.cos() + v * angle.sin(), v * angle.cos() - u * angle.sin()
    coverage = (0.5 - _distance(what["shape"], p, q) * radius).clamp(0, 1).unsqueeze(1)

    hue = torch.tensor(_HUES)[what["colour"]].view(-1, 1, 1) + uniform(-0.018, 0.018)
    saturation = torch.tensor(_SATURATIONS)[what["colour"]].view(-1, 1, 1) * uniform(0.9, 1.05)
    light = uniform(0, 2 * math.pi)
    shade = 1 + uniform(0.0, 0.16) * (p * light.cos() + q * light.sin())
    value = torch.tensor(_VALUES)[what["colour"]].view(-1, 1, 1) * uniform(0.9, 1.04) * shade
    return coverage * _rgb(hue, saturation.clamp(0, 1), value.clamp(0, 1)) + (1 - coverage) * ground


def _distance(shape: Tensor, p: Tensor, q: Tensor) -> Tensor:
    """Signed distance (N, H, W), negative inside, in units of the object's radius; up is negative q."""
    a, b = p.abs(), q.abs()
    circle = (p * p + q * q).sqrt() - 1
    square = torch.maximum(a, b) - 0.85
    triangle = _sides(3, p, q).amax(1) - 0.6
    star = (
        _sides(5, p, q).topk(2, dim=1).values[:, 1] - 0.4
    )  # a pentagram is inside at least 4 of its 5 lines
    cross = torch.minimum(torch.maximum(a - 1.05, b - 0.36), torch.maximum(a - 0.36, b - 1.05))
    every = torch.stack((circle, square, triangle, star, cross), 1)
    return every.gather(1, shape.view(-1, 1, 1, 1).expand(-1, 1, *every.shape[2:])).squeeze(1)


def _sides(count: int, p: Tensor, q: Tensor) -> Tensor:
    """Projections (N, count, H, W) on the outward normals of a regular polygon that stands on a side."""
    angles = (2 * math.pi * torch.arange(count) / count + math.pi / 2).view(1, -1, 1, 1)
    return p.unsqueeze(1) * angles.cos() + q.unsqueeze(1) * angles.sin()


def _background(kind: Tensor, x: Tensor, y: Tensor, uniform: Uniform) -> Tensor:
    """Backgrounds (N, 3, H, W): three plain greys of some tint, two textures of two tones, a fade."""
    plain = torch.tensor((1.0, 0.5, 0.08, 0.0, 0.0, 0.0))[kind].view(-1, 1, 1) + uniform(-0.06, 0.04)
    angle = uniform(-0.25, 0.25)
    period = uniform(9.0, 11.0)
    across = (x * angle.cos() + y * angle.sin()) / period + uniform(0, 1)
    along = (y * angle.cos() - x * angle.sin()) / period + uniform(0, 1)
    stripe = (across * 2 * math.pi).sin() * period / 2.5
    check = stripe * (along * 2 * math.pi).sin()
    pale, dark = uniform(0.88, 1.0), uniform(0.58, 0.7)
    striped = dark + (pale - dark) * (0.5 + stripe).clamp(0, 1)
    checkered = dark + (pale - dark) * (0.5 + check).clamp(0, 1)
    fade = 0.55 + uniform(0.32, 0.45) * y / SIZE * 2
    value = torch.stack(
        (*(plain.expand(-1, SIZE, SIZE),) * 3, striped, checkered, fade.expand(-1, SIZE, SIZE)), 1
    )
    value = value.gather(1, kind.view(-1, 1, 1, 1).expand(-1, 1, SIZE, SIZE)).squeeze(1)
    return _rgb(uniform(0, 1), uniform(0.0, 0.16), value.clamp(0, 1))


def _rgb(hue: Tensor, saturation: Tensor, value: Tensor) -> Tensor:
    """HSV to RGB, (N, 3, H, W); hue wraps at 1."""
    sector = torch.stack([(offset + hue * 6) % 6 for offset in (5.0, 3.0, 1.0)], 1)
    ramp = torch.minimum(sector, 4 - sector).clamp(0, 1)
    return value.unsqueeze(1) * (1 - saturation.unsqueeze(1) * ramp)


def erased_objects(what: Scenes) -> Tensor:
    """Masks (N, 1, 32, 32) over all that may belong to each drawing's object, of one size for all objects."""
    centre = torch.tensor(CENTRES)
    axis = torch.arange(SIZE) - (SIZE - 1) / 2
    x, y = (centre[what.labels["position"]][:, i].view(-1, 1, 1) for i in (0, 1))
    inside = ((axis.view(1, 1, -1) - x).abs() <= 14) & ((axis.view(1, -1, 1) - y).abs() <= 14)
    return inside[:, None].float()


def drawings_to_fill(prompts: Sequence[str], *, seed: int) -> tuple[Tensor, Tensor]:
    """Drawings (N, 3, 32, 32) on the backgrounds that the prompts name, of other shapes than they name, and
    masks over these."""
    what = scenes(len(prompts), seed=~seed)  # prompts are often drawn from the seed itself, or the next
    shape, background = what.labels["shape"], what.labels["background"]
    for row, prompt in enumerate(prompts):
        said = labels(prompt)
        background[row] = said.get("background", int(background[row]))
        if int(shape[row]) == said.get("shape"):
            shape[row] = (shape[row] + 1) % len(ATTRIBUTES["shape"])
    return render(what, seed=seed), erased_objects(what)
