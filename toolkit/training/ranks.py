"""The processes of one run (``accelerate launch -m toolkit.distill``), each with a device of its own.

Data parallel: every process holds student, teacher and optimiser whole, takes its rows of each micro-batch,
and the gradients are added up before a step, so that all of them take the same one. The random numbers of a
micro-batch are drawn whole by every process, which keeps those of its rows: several processes with m pictures
at once are one process with as many times m. The first writes files; what concerns all is agreed upon, so
that none waits for one that has left.

Not torch's DistributedDataParallel: a critic, adapters that take turns on one network and a micro-batch
halved for want of memory all put other passes between a step's forward and its exchange. What is given up is
that it exchanges during the backward pass.

Launched for FSDP2, the processes divide a student that is trained whole: sharding.py.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter
from torch.overrides import TorchFunctionMode

from ..diffusion.errors import BadInput

BUCKET_BYTES = 64 * 1024**2
"""Gradients are exchanged in lots of so many bytes, or one by one where they are larger."""

PATIENCE = timedelta(days=7)
"""How long one process waits for the others, who may be making pictures; that one has ended is seen at
once."""

T = TypeVar("T")


def exchange_bytes(trained: int, processes: int) -> int:
    """What the exchange of so many gradients takes beside them."""
    return 0 if processes == 1 else min(4 * trained, BUCKET_BYTES)


@dataclass(frozen=True)
class Ranks:
    """This process's ``number`` among ``count``; ``device``: where what is exchanged lies; ``divides``:
    whether students with all their weights are divided (sharding.py)."""

    number: int = 0
    count: int = 1
    device: torch.device | str = "cpu"
    divides: bool = False

    @property
    def writes(self) -> bool:
        """Whether files, logs and pictures are this one's."""
        return self.number == 0

    def wait(self) -> None:
        """Until all are here."""
        if self.count > 1:
            self.any(False)

    @contextmanager
    def first(self) -> Generator[None]:
        """The first process goes through the block alone; the others find what it has left."""
        if not self.writes:
            self.wait()
        yield
        if self.writes:
            self.wait()

    def told(self, word: str = "") -> str:
        """What the first process says."""
        if self.count == 1:
            return word
        words = [word]
        self._exchanged(dist.broadcast_object_list, words, device=torch.device(self.device))
        return words[0]

    def any(self, sign: bool) -> bool:
        """Whether any process says so."""
        return self.each(sign)[0]

    def each(self, *signs: bool) -> list[bool]:
        """Of each sign, whether any process gives it."""
        return [bool(count) for count in self._sum(signs)]

    def total(self, loss: float | None) -> float | None:
        """The sum over all processes; None where one has none."""
        found, missing = self._sum([loss or 0.0, loss is None])
        return None if missing else found

    def mine(self, works: Sequence[T]) -> Sequence[T]:
        """This process's share of what each does for itself."""
        return works[self.number :: self.count]

    def pieces(self, length: int, at_once: int) -> Sequence[Tensor]:
        """This process's rows of a micro-batch, ``at_once`` and at once."""
        return torch.arange(length).tensor_split(self.count)[self.number].split(at_once)

    @torch.no_grad()
    def add_up(self, parameters: Iterable[Parameter]) -> None:
        """The gradients become their sum over all processes, which divided ones are already."""
        if self.count == 1:
            return
        gradients = [p.grad for p in parameters if p.grad is not None]
        for bucket in _buckets([g for g in gradients if not is_divided(g)]):
            flat = torch.cat([gradient.flatten() for gradient in bucket])
            self._exchanged(dist.all_reduce, flat)
            for gradient, part in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
                gradient.copy_(part.view_as(gradient))

    def _sum(self, numbers: Sequence[float]) -> list[float]:
        if self.count == 1:
            return list(numbers)
        values = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        self._exchanged(dist.all_reduce, values)
        return values.tolist()

    def _exchanged(self, call: Callable[..., object], *what: object, **how: object) -> None:
        """An error where another process has ended."""
        try:
            call(*what, **how)
        except RuntimeError:
            raise self._lost() from None

    @contextmanager
    def loss_in_words(self) -> Generator[None]:
        """The same for what a divided network exchanges within."""
        try:
            yield
        except RuntimeError as error:
            if self.count == 1 or not (isinstance(error, dist.DistError) or "gloo" in str(error)):
                raise
            raise self._lost() from None

    def _lost(self) -> BadInput:
        return self.all_find(
            "another process of this run has ended, and without it this one cannot go on; what it said "
            "tells why; go on from the last state by --resume"
        )

    def all_find(self, sentence: str) -> BadInput:
        """An error that every process has come to: the first one says it."""
        return BadInput(sentence) if self.writes else SaidByTheFirst(sentence)

    def linger(self) -> None:
        """Until the first has said and saved all: launchers end everybody when somebody leaves with an
        error."""
        with suppress(BadInput):
            self.wait()

    def leave(self) -> None:
        """At the end."""
        if self.count > 1:
            dist.destroy_process_group()


ALONE = Ranks()


class SaidByTheFirst(BadInput):
    """An error that needs no words of this process."""


def require_shares(batch: int, processes: int) -> None:
    """BadInput for a batch that cannot be shared equally."""
    if batch % processes:
        raise BadInput(
            f"a batch of {batch} pictures cannot be shared equally by {processes} processes; give a "
            f"--batch-size that is a multiple of {processes}, or another number of processes"
        )


def launched() -> int:
    """How many processes this run was launched with."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def launched_to_divide() -> bool:
    """Whether this run was launched to divide what it trains (by FSDP2)."""
    return launched() > 1 and os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"


def gathered(*, cpu: bool) -> Ranks:
    """All processes that were launched together, when they have met; one of its own needs nothing of this."""
    if launched() == 1:
        return ALONE
    from accelerate import PartialState

    state = PartialState(cpu=cpu, timeout=PATIENCE)
    return Ranks(state.process_index, state.num_processes, state.device or "cpu", launched_to_divide())


def is_divided(value: Tensor) -> bool:
    """By what such a tensor alone has: some builds of torch know nothing of DTensors."""
    return hasattr(value, "full_tensor")


def as_of(rows: Tensor, whole: int) -> AbstractContextManager[Any]:
    """Random numbers for a piece of ``whole`` rows, drawn as for all of them."""
    return nullcontext() if len(rows) == whole else _Whole(rows, whole)


class _Whole(TorchFunctionMode):
    """Draws from a generator that have as many rows as the piece are made for the whole."""

    def __init__(self, rows: Tensor, whole: int) -> None:
        super().__init__()
        self.rows, self.whole = rows, whole

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        options = kwargs or {}
        if func not in (torch.rand, torch.randn, torch.randint) or options.get("generator") is None:
            return func(*args, **options)
        bounds = args[:-1] if func is torch.randint else ()
        shape = args[-1] if isinstance(args[-1], Sequence) else args
        if len(shape) == 0 or shape[0] != len(self.rows):
            return func(*args, **options)
        return func(*bounds, (self.whole, *shape[1:]), **options)[self.rows]


def _buckets(tensors: Sequence[Tensor]) -> Generator[list[Tensor]]:
    """Of one dtype each."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        held = sum(other.nbytes for other in bucket)
        if bucket and (held + tensor.nbytes > BUCKET_BYTES or tensor.dtype != bucket[0].dtype):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket
