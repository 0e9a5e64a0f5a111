"""A loaded model, ready to make pictures: a teacher with classifier-free guidance, or a student with its
grid.

The one place outside a host where prompts, seeds, guidance and strength become a walk down the noise levels;
the command line, the evaluation and the training loop's sample grids all paint through it. Each picture has a
seed of its own, and its noise does not depend on the batch that it is made in.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from ..diffusion.denoiser import Cond, Denoiser, Guided
from ..diffusion.errors import BadInput
from ..diffusion.grid import Grid
from ..diffusion.schedule import NoiseSchedule
from ..diffusion.spec import StudentSpec
from ..runtime.samplers import (
    initial_latent,
    later_noise,
    sample_deterministic,
    sample_dpmpp_2m,
    strength_sigma,
    student_sampler,
    walk,
)
from ..training.checkpoint import Checkpoint
from ..training.networks import (
    decode_latents,
    denoiser,
    encode_images,
    encode_prompts,
    load_encoders,
    place,
    with_sizes,
)

TeacherSampler = Literal["ddim", "dpmpp_2m"]
Texts: TypeAlias = Callable[[Sequence[str]], Cond]
"""Prompts -> conditioning, one row each."""
SamplerFor: TypeAlias = Callable[[Sequence[int]], Callable[..., Tensor]]

Progress: TypeAlias = Callable[[int, int], None]
"""Told (steps done, steps in all) after each step of each batch."""

TEACHER_SAMPLERS: dict[str, Callable[..., Tensor]] = {
    "ddim": sample_deterministic,
    "dpmpp_2m": sample_dpmpp_2m,
}
DEFAULT_GUIDANCE, DEFAULT_STEPS = 7.5, 50
_LATENT_CELLS = 8192


@dataclass(frozen=True)
class Plan:
    """What one picture costs and where: ``sigmas`` descending, one longer than the ``timesteps`` evaluated.

    ``w`` is guidance_scale - 1, None where the network is not told (unguided, or baked in). ``evaluations``
    counts runs of the network: two a step for a guided teacher.
    """

    sampler: str
    guidance: float
    w: float | None
    sigmas: tuple[float, ...]
    timesteps: tuple[int, ...]
    evaluations: int


@dataclass(frozen=True, eq=False)
class Painted:
    """``x0``: (N, C, h, w) float32 on the CPU; ``seconds``: sampling alone, without texts and decoding."""

    x0: Tensor
    plan: Plan
    seconds: float


@dataclass(frozen=True, eq=False)
class Painter:
    """``size`` is the height and width in pixels where none is asked for; ``spec`` is None for teachers.

    ``vae`` is diffusers' AutoencoderKL (Any, because this room does not import diffusers).
    """

    denoiser: Denoiser
    vae: Any
    texts: Texts
    schedule: NoiseSchedule
    size: tuple[int, int]
    spec: StudentSpec | None = None
    device: torch.device | str = "cpu"

    @classmethod
    def open(
        cls, checkpoint: Checkpoint, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> Painter:
        """Load all parts of a checkpoint, each in ``dtype``; BadInput for one that cannot paint by itself."""
        if checkpoint.inpaint:
            raise BadInput(
                f"{checkpoint.path.name}: this is an inpainting model, which needs a picture and a mask; "
                "this FewStep cannot paint with it yet"
            )
        if checkpoint.kind != "teacher" and checkpoint.spec is None:
            raise BadInput(
                f"{checkpoint.path.name}: this student's file lost the metadata that name its steps; "
                "attach them with python -m toolkit.inspect --attach-spec"
            )
        unet = place(checkpoint.unet(dtype=dtype), device)
        encoders = load_encoders(checkpoint, device=device, dtype=dtype)
        width, height = checkpoint.resolution
        return cls(
            denoiser=denoiser(unet, schedule=checkpoint.schedule, prediction_type=checkpoint.prediction_type),
            vae=place(checkpoint.vae(checkpoint.vae_dtype(dtype)), device),
            texts=lambda prompts: encode_prompts(prompts, encoders),
            schedule=checkpoint.schedule,
            size=(height, width),
            spec=checkpoint.spec,
            device=device,
        )

    @property
    def downscale(self) -> int:
        """Pixels a latent cell."""
        return 2 ** (len(self.vae.config["block_out_channels"]) - 1)

    def plan(
        self,
        *,
        guidance: float | None = None,
        steps: int | None = None,
        sampler: str | None = None,
        strength: float = 1.0,
    ) -> Plan:
        """The walk of one picture; BadInput for what this model cannot do. ``guidance`` is a
        guidance_scale."""
        return make_plan(
            self.spec, self.schedule, guidance=guidance, steps=steps, sampler=sampler, strength=strength
        )

    def runs_at(self, guidance: float) -> bool:
        """Whether this model can be asked for a guidance_scale."""
        try:
            self.plan(guidance=guidance)
        except BadInput:
            return False
        return True

    @torch.no_grad()
    def latents(
        self,
        prompts: Sequence[str],
        *,
        seeds: Sequence[int],
        guidance: float | None = None,
        steps: int | None = None,
        sampler: str | None = None,
        negative: str | None = None,
        x0: Tensor | None = None,
        strength: float = 1.0,
        size: tuple[int, int] | None = None,
        batch: int | None = None,
        progress: Progress | None = None,
    ) -> Painted:
        """Clean latents of ``prompts``, each from its own seed.

        ``x0``: (N or 1, C, h, w) scaled latents to start from at ``strength`` in (0, 1]. ``size``: (height,
        width) in pixels. Raises BadInput for what this model cannot do.
        """
        if len(prompts) != len(seeds):
            raise ValueError(f"{len(prompts)} prompts and {len(seeds)} seeds")
        if strength < 1 and x0 is None:
            raise ValueError("a strength below 1 needs x0 to start from")
        plan = self.plan(guidance=guidance, steps=steps, sampler=sampler, strength=strength)
        model, sampler_for = self._model(negative, plan)
        shape = self.latent_shape(size) if x0 is None else tuple(x0.shape[1:])
        height, width = (side * self.downscale for side in shape[1:])
        cond = with_sizes(self._conditioning(prompts), width=width, height=height)
        batch = batch or max(1, _LATENT_CELLS // (shape[1] * shape[2]))
        sigmas = torch.tensor(plan.sigmas, dtype=torch.float64)
        starts = [
            initial_latent(
                (1, *shape),
                seed=seed,
                sigma=plan.sigmas[0],
                x0=None if x0 is None else x0[min(row, len(x0) - 1)][None],
            )
            for row, seed in enumerate(seeds)
        ]
        total = len(plan.timesteps) * math.ceil(len(seeds) / batch)
        done = 0

        def tick(_: Mapping[str, Any]) -> None:
            nonlocal done
            done += 1
            if progress is not None:
                progress(done, total)

        parts: list[Tensor] = []
        started = time.perf_counter()
        for first in range(0, len(starts), batch):
            x = torch.cat(starts[first : first + batch]).to(self.device)
            arguments = {
                "cond": {name: rows[first : first + batch] for name, rows in cond.items()},
                "w": None if plan.w is None else x.new_full((len(x),), plan.w),
            }
            run = sampler_for(seeds[first : first + batch])
            parts.append(run(model, x, sigmas, arguments, tick).cpu())
        return Painted(torch.cat(parts), plan, time.perf_counter() - started)

    def paint(self, prompts: Sequence[str], **arguments: Any) -> Tensor:
        """Pictures (N, 3, H, W) float32 in [0, 1]; arguments as in :meth:`latents`."""
        return self.decode(self.latents(prompts, **arguments).x0)

    def decode(self, x0: Tensor) -> Tensor:
        """Latents (N, C, h, w) -> pictures (N, 3, H, W) float32 in [0, 1]."""
        return decode_latents(x0, self.vae)

    def encode(self, images: Tensor) -> Tensor:
        """Pictures (N, 3, H, W) in [0, 1] -> latents (N, C, h, w) to start from."""
        return encode_images(images, self.vae)

    def _model(self, negative: str | None, plan: Plan) -> tuple[Denoiser, SamplerFor]:
        """What is sampled, and what samples pictures of given seeds."""
        if (spec := self.spec) is not None:
            check_negative(spec, negative)
            return self.denoiser, lambda seeds: student_sampler(spec.sampler, noise=later_noise(seeds))
        run = TEACHER_SAMPLERS[plan.sampler]
        if plan.w is None:
            return self.denoiser, lambda seeds: run
        return Guided(self.denoiser, self._conditioning([negative or ""])), lambda seeds: run

    def _conditioning(self, prompts: Sequence[str]) -> Cond:
        """Conditioning on the device, one row a prompt; each different prompt is encoded once."""
        different = list(dict.fromkeys(prompts))
        place = {prompt: row for row, prompt in enumerate(different)}
        rows = torch.tensor([place[prompt] for prompt in prompts])
        return {name: value[rows].to(self.device) for name, value in self.texts(different).items()}

    def latent_shape(self, size: tuple[int, int] | None = None) -> tuple[int, int, int]:
        """(C, h, w) of a picture of ``size`` (height, width) in pixels; BadInput if there is none."""
        height, width = size or self.size
        check_size((height, width), self.downscale)
        channels = int(self.vae.config["latent_channels"])
        return channels, height // self.downscale, width // self.downscale


def cached_texts(prompts: Sequence[str], texts: Cond) -> Texts:
    """Texts for a painter from conditioning of N rows that was made earlier; only for these prompts."""
    place = {prompt: row for row, prompt in enumerate(prompts)}

    def taken(wanted: Sequence[str]) -> Cond:
        rows = torch.tensor([place[prompt] for prompt in wanted])
        return {name: value[rows] for name, value in texts.items()}

    return taken


def make_plan(
    spec: StudentSpec | None,
    schedule: NoiseSchedule,
    *,
    guidance: float | None = None,
    steps: int | None = None,
    sampler: str | None = None,
    strength: float = 1.0,
) -> Plan:
    """:meth:`Painter.plan` before anything is loaded."""
    if spec is None:
        return _teacher_plan(schedule, guidance, steps, sampler, strength)
    return _student_plan(spec, schedule, guidance, steps, sampler, strength)


def check_size(size: tuple[int, int], downscale: int) -> None:
    """BadInput unless pictures of ``size`` (height, width) in pixels have whole latent cells."""
    height, width = size
    if min(size) < downscale or height % downscale or width % downscale:
        raise BadInput(
            f"a picture of {width} x {height} pixels was asked for; both must be multiples of {downscale}"
        )


def check_negative(spec: StudentSpec, negative: str | None) -> None:
    """BadInput if a student is asked for another negative prompt than the one distilled into it."""
    if negative not in (None, spec.negative):
        own = f"{spec.negative!r}" if spec.negative else "empty"
        raise BadInput(
            f"negative prompt {negative!r} was asked for, but a student's is distilled in, "
            f"and this one's is {own}; leave it out, or distil with --negative"
        )


def _student_plan(
    spec: StudentSpec,
    schedule: NoiseSchedule,
    guidance: float | None,
    steps: int | None,
    sampler: str | None,
    strength: float,
) -> Plan:
    if spec.direction != "decode":
        raise BadInput(
            "this student is an encoder, it turns pictures into noise; give the decoder that belongs to it"
        )
    if sampler is not None:
        raise BadInput(
            f"sampler {sampler} was asked for, but a student brings its own ({spec.sampler}); leave it out"
        )
    if steps not in (None, spec.steps):
        raise BadInput(
            f"{steps} steps were asked for, but this student was trained for {spec.steps} "
            f"(timesteps {_listed(spec.timesteps)}); leave the number out, or take "
            f"students/{steps}.safetensors of the run, if there is one"
        )
    if guidance is None:
        guidance = spec.guidance_default if spec.baked_guidance is None else spec.baked_guidance
    spec.check_guidance(guidance)
    live = spec.w_embedding is not None and spec.baked_guidance is None
    sigmas = walk(
        spec.timesteps, schedule, start_sigma=strength_sigma(strength, schedule), any_start=spec.any_start
    )
    return _plan(
        sigmas, schedule, sampler=spec.sampler, guidance=guidance, w=guidance - 1 if live else None, width=1
    )


def _teacher_plan(
    schedule: NoiseSchedule, guidance: float | None, steps: int | None, sampler: str | None, strength: float
) -> Plan:
    guidance = DEFAULT_GUIDANCE if guidance is None else guidance
    steps = DEFAULT_STEPS if steps is None else steps
    sampler = sampler or "ddim"
    if not 1 <= guidance < math.inf:
        raise BadInput(f"guidance {guidance:g} was asked for; it must be at least 1, which is unguided")
    if not 1 <= steps <= len(schedule):
        raise BadInput(f"{steps} steps were asked for; a teacher runs 1 to {len(schedule)}")
    if sampler not in TEACHER_SAMPLERS:
        raise BadInput(f"sampler {sampler!r} is not one of {', '.join(get_args(TeacherSampler))}")
    grid = Grid.trailing(steps, len(schedule))
    sigmas = walk(grid.timesteps, schedule, start_sigma=strength_sigma(strength, schedule))
    w = None if guidance == 1 else guidance - 1
    return _plan(sigmas, schedule, sampler=sampler, guidance=guidance, w=w, width=1 if w is None else 2)


def _plan(
    sigmas: Tensor, schedule: NoiseSchedule, *, sampler: str, guidance: float, w: float | None, width: int
) -> Plan:
    timesteps = tuple(int(t) for t in schedule.timestep(sigmas[:-1]))
    return Plan(sampler, guidance, w, tuple(sigmas.tolist()), timesteps, width * len(timesteps))


def _listed(timesteps: Sequence[int]) -> str:
    return ", ".join(map(str, timesteps))
