"""The optimisers that a run can take: AdamW, and that with moments of 8 bits (Dettmers et al. 2022)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.nn import Parameter
from torch.optim import Optimizer

from ..diffusion.errors import BadInput

OPTIMIZERS = ("adamw", "adamw8bit")
MOMENTS = {"adamw": 8, "adamw8bit": 2}
"""Bytes of both moments of a trained number; of 8 bits each, the scales of their blocks are left out."""


def make_optimizer(
    name: str, parameters: Iterable[Parameter], *, lr: float, device: torch.device
) -> Optimizer:
    """Of :data:`OPTIMIZERS`, without weight decay; BadInput for one whose package is missing."""
    options: dict[str, Any] = {"lr": lr, "betas": (0.9, 0.99), "weight_decay": 0.0}
    if name == "adamw8bit":
        return bitsandbytes().optim.AdamW8bit(parameters, **options)
    # Fused it holds no copies of what is trained; elsewhere than on a GPU torch's own choice stays.
    return torch.optim.AdamW(parameters, fused=True if device.type == "cuda" else None, **options)


def require_optimizer(name: str) -> None:
    """BadInput for one that is not known, or not to be had here."""
    if name not in OPTIMIZERS:
        raise BadInput(f"--optimizer {name}: expected {' or '.join(OPTIMIZERS)}")
    if name == "adamw8bit":
        bitsandbytes()


def bitsandbytes() -> Any:
    """The package; BadInput where it is not installed."""
    try:
        import bitsandbytes as found  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise BadInput(
            "--optimizer adamw8bit is bitsandbytes', which is not installed; python -m pip install "
            "bitsandbytes, or leave it out"
        ) from None
    return found


def has_bitsandbytes() -> bool:
    try:
        bitsandbytes()
    except BadInput:
        return False
    return True
