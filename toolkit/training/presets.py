"""What a run decides by the size of the card that it is for: how much memory to plan for, and more."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .optimizers import has_bitsandbytes
from .settings import Defaults

PRESETS: Mapping[str, float] = {"8gb": 7.0, "12gb": 10.5, "16gb": 14.5, "24gb": 22.0, "80gb": 77.0}
"""GiB that a run may take of a card of that size: less what driver, desktop and torch itself hold."""


@dataclass(frozen=True)
class Room:
    """What a run is planned for: ``free`` bytes for each of the ``processes`` (None: what its device has
    free), a ``preset``, whose decisions count where nobody else's do, and among how many processes what is
    trained is ``divided``.
    """

    free: int | None = None
    preset: str | None = None
    processes: int = 1
    divided: int = 1


HERE = Room()


def preset_defaults(name: str, *, small: bool, precision: str, divided: bool) -> Defaults:
    """For large networks half precision (``precision``), and 8-bit moments where they can be had and 80 GB
    are not there; ``divided`` moments are Adam's own.
    """
    values: dict[str, Any] = {}
    if not small:
        values["precision"] = precision
        if name != "80gb" and not divided and has_bitsandbytes():
            values["optimizer"] = "adamw8bit"
    return Defaults(values, f"--preset {name}")


def fitting_micro_batch(takes: Callable[[int], int], *, free: int, batch: int) -> int:
    """The most pictures at once, a power of two, whose bytes ``takes`` fit what is free; 1 if none do."""
    sizes = [2**n for n in range(batch.bit_length() - 1, 0, -1)]
    return next((count for count in sizes if takes(count) <= free), 1)
