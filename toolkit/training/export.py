"""Students in the forms that other programs open, each loaded back and compared before it gets its name.

``checkpoint`` keeps the dial; ``baked`` folds one guidance into a bias, ``b1 <- b1 + W1 P e(w)``, exactly
what the dial does at that w, and is a plain checkpoint; ``lora`` is that shift alone, as a patch, or with the
low-rank weights of a student that was trained as a LoRA; ``diffusers`` is a folder for
the family's stock pipeline, with the dial as ``time_cond_proj_dim``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Parameter

from ..diffusion.denoiser import Cond
from ..diffusion.errors import BadInput
from ..diffusion.guidance import bias_shift, w_embedding
from ..diffusion.spec import StudentSpec
from ..runtime.files import atomic_path, free_path, load_tensors, read_spec, save_tensors
from ..runtime.sentences import clip_skip_differs
from .checkpoint import (
    Checkpoint,
    described,
    is_finite,
    open_checkpoint,
    seen_by_comfyui,
    student_metadata,
    write_checkpoint,
)
from .families import SD1, UNET_PREFIX, Family, TextEncoder
from .layout import COND_PROJ, PROJECTION, text_from_ldm, unet_from_ldm, vae_from_ldm
from .networks import added_conditions, random_cond
from .sidecar import check_sidecar, is_ours, sidecar, sidecar_path
from .student_lora import LORA_COND_PROJ, LORA_DIFF, LORA_DIFF_BIAS, lora_path
from .vocabulary import save_tokenizer

if TYPE_CHECKING:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
    from transformers import CLIPTokenizer

W1, B1 = UNET_PREFIX + "time_embed.0.weight", UNET_PREFIX + "time_embed.0.bias"

UNET_FILE = Path("unet") / "diffusion_pytorch_model.safetensors"
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 1e-1}
"""Largest difference of the probe's answers that rounding to a dtype explains, relative to the largest
answer."""


@dataclass(frozen=True)
class Exported:
    """``difference``: largest one between the student's and the export's answers to a probe, in their units
    (standard deviation about 1); ``notes``: sentences on what the hosts need."""

    files: tuple[Path, ...]
    difference: float
    notes: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Probe:
    """A random network input; z: (B, C, h, w), timestep: (B,), cond: B rows, embedded w: (B, dim) or None."""

    z: Tensor
    timestep: Tensor
    cond: Cond
    embedded: Tensor | None


def export_checkpoint(
    student: Checkpoint,
    path: Path,
    *,
    dtype: torch.dtype | None = None,
    more: Mapping[str, str] | None = None,
) -> Exported:
    """A single file with the dial, the VAE and the text encoder, in another dtype (default: as it is).

    Here as elsewhere: ``more`` metadata, for a file that is shared.
    """
    spec = spec_of(student)
    _check_output(student, path, suffix=".safetensors")
    answers, probe = _answers(student)
    tensors = _cast(_used(student), dtype)
    with free_path(path, size=_bytes(tensors)) as place:
        partial = place.partial
        write_checkpoint(partial, tensors=tensors, spec=spec, resolution=student.resolution, more=more)
        found = open_checkpoint(partial)
        difference = _compare(_answer(_mapped(found), probe), answers, dtype=_dtype(tensors), path=path)
        _same_tensors(found.tensors, tensors, path)
    return Exported((place.path,), difference, _sampling_notes(spec))


def export_baked(
    student: Checkpoint,
    path: Path,
    *,
    guidance: float,
    dtype: torch.dtype | None = None,
    more: Mapping[str, str] | None = None,
) -> Exported:
    """A plain checkpoint with one guidance_scale folded in: no dial, half of the evaluations of cfg."""
    spec = _spec_with_dial(student, guidance)
    _check_output(student, path, suffix=".safetensors")
    check_sidecar(path)
    answers, probe = _answers(student, guidance)
    kept = _used(student)
    bias = kept[B1].double() + _shift(student, spec, guidance)
    tensors = _cast(
        {key: value for key, value in kept.items() if key != COND_PROJ} | {B1: bias.float()}, dtype
    )
    tensors[B1] = bias.to(dtype or kept[B1].dtype)
    baked = dataclasses.replace(spec, baked_guidance=guidance, guidance_default=guidance)
    with free_path(path, size=_bytes(tensors)) as place:
        partial = place.partial
        write_checkpoint(partial, tensors=tensors, spec=baked, resolution=student.resolution, more=more)
        found = open_checkpoint(partial)
        difference = _compare(_answer(_mapped(found), probe), answers, dtype=_dtype(tensors), path=path)
        _same_tensors(found.tensors, tensors, path)
    yaml = _write_sidecar(student, place.path)
    notes = (f"guidance {guidance:g} is folded in: use cfg 1 in hosts", *_sampling_notes(spec))
    if student.prediction_type == "v_prediction":
        notes = (*notes, _comfyui_note(student))
    if yaml is None:
        return Exported((place.path,), difference, notes)
    notes = (*notes, f"A1111 and Forge read {yaml.name}, which must stand beside the checkpoint")
    return Exported((place.path, yaml), difference, notes)


def export_lora(
    student: Checkpoint,
    path: Path,
    *,
    guidance: float,
    dtype: torch.dtype | None = None,
    more: Mapping[str, str] | None = None,
) -> Exported:
    """A LoRA file with one guidance_scale baked in, for stock loaders at strength 1.

    Of a student that was trained as a LoRA: that LoRA, for its teacher, from the file beside it, at this
    guidance. A fully trained one has no low-rank part, so the patch (default float32) carries the dial and
    nothing else: it belongs on this student's own weights in a host that does not know the dial.
    """
    spec = _spec_with_dial(student, guidance)
    _check_output(student, path, suffix=".safetensors")
    answers, probe = _answers(student, guidance)
    shift = _shift(student, spec, guidance)
    if spec.lora_rank is None:
        trained, shifted = dict[str, Tensor](), torch.zeros_like(shift)
        tensors = {
            LORA_DIFF: torch.zeros(student.tensors[W1].shape, dtype=torch.float16),
            LORA_DIFF_BIAS: shift.float(),
            LORA_COND_PROJ: student.tensors[COND_PROJ].float(),
        }
        what = (
            "this patch holds the guidance alone: add it at strength 1 to this student's own checkpoint in a "
            "host that ignores the dial; on any other checkpoint it does nothing useful"
        )
    else:
        trained, was_baked = _lora_beside(student, spec)
        shifted = trained[LORA_DIFF_BIAS].double() - _shift(student, spec, was_baked)
        tensors = trained | {LORA_DIFF_BIAS: (shifted + shift).float()}
        what = f"load it at strength 1 on {spec.teacher_name}, the teacher, or on a model near it"
        if spec.loras:
            merged = ", ".join(f"{lora.name} at {lora.strength:g}" for lora in spec.loras)
            what += f", with what was merged into the teacher: {merged}"
    tensors = _cast(tensors, dtype)
    lora = dataclasses.replace(spec, container="lora", baked_guidance=guidance, guidance_default=guidance)
    with free_path(path, size=_bytes(tensors)) as place:
        partial = place.partial
        metadata = student_metadata(lora, student.resolution) | described(tensors, more)
        save_tensors(tensors, metadata, partial)
        written = load_tensors(partial)
        _same_tensors(written, _cast({k: v for k, v in trained.items() if k != LORA_DIFF_BIAS}, dtype), path)
        kept = {key: value for key, value in student.tensors.items() if key != COND_PROJ}
        kept[B1] = (kept[B1].double() - shifted + written[LORA_DIFF_BIAS].double()).float()
        patched = dataclasses.replace(student, tensors=kept)
        rounding = max((dtype or torch.float32, student.tensors[W1].dtype), key=lambda d: TOLERANCE[d])
        difference = _compare(_answer(_mapped(patched), probe), answers, dtype=rounding, path=path)
    notes = (what, f"guidance {guidance:g} is folded in: use cfg 1 in hosts", *_prediction_notes(student))
    return Exported((place.path,), difference, (*notes, *_sampling_notes(spec)))


def _lora_beside(student: Checkpoint, spec: StudentSpec) -> tuple[dict[str, Tensor], float]:
    """The tensors of the LoRA that a merged student was trained as, and the guidance baked into them."""
    beside = lora_path(student.path)
    if not beside.exists():
        raise BadInput(
            f"{student.path}: this student was trained as a LoRA, which {beside.name} beside it holds, and "
            "that file is missing; put it back, or export with --to baked"
        )
    said, tensors = read_spec(beside), load_tensors(beside)
    own = student.tensors[COND_PROJ]
    if (
        said is None
        or said.container != "lora"
        or said.baked_guidance is None
        or not torch.equal(tensors[LORA_COND_PROJ].to(own.dtype), own)
    ):
        raise BadInput(f"{beside}: this is not the LoRA of {student.path.name}; put the right one beside it")
    return tensors, said.baked_guidance


def export_diffusers(student: Checkpoint, path: Path, *, dtype: torch.dtype | None = None) -> Exported:
    """A folder that the family's unmodified pipeline runs, its guidance_scale being the dial."""
    spec = spec_of(student)
    _check_output(student, path, suffix="")
    answers, probe = _answers(student)
    tensors = _without_fp8(_cast(_used(student), dtype))
    with free_path(path, size=_bytes(tensors)) as place:
        partial = place.partial
        with _quiet():
            _write_folder(student, tensors, partial)
            found = pipeline_class(student.of, inpaint=student.inpaint).from_pretrained(
                str(partial), local_files_only=True
            )
        unet: Any = found.unet.float().eval()
        difference = _compare(_answer(unet, probe), answers, dtype=_dtype(tensors), path=path)
        kept = {key: tensors[key] for key in student.network_tensors()}
        _same_tensors(open_checkpoint(partial).tensors, kept, path)
        notes = _pipeline_notes(spec, found.scheduler, type(found).__name__)
        del found
    return Exported((place.path,), difference, notes)


