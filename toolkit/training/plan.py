"""What a run will cost, before it starts: updates, network evaluations, memory, disk and time.

Times come from a few real forwards and one training step on the teacher's own network and shapes; memory from
the sizes of the weights and the tensors that the backward pass keeps.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from ..diffusion.denoiser import Cond, Network
from ..diffusion.errors import BadInput
from ..diffusion.method import Phase
from .loop import LoopSettings
from .networks import DTYPES

GIB = 1024**3


@dataclass(frozen=True)
class Costs:
    """Measured: seconds a picture of one evaluation and of one training step, and bytes kept for the backward
    pass. The network has ``parameters``, and ``trained`` are trained, of it or beside it. Where the step did
    not fit the free memory it is not ``measured``, but taken for three evaluations.
    """

    parameters: int
    trained: int
    evaluation_seconds: float
    training_seconds: float
    activation_bytes: int
    measured: bool = True


@dataclass(frozen=True)
class PhasePlan:
    name: str
    updates: int
    evaluations: int
    seconds: float


@dataclass(frozen=True)
class Plan:
    """``disk``: bytes of each item at its largest; ``evaluations`` count pictures through the network. Not
    ``measured``: a training step's time is a guess, and the memory leaves out what its backward pass keeps.
    """

    phases: tuple[PhasePlan, ...]
    sample_evaluations: int
    sample_seconds: float
    memory_bytes: int
    free_bytes: int
    disk: dict[str, int]
    files: tuple[str, ...]
    measured: bool = True

    @property
    def seconds(self) -> float:
        return self.sample_seconds + sum(phase.seconds for phase in self.phases)

    @property
    def evaluations(self) -> int:
        return self.sample_evaluations + sum(phase.evaluations for phase in self.phases)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "seconds": self.seconds, "evaluations": self.evaluations}

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
        memory = f"memory: about {size(self.memory_bytes)}, of {size(self.free_bytes)} free"
        if self.memory_bytes > self.free_bytes:
            memory += "; that is not enough: try --student lora, a smaller --micro-batch or --resolution"
        if not self.measured:
            lines.append("a training step does not fit the free memory here; its time is guessed")
        return "\n".join(
            [
                *lines,
                memory,
                f"disk: {disk}",
                "files: " + ", ".join(self.files),
            ]
        )


def measure(
    student: Network,
    *,
    trained: Sequence[Tensor],
    parameters: Sequence[Tensor],
    latent: tuple[int, int, int],
    cond: Cond,
    w: Tensor | None,
    batch: int,
    device: torch.device,
    precision: str,
) -> Costs:
    """Time a student at its real shapes (``cond`` and ``w``: ``batch`` rows), in the precision of the run;
    its weights are left as they were.

    ``trained`` of its ``parameters`` get gradients.
    """
    generator = torch.Generator().manual_seed(0)
    inputs = (
        torch.randn((batch, *latent), generator=generator).to(device),
        torch.full((batch,), 500, device=device),
        {name: value.to(device) for name, value in cond.items()},
        None if w is None else w.to(device),
    )
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    def evaluate() -> None:
        with torch.no_grad():
            student(*inputs)

    def step() -> None:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = student(*inputs).float().square().mean()
        loss.backward()
        for parameter in trained:
            parameter.grad = None

    # Beside the weights, which are there: gradients, and about as much again that the step works on.
    fits = free_memory(device) > 2 * sum(tensor.nbytes for tensor in trained)
    with torch.autocast(device.type, dtype=DTYPES[precision], enabled=precision != "fp32"):
        evaluation = _seconds(evaluate, device)
        training = _seconds(step, device) if fits else 3 * evaluation
    weights = {p.untyped_storage().data_ptr() for p in parameters}
    return Costs(
        parameters=sum(p.numel() for p in parameters),
        trained=sum(p.numel() for p in trained),
        evaluation_seconds=evaluation / batch,
        training_seconds=training / batch,
        activation_bytes=sum(count for pointer, count in kept.items() if pointer not in weights),
        measured=fits,
    )


def _seconds(work: Any, device: torch.device, repeats: int = 3) -> float:
    """The fastest of a few runs after one to warm up; a slow network is timed once."""
    times: list[float] = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
        if times[0] > 10:
            break
    return min(times[1:] or times)


def make_plan(
    phases: Sequence[Phase],
    settings: LoopSettings,
    costs: Costs,
    *,
    on_trajectory: bool,
    sample_evaluations: int,
    sample_bytes: int,
    student_bytes: int,
    free_bytes: int,
    files: Sequence[str],
) -> Plan:
    """``on_trajectory``: the data has trajectories; ``sample_evaluations``: what is still to do for the data;
    ``student_bytes``: one student's file.
    """

    def beside(phase: Phase) -> float:
        """Evaluations a sample and update beside the trained one: none of the teacher's for samples on a kept
        trajectory."""
        share = 1.0 if phase.asks_always or not on_trajectory else 1 - settings.trajectory_share
        return share * phase.teacher_evaluations + phase.own_evaluations

    rows = [
        PhasePlan(
            name=phase.name,
            updates=updates,
            evaluations=round(updates * settings.batch_size * (beside(phase) + 1)),
            seconds=updates
            * settings.batch_size
            * (beside(phase) * costs.evaluation_seconds + costs.training_seconds),
        )
        for phase, updates in zip(phases, settings.updates, strict=True)
    ]
    return Plan(
        phases=tuple(rows),
        sample_evaluations=sample_evaluations,
        sample_seconds=sample_evaluations * costs.evaluation_seconds,
        memory_bytes=weights_bytes(
            costs.parameters, costs.trained, precision=settings.precision, ema=settings.ema
        )
        + costs.activation_bytes,
        free_bytes=free_bytes,
        disk={
            "samples": sample_bytes,
            "students": student_bytes * (len(phases) + 1),
            "state": costs.trained * 4 * (2 * 4 + 2),
        },
        files=tuple(files),
        measured=costs.measured,
    )


def weights_bytes(parameters: int, trained: int, *, precision: str, ema: float) -> int:
    """Held while training: the frozen network in the run's precision; of what is trained, in float32, the
    values, gradients, Adam's two moments, the average, a LoRA's earlier student; and autocast's copies.
    """
    frozen = DTYPES[precision].itemsize
    copies = 0 if precision == "fp32" else frozen
    earlier = 4 if trained < parameters else 0
    return parameters * frozen + trained * (4 + 4 + 8 + (4 if ema else 0) + earlier + copies)


def free_memory(device: torch.device) -> int:
    """Bytes that a run on this device may still take."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def require_disk(plan: Plan, *, out: Path, cache: Path) -> None:
    """BadInput when the disks of the two folders cannot take what the plan writes."""
    needs: dict[int, tuple[Path, int]] = {}
    for folder, count in ((cache, plan.disk["samples"]), (out, plan.disk["students"] + plan.disk["state"])):
        place = next(p for p in (folder.resolve(), *folder.resolve().parents) if p.exists())
        device = place.stat().st_dev
        needs[device] = (place, needs.get(device, (place, 0))[1] + count)
    for place, count in needs.values():
        if (free := shutil.disk_usage(place).free) < count:
            raise BadInput(
                f"this run writes up to {size(count)}, but the disk of {place} has {size(free)} free; free "
                "some space, or choose --out and --cache-dir on another disk"
            )


def size(count: int) -> str:
    """Bytes for people."""
    return f"{count / GIB:.1f} GiB" if count >= GIB else f"{count / 1024**2:.0f} MiB"


def duration(seconds: float) -> str:
    """Seconds for people."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
