"""What a run takes of its device's memory, known before anything is loaded.

The networks run once on the meta device, where tensors have a size and no values; what lives at the same time
is counted. Weights and the optimiser are added up from their numbers.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..diffusion.guidance import W_DIM
from .adapters import WHOLE, LoraShape, recomputing
from .checkpoint import Checkpoint
from .networks import DTYPES, UNetNetwork, place, random_cond
from .optimizers import MOMENTS
from .recognise import build
from .sharding import units

GIB = 1024**3
PLACES = ("device", "cpu")
"""Where averaged weights can be kept."""
SLACK = 1.1
"""What an allocator and the libraries' workspaces take beyond what lives: a guess, no GPU was at hand."""


@dataclass(frozen=True, eq=False)
class Needs:
    """The memory of runs on a checkpoint at one size in pixels; ``batch``: pictures at once.

    ``looks``: whether pictures are decoded while the student trains. ``divided``: among so many processes,
    where every weight is trained (sharding.py).
    """

    checkpoint: Checkpoint
    width: int
    height: int
    batch: int
    looks: bool
    divided: int = 1
    _known: dict[torch.dtype, dict[str, int]] = field(default_factory=dict[torch.dtype, dict[str, int]])

    def stages(
        self, *, rank: int | None, precision: str, ema: float, optimizer: str = "adamw"
    ) -> dict[str, int]:
        """Bytes at the largest moment of each stage of a run; ``rank`` None: every weight is trained."""
        whole, dtype = self.checkpoint.unet_parameters, DTYPES[precision]
        trained = whole if rank is None else self.lora_parameters(rank)
        divided = self.divided if rank is None else 1
        working = self._working(dtype)
        words = sum(self._weights(e.part, torch.float32) for e in self.checkpoint.of.text_encoders)
        found = {
            "texts": words,
            "pictures": whole * dtype.itemsize + max(working["evaluation"], working["masks"]),
            "training": max(working.values())
            + (self._together() if divided > 1 else 0)
            + weights_bytes(
                whole, trained, precision=precision, ema=ema, optimizer=optimizer, divided=divided
            ),
        }
        if self.looks:  # teacher and student have text encoders each; their UNets take turns
            both = 2 * words * dtype.itemsize // 4
            found["report"] = whole * dtype.itemsize + both + max(working["evaluation"], working["decoding"])
        return {name: round(SLACK * count) for name, count in found.items()}

    def _working(self, dtype: torch.dtype) -> dict[str, int]:
        """What lives beside the weights, at most, of everything that is done with them."""
        if dtype not in self._known:
            seen = self.checkpoint.vae_dtype(dtype)
            self._known[dtype] = {
                "step": self._step(dtype),
                "evaluation": self._evaluation(dtype),
                "decoding": self._decoding(seen) if self.looks else 0,
                "masks": self._decoding(torch.float32) if self.checkpoint.inpaint else 0,
            }
        return self._known[dtype]

    def lora_parameters(self, rank: int) -> int:
        """What a LoRA of this rank trains, with the guidance input and the layer behind it."""
        shape = LoraShape(rank)
        modules = {name: module for name, module in self._unet.named_modules() if hasattr(module, "weight")}
        low_rank = (m.weight for name, m in modules.items() if shape.matches(name))
        whole = sum(p.numel() for name in WHOLE for p in modules[name].parameters())
        return whole + sum(rank * (weight.shape[0] + weight[0].numel()) for weight in low_rank)

    def _together(self) -> int:
        """Of a divided student at the largest moment: values and gradients of the root and of one unit, and
        what they are sent in; a guess, no GPU was at hand.
        """
        sizes = [sum(p.numel() for p in unit.parameters()) for unit in units(self._unet)]
        root = self.checkpoint.unet_parameters - sum(sizes)
        return 16 * (root + max(sizes))

    @cached_property
    def _unet(self) -> Any:
        config = self.checkpoint.config("unet")
        return build("unet", {**config, "time_cond_proj_dim": W_DIM}, self.checkpoint.of)

    def _weights(self, part: Any, dtype: torch.dtype) -> int:
        prefix = self.checkpoint.of.prefixes[part]
        counts = (v.numel() for key, v in self.checkpoint.tensors.items() if key.startswith(prefix))
        return sum(counts) * dtype.itemsize

    def _step(self, dtype: torch.dtype) -> int:
        """Beside the weights and their gradients: a training step of the student."""
        unet = recomputing(place(self._unet, "meta", dtype).train().requires_grad_(True))
        hooks = [p.register_post_accumulate_grad_hook(_forget) for p in unet.parameters()]
        try:
            return peak(
                lambda: torch.autograd.backward(self._asked(unet, self.batch).float().square().mean())
            )
        finally:
            for hook in hooks:
                hook.remove()

    def _evaluation(self, dtype: torch.dtype) -> int:
        """Of the guided pair, both branches at once."""
        unet = place(self._unet, "meta", dtype).eval().requires_grad_(False)
        return peak(lambda: self._asked(unet, 2 * self.batch))

    def _asked(self, unet: Any, batch: int) -> Tensor:
        cond = random_cond(self.checkpoint, batch, generator=torch.Generator())
        cells = (self.height // self.checkpoint.downscale, self.width // self.checkpoint.downscale)
        with torch.device("meta"):
            z = torch.empty(batch, int(unet.config["in_channels"]), *cells)
            empty = {name: torch.empty(value.shape) for name, value in cond.items()}
            return UNetNetwork(unet)(z, torch.empty(batch), empty, torch.empty(batch))

    def _decoding(self, dtype: torch.dtype) -> int:
        """The VAE, and one picture of it at a time."""
        vae = place(build("vae", self.checkpoint.config("vae")), "meta", dtype).requires_grad_(False)
        cells = (self.height // self.checkpoint.downscale, self.width // self.checkpoint.downscale)
        latent = torch.empty(1, self.checkpoint.latent_channels, *cells, dtype=dtype, device="meta")
        return self._weights("vae", dtype) + peak(lambda: vae.decode(latent))


@dataclass(frozen=True)
class Route:
    """How a run's student is trained; ``reasons`` by the name of the setting, where there is one;
    ``averages``: of :data:`PLACES`.
    """

    student: str
    rank: int | None
    precision: str
    reasons: Mapping[str, str]
    averages: str = "device"


def choose_route(
    needs: Needs,
    *,
    free: int,
    student: str | None,
    rank: int | None,
    ranks: Sequence[int],
    precisions: Sequence[str],
    ema: float,
    optimizer: str = "adamw",
    places: Sequence[str] = PLACES[:1],
) -> Route:
    """Every weight where the memory allows it, else the largest LoRA that it allows, else the smallest.

    What was asked for (``student``, ``rank``) is kept; of ``ranks``, ``precisions`` and ``places`` (of the
    averages) the first is what is best.
    """

    def takes(rank: int | None, precision: str, place: str = places[0]) -> int:
        kept = ema if place == "device" else 0
        return max(needs.stages(rank=rank, precision=precision, ema=kept, optimizer=optimizer).values())

    def off(rank: int | None, precision: str, place: str) -> dict[str, str]:
        if place == places[0]:
            return {}
        return {
            "averages": f"on the device too it takes about {size(takes(rank, precision))}, and {size(free)} "
            "are free"
        }

    whole = [(None, precisions[0], place) for place in places]
    fitting = next((each for each in whole if takes(*each) <= free), None)
    if student == "full":
        best = fitting or whole[-1]
        return Route("full", None, precisions[0], {"student": "you", **off(*best)}, best[2])
    why = "you" if student else "--rank"
    if not student and rank is None:
        count = takes(*(fitting or whole[0]))
        why = f"training every weight takes about {size(count)}, and {size(free)} are free"
        if fitting:
            return Route("full", None, precisions[0], {"student": why, **off(*fitting)}, fitting[2])
    asked = (rank,) if rank is not None else ranks
    tried = [(r, p, place) for r in asked for p in precisions for place in places]
    chosen = next((each for each in tried if takes(*each) <= free), tried[-1])
    reasons = {"student": why, **off(*chosen)}
    if rank is None and chosen[0] != ranks[0]:
        first = size(takes(ranks[0], precisions[-1]))
        reasons["rank"] = f"rank {ranks[0]} takes about {first}, and {size(free)} are free"
    if chosen[1] != precisions[0]:
        reasons["precision"] = f"in {precisions[0]} it takes about {size(takes(chosen[0], precisions[0]))}"
    return Route("lora", chosen[0], chosen[1], reasons, chosen[2])


def weights_bytes(
    parameters: int, trained: int, *, precision: str, ema: float, optimizer: str = "adamw", divided: int = 1
) -> int:
    """Held while training: the frozen network in the run's precision; of what is trained, in float32, the
    values, gradients, Adam's two moments, the average, a LoRA's earlier student; and autocast's copies, which
    processes that have ``divided`` what is trained do not keep.
    """
    frozen = DTYPES[precision].itemsize
    copies = 0 if precision == "fp32" or divided > 1 else frozen
    earlier = 4 if trained < parameters else 0
    average = 4 if ema else 0
    each = 4 + 4 + MOMENTS[optimizer] + average + earlier + copies
    return parameters * frozen + -(-trained * each // divided)


def free_memory(device: torch.device) -> int:
    """Bytes that a run on this device may still take."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def size(count: int) -> str:
    """Bytes for people."""
    return f"{count / GIB:.1f} GiB" if count >= GIB else f"{count / 1024**2:.0f} MiB"


def peak(work: Callable[[], object]) -> int:
    """:func:`peak_living` on the meta device."""
    with _flash_attention():
        return peak_living(lambda: work)


def peak_living(make: Callable[[], Callable[[], object]]) -> int:
    """Bytes of the tensors that ``make`` and the work that it gives have made, when most of them live during
    the work; what the making takes for a moment does not count.
    """
    with _Living() as living:
        work = make()
        living.most = living.now
        work()
    return living.most


class _Living(TorchDispatchMode):
    """Counts the storages that operations make until they are let go of."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._counted: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        answer = func(*args, **(kwargs or {}))
        given = {id(tensor.untyped_storage()) for tensor in _tensors((args, kwargs))}
        for tensor in _tensors(answer):
            storage = tensor.untyped_storage()
            if id(storage) not in given and id(storage) not in self._counted:
                self._counted.add(id(storage))
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self._forget, id(storage), storage.nbytes())
        return answer

    def _forget(self, number: int, count: int) -> None:
        self._counted.discard(number)
        self.now -= count


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, Mapping):
        for value in values.values():
            yield from _tensors(value)
    elif isinstance(values, (tuple, list)):
        for value in values:
            yield from _tensors(value)


def _forget(parameter: Tensor) -> None:
    """Gradients are counted with the weights."""
    parameter.grad = None


@contextmanager
def _flash_attention() -> Generator[None]:
    """On the meta device torch takes the plain formula, whose matrix of every pair no device here holds."""
    plain = F.scaled_dot_product_attention

    def flash(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]

    F.scaled_dot_product_attention = flash  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        F.scaled_dot_product_attention = plain  # pyright: ignore[reportAttributeAccessIssue]
