"""The training loop: phases of a method, each ending in a student file; killed at any moment, it goes on
exactly.

All random numbers of an update come from a generator seeded by (seed, phase, update), and the order of the
data from (seed, phase, epoch). So the state to keep is small: weights, their average, the optimiser and where
the run stands.

Out of memory, the loop halves the micro-batch and does the update anew, its batch unchanged. Every update
still sees the samples and the random numbers that it would have seen (the order keeps the micro-batch that
was asked for, and the parts are cut into pieces), but sums are rounded in another order, so the bytes depend
on where it happened. That is why it is in the state, which is saved there and then: a run that goes on from
any state gives the bytes of the run that it was. Several processes (ranks.py) share each part in the same
way; the state knows how many pictures a part has, so that another number of processes can go on.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import signal
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Parameter
from tqdm import tqdm

from ..diffusion.denoiser import Cond, Denoiser, Network, NetworkDenoiser
from ..diffusion.errors import BadInput
from ..diffusion.guidance import smooth_features
from ..diffusion.method import Batch, Criticism, Phase
from ..diffusion.prediction import PredictionType
from ..diffusion.schedule import NoiseSchedule
from ..runtime.files import atomic_path
from .adapters import COND_PROJ, Holder, LoraShape, OneNetwork, State, Trained, TwoNetworks
from .guests import Guests
from .networks import DTYPES
from .optimizers import make_optimizer
from .pace import Pace
from .pilot import LEAST, Pilot, distance, painted
from .ranks import ALONE, Ranks, as_of
from .samples import GuidanceRange, Order, Samples, derived_seed, draw_batch
from .sharding import cut, own, shown_by_the_first, wholes

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

log = logging.getLogger("fewstep")

STOPS = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP", "SIGBREAK") if hasattr(signal, name)]
"""Signals that ask for a stop, beside Ctrl+C: the second comes when a terminal is closed, the third when a
window is on Windows."""


@dataclass(frozen=True)
class LoopSettings:
    """The resolved numbers of a run; ``updates`` one a phase, ``micro_batch`` of each process, ``lora`` None
    to train every weight, ``caption_dropout`` None as each phase wants it, ``state_minutes`` and
    ``sample_minutes`` wall-clock, ``averages`` where the averaged weights are kept, "device" or "cpu".
    """

    updates: tuple[int, ...]
    batch_size: int
    micro_batch: int
    lr: float
    warmup: int
    clip: float
    ema: float
    seed: int
    precision: str
    guidance: GuidanceRange
    trajectory_share: float
    lora: LoraShape | None = None
    optimizer: str = "adamw"
    averages: str = "device"
    critic_lr: float = 1e-4
    caption_dropout: float | None = None
    cfg_rescale: float = 0.0
    state_minutes: float = 5.0
    sample_minutes: float = 5.0


@dataclass(frozen=True, eq=False)
class Start:
    """Weights that a run begins with instead of its teacher's, by the names that ``finished`` gets."""

    prediction_type: PredictionType
    load: Callable[[], State]


@dataclass(frozen=True, eq=False)
class Job:
    """What the loop works on, and whom it tells.

    ``new_unet()`` gives the teacher's network in float32, with a zero-initialised guidance input if the
    student is to have one.
    ``finished`` writes a phase's student from its averaged weights, of a LoRA those alone that were trained;
    ``look`` is shown the current student for sample pictures. ``guests`` reach the networks of ``new_unet``.
    ``told`` hears each line of run.jsonl. The pilot makes ``pilot_pictures``, if any.
    """

    phases: Sequence[Phase]
    teacher_prediction: PredictionType
    schedule: NoiseSchedule
    samples: Samples
    new_unet: Callable[[], UNet2DConditionModel]
    finished: Callable[[Phase, dict[str, Tensor]], None]
    look: Callable[[str, NetworkDenoiser, Phase], None]
    out: Path
    guests: Guests = field(default_factory=Guests)
    start: Start | None = None
    told: Callable[[dict[str, Any]], None] = lambda line: None
    pilot_pictures: int = 0


@dataclass
class Progress:
    """Where a run stands: phase index and the updates done in it."""

    phase: int = 0
    update: int = 0


