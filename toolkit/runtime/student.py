"""What every host does with a student: read its file, embed the guidance, walk its grid in the host's
sigmas."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ..diffusion.errors import BadInput
from ..diffusion.grid import Grid, trailing_timesteps
from ..diffusion.guidance import w_embedding
from ..diffusion.prediction import PredictionType
from ..diffusion.schedule import CLEAN, NoiseSchedule
from ..diffusion.spec import StudentSpec
from .files import Header, read_header, spec_from
from .samplers import entry_below, later_noise, strength_sigma, student_sampler, walk

COND_PROJ = "time_embed.cond_proj.weight"
"""How the guidance input's key ends, whatever the file's prefix."""

LORA_COND_PROJ = "fewstep.cond_proj.weight"

V_PRED = "v_pred"
"""The empty key by which programs mark v-prediction in a checkpoint."""

TEACHER_STEPS = 50
"""DDIM steps of a teacher where nobody says how many."""

Kind = Literal["student", "baked", "lora", "other"]


@dataclass(frozen=True)
class StudentFile:
    """``spec``: as the file says, or a guess by :func:`guessed_spec` (``stated`` false); None for kind
    "other".
    """

    kind: Kind
    spec: StudentSpec | None
    stated: bool
    header: Header


def read_student(path: Path) -> StudentFile:
    """What a safetensors file says of itself; BadInput if it cannot be read. Reads the header only."""
    header = read_header(path)
    spec = spec_from(header.metadata, header.tensors, path)
    has_dial = any(key.endswith(COND_PROJ) for key in header.tensors)
    if spec is None:
        kind: Kind = "student" if has_dial else "other"
        return StudentFile(kind, guessed_spec(header.tensors) if has_dial else None, False, header)
    if spec.container == "lora":
        return StudentFile("lora", spec, True, header)
    return StudentFile("baked" if spec.baked_guidance is not None else "student", spec, True, header)


def guessed_spec(tensors: Mapping[str, Tensor]) -> StudentSpec:
    """The family's defaults, for a student whose metadata a merger or pruner dropped: 4 trailing steps."""
    [cond_proj] = [key for key in tensors if key.endswith(COND_PROJ)]
    unet = cond_proj.removesuffix(COND_PROJ)
    width = next((t.shape[1] for key, t in tensors.items() if key.endswith("attn2.to_k.weight")), 768)
    inputs = tensors[f"{unet}input_blocks.0.0.weight"].shape[1]
    prediction: PredictionType = "v_prediction" if V_PRED in tensors else "epsilon"
    return StudentSpec(
        family="sdxl" if f"{unet}label_emb.0.0.weight" in tensors else "sd2" if width == 1024 else "sd1",
        prediction_type=prediction,
        method="unknown",
        timesteps=trailing_timesteps(4),
        teacher_sha256="",
        teacher_name="",
        inpaint=inputs == 9,
        ztsnr="ztsnr" in tensors,
    )


def embedded(spec: StudentSpec, guidance: Sequence[float]) -> Tensor:
    """(len(guidance), dim) float32, what the network is fed; BadInput for one out of the trained range."""
    if spec.w_embedding is None:
        raise BadInput("this student has no guidance dial; its guidance cannot be chosen")
    for value in guidance:
        spec.check_guidance(value)
    w = torch.tensor([value - 1 for value in guidance])
    return w_embedding(w, dim=spec.w_embedding.dim, scale=spec.w_embedding.scale)


def time_shift(spec: StudentSpec, cond_proj: Tensor, guidance: float, *, strength: float = 1.0) -> Tensor:
    """(C,) float32, what joins the sinusoid of the time embedding at one guidance: ``P e(w)``.

    Of a student LoRA, whose stock loader adds the shift of the baked guidance at the LoRA's ``strength``,
    what is missing: ``strength P (e(w) - e(w_baked))``.
    """
    added = embedded(replace(spec, baked_guidance=None), [guidance])[0]
    if spec.baked_guidance is not None:
        added = added - embedded(spec, [spec.baked_guidance])[0]
    return strength * (cond_proj.float().cpu() @ added)


@dataclass(frozen=True)
class LiveNegative:
    """Two evaluations of a student as one guided step with a negative prompt, ``n + cfg (p - n)`` of a
    positive evaluation p and a negative one n, each at its own guidance.
    """

    cfg: float
    positive: float
    negative: float


NO_NEGATIVE = LiveNegative(1.0, 1.0, 1.0)
"""One evaluation, of the positive prompt alone."""


def live_negative(spec: StudentSpec, guidance: float) -> LiveNegative:
    """How a student heeds another negative prompt than the one it was trained with, at guidance g.

    A student answers ``D(c, g) = u + g (c - u)``, u being the trained negative. For any a in (1, g],
    ``a D(p, g/a) - (a - 1) D(n, (g - 1)/(a - 1)) = n + g (p - n)``: u cancels. a = 2 asks the least of the
    network: against the demo teacher with a negative prompt, distance over that of other noise, at 4 steps
    and guidance 4: ignored 0.60, a = 4 (plain cfg of the unguided student) 0.47, a = 2 0.44; at 2 steps 0.55,
    0.61, 0.46. a is smaller where g/a would leave the trained range.
    """
    spec.check_guidance(guidance)
    a = min(2.0, guidance / spec.guidance_min)
    if a <= 1:
        return NO_NEGATIVE
    negative = (guidance - 1) / (a - 1)
    if not spec.guidance_min <= negative <= spec.guidance_max:
        raise BadInput(
            f"a live negative prompt at guidance {guidance:g} needs this student at guidance {negative:g}, "
            f"and it was trained for {spec.guidance_min:g} to {spec.guidance_max:g}; choose another guidance "
            "or no negative prompt"
        )
    return LiveNegative(a, guidance / a, negative)