def pipeline_scheduler(spec: StudentSpec) -> DPMSolverMultistepScheduler:
    """The stock scheduler that walks trailing grids exactly, ending on clean: DPM-Solver++ of order 1 is
    DDIM."""
    from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler

    return DPMSolverMultistepScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=spec.prediction_type,
        rescale_betas_zero_snr=spec.ztsnr,
        solver_order=1,
        algorithm_type="dpmsolver++",
        final_sigmas_type="zero",
        timestep_spacing="trailing",
        steps_offset=1,
    )


def pipeline_class(family: Family = SD1, *, inpaint: bool = False) -> Any:
    """The family's stock pipeline, imported only where it is needed: that takes seconds and prints hints."""
    if inpaint:
        return _inpaint_pipeline_class(family)
    if family.sizes:
        from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import (
            StableDiffusionXLPipeline,
        )

        return StableDiffusionXLPipeline
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline

    return StableDiffusionPipeline


def _inpaint_pipeline_class(family: Family) -> Any:
    if family.sizes:
        from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl_inpaint import (
            StableDiffusionXLInpaintPipeline,
        )

        return StableDiffusionXLInpaintPipeline
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_inpaint import (
        StableDiffusionInpaintPipeline,
    )

    return StableDiffusionInpaintPipeline


