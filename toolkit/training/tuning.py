"""How a network is laid out and run, which changes its speed and its last bits, and nothing else: channels
last in memory, and torch.compile.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

log = logging.getLogger("fewstep")

MEMORY_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def tuned(unet: UNet2DConditionModel, *, memory_format: str, compiled: bool) -> UNet2DConditionModel:
    """The network itself, in one of :data:`MEMORY_FORMATS`; ``compiled``: through torch.compile, from its
    first call.
    """
    module: Any = unet
    module.to(memory_format=MEMORY_FORMATS[memory_format])
    if compiled:
        module.forward = _compiled(module.forward)
    return unet


def _compiled(forward: Any) -> Any:
    """Where compiling fails, now or at a later call's shapes, the plain function from then on, and a
    sentence.
    """
    fast: Any = None
    is_plain = False

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal fast, is_plain
        if is_plain:
            return forward(*args, **kwargs)
        try:
            fast = fast or torch.compile(forward)
            return fast(*args, **kwargs)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ImportError, OSError) as error:  # all that torch.compile raises is among them
            is_plain = True
            first = next(iter(str(error).strip().splitlines()), type(error).__name__)
            log.warning("torch.compile does not work here (%s); going on without it", first)
        return forward(*args, **kwargs)

    return call