def describe(spec: StudentSpec) -> str:
    """One sentence for people: steps, guidance, method, teacher."""
    if spec.has_dial:
        low, high, usual = spec.guidance_min, spec.guidance_max, spec.guidance_default
        dial = f"guidance {low:g} to {high:g} (usually {usual:g})"
    elif spec.baked_guidance is not None:
        dial = f"guidance {spec.baked_guidance:g} baked in (a host's cfg stays at 1)"
    else:
        dial = "no guidance dial"
    count = "1 step" if spec.steps == 1 else f"{spec.steps} steps"
    teacher = f", from {spec.teacher_name}" if spec.teacher_name else ""
    inpaint = ", for inpainting" if spec.inpaint else ""
    what = "an encoder of pictures into noise" if spec.direction == "encode" else spec.sampler
    return f"{count}, {dial}, {spec.method}, {what}{inpaint}{teacher}"


def schedule_of(sigmas: Tensor) -> NoiseSchedule:
    """A host's table of noise levels (T,), ascending, as a schedule."""
    return NoiseSchedule(1 / (1 + sigmas.detach().cpu().double() ** 2))


def trained_sigmas(spec: StudentSpec, schedule: NoiseSchedule, steps: int = 0) -> Tensor:
    """(N + 1,) float64: the trained grid and 0; other ``steps`` than 0 and N only for consistency
    students."""
    require_decoder(spec)
    timesteps = spec.timesteps
    if steps not in (0, spec.steps):
        if spec.sampler != "consistency":
            raise BadInput(
                f"{steps} steps were asked for, but this student was trained for {spec.steps}; one file "
                "has one grid: choose 0 steps (as trained), or another student of the same run"
            )
        timesteps = trailing_timesteps(steps)
    return schedule.sigma(torch.tensor([*timesteps, CLEAN]))


def sigmas_from(spec: StudentSpec, schedule: NoiseSchedule, strength: float, steps: int = 0) -> Tensor:
    """(N + 1,) float64: where a student evaluates from a strength in (0, 1] on, and 0."""
    full = trained_sigmas(spec, schedule, steps)
    sigma = strength_sigma(strength, schedule)
    if sigma is None:
        return full
    timesteps = schedule.timestep(full[:-1]).tolist()
    return walk(timesteps, schedule, start_sigma=sigma, any_start=spec.any_start)


def encoding_grid(spec: StudentSpec | None, total: int, steps: int = 0) -> Grid:
    """The ascending grid on which a picture becomes noise: an encoder's own, or of a teacher (spec None)
    ``steps`` of DDIM backwards; 0: as trained, of a teacher 50. BadInput for a decoder.
    """
    if spec is None:
        return Grid.encoding(steps or TEACHER_STEPS, total)
    if spec.direction != "encode":
        raise BadInput(
            "this student makes pictures of noise; to make noise of pictures takes an encoder "
            "(python -m toolkit.distill --method inversion) or the teacher"
        )
    if steps not in (0, spec.steps):
        raise BadInput(f"{steps} steps were asked for, but this encoder was trained for {spec.steps}")
    return Grid(spec.timesteps, end=total - 1)


def require_decoder(spec: StudentSpec) -> None:
    """BadInput for an encoder, which makes no pictures."""
    if spec.direction == "encode":
        raise BadInput(
            "this student is an encoder, it turns pictures into noise; load the decoder that belongs to it"
        )


@dataclass(frozen=True)
class Walk:
    """``sigmas``: descending float64, evaluations at all but the last; ``note``: what was snapped, or ""."""

    sigmas: Tensor
    timesteps: tuple[int, ...]
    sampler: Callable[..., Tensor]
    note: str


def plan_walk(spec: StudentSpec, schedule: NoiseSchedule, given: Tensor, *, seeds: Sequence[int]) -> Walk:
    """How a student gets from the first to the last of the noise levels that a host gives, whatever lies
    between; a consistency student, which knows no grid, takes those too.
    """
    start, end = float(given[0]), float(given[-1])
    require_decoder(spec)
    if spec.sampler == "consistency":
        sigmas = given.detach().cpu().double()
    else:
        sigmas = walk(spec.timesteps, schedule, start_sigma=start, end_sigma=end, any_start=spec.any_start)
    timesteps = tuple(schedule.timestep(sigmas[:-1]).tolist())
    note = ""
    if abs(float(sigmas[0]) / start - 1) > 1e-3:
        asked = int(schedule.timestep(torch.tensor([start])))
        note = f"timestep {asked} was asked for, and the nearest trained one, {timesteps[0]}, was taken"
    sampler = student_sampler(
        spec.sampler,
        noise=later_noise(seeds),
        beyond=entry_below(spec.timesteps, schedule, end) if end > 0 else 0.0,
    )
    return Walk(sigmas, timesteps, sampler, note)