class Interrupted(KeyboardInterrupt):
    """The run was asked to stop; its state is on the disk."""


def train(job: Job, settings: LoopSettings, *, device: torch.device, ranks: Ranks = ALONE) -> None:
    """Run the phases from where ``out/state`` stands to the end; of several processes (``ranks``) the first
    alone writes and shows.

    Raises BadInput when the loss is not finite, the memory does not suffice or the pilot finds that all is
    not well, and Interrupted after Ctrl+C or one of STOPS, the state saved.
    """
    scaler = torch.GradScaler(device.type, enabled=settings.precision == "fp16")
    state = job.out / "state"
    saved = load_state(state / "latest.pt")
    progress = Progress(saved["phase"], saved["update"]) if saved else Progress()
    at_once, part = sizes(saved, settings, ranks)
    if ranks.writes:
        cut_back(job.out / "run.jsonl", progress)
    else:
        job = dataclasses.replace(job, finished=_nothing, look=_nothing)
    done = sum(settings.updates[: progress.phase]) + progress.update
    holder = make_holder(job, settings, device, ranks)
    with (
        tqdm(
            total=sum(settings.updates),
            initial=done,
            unit="update",
            dynamic_ncols=True,
            disable=not ranks.writes,
        ) as bar,
        stop_requests() as stop,
        memory_in_words(state, divided=divides(settings, ranks)),
        ranks.loss_in_words(),
    ):
        if saved is None and job.start is None:
            start = NetworkDenoiser(holder.untrained(), job.schedule, job.teacher_prediction)
            show(job, "start", start, job.phases[0], ranks if divides(settings, ranks) else ALONE, device)
            del start
        for index in range(progress.phase, len(job.phases)):
            trainer = PhaseTrainer(job, settings, index, holder, scaler, device, at_once, part, ranks)
            if saved is not None and "student" in saved:
                trainer.restore(saved)
            elif saved is None and job.start is not None and index == 0:
                trainer.look("start")
            saved = None
            bar.set_description(job.phases[index].name)
            trainer.run(bar, stop, trainer.begin_pilot())
            at_once = trainer.at_once
            _conclude_phase(trainer, index, {"at_once": at_once, "part": part})
            ranks.wait()
            del trainer


def _conclude_phase(trainer: PhaseTrainer, index: int, going_on: dict[str, Any]) -> None:
    """Write the phase's student and show it; what a later phase needs is kept."""
    job, writes = trainer.job, trainer.ranks.writes
    state = job.out / "state"
    average = wholes(trainer.average, trainer.trained, keep=writes)
    if writes:
        save_state(state / f"phase-{index}.pt", average)
        job.finished(job.phases[index], average)
    del average
    trainer.look(job.phases[index].name)
    if not writes:
        return
    save_state(state / "latest.pt", {"phase": index + 1, "update": 0, **going_on})
    with suppress(PermissionError):  # of use to nobody, and open somewhere (Windows)
        (state / f"phase-{index - 1}.pt").unlink(missing_ok=True)


def sizes(saved: dict[str, Any] | None, settings: LoopSettings, ranks: Ranks) -> tuple[int, int]:
    """Pictures that a process takes at once, and those of a part, which all share; as in the state that is
    gone on from, unless a process would be left without a picture; who divides the student must be asked as
    often as everyone.
    """
    if saved is None:
        return settings.micro_batch, settings.micro_batch * ranks.count
    at_once = saved.get("at_once", settings.micro_batch)
    part = saved.get("part", settings.micro_batch)
    shortest = settings.batch_size % part or part
    fits = part % ranks.count == 0 if divides(settings, ranks) else shortest >= ranks.count
    return at_once, part if fits else at_once * ranks.count


def divides(settings: LoopSettings, ranks: Ranks) -> bool:
    """Whether the processes divide the student among them: a LoRA is too small for that."""
    return ranks.divides and settings.lora is None


def _nothing(*_: object) -> None:
    """What the other processes do where the first one writes."""


