"""Sizes of the pictures that a student is trained on, as (width, height) in pixels.

``--resolution N`` means about N x N pixels in several shapes, so that a student knows portraits and
landscapes too: pictures of a folder go into the shape that is nearest to theirs, the teacher's own are made
in the family's usual ones. ``WIDTHxHEIGHT`` means that size alone. A batch holds one size.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence

from .families import Family

Size = tuple[int, int]

CELL = 64
"""Sides are multiples of it, as in all of Stable Diffusion's own training."""


def bucket_sizes(side: int, *, cell: int = CELL) -> tuple[Size, ...]:
    """The square, and every size up to 1:4 of at most as many pixels: 17 of them for 1024."""
    sizes = {(side, side)}
    for short in range(cell * math.ceil(side / 2 / cell), side, cell):
        long = side * side // short // cell * cell
        sizes |= {(short, long), (long, short)}
    return tuple(sorted(sizes))


def usual_sizes(family: Family, side: int, *, cell: int = CELL) -> tuple[Size, ...]:
    """Square, portrait and landscape, as people ask a family's checkpoints for them; the square alone where
    it is too small for others.
    """
    scale = side / family.resolution[0]
    width, height = (cell * round(edge * scale / cell) for edge in family.portrait)
    if not 0 < width < height:
        return ((side, side),)
    return ((side, side), (width, height), (height, width))


def nearest_size(size: Size, sizes: Sequence[Size]) -> Size:
    """Of ``sizes`` the one whose shape is nearest to ``size``'s."""
    return min(sizes, key=lambda other: abs(math.log(size[0] * other[1] / (size[1] * other[0]))))


def told_sizes(counts: Iterable[Size]) -> str:
    """How many there are of each size, the most frequent first, for people."""
    rows = sorted(Counter(counts).items(), key=lambda row: (-row[1], row[0]))
    return ", ".join(f"{count} of {width}x{height}" for (width, height), count in rows)
