"""Works timed against each other: alternating in one run, so that what else the machine does slows all
alike.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import torch

from ..training.memory import peak_living

Work: TypeAlias = Callable[[], object]
Spread: TypeAlias = list[float]
"""Least, median, greatest."""


def race(works: Mapping[str, Work], *, rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each work in each round, after some to warm up; every second round runs backwards."""
    for work in works.values():
        for _ in range(3 if device.type == "cuda" else 1):
            work()
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for number in range(rounds):
        for name in list(works)[:: -1 if number % 2 else 1]:
            seconds[name].append(timed(works[name], device))
    return seconds


def timed(work: Work, device: torch.device) -> float:
    """Seconds by the clock of :func:`clock_of`."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    started = clock()
    work()
    return clock() - started


def clock_of(device: torch.device) -> str:
    """With what times are taken: other programs slow a single thread's wall clock, not its processor time."""
    if device.type == "cuda":
        return "CUDA events"
    return "processor time" if torch.get_num_threads() == 1 else "wall clock"


def spread(values: Sequence[float]) -> Spread:
    return [min(values), statistics.median(values), max(values)]


def ratio(of: Sequence[float], to: Sequence[float]) -> Spread:
    """Of the quotients of each round."""
    return spread([a / b for a, b in zip(of, to, strict=True)])


def peak_memory(make: Callable[[], Work], device: torch.device) -> int:
    """Bytes of tensors beyond those that are there, at the largest moment of the work that is made: on a GPU
    as its allocator says, elsewhere counted one by one. What making it takes for a moment does not count.
    """
    gc.collect()
    if device.type != "cuda":
        return peak_living(make)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(device)
    work = make()
    torch.cuda.reset_peak_memory_stats(device)
    work()
    return torch.cuda.max_memory_allocated(device) - before