@contextlib.contextmanager
def _quiet() -> Generator[None, None, None]:
    """Without the progress bars and hints that diffusers and transformers print on stderr."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    libraries: tuple[Any, ...] = (diffusers_logging, transformers_logging)
    levels = [library.get_verbosity() for library in libraries]
    for library in libraries:
        library.set_verbosity_error()
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library, level in zip(libraries, levels, strict=True):
            library.set_verbosity(level)
            library.enable_progress_bar()


def _write_folder(student: Checkpoint, tensors: Mapping[str, Tensor], path: Path) -> None:
    """A diffusers folder of these single-file tensors, with the spec in the UNet file's metadata."""
    spec = spec_of(student)
    parts = student.empty_networks()
    latent = max(student.resolution) // student.downscale
    parts["unet"].register_to_config(sample_size=latent)
    parts["vae"].register_to_config(sample_size=max(student.resolution))
    for name in ("unet", "vae"):
        (path / name).mkdir(parents=True)
        parts[name].save_config(str(path / name))
    metadata = {"format": "pt"}
    save_tensors(
        unet_from_ldm(tensors), metadata | student_metadata(spec, student.resolution), path / UNET_FILE
    )
    save_tensors(vae_from_ldm(tensors), metadata, path / "vae" / UNET_FILE.name)
    components: dict[str, Any] = {**parts, "scheduler": pipeline_scheduler(spec)}
    for encoder in student.of.text_encoders:
        parts[encoder.part].config.save_pretrained(str(path / encoder.part))
        bare = text_from_ldm(tensors, encoder)
        text = {key if key == PROJECTION else f"text_model.{key}": value for key, value in bare.items()}
        save_tensors(text, metadata, path / encoder.part / "model.safetensors")
        components[encoder.tokenizer] = _with_pad(student.tokenizer(encoder.part), encoder)
        save_tokenizer(components[encoder.tokenizer], path / encoder.tokenizer)
    if not student.of.sizes:
        components |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    pipeline = pipeline_class(student.of, inpaint=student.inpaint)(**components)
    pipeline.save_config(str(path))
    pipeline.scheduler.save_pretrained(str(path / "scheduler"))


