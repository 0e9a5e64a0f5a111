"""Our own training step on made-up data, to be measured: the loop's real trainer in a fold of two steps.

The teacher is the student of the phase before, one network that takes w, asked twice; on kept trajectories it
is not asked at all. Stage 1, whose teacher is the guided pair in one forward, has as many evaluations.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..diffusion.denoiser import Guided, NetworkDenoiser
from ..diffusion.grid import Grid
from ..diffusion.method import Setting
from ..methods import progressive
from .adapters import LoraShape
from .checkpoint import Checkpoint
from .loop import Job, LoopSettings, PhaseTrainer, make_holder, save_state
from .networks import DTYPES, random_cond, with_sizes
from .reference import NewUnet
from .samples import GuidanceRange, Samples
from .settings import LARGE, SMALL, SMALL_PARAMETERS, phase_updates
from .teacher_samples import trajectory_steps

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

STEPS = 4
"""Of the student that the run would end with."""

_TEXTS = 8
_ENDLESS = 10_000


class Rehearsal:
    """A run that is at its first fold; ``out`` is a folder to leave a state in."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        new_unet: NewUnet,
        *,
        size: tuple[int, int],
        batch: int,
        precision: str,
        device: torch.device,
        lora: LoraShape | None,
        recompute: bool,
        out: Path,
    ) -> None:
        dtype = DTYPES[precision]
        self._small = checkpoint.unet_parameters < SMALL_PARAMETERS
        self._phases = progressive.phases(
            progressive.Config(), Setting(checkpoint.schedule, checkpoint.prediction_type, STEPS)
        )
        finest = len(self._phases[0].grid)
        timesteps = Grid.trailing(trajectory_steps(finest), len(checkpoint.schedule)).timesteps
        samples = made_up(checkpoint, size, count=4 * batch, timesteps=timesteps)

        def network() -> UNet2DConditionModel:
            if lora is None:
                return new_unet(dtype=torch.float32, conditioned=True)
            return new_unet(dtype=dtype, conditioned=True, exact="time_embedding.")

        job = Job(
            phases=self._phases,
            teacher_prediction=checkpoint.prediction_type,
            schedule=checkpoint.schedule,
            samples=samples,
            new_unet=network,
            finished=lambda phase, state: None,
            look=lambda name, student, phase: None,
            out=out,
        )
        self._settings = LoopSettings(
            updates=(_ENDLESS,) * len(self._phases),
            batch_size=batch,
            micro_batch=batch,
            lr=1e-6,
            warmup=0,
            clip=1.0,
            ema=(SMALL if self._small else LARGE).values["ema"],
            seed=0,
            precision=precision,
            guidance=GuidanceRange(1, 15),
            trajectory_share=0.0,
            lora=lora,
        )
        scaler = torch.GradScaler(device.type, enabled=precision == "fp16")
        holder = make_holder(job, self._settings, device)
        if lora is not None:  # a teacher of its own, which a later phase's is
            first = PhaseTrainer(job, self._settings, 0, holder, scaler, device, batch)
            save_state(out / "state" / "phase-0.pt", first.average)
        self._trainer = PhaseTrainer(job, self._settings, 1, holder, scaler, device, batch)
        for unet in new_unet.made:
            if recompute:
                unet.enable_gradient_checkpointing()
            else:
                unet.disable_gradient_checkpointing()
        plain = self._trainer.teacher
        if lora is not None:
            plain = NetworkDenoiser(holder.untrained(), checkpoint.schedule, checkpoint.prediction_type)
        self._pair = Guided(plain, {name: value.to(device) for name, value in samples.uncond.items()})
        cond = samples.cond(samples.rows(torch.arange(batch)))
        self._cond = {name: value.to(device) for name, value in cond.items()}
        self._x = torch.randn(samples.rows(torch.arange(batch))["x0"].shape).to(device)

    def step(self) -> float:
        """One update whose teacher is asked; the loss."""
        return self._updated(0.0)

    def cached_step(self) -> float:
        """One update from kept trajectories; the loss."""
        return self._updated(1.0)

    @torch.no_grad()
    def making_step(self) -> Tensor:
        """One of the steps in which the teacher makes a trajectory: the guided pair."""
        ones = self._x.new_ones(len(self._x))
        return self._pair(self._x, ones, cond=self._cond, w=ones)

    @property
    def making_steps(self) -> int:
        """So many to a trajectory."""
        return trajectory_steps(len(self._phases[0].grid))

    @property
    def uses(self) -> float:
        """How often a run with the usual settings draws each of its pictures in the folds."""
        usual = (SMALL if self._small else LARGE).values
        updates = phase_updates(None, [phase.name for phase in self._phases], small=self._small)
        return sum(updates[1:]) * usual["batch_size"] / usual["pictures"]

    def _updated(self, share: float) -> float:
        self._trainer.settings = dataclasses.replace(self._settings, trajectory_share=share)
        return self._trainer.step()[0]


def made_up(
    checkpoint: Checkpoint, size: tuple[int, int], *, count: int, timesteps: tuple[int, ...]
) -> Samples:
    """Random latents, texts and trajectories in the shapes of the teacher's own."""
    generator = torch.Generator().manual_seed(0)
    cells = (checkpoint.latent_channels, size[1] // checkpoint.downscale, size[0] // checkpoint.downscale)
    told = with_sizes(random_cond(checkpoint, _TEXTS, generator=generator), width=size[0], height=size[1])
    shard = {
        "x0": torch.randn(count, *cells, generator=generator).half(),
        "text": torch.randint(1, _TEXTS, (count,), generator=generator),
        "guidance": 1 + 14 * torch.rand(count, generator=generator),
        "states": torch.randn(count, len(timesteps), *cells, generator=generator).half(),
    }
    if "time_ids" in told:
        shard["time_ids"] = told["time_ids"][:1].expand(count, -1)
    texts = {name: value.half() for name, value in told.items() if name != "time_ids"}
    return Samples([shard], texts, timesteps)