def make_holder(job: Job, settings: LoopSettings, device: torch.device, ranks: Ranks = ALONE) -> Holder:
    """Where the networks of a run live."""
    dtype, divided = DTYPES[settings.precision], divides(settings, ranks)

    def in_precision(network: Network) -> Network:
        return autocast(network, device, dtype, keep_casts=not divided)

    if settings.lora is None:
        seed = derived_seed(settings.seed, -2)
        return TwoNetworks(job.new_unet, device, dtype, in_precision, seed, divided)
    seed = derived_seed(settings.seed, settings.lora.rank)
    return OneNetwork(
        job.new_unet, settings.lora, seed=seed, device=device, dtype=dtype, autocast=in_precision
    )


class PhaseTrainer:
    """One phase: student, its average, optimiser and frozen teacher. Of what is trained it holds three sets
    of weights at most. ``at_once``: pictures, the micro-batch or less, should the memory not suffice;
    ``part``: those that all processes share (None: as many).
    """

    def __init__(
        self,
        job: Job,
        settings: LoopSettings,
        index: int,
        holder: Holder,
        scaler: torch.GradScaler,
        device: torch.device,
        at_once: int,
        part: int | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.job, self.settings, self.index, self.ranks = job, settings, index, ranks
        self.phase, self.scaler, self.device = job.phases[index], scaler, device
        self.at_once, self.part = at_once, part or settings.micro_batch
        self.update = 0
        self.order = Order(
            job.samples.buckets,
            batch=settings.batch_size,
            micro_batch=self.part,
            updates=settings.updates[index],
            seed=derived_seed(settings.seed, index, -1),
        )
        self.state_path = job.out / "state" / "latest.pt"
        previous, predicted = self._before()
        criticism = self.phase.criticism
        pair = holder.pair(previous, teacher=self.phase.teacher, critic=criticism is not None)
        prediction = job.teacher_prediction
        if self.phase.teacher == "previous" and previous is not None:
            prediction = predicted
        self.teacher = NetworkDenoiser(pair.teacher, job.schedule, prediction)
        self.student = NetworkDenoiser(pair.student, job.schedule, self.phase.prediction_type)
        self.trained = pair.trained
        self.is_divided = divides(settings, ranks)
        self.average = {name: own(value) for name, value in self.trained.items()}
        if settings.ema:
            home = torch.device("cpu") if settings.averages == "cpu" else device
            self.average = {name: value.to(home, copy=True) for name, value in self.average.items()}
        self.optimizer = make_optimizer(
            settings.optimizer, self.trained.values(), lr=settings.lr, device=device
        )
        self.critic: Critic | None = None
        if criticism is not None and pair.critic is not None:
            watching = NetworkDenoiser(pair.critic.network, job.schedule, job.teacher_prediction)
            self.critic = Critic(criticism, pair.critic, watching, lr=settings.critic_lr)

    def _before(self) -> tuple[State | None, PredictionType]:
        """The weights that the phase begins with, if not the teacher's, and what they predict."""
        if self.index:
            state = load_state(self.job.out / "state" / f"phase-{self.index - 1}.pt")
            return state, self.job.phases[self.index - 1].prediction_type
        start = self.job.start
        return (None, self.job.teacher_prediction) if start is None else (start.load(), start.prediction_type)

    def run(self, bar: tqdm[Any], stop: StopFlag, pilot: Pilot | None = None) -> None:
        """Updates to the end of the phase, saving the state and looking at samples by the clock."""
        last_state = last_look = time.monotonic()
        pace = Pace()
        while self.update < self.settings.updates[self.index]:
            started = time.monotonic()
            loss, lr = self.step()
            slow = pace.note(time.monotonic() - started)
            stopping = self.ranks.any(stop.requested)
            if stopping:  # first of all: in a closed window the bar can be drawn no more
                self.keep()
            bar.update(1)
            bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
            if slow:
                log.warning("%s", slow)
            if self.update % 10 == 0 or self.update == self.settings.updates[self.index]:
                self.write_line(bar, loss, lr, time.monotonic() - started)
            if stopping:
                raise Interrupted
            if pilot is not None:
                pilot.losses.append(loss)
                if self.ranks.any(pilot.is_due()):
                    self.conclude(pilot)
                    pilot = None
            now = time.monotonic()
            is_state_due, is_look_due = self.ranks.each(
                now - last_state > 60 * self.settings.state_minutes,
                now - last_look > 60 * self.settings.sample_minutes,
            )
            if is_state_due:
                self.keep()
                last_state = time.monotonic()
            if is_look_due:
                self.look(f"{self.phase.name}-{self.update:06d}")
                last_look = time.monotonic()

    def begin_pilot(self) -> Pilot | None:
        """None in a later phase, in one too short for a pilot, and where there was one already."""
        if self.index or self.settings.updates[0] < LEAST or verdict_path(self.job.out).exists():
            return None
        return Pilot(sum(self.settings.updates), self._distance())

    def conclude(self, pilot: Pilot) -> None:
        """Keep what the pilot says; BadInput, the state saved, if that is bad."""
        weights = [*map(own, self.trained.values()), *self.average.values()]
        finite = not self.ranks.any(not all(bool(value.isfinite().all()) for value in weights))
        moving = self.phase.own_evaluations > 0
        finding = pilot.judge(finite=finite, own_target=moving, now=self._distance())
        says = f"pilot, after {self.update} updates: {'going well' if finding.well else 'not going well'}"
        if self.ranks.writes:
            keep_verdict(self.job.out, f"{says} ({finding.says})")
        log.info("%s (%s)", says, finding.says)
        if self.ranks.any(not finding.well):
            self.keep()
            raise self.ranks.all_find(
                f"the pilot stopped this run after {self.update} updates: {finding.says}; start anew with "
                f"{self._lower_rate()}, or go on all the same by --resume"
            )

    def _distance(self) -> float | None:
        """How far the averaged student's pictures are from the data, if there is to be any."""
        if not self.job.pilot_pictures or self.phase.grid.ascending:
            return None
        self._swap()
        made, data = painted(
            self.student,
            self.phase,
            self.job.samples,
            count=self.job.pilot_pictures,
            schedule=self.job.schedule,
            guidance=self.settings.guidance,
            device=self.device,
        )
        self._swap()
        return distance(made, data)

    def step(self) -> tuple[float, float]:
        """One update of the whole batch in micro-batches; returns the mean loss and the learning rate."""
        settings, critic, updates = self.settings, self.critic, self.settings.updates[self.index]
        waits = self.waits
        lr = settings.lr * self.phase.lr_scale
        lr *= lr_factor(self.update - waits, updates - waits, settings.warmup) if self.update >= waits else 0
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        while (total := self.ranks.total(self._gradients())) is None:
            self._halve()
        self._require_finite(total)
        if critic is not None:
            self._step_optimizer(critic.optimizer, critic.parameters)
        if self.update >= waits:
            self._step_optimizer(self.optimizer, self.trained)
        self.scaler.update()
        self.update += 1
        self._average_weights()
        return total, lr

    def _gradients(self) -> float | None:
        """The loss of this process's share of the batch, its gradients added up; None where they do not fit
        the memory and fewer pictures at once can help."""
        seed = derived_seed(self.settings.seed, self.index, self.update)
        generator = torch.Generator().manual_seed(seed)
        total = 0.0
        try:
            for part in self.order(self.update):
                with self.job.guests.visit(generator) as visited:
                    begun = generator.get_state()
                    for rows in self.ranks.pieces(len(part), self.at_once):
                        generator.set_state(begun)
                        total += self._add_gradients(part, rows, visited, generator)
        except torch.OutOfMemoryError:
            if self.is_divided:  # the others wait within an evaluation, and would wait for ever
                raise
            return None
        return total

    def _add_gradients(self, part: Tensor, rows: Tensor, visited: bool, generator: torch.Generator) -> float:
        waiting = self.update < self.waits
        with as_of(rows, len(part)):
            batch = draw_batch(
                self.job.samples,
                part[rows],
                guidance=self.settings.guidance,
                # Kept trajectories are the teacher's without a guest.
                trajectory_share=0.0 if visited else self.settings.trajectory_share,
                cfg_rescale=self.settings.cfg_rescale,
                caption_dropout=self.caption_dropout,
                generator=generator,
                device=self.device,
            )
            loss = self._losses(batch, generator, waiting=waiting).sum() / self.settings.batch_size
        if not waiting:
            self.scaler.scale(loss).backward()
        return float(loss.detach())

    @property
    def waits(self) -> int:
        """The first so many updates of the phase are a critic's alone."""
        return 0 if self.critic is None else self.critic.alone(self.settings.updates[self.index])

    def _halve(self) -> None:
        """Half as many pictures at once from now on; what the failed update left is thrown away.

        Called when its exception is gone, and with it the tensors of the frames that it had passed.
        """
        self.optimizer.zero_grad(set_to_none=True)
        if self.critic is not None:
            self.critic.optimizer.zero_grad(set_to_none=True)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        if self.at_once == 1:
            raise torch.OutOfMemoryError
        before, self.at_once = self.at_once, (self.at_once + 1) // 2
        self.keep()
        log.warning(
            "out of memory at update %d of phase %s with %d pictures at once; going on with %d, the batch "
            "stays %d",
            self.update,
            self.phase.name,
            before,
            self.at_once,
            self.settings.batch_size,
        )

    def _losses(self, batch: Batch, generator: torch.Generator, *, waiting: bool) -> Tensor:
        """The student's losses (B,), to be backpropagated; a critic learns at once. While the student is
        ``waiting`` for it they are the critic's."""
        models = {"student": self.student, "teacher": self.teacher}
        if self.critic is None:
            return self.phase.loss(**models, batch=batch, generator=generator)
        criticism, critic = self.critic.criticism, self.critic.denoiser
        with torch.set_grad_enabled(not waiting):
            x0 = criticism.paint(self.student, batch, generator=generator)
        with self.critic.active():
            learned = criticism.learn(x0.detach(), critic=critic, batch=batch, generator=generator)
            self.scaler.scale(learned.sum() / self.settings.batch_size).backward()
        if waiting:
            return learned.detach()
        judged = criticism.judge(x0, teacher=self.teacher, critic=critic, batch=batch, generator=generator)
        return judged + self.phase.loss(**models, batch=batch, generator=generator)

    def _step_optimizer(self, optimizer: torch.optim.Optimizer, trained: Mapping[str, Parameter]) -> None:
        """In fp16 gradients are unscaled before they are clipped, and an overflowing update is left out."""
        if COND_PROJ in trained:
            freeze_fast_features(trained[COND_PROJ])
        self.ranks.add_up(trained.values())
        self.scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(trained.values(), self.settings.clip)
        self.scaler.step(optimizer)
        optimizer.zero_grad(set_to_none=True)
        if self.scaler.is_enabled() and self.scaler.get_scale() < 1:
            raise self.ranks.all_find(
                f"in fp16 the gradients of phase {self.phase.name} overflow in every update; start anew with "
                "--precision bf16, or fp32"
            )

    @property
    def caption_dropout(self) -> float:
        asked = self.settings.caption_dropout
        return self.phase.caption_dropout if asked is None else asked

    def _require_finite(self, loss: float) -> None:
        if math.isfinite(loss):
            return
        flag = self._lower_rate()
        if self.update == 0 and self.index == 0:  # nothing was learned yet, so the rate is not to blame
            exact = self.settings.precision == "fp32"
            flag = "another --cache-dir, for the data may be damaged" if exact else "--precision fp32"
        raise self.ranks.all_find(
            f"the loss became {loss} at update {self.update} of phase {self.phase.name}; the last good "
            f"state is kept in {self.job.out / 'state'}; start anew with {flag}"
        )

    def _lower_rate(self) -> str:
        return f"a lower --lr, such as {self.settings.lr / 3:.1g} (it was {self.settings.lr:g})"

    @torch.no_grad()
    def _average_weights(self) -> None:
        """Exponential average whose memory grows from the start to ``ema``; 0 keeps no copy at all."""
        if not self.settings.ema:
            return
        decay = min(self.settings.ema, (1 + self.update) / (10 + self.update))
        for name, value in self.trained.items():
            average = self.average[name]
            average.lerp_(own(value).to(average), 1 - decay)

    @torch.no_grad()
    def look(self, name: str) -> None:
        """Show the averaged student: its weights change places with the trained ones, so no copy is held."""
        self._swap()
        ranks = self.ranks if self.is_divided else ALONE
        show(self.job, name, self.student, self.phase, ranks, self.device)
        self._swap()

    def _swap(self) -> None:
        """In the same memory, which is where a divided network looks for its weights."""
        if not self.settings.ema:
            return
        for name, parameter in self.trained.items():
            average, trained = self.average[name], own(parameter)
            kept = trained.clone()
            trained.copy_(average)
            average.copy_(kept)

    def write_line(self, bar: tqdm[Any], loss: float, lr: float, seconds: float) -> None:
        if not self.ranks.writes:
            return
        rate = bar.format_dict["rate"] or 1 / max(seconds, 1e-9)
        line = {
            "time": round(time.time(), 3),
            "phase": self.phase.name,
            "phase_index": self.index,
            "update": self.update,
            "loss": loss,
            "lr": lr,
            "micro_batch": self.at_once,
            "images_per_second": round(self.settings.batch_size * rate, 3),
            "eta_seconds": round((bar.total - bar.n) / rate, 1),
        }
        with (self.job.out / "run.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self.job.told(line)

    def keep(self) -> None:
        state = self.state()
        if self.ranks.writes:
            save_state(self.state_path, state)

    def state(self) -> dict[str, Any]:
        """Of a divided student all processes ask for it, and the one that writes has it."""
        keep = self.ranks.writes
        student = {name: own(value) for name, value in self.trained.items()}
        return {
            "phase": self.index,
            "update": self.update,
            "at_once": self.at_once,
            "part": self.part,
            "student": wholes(student, self.trained, keep=keep),
            "average": wholes(self.average, self.trained, keep=keep) if self.settings.ema else None,
            "optimizer": optimizer_state(self.optimizer, keep=keep),
            "critic": None if self.critic is None else self.critic.state(),
            "scaler": self.scaler.state_dict(),
        }

    def restore(self, saved: dict[str, Any]) -> None:
        """Take up a state of this phase."""
        self.update = saved["update"]
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(cut(saved["student"][name], parameter))
        if self.settings.ema:
            kept = saved["average"]
            self.average = {
                name: own(cut(kept[name], self.trained[name])).to(average, copy=True)
                for name, average in self.average.items()
            }
        restore_optimizer(self.optimizer, saved["optimizer"])
        if self.critic is not None:
            self.critic.restore(saved["critic"])
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(saved["scaler"])


class Critic:
    """The network that is trained beside the student, and its optimiser."""

    def __init__(self, criticism: Criticism, trained: Trained, denoiser: Denoiser, *, lr: float) -> None:
        self.criticism, self.denoiser = criticism, denoiser
        self.parameters, self.active = trained.parameters, trained.active
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=lr, betas=(0.0, 0.99), weight_decay=0.0
        )

    def alone(self, updates: int) -> int:
        """The first so many of a phase's updates are its own."""
        return round(self.criticism.alone * updates)

    def state(self) -> dict[str, Any]:
        weights = {name: value.detach() for name, value in self.parameters.items()}
        return {"weights": weights, "optimizer": self.optimizer.state_dict()}

    @torch.no_grad()
    def restore(self, saved: dict[str, Any]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(saved["weights"][name])
        restore_optimizer(self.optimizer, saved["optimizer"])


def restore_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Take up a state, in memory of its own: Windows replaces no file that is mapped, as saved states are."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    moments = {
        number: {name: cut(value, parameters[number]) for name, value in of.items()}
        for number, of in saved["state"].items()
    }
    optimizer.load_state_dict({**saved, "state": moments})
    for moments in optimizer.state.values():
        for name, value in moments.items():
            if isinstance(value, Tensor) and value.device.type == "cpu":
                moments[name] = value.clone()


def optimizer_state(optimizer: torch.optim.Optimizer, *, keep: bool) -> dict[str, Any]:
    """With whole moments (see :func:`wholes`)."""
    found = optimizer.state_dict()
    for number, moments in found["state"].items():
        parts = {name: own(value) for name, value in moments.items() if isinstance(value, Tensor)}
        found["state"][number] = {**moments, **wholes(parts, moments, keep=keep)}
    return found


def autocast(
    network: Network, device: torch.device, dtype: torch.dtype, *, keep_casts: bool = True
) -> Network:
    """The network computing in ``dtype``; what is done with its output stays in float32. ``keep_casts``: to
    the end of the evaluation, which for weights that come and go would be all of them.
    """

    def call(z: Tensor, timestep: Tensor, cond: Cond, w: Tensor | None) -> Tensor:
        with torch.autocast(
            device.type, dtype=dtype, enabled=dtype != torch.float32, cache_enabled=keep_casts
        ):
            return network(z, timestep, cond, w)

    return call


def freeze_fast_features(cond_proj: Parameter) -> None:
    """Let the projection's columns of fast features of w learn nothing (see ``smooth_features``)."""
    if cond_proj.grad is not None:
        gradient = own(cond_proj.grad)
        gradient.mul_(_smooth_features(gradient.device))


@cache
def _smooth_features(device: torch.device) -> Tensor:
    """Where gradients are, once: no copy to the device in every update."""
    return smooth_features().to(device)


def show(
    job: Job, name: str, student: NetworkDenoiser, phase: Phase, ranks: Ranks, device: torch.device
) -> None:
    """Let the first look at a student, in which all ``ranks`` must take part."""
    if ranks.count == 1:
        job.look(name, student, phase)
        return
    shown_by_the_first(
        student, lambda led: job.look(name, led, phase), samples=job.samples, ranks=ranks, device=device
    )


def lr_factor(update: int, updates: int, warmup: int) -> float:
    """Linear warm-up, then linear to zero at the end of the phase (Salimans & Ho 2022)."""
    warmup = min(warmup, updates // 10)
    if update < warmup:
        return (update + 1) / (warmup + 1)
    return (updates - update) / max(1, updates - warmup)


def raise_on_stops() -> None:
    """STOPS interrupt the program as Ctrl+C does, also before and after the training; what is ignored, as
    under nohup, stays so.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    for number in STOPS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, interrupt)


@contextmanager
def memory_in_words(state: Path, *, divided: bool) -> Generator[None]:
    """Says what to do where halving the micro-batch helps no more, or cannot be tried (``divided``)."""
    said = "out of memory" if divided else "out of memory, and it cannot be helped by fewer pictures at once"
    untried = "a smaller --micro-batch, " if divided else ""
    try:
        yield
    except torch.OutOfMemoryError:
        raise BadInput(
            f"{said}; the last state is kept in {state}; free some memory and --resume, or "
            f"start anew with {untried}--student lora, a smaller --rank or a smaller --resolution"
        ) from None


def verdict_path(out: Path) -> Path:
    """Where a run keeps the last sentence that was said about it."""
    return out / "state" / "verdict.txt"


def keep_verdict(out: Path, says: str) -> None:
    path = verdict_path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        temporary.write_text(says, encoding="utf-8")


def save_state(path: Path, state: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())  # else a power cut can leave the new name with nothing behind it


def load_state(path: Path) -> dict[str, Any] | None:
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True) if path.exists() else None


def cut_back(path: Path, progress: Progress) -> None:
    """Drop the lines of run.jsonl that lie after the state, so that a resumed run does not tell them
    twice.
    """
    if not path.exists():
        return
    kept: list[str] = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            break
        if (line["phase_index"], line["update"]) <= (progress.phase, progress.update):
            kept.append(text + "\n")
    with atomic_path(path) as temporary:
        temporary.write_text("".join(kept), encoding="utf-8")


@dataclass
class StopFlag:
    requested: bool = False


@contextmanager
def stop_requests() -> Generator[StopFlag]:
    """Ctrl+C and STOPS ask for a stop at the next update; a second one stops at once. What is ignored, as
    under nohup, stays so.
    """
    flag = StopFlag()

    def ask(number: int, frame: FrameType | None) -> None:
        if flag.requested:
            raise KeyboardInterrupt
        flag.requested = True
        log.info("stopping after this update; the state is being saved (again: stop at once)")

    heard = [n for n in (signal.SIGINT, *STOPS) if signal.getsignal(n) != signal.SIG_IGN]
    before = {number: signal.signal(number, ask) for number in heard}
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