def _with_pad(tokenizer: CLIPTokenizer, encoder: TextEncoder) -> CLIPTokenizer:
    """The tokenizer with the family's pad token, which stock pipelines take from it."""
    if encoder.pad is not None:
        tokenizer.pad_token = encoder.pad
    return tokenizer


def _write_sidecar(student: Checkpoint, path: Path) -> Path | None:
    """The .yaml that a v-prediction checkpoint needs; of an earlier export, it is removed where it would
    mislead. None for SDXL, whose hosts go by the key ``v_pred``."""
    yaml = sidecar_path(path)
    if student.prediction_type == "v_prediction" and not student.of.sizes:
        with atomic_path(yaml) as partial:
            partial.write_text(sidecar(student), encoding="utf-8", newline="\n")
        return yaml
    if is_ours(yaml):
        yaml.unlink()
    return None


def spec_of(student: Checkpoint) -> StudentSpec:
    """BadInput for a teacher and for a student whose description is lost."""
    if student.kind == "teacher":
        raise BadInput(f"{student.path}: this is a teacher, and a student was expected")
    if student.spec is None:
        raise BadInput(
            f"{student.path}: this student's description (fewstep.spec) is lost; put it back with "
            "python -m toolkit.inspect FILE --attach-spec SPEC.json"
        )
    return student.spec


def _spec_with_dial(student: Checkpoint, guidance: float) -> StudentSpec:
    spec = spec_of(student)
    if spec.w_embedding is None or COND_PROJ not in student.tensors:
        raise BadInput(f"{student.path}: this student has no guidance dial; export it with --to checkpoint")
    try:
        spec.check_guidance(guidance)
    except BadInput as error:
        raise BadInput(f"{student.path}: {error}") from None
    return spec


