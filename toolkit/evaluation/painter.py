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

from ..diffusion.blending import Blended
from ..diffusion.denoiser import Cond, Denoiser, Guided
from ..diffusion.errors import BadInput
from ..diffusion.grid import Grid, trailing_timesteps
from ..diffusion.schedule import NoiseSchedule, alpha
from ..diffusion.solvers import start_noise
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
from ..runtime.student import TEACHER_STEPS, encoding_grid
from ..training.checkpoint import Checkpoint
from ..training.masks import Pictures, at_latent_size, inpaint_cond
from ..training.networks import (
    Turns,
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
DEFAULT_GUIDANCE, DEFAULT_STEPS = 7.5, TEACHER_STEPS
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
class Fill:
    """What to fill in: ``images`` (N or 1, 3, H, W) in [0, 1], ``masks`` (N or 1, 1, H, W), 1 where to fill,
    values between are mixed."""

    images: Tensor
    masks: Tensor

    def paste(self, pictures: Tensor) -> Tensor:
        """The pictures within the masks; outside, the images bit for bit."""
        return torch.where(self.masks > 0, torch.lerp(self.images, pictures, self.masks), self.images)


@dataclass(frozen=True, eq=False)
class Painter:
    """``size`` is the height and width in pixels where none is asked for; ``spec`` is None for teachers;
    ``inpaint``: whether the network sees a mask and a masked picture, all of it grey where none is given;
    ``cfg_rescale``: of a teacher's guidance.

    ``vae`` is diffusers' AutoencoderKL (Any, because this room does not import diffusers); ``decoder``: an
    AutoencoderTiny that makes the pictures in its place.
    """

    denoiser: Denoiser
    vae: Any
    texts: Texts
    schedule: NoiseSchedule
    size: tuple[int, int]
    spec: StudentSpec | None = None
    device: torch.device | str = "cpu"
    inpaint: bool = False
    cfg_rescale: float = 0.0
    decoder: Any = None

    @classmethod
    def open(
        cls,
        checkpoint: Checkpoint,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        turns: Turns | None = None,
    ) -> Painter:
        """Load all parts of a checkpoint, each in ``dtype``, the UNet onto the device when it is its turn;
        BadInput for one that cannot paint by itself."""
        if checkpoint.kind != "teacher" and checkpoint.spec is None:
            raise BadInput(
                f"{checkpoint.path.name}: this student's file lost the metadata that name its steps; "
                "attach them with python -m toolkit.inspect --attach-spec"
            )
        unet = checkpoint.unet(dtype=dtype)
        unet = place(unet, device) if turns is None else turns.admit(unet)
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
            inpaint=checkpoint.inpaint,
            cfg_rescale=checkpoint.cfg_rescale,
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
        noise: Tensor | None = None,
        fill: Fill | None = None,
        strength: float = 1.0,
        size: tuple[int, int] | None = None,
        batch: int | None = None,
        progress: Progress | None = None,
    ) -> Painted:
        """Clean latents of ``prompts``, each from its own seed, or from ``noise`` (N, C, h, w), of unit
        variance.

        ``x0``: (N or 1, C, h, w) scaled latents to start from at ``strength`` in (0, 1]. ``size``: (height,
        width) in pixels. ``fill``: only its masks are painted, on its images (which x0 and size then come
        from); an inpainting network sees them, any other has what is kept put back at each step. Raises
        BadInput for what this model cannot do.
        """
        if len(prompts) != len(seeds):
            raise ValueError(f"{len(prompts)} prompts and {len(seeds)} seeds")
        keeping: tuple[Tensor, Tensor] | None = None
        if fill is not None:
            known, size = self.encode(fill.images), (fill.images.shape[2], fill.images.shape[3])
            x0 = known if strength < 1 else None
            if not self.inpaint:
                masks = at_latent_size(fill.masks, known)
                keeping = _each(known, len(prompts)), _each(masks, len(prompts))
        if strength < 1 and x0 is None:
            raise ValueError("a strength below 1 needs x0 to start from")
        plan = self.plan(guidance=guidance, steps=steps, sampler=sampler, strength=strength)
        model, sampler_for = self._model(negative, plan)
        given = noise if x0 is None else x0
        shape = self.latent_shape(size) if given is None else tuple(given.shape[1:])
        cond = self._told(prompts, shape, fill)
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
        if noise is not None:
            starts = list(start_noise(noise, torch.full((len(noise),), plan.sigmas[0])).split(1))
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
            part = seeds[first : first + batch]
            painting = model
            if keeping is not None:
                kept, masks = (rows[first : first + batch].to(x) for rows in keeping)
                painting = Blended(model, kept, unit_noise(x.shape, seeds=part).to(x), masks)
            parts.append(sampler_for(part)(painting, x, sigmas, arguments, tick).cpu())
        return Painted(torch.cat(parts), plan, time.perf_counter() - started)

    @torch.no_grad()
    def invert(self, x0: Tensor, prompts: Sequence[str], *, steps: int | None = None) -> Tensor:
        """The noise (N, C, h, w), of unit variance, that the flow makes the latents x0 of, without guidance.

        By an encoder on its own timesteps; by a teacher in ``steps`` of DDIM backwards (default 50).
        """
        grid = self.encoding(steps)
        sigmas = grid.sigmas(self.schedule)
        cond = self._told(prompts, tuple(x0.shape[1:]), None)
        batch = max(1, _LATENT_CELLS // (x0.shape[2] * x0.shape[3]))
        parts: list[Tensor] = []
        for first in range(0, len(x0), batch):
            told = {name: rows[first : first + batch] for name, rows in cond.items()}
            x = x0[first : first + batch].float().to(self.device)
            parts.append(sample_deterministic(self.denoiser, x, sigmas, {"cond": told}).cpu())
        return torch.cat(parts) * float(alpha(sigmas[-1]))

    def encoding(self, steps: int | None = None) -> Grid:
        """The ascending grid that pictures are inverted on; BadInput for a decoder."""
        return encoding_grid(self.spec, len(self.schedule), steps or 0)

    def paint(self, prompts: Sequence[str], **arguments: Any) -> Tensor:
        """Pictures (N, 3, H, W) float32 in [0, 1]; arguments as in :meth:`latents`."""
        return self.decode(self.latents(prompts, **arguments).x0, fill=arguments.get("fill"))

    def decode(self, x0: Tensor, *, fill: Fill | None = None) -> Tensor:
        """Latents (N, C, h, w) -> pictures (N, 3, H, W) float32 in [0, 1]; with ``fill``, in its masks."""
        pictures = decode_latents(x0, self.vae if self.decoder is None else self.decoder)
        return pictures if fill is None else fill.paste(pictures)

    def encode(self, images: Tensor) -> Tensor:
        """Pictures (N, 3, H, W) in [0, 1] -> latents (N, C, h, w) to start from."""
        return encode_images(images, self.vae)

    def seen(self, fill: Fill | None, count: int, height: int, width: int) -> Tensor:
        """(N, 5, h, w): what an inpainting network is told."""
        if fill is None:
            return Pictures(self.encode, self.decode, self.downscale).nothing(count, height, width)
        return _each(inpaint_cond(fill.images, fill.masks, self.encode), count)

    def _model(self, negative: str | None, plan: Plan) -> tuple[Denoiser, SamplerFor]:
        """What is sampled, and what samples pictures of given seeds."""
        if (spec := self.spec) is not None:
            check_negative(spec, negative)
            return self.denoiser, lambda seeds: student_sampler(spec.sampler, noise=later_noise(seeds))
        run = TEACHER_SAMPLERS[plan.sampler]
        if plan.w is None:
            return self.denoiser, lambda seeds: run
        uncond = self._conditioning([negative or ""])
        return Guided(self.denoiser, uncond, self.cfg_rescale), lambda seeds: run

    def _told(self, prompts: Sequence[str], shape: Sequence[int], fill: Fill | None) -> Cond:
        """All that the network is told of pictures whose latents have ``shape`` (C, h, w)."""
        height, width = (side * self.downscale for side in shape[1:])
        cond = with_sizes(self._conditioning(prompts), width=width, height=height)
        if self.inpaint:
            cond = {**cond, "inpaint": self.seen(fill, len(prompts), height, width).to(self.device)}
        return cond

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


def unit_noise(shape: Sequence[int], *, seeds: Sequence[int]) -> Tensor:
    """(B, C, h, w): the noise that each seed's picture starts from."""
    nothing = torch.zeros(1)
    return torch.cat([initial_latent((1, *shape[1:]), seed=s, sigma=1, x0=nothing) for s in seeds])


def _each(rows: Tensor, count: int) -> Tensor:
    """One row repeated for a batch; as many as the batch are returned as they are."""
    return rows if len(rows) == count else rows.expand(count, *rows.shape[1:])


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
    timesteps = spec.timesteps
    if spec.sampler == "consistency" and steps is not None and 1 <= steps <= len(schedule):
        timesteps = trailing_timesteps(steps, len(schedule))
    elif steps not in (None, spec.steps):
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
        timesteps, schedule, start_sigma=strength_sigma(strength, schedule), any_start=spec.any_start
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
