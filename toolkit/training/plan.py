"""What a run will cost, before it starts: updates, network evaluations, memory, disk and time.

Times come from a few real forwards, training steps and updates on the teacher's own network and shapes;
memory from memory.py.
"""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from ..diffusion.denoiser import Cond, Network
from ..diffusion.errors import BadInput
from ..diffusion.method import Phase
from .loop import LoopSettings
from .memory import free_memory, size
from .networks import DTYPES
from .optimizers import MOMENTS, make_optimizer

SAMPLED = 2**24
"""Trained numbers, about, on which an update is timed; the time is taken to grow with their count."""


@dataclass(frozen=True)
class Costs:
    """Measured: seconds a picture of one evaluation and of one training step, and of what each update does
    with the gradients. ``trained`` parameters are trained, of the network or beside it. Where the step did
    not fit the free memory it is not ``measured``, but taken for three evaluations.
    """

    trained: int
    evaluation_seconds: float
    training_seconds: float
    update_seconds: float
    measured: bool = True


@dataclass(frozen=True)
class PhasePlan:
    name: str
    updates: int
    evaluations: int
    seconds: float


@dataclass(frozen=True)
class Plan:
    """``memory``: bytes of each stage at its largest moment; ``disk``: of each item at its largest;
    ``evaluations`` count pictures through the network. Not ``measured``: a training step's time is a guess.
    ``route``: how the run gets by with the memory, in words. ``memory`` is of each of the ``processes``, who
    share the work equally.
    """

    phases: tuple[PhasePlan, ...]
    sample_evaluations: int
    sample_seconds: float
    memory: dict[str, int]
    free_bytes: int
    disk: dict[str, int]
    files: tuple[str, ...]
    route: str
    measured: bool = True
    processes: int = 1

    @property
    def memory_bytes(self) -> int:
        return max(self.memory.values())

    @property
    def seconds(self) -> float:
        return self.sample_seconds + sum(phase.seconds for phase in self.phases)

    @property
    def evaluations(self) -> int:
        return self.sample_evaluations + sum(phase.evaluations for phase in self.phases)

    def to_json(self) -> dict[str, Any]:
        sums = {"memory_bytes": self.memory_bytes, "seconds": self.seconds, "evaluations": self.evaluations}
        return {**asdict(self), **sums}

    def text(self) -> str:
        """The plan for people, a few lines."""
        rows = (
            [("teacher's pictures", "", self.sample_evaluations, self.sample_seconds)]
            if self.sample_evaluations
            else []
        )
        rows += [(p.name, str(p.updates), p.evaluations, p.seconds) for p in self.phases]
        rows.append(("all", "", self.evaluations, self.seconds))
        lines = [f"{'phase':<20}{'updates':>9}{'evaluations':>14}{'about':>12}"]
        lines += [
            f"{name:<20}{updates:>9}{count:>14,}{duration(seconds):>12}"
            for name, updates, count, seconds in rows
        ]
        disk = ", ".join(f"{name} {size(count)}" for name, count in self.disk.items())
        stages = ", ".join(f"{name} {size(count)}" for name, count in self.memory.items())
        each = " of each process" if self.processes > 1 else ""
        memory = f"memory{each}: about {size(self.memory_bytes)} ({stages}), of {size(self.free_bytes)} free"
        if self.memory_bytes > self.free_bytes:
            memory += "; that is not enough: try --student lora, a smaller --micro-batch or --resolution"
        if not self.measured:
            lines.append("a training step does not fit the free memory here; its time is guessed")
        return "\n".join(
            [
                *lines,
                self.route,
                memory,
                f"disk: {disk}",
                "files: " + ", ".join(self.files),
            ]
        )


def measure(
    student: Network,
    *,
    trained: Sequence[Tensor],
    latent: tuple[int, int, int],
    cond: Cond,
    w: Tensor | None,
    batch: int,
    device: torch.device,
    precision: str,
    optimizer: str,
) -> Costs:
    """Time a student at its real shapes (``cond`` and ``w``: ``batch`` rows), in the precision of the run;
    its weights are left as they were.

    ``trained``: what gets gradients.
    """
    generator = torch.Generator().manual_seed(0)
    inputs = (
        torch.randn((batch, *latent), generator=generator).to(device),
        torch.full((batch,), 500, device=device),
        {name: value.to(device) for name, value in cond.items()},
        None if w is None else w.to(device),
    )

    def evaluate() -> None:
        with torch.no_grad():
            student(*inputs)

    def step() -> None:
        student(*inputs).float().square().mean().backward()
        for parameter in trained:
            parameter.grad = None

    # Beside the weights, which are there: gradients, and about as much again that the step works on.
    fits = free_memory(device) > 2 * sum(tensor.nbytes for tensor in trained)
    with torch.autocast(device.type, dtype=DTYPES[precision], enabled=precision != "fp32"):
        evaluation = _seconds(evaluate, device)
        training = _seconds(step, device) if fits else 3 * evaluation
    return Costs(
        trained=sum(p.numel() for p in trained),
        evaluation_seconds=evaluation / batch,
        training_seconds=training / batch,
        update_seconds=_updating(trained, optimizer, device),
        measured=fits,
    )


