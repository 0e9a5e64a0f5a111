"""The features behind a network's last layer, seen through all that wraps the network.

Networks and guidance :func:`show` theirs; nothing is kept unless somebody is :func:`watching`.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

_watched: ContextVar[list[Tensor] | None] = ContextVar("watched", default=None)


def show(features: Tensor) -> None:
    """Offer an evaluation's features (B, C, H, W), before the layer that makes the output of them."""
    if (seen := _watched.get()) is not None:
        seen.append(features)


@contextmanager
def watching() -> Generator[list[Tensor]]:
    """The features of the evaluations within, in order; the innermost watcher alone sees them."""
    seen: list[Tensor] = []
    token = _watched.set(seen)
    try:
        yield seen
    finally:
        _watched.reset(token)