def _check_output(student: Checkpoint, path: Path, *, suffix: str) -> None:
    """BadInput for a name that hosts would not find, and for overwriting what is no export of ours."""
    if suffix and path.suffix.lower() != suffix:
        raise BadInput(f"{path}: the file's name must end in {suffix}, or hosts do not list it")
    if not path.exists():
        return
    if os.path.samefile(path, student.path):
        raise BadInput(f"{path}: this is the student itself; write the export elsewhere")
    try:
        inner = path / UNET_FILE
        ours = (read_spec(inner) if inner.exists() else None) if path.is_dir() else read_spec(path)
    except BadInput:
        ours = None
    if ours is None or path.is_dir() != (suffix == ""):
        raise BadInput(
            f"{path}: this exists already and is no such export; write elsewhere or remove it first"
        )


def _used(student: Checkpoint) -> dict[str, Tensor]:
    """What goes into an export: UNet, VAE and text encoder, without leftovers of training."""
    tensors = student.network_tensors() | student.carried()
    for key, value in tensors.items():
        if not is_finite(value):
            raise BadInput(f"{student.path}: the weights are damaged ({key} holds NaN or infinity)")
    return tensors


def _cast(tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    return {
        key: value.to(dtype) if dtype is not None and value.is_floating_point() else value
        for key, value in tensors.items()
    }


def _without_fp8(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """fp8 as fp16, without loss: stock pipelines cannot load it."""
    return {key: value.half() if value.element_size() == 1 else value for key, value in tensors.items()}


def _dtype(tensors: Mapping[str, Tensor]) -> torch.dtype:
    """The coarsest dtype of the UNet's tensors, whose rounding the comparison must allow for."""
    found = {value.dtype for key, value in tensors.items() if key.startswith(UNET_PREFIX)}
    return max(found, key=lambda dtype: TOLERANCE.get(dtype, 0.0))


def _bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(value.numel() * value.element_size() for value in tensors.values())


def _shift(student: Checkpoint, spec: StudentSpec, guidance: float) -> Tensor:
    """float64 (E,): what the dial at this guidance adds to the first time-embedding bias."""
    scale = spec.w_embedding.scale if spec.w_embedding is not None else 0.0
    return bias_shift(student.tensors[W1], student.tensors[COND_PROJ], guidance - 1, scale=scale)


def _answers(student: Checkpoint, guidance: float | None = None) -> tuple[Tensor, Probe]:
    """The student's own answers, in float32, at its first and last timestep."""
    spec = spec_of(student)
    unet = _mapped(student)
    generator = torch.Generator().manual_seed(0)
    side = 2 ** len(student.config("unet")["block_out_channels"])
    dial = spec.w_embedding
    scales = (guidance, guidance) if guidance is not None else (spec.guidance_default, spec.guidance_max)
    probe = Probe(
        z=torch.randn(2, unet.config["in_channels"], side, side, generator=generator),
        timestep=torch.tensor([max(spec.timesteps), min(spec.timesteps)]),
        cond=random_cond(student, 2, generator=generator),
        embedded=None
        if dial is None
        else w_embedding(torch.tensor(scales) - 1, dim=dial.dim, scale=dial.scale),
    )
    return _answer(unet, probe), probe


def _mapped(student: Checkpoint) -> UNet2DConditionModel:
    """Its UNet, computing in float32 from the weights as they lie in the file: a layer's are widened while it
    computes, so that memory holds no copy of them all."""
    unet = student.unet(dtype=None)

    def widen(module: torch.nn.Module, inputs: object, *, own: Mapping[str, Parameter]) -> None:
        for name, value in own.items():
            setattr(module, name, Parameter(value.float(), requires_grad=False))

    def narrow(
        module: torch.nn.Module, inputs: object, answer: object, *, own: Mapping[str, Parameter]
    ) -> None:
        for name, value in own.items():
            setattr(module, name, value)

    for module in unet.modules():
        if own := dict(module.named_parameters(recurse=False)):
            module.register_forward_pre_hook(functools.partial(widen, own=own))
            module.register_forward_hook(functools.partial(narrow, own=own))
    return unet


@torch.no_grad()
def _answer(unet: UNet2DConditionModel, probe: Probe) -> Tensor:
    embedded = None if unet.config["time_cond_proj_dim"] is None else probe.embedded
    added = added_conditions(probe.cond, torch.float32)
    text = probe.cond["text"]
    call: Any = unet
    return call(
        probe.z, probe.timestep, text, timestep_cond=embedded, added_cond_kwargs=added, return_dict=False
    )[0]


def _compare(found: Tensor, expected: Tensor, *, dtype: torch.dtype, path: Path) -> float:
    """The largest difference; BadInput if rounding to the dtype does not explain it."""
    difference = float((found - expected).abs().max())
    allowed = TOLERANCE.get(dtype, TOLERANCE[torch.bfloat16]) * float(expected.abs().max())
    if not difference <= allowed:
        raise BadInput(
            f"{path}: loaded back, this export answers differently from the student (by {difference:.2g}, "
            f"{allowed:.2g} is rounding), so it was not kept"
        )
    return difference


def _same_tensors(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: Path) -> None:
    """BadInput unless every tensor was read back bit for bit."""
    for key, value in expected.items():
        if key.endswith("position_ids"):
            continue
        if key not in found or not torch.equal(found[key].reshape(value.shape), value):
            raise BadInput(f"{path}: loaded back, {key} differs from what was written, so it was not kept")


def _sampling_notes(spec: StudentSpec) -> tuple[str, ...]:
    timesteps = ", ".join(str(timestep) for timestep in spec.timesteps)
    own = {
        "deterministic": "Euler steps",
        "stochastic": "a sampler of its own, fewstep, which no stock host has",
        "consistency": "hosts' LCM sampler",
    }
    return (
        f"it is trained for {spec.steps} evaluations, at the timesteps {timesteps}, by {own[spec.sampler]}",
        *([f"{clip_skip_differs(spec)}: set that in hosts"] if spec.unusual_clip_skip else []),
    )


def _prediction_notes(student: Checkpoint) -> tuple[str, ...]:
    """What a LoRA cannot tell a stock host: that the student predicts v where its base may not."""
    if student.prediction_type == "epsilon":
        return ()
    return (
        "it predicts v: on a base that does not, put ModelSamplingDiscrete (v_prediction) after the stock "
        "loader; FewStep's own loader does so by itself",
    )


def sampling_node(student: Checkpoint) -> str | None:
    """What a stock ComfyUI needs after the loader of a plain checkpoint that predicts v; None: nothing."""
    if student.prediction_type == "epsilon" or student.family == "sdxl":
        return None
    if seen_by_comfyui(student.tensors, student.family) == "v_prediction" and not student.ztsnr:
        return None
    return "ModelSamplingDiscrete (v_prediction" + (", zsnr" if student.ztsnr else "") + ")"


def _comfyui_note(student: Checkpoint) -> str:
    """How a stock ComfyUI comes to know that a plain checkpoint predicts v."""
    if student.family == "sdxl":
        return "it predicts v: hosts tell by its key v_pred" + (" and ztsnr" if student.ztsnr else "")
    node = sampling_node(student)
    if node is None:
        return "it predicts v, and ComfyUI takes it for that, going by a statistic of its weights"
    return (
        f"it predicts v, which a stock ComfyUI cannot tell of {student.of.name}: put {node} after the "
        "loader, or the pictures are noise"
    )


def _pipeline_notes(spec: StudentSpec, scheduler: Any, pipeline: str) -> tuple[str, ...]:
    scheduler.set_timesteps(spec.steps)
    walks = spec.sampler == "deterministic" and spec.direction == "decode"
    if walks and tuple(scheduler.timesteps.tolist()) == spec.timesteps:
        return (f"{pipeline}: num_inference_steps={spec.steps}, guidance_scale is the dial",)
    return (
        "stock diffusers can load this student, but its schedulers cannot walk its grid "
        f"({spec.sampler}, timesteps {', '.join(str(timestep) for timestep in spec.timesteps)})",
    )