def _updating(trained: Sequence[Tensor], optimizer: str, device: torch.device) -> float:
    """Seconds of clipping, the optimiser's step and averaging, on copies of some of what is trained."""
    sample: list[Parameter] = []
    for tensor in trained:
        if sum(copy.numel() for copy in sample) < SAMPLED:
            sample.append(Parameter(tensor.detach().clone()))
            sample[-1].grad = torch.full_like(tensor, 1e-3)
    averages = [copy.detach().clone() for copy in sample]
    stepping = make_optimizer(optimizer, sample, lr=1e-6, device=device)

    @torch.no_grad()
    def update() -> None:
        torch.nn.utils.clip_grad_norm_(sample, 1.0)
        stepping.step()
        for average, copy in zip(averages, sample, strict=True):
            average.lerp_(copy, 0.01)

    counted = sum(copy.numel() for copy in sample)
    return _seconds(update, device) * sum(tensor.numel() for tensor in trained) / counted


def _seconds(work: Any, device: torch.device, repeats: int = 3) -> float:
    """The median of a few runs after one to warm up; a slow network is timed once."""
    times: list[float] = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
        if times[0] > 10:
            break
    return statistics.median(times[1:] or times)


def make_plan(
    phases: Sequence[Phase],
    settings: LoopSettings,
    costs: Costs,
    *,
    on_trajectory: bool,
    sample_evaluations: int,
    sample_bytes: int,
    student_bytes: int,
    memory: Mapping[str, int],
    free_bytes: int,
    files: Sequence[str],
    route: str,
    processes: int = 1,
) -> Plan:
    """``on_trajectory``: the data has trajectories; ``sample_evaluations``: what is still to do for the data;
    ``student_bytes``: one student's file. The exchange between ``processes`` is not counted.
    """

    on_kept = settings.trajectory_share if on_trajectory else 0.0
    # While a state takes the place of the one before, both are there, beside the weights of two phases.
    saved = 4 + MOMENTS[settings.optimizer] + (4 if settings.ema else 0)
    rows = [
        PhasePlan(
            name=phase.name,
            updates=updates,
            evaluations=round(updates * settings.batch_size * (beside(phase, on_kept) + 1)),
            seconds=updates
            * (
                settings.batch_size
                * (beside(phase, on_kept) * costs.evaluation_seconds + costs.training_seconds)
                / processes
                + costs.update_seconds
            ),
        )
        for phase, updates in zip(phases, settings.updates, strict=True)
    ]
    return Plan(
        phases=tuple(rows),
        sample_evaluations=sample_evaluations,
        sample_seconds=sample_evaluations * costs.evaluation_seconds / processes,
        memory=dict(memory),
        free_bytes=free_bytes,
        disk={
            "samples": sample_bytes,
            "students": student_bytes * (len(phases) + 1),
            "state": costs.trained * (2 * saved + 2 * 4),
        },
        files=tuple(files),
        route=route,
        measured=costs.measured,
        processes=processes,
    )


def beside(phase: Phase, trajectory_share: float) -> float:
    """Evaluations a sample and update beside the trained one: none of the teacher's for samples on a kept
    trajectory.
    """
    asked = 1.0 if phase.asks_always else 1 - trajectory_share
    return asked * phase.teacher_evaluations + phase.own_evaluations


def require_disk(plan: Plan, *, out: Path, cache: Path) -> None:
    """BadInput when the disks of the two folders cannot take what the plan writes."""
    needs: dict[int, tuple[Path, int]] = {}
    for folder, count in ((cache, plan.disk["samples"]), (out, plan.disk["students"] + plan.disk["state"])):
        place = nearest(folder)
        device = place.stat().st_dev
        needs[device] = (place, needs.get(device, (place, 0))[1] + count)
    for place, count in needs.values():
        if (free := shutil.disk_usage(place).free) < count:
            raise BadInput(
                f"this run writes up to {size(count)}, but the disk of {place} has {size(free)} free; free "
                "some space, or choose --out and --cache-dir on another disk"
            )


def nearest(folder: Path) -> Path:
    """The folder itself, or what of the way to it is there: it tells the disk."""
    return next(p for p in (folder.resolve(), *folder.resolve().parents) if p.exists())


def duration(seconds: float) -> str:
    """Seconds for people."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
