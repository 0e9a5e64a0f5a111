"""Other people's LoRAs as guests of a run: applied unmerged to teacher and student alike in every second
batch, at a random strength, so that the student goes on answering to them as its teacher does.

Their effect is added to a layer's output by a hook, so no weight is touched, gradients flow through it, and a
student that is itself a LoRA works too. The texts of a run are encoded once, without guests: what a LoRA
changes in a text encoder reaches student and teacher alike in a host, and needs no training.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..diffusion.errors import BadInput
from .checkpoint import Checkpoint
from .lora import LoraFile, Update, match_lora

LOW, HIGH = 0.4, 1.2
"""The strengths that people use."""

SHARE = 0.5
"""Of the batches that have a guest."""

_Unet = torch.nn.Module


@dataclass(frozen=True, eq=False)
class Guest:
    """``updates`` by the UNet's modules; strengths between ``low`` and ``high``."""

    file: LoraFile
    updates: Mapping[str, Update]
    low: float
    high: float

    @classmethod
    def of(cls, file: LoraFile, low: float, high: float, *, checkpoint: Checkpoint) -> Guest:
        """BadInput for a LoRA of something else, or of a kind whose effect cannot be added to outputs."""
        found = {module: u for (part, module), u in match_lora(file, checkpoint).items() if part == "unet"}
        if whole := next((m for m, u in found.items() if u.diff is not None and u.diff.ndim == 1), None):
            raise BadInput(
                f"--with-lora {file.path}: this is a difference of the normalisation {whole}, which cannot "
                "be applied unmerged; leave it out, or merge it with --lora"
            )
        if not found:
            raise BadInput(f"--with-lora {file.path}: this LoRA changes nothing in the UNet; leave it out")
        return cls(file, found, low, high)


class Guests:
    """All guests of a run, of which at most one is there at a time."""

    def __init__(self, guests: Sequence[Guest] = ()) -> None:
        self.all = tuple(guests)
        self._present: tuple[Guest, float] | None = None

    @property
    def share(self) -> float:
        """Of the batches that have a guest."""
        return SHARE if self.all else 0.0

    def welcome(self, unet: Any) -> Any:
        """The network, whose layers the guests reach from now on."""
        modules = dict(unet.named_modules())
        for module in {module for guest in self.all for module in guest.updates}:
            modules[module].register_forward_hook(self._hook(module))
        return unet

    @contextmanager
    def visit(self, generator: torch.Generator) -> Generator[bool]:
        """For one batch and its backward pass: perhaps a guest, at a strength from its range."""
        if not self.all or float(torch.rand((), generator=generator)) >= SHARE:
            yield False
            return
        guest = self.all[int(torch.randint(len(self.all), (), generator=generator))]
        strength = guest.low + (guest.high - guest.low) * float(torch.rand((), generator=generator))
        with self.present(guest, strength):
            yield True

    @contextmanager
    def present(self, guest: Guest, strength: float) -> Generator[None]:
        self._present = (guest, strength)
        try:
            yield
        finally:
            self._present = None

    def _hook(self, name: str) -> Any:
        def hook(module: torch.nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if self._present is None or name not in self._present[0].updates:
                return output
            guest, strength = self._present
            return output + strength * effect(guest.updates[name], inputs[0], module).to(output.dtype)

        return hook


def parse_range(text: str) -> tuple[Path, float, float]:
    """``FILE[:LO-HI]``, or one number for both; BadInput for a range that is none."""
    match = re.fullmatch(r"(.+):(\d*\.?\d+)(?:-(\d*\.?\d+))?", text)
    if match is None or Path(text).exists():
        return Path(text), LOW, HIGH
    low, high = float(match[2]), float(match[3] or match[2])
    if low > high:
        raise BadInput(
            f"--with-lora {text}: expected FILE:LO-HI with LO <= HI, such as style.safetensors:0.4-1.2"
        )
    return Path(match[1]), low, high


def effect(update: Update, x: Tensor, module: Any) -> Tensor:
    """What the update at strength 1 adds to the output of a linear or convolutional layer."""

    def here(value: Tensor) -> Tensor:
        return value.to(x.device, x.dtype)

    bias = None if update.bias is None else here(update.bias)
    is_linear = module.weight.ndim == 2
    if update.diff is not None or update.magnitude is not None:
        # A DoRA's change depends on the weight that it comes to, as in a host; no gradient follows that.
        weight = here(update.delta(module.weight.detach().float()))
        return F.linear(x, weight, bias) if is_linear else _convolved(x, weight, module, bias)
    if update.down is None or update.up is None:
        whole = torch.zeros((), device=x.device, dtype=x.dtype) if bias is None else bias
        return whole if is_linear else whole.reshape(-1, 1, 1)
    down, up = here(update.down), here(update.up)
    if is_linear:
        low_rank = F.linear(F.linear(x, down.flatten(1)), up.flatten(1))
    else:
        down, up = down.reshape(*down.shape[:2], *down.shape[2:] or (1, 1)), up.reshape(*up.shape[:2], 1, 1)
        inner = _convolved(x, down, module) if update.mid is None else F.conv2d(x, down)
        low_rank = F.conv2d(inner if update.mid is None else _convolved(inner, here(update.mid), module), up)
    low_rank = update.scale * low_rank
    if bias is None:
        return low_rank
    return low_rank + (bias if is_linear else bias.reshape(-1, 1, 1))


def _convolved(x: Tensor, weight: Tensor, module: Any, bias: Tensor | None = None) -> Tensor:
    return F.conv2d(x, weight, bias, stride=module.stride, padding=module.padding)
