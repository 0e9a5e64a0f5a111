"""A card that other programs use too: a run keeps to what was free when it began, and says who holds the
rest.

Where a card's memory is used up, a driver on Windows hands out the system's in silence, and every update
takes ten times as long. An allocation that is refused instead is caught by the training loop, which takes
fewer pictures at once.
"""

from __future__ import annotations

import logging
import os
from typing import Any

import torch

from . import cards
from .training.memory import GIB, size

log = logging.getLogger("fewstep")

UNSAID = GIB
"""Not worth a word: a desktop, and what a driver holds for this process itself."""


def keep_to_free(device: torch.device) -> None:
    """Cap this process's memory on a CUDA device at what is free now; nothing elsewhere."""
    if device.type != "cuda":
        return
    given: Any = device.index
    index = torch.cuda.current_device() if given is None else given
    free, total = torch.cuda.mem_get_info(index)
    ours = free + torch.cuda.memory_reserved(index)
    torch.cuda.set_per_process_memory_fraction(min(1.0, ours / total), index)
    if total - ours < UNSAID:
        return
    uuid = str(getattr(torch.cuda.get_device_properties(index), "uuid", ""))
    named = [
        name if held is None else f"{name} {size(held)}"
        for name, held in cards.holders(uuid, but=os.getpid())
    ]
    log.warning(
        "other programs hold %s of this card's %s%s; the run keeps to the %s that are free",
        size(total - ours),
        size(total),
        f" ({', '.join(named)})" if named else "",
        size(ours),
    )
