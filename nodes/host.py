"""Students inside ComfyUI's own machinery; the one file that knows comfy's internals.

**Loading.** Additive classes in ``comfy.supported_models.models`` take every checkpoint that is a student.
They are the family's own classes; the UNet's ``time_embed`` gets one layer more, ``cond_proj``, made by
comfy's ops like its neighbours, so that LoRA, low VRAM, merging and saving treat it as any other weight.

**Guidance.** A wrapper around each sampling run (SAMPLER_SAMPLE) finds each conditioning's guidance, embeds
it in float32 and hands it to the network as a model conditioning; then cfg is 1 for the run: one evaluation a
step. Never the scalar: hosts cast what they pass down, and 1000 w in bf16 is wrong by whole radians.

**Sampling.** The sampler ``fewstep`` walks from the first noise level that it is given through the trained
ones below, to the last that it is given.

ComfyUI passes a loader neither the file's metadata to the model's class nor the model's class a say in the
sampling run, so two places look at the calling frames (:func:`_from_callers`): nothing of the host's is
replaced, and a host that changes the names falls back to the family's defaults, with a warning.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, ClassVar

import comfy.conds
import comfy.k_diffusion.sampling
import comfy.lora
import comfy.model_base
import comfy.model_sampling
import comfy.patcher_extension
import comfy.samplers
import comfy.supported_models
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from torch import Tensor, nn

from ..toolkit.diffusion.errors import BadInput
from ..toolkit.diffusion.grid import trailing_timesteps
from ..toolkit.diffusion.guidance import bias_shift
from ..toolkit.diffusion.schedule import CLEAN
from ..toolkit.diffusion.spec import SPEC_KEY, StudentSpec
from ..toolkit.runtime.files import SAVED_SPEC, load_tensors, spec_tensor, spec_text
from ..toolkit.runtime.sentences import (
    DIAL_MISSING,
    UNGUIDED,
    baked_ignores,
    clip_skip_differs,
    metadata_gone,
    negative_ignored,
    no_dial,
    not_the_students_sampler,
)
from ..toolkit.runtime.student import (
    COND_PROJ,
    LORA_COND_PROJ,
    NO_NEGATIVE,
    LiveNegative,
    embedded,
    encoding_grid,
    guessed_spec,
    live_negative,
    plan_walk,
    require_decoder,
    schedule_of,
)
from .messages import say, show_run

KEY = "fewstep"
"""Our name in the host's dictionaries: wrappers, options, the sampler and the scheduler."""

_EMBEDDED = "fewstep_w"
"""The model conditioning (B, dim) that carries the embedded guidance."""


@dataclass(frozen=True)
class Choice:
    """How a model's runs find their guidance. ``guidance``: of the loader, None for the spec's default;
    ``asked``: of a FewStep sampler node, which goes before the host's cfg."""

    cfg_is_guidance: bool = True
    guidance: float | None = None
    live_negative: bool = False
    asked: float | None = None


def choose(patcher: Any, **changes: Any) -> Any:
    """A clone of a MODEL with another :class:`Choice`."""
    clone = patcher.clone()
    options = clone.model_options["transformer_options"]
    options[KEY] = replace(options.get(KEY, Choice()), **changes)
    return clone


def student_of(patcher: Any) -> StudentSpec | None:
    """The spec of a MODEL, or None if it is no student."""
    return patcher.get_attachment(KEY) or getattr(patcher.model, KEY, None)


def expect_student(patcher: Any, what: str) -> StudentSpec:
    """The spec of a MODEL; BadInput, naming ``what`` needed it, if it is no student."""
    if (spec := student_of(patcher)) is None:
        raise BadInput(
            f"{what} needs a FewStep student, and this model is none; load one with FewStepLoadStudent or "
            "Load Checkpoint, or choose another sampler"
        )
    return spec


def encoding_sigmas(patcher: Any, steps: int) -> tuple[tuple[int, ...], Tensor]:
    """Timesteps (N), ascending, and noise levels (N + 1,) float32 on which a MODEL turns pictures into noise;
    BadInput for a decoder, and for what is no Stable Diffusion."""
    sampling = patcher.get_model_object("model_sampling")
    if not isinstance(sampling, comfy.model_sampling.ModelSamplingDiscrete):
        raise BadInput(
            f"this model ({type(patcher.model).__name__}) is no Stable Diffusion 1, 2 or SDXL, and only "
            "those are encoded into noise; load one of them, or an encoder distilled of one"
        )
    schedule = schedule_of(sampling.sigmas)
    grid = encoding_grid(student_of(patcher), len(schedule), steps)
    return grid.timesteps, grid.sigmas(schedule).float()


# -- Loading ---------------------------------------------------------------------------------------------


class TimeEmbed(nn.Sequential):
    """A UNet's time embedding (children 0, 1, 2) with ``cond_proj``, whose output joins the sinusoid."""

    def __init__(self, plain: nn.Sequential, cond_proj: nn.Module) -> None:
        super().__init__(*plain)
        self.cond_proj = cond_proj
        self.w: Tensor | None = None

    def forward(self, input: Tensor) -> Tensor:
        if self.w is not None:
            input = input + self.cond_proj(self.w.to(input))
        for layer in (self[0], self[1], self[2]):
            input = layer(input)
        return input


class StudentModel:
    """Mixed into the host's model class: ``fewstep`` is the StudentSpec."""

    @property
    def current_patcher(self) -> Any:
        return self.__dict__.get("_current_patcher")

    @current_patcher.setter
    def current_patcher(self, patcher: Any) -> None:
        """The host sets this as each sampling run begins: the moment to wrap the run."""
        self.__dict__["_current_patcher"] = patcher
        guider = _from_callers("self", lambda found: isinstance(found, comfy.samplers.CFGGuider))
        if patcher is not None and guider is not None:
            _wrap(guider.model_options)

    def _apply_model(self, x: Tensor, t: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        w = kwargs.pop(_EMBEDDED, None)
        time_embed = self.diffusion_model.time_embed  # type: ignore[attr-defined]
        if not isinstance(time_embed, TimeEmbed):
            return super()._apply_model(x, t, *args, **kwargs)  # type: ignore[misc]
        time_embed.w = _or_default(w, self.fewstep, x)  # type: ignore[attr-defined]
        try:
            return super()._apply_model(x, t, *args, **kwargs)  # type: ignore[misc]
        finally:
            time_embed.w = None

    def state_dict_for_saving(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The host's save nodes write no foreign metadata, so the spec goes among the UNet's weights."""
        saved = super().state_dict_for_saving(*args, **kwargs)  # type: ignore[misc]
        return {**saved, SAVED_SPEC: spec_tensor(self.fewstep)}  # type: ignore[attr-defined]

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The host's merge nodes ask model2 for its weights, and keep only those that model1 has too."""
        model1 = _from_callers("model1", lambda found: isinstance(found, ModelPatcher))
        if model1 is not None and student_of(model1) is None:
            say(
                "a merge keeps the guidance dial of model1, which is no student here: the dial is gone; "
                "connect the student as model1"
            )
        return super().state_dict(*args, **kwargs)  # type: ignore[misc]


class Multiple(Fraction):
    """A level's width over the first one's, for widths that are no whole multiples."""

    def __mul__(self, other: Any) -> Any:
        return int(Fraction(self) * other)

    __rmul__ = __mul__


def _student_config(base: type, family: str) -> type:
    """The host's class of a family, for its students; of the first family, in any width."""

    class StudentConfig(base):
        unet_config: ClassVar = {
            name: value
            for name, value in base.unet_config.items()
            if family != "sd1" or name not in ("context_dim", "model_channels")
        }

        @classmethod
        def matches(
            cls, unet_config: dict[str, Any], state_dict: Any = None, *args: Any, **kwargs: Any
        ) -> bool:
            if not super().matches(unet_config, state_dict, *args, **kwargs):
                return False
            spec = None if state_dict is None else _spec_of(state_dict)
            return spec is not None and spec.family == family

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.spec: StudentSpec | None = None

        def model_type(self, state_dict: dict[str, Tensor], prefix: str = "", **kwargs: Any) -> Any:
            spec = self._read(state_dict, prefix)
            if spec.ztsnr:
                self.sampling_settings["zsnr"] = True
            wanted = comfy.model_base.ModelType
            return wanted.V_PREDICTION if spec.prediction_type == "v_prediction" else wanted.EPS

        def get_model(
            self, state_dict: dict[str, Tensor], prefix: str = "", device: Any = None, **kwargs: Any
        ) -> Any:
            spec = self._read(state_dict, prefix)
            for key in [key for key in state_dict if key.endswith(SPEC_KEY)]:
                del state_dict[key]  # it is read; the network has no such weight
            self.unet_config["channel_mult"] = _multiples(state_dict, prefix, self.unet_config)
            model = super().get_model(state_dict, prefix, device, **kwargs)
            return _as_student(model, spec, state_dict.get(prefix + COND_PROJ), device)

        def _read(self, state_dict: dict[str, Tensor], prefix: str) -> StudentSpec:
            if self.spec is None:
                self.spec = _spec_of(state_dict)
                assert self.spec is not None, "matches() said that this is a student"
                if self.spec.method == "unknown":
                    say(metadata_gone(self.spec))
            return self.spec

    StudentConfig.__name__ = StudentConfig.__qualname__ = f"FewStep{base.__name__}"
    return StudentConfig


def _spec_of(state_dict: Mapping[str, Tensor]) -> StudentSpec | None:
    """The spec of the checkpoint that is being loaded: from its metadata, else from among its weights, else
    the family's defaults if it has a guidance input; None if it is no student."""
    metadata = _from_callers("metadata", lambda found: isinstance(found, dict) and SPEC_KEY in found)
    if metadata is not None:
        return StudentSpec.from_json(metadata[SPEC_KEY])
    for key in state_dict:
        if key.endswith(SPEC_KEY):
            return StudentSpec.from_json(spec_text(state_dict[key]))
    return guessed_spec(state_dict) if any(key.endswith(COND_PROJ) for key in state_dict) else None


def _multiples(tensors: Mapping[str, Tensor], prefix: str, config: Mapping[str, Any]) -> list[Any]:
    """Each level's width over the first one's; the host's own detection rounds it down."""
    first, block, multiples = config["model_channels"], 0, []
    for blocks in config["num_res_blocks"]:
        block += 1
        width = tensors[f"{prefix}input_blocks.{block}.0.out_layers.3.weight"].shape[0]
        multiples.append(width // first if width % first == 0 else Multiple(width, first))
        block += blocks
    return multiples


def _as_student(model: Any, spec: StudentSpec, cond_proj: Tensor | None, device: Any) -> Any:
    unet = model.diffusion_model
    if cond_proj is not None:
        width, dim = cond_proj.shape
        expected = (unet.model_channels, spec.w_embedding.dim if spec.w_embedding else dim)
        if (width, dim) != expected:
            raise BadInput(f"the student's cond_proj has the shape {(width, dim)}; {expected} was expected")
        layer = type(unet.time_embed[0])(dim, width, bias=False, dtype=unet.dtype, device=device)
        unet.time_embed = TimeEmbed(unet.time_embed, layer)
    elif spec.has_dial:
        say(DIAL_MISSING)
        spec = replace(spec, w_embedding=None)
    base = type(model)
    model.__class__ = type(f"Student{base.__name__}", (StudentModel, base), {})
    model.fewstep = spec
    model.model_sampling.fewstep = spec
    return model


def missing_weights(patcher: Any, tensors: Mapping[str, Tensor]) -> list[str]:
    """Keys of a MODEL's UNet that a checkpoint, with its keys under the usual prefix, does not have."""
    wanted = patcher.model.diffusion_model.state_dict()
    return [key for key in wanted if f"model.diffusion_model.{key}" not in tensors]


def with_student_lora(patcher: Any, path: Path, spec: StudentSpec, strength: float) -> Any:
    """A clone of a MODEL with a student's low-rank weights and its live dial; BadInput if they do not fit.

    The baked guidance's shift (methods: ``W1 P e(w)``) is taken off the time embedding's bias, since the
    dial is live. Of a strength other than 1, weights and dial are scaled alike.
    """
    if student_of(patcher) is not None:
        raise BadInput(f"{path.name}: the model is a student already; connect the checkpoint it was made for")
    tensors = load_tensors(path)
    cond_proj = tensors.pop(LORA_COND_PROJ, None)
    clone = patcher.clone()
    layers = comfy.lora.model_lora_keys_unet(clone.model, {})
    _check_fit(path, tensors, cond_proj, spec, clone, layers)
    if cond_proj is not None and spec.baked_guidance is not None:
        _take_off_shift(tensors, clone, cond_proj, spec)
        spec = replace(spec, baked_guidance=None)
    clone.add_patches(comfy.lora.load_lora(tensors, layers), strength)
    clone.set_attachments(KEY, spec)
    clone.add_object_patch("model_sampling", _sampling_of(patcher, spec))
    clone.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, KEY, _run)
    if cond_proj is not None:
        clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, _hooked(cond_proj * strength, spec))
    return clone


def _check_fit(
    path: Path,
    tensors: Mapping[str, Tensor],
    cond_proj: Tensor | None,
    spec: StudentSpec,
    patcher: Any,
    layers: Mapping[str, str],
) -> None:
    """BadInput if a LoRA's layers, under the names of ``layers``, are not all the model's, in its shapes."""
    names = sorted({key.split(".")[0] for key in tensors})
    strange = [
        name for name in names if name not in layers or not _fits(patcher, layers[name], name, tensors)
    ]
    if cond_proj is not None:
        dim = spec.w_embedding.dim if spec.w_embedding else cond_proj.shape[1]
        if tuple(cond_proj.shape) != (patcher.model.diffusion_model.model_channels, dim):
            strange, names = [*strange, LORA_COND_PROJ], [*names, LORA_COND_PROJ]
    if strange:
        raise BadInput(
            f"{path.name}: {len(strange)} of {len(names)} of its layers do not fit this model, {strange[0]} "
            "for one; connect a checkpoint of the family that the student was made for"
        )


def _fits(patcher: Any, key: str, name: str, tensors: Mapping[str, Tensor]) -> bool:
    """Whether a layer of a LoRA has the shape of the model's weight under ``key``."""
    shape = tuple(comfy.utils.get_attr(patcher.model, key).shape)
    down, up = tensors.get(f"{name}.lora_down.weight"), tensors.get(f"{name}.lora_up.weight")
    if (down is None) != (up is None):
        return False
    if down is not None and up is not None:
        return (up.shape[0], *down.shape[1:2]) == shape[:2]
    diff, diff_b = tensors.get(f"{name}.diff"), tensors.get(f"{name}.diff_b")
    return (diff is None or tuple(diff.shape) == shape) and (diff_b is None or len(diff_b) == shape[0])


def _take_off_shift(tensors: dict[str, Tensor], patcher: Any, cond_proj: Tensor, spec: StudentSpec) -> None:
    layer, weight_key = "lora_unet_time_embedding_linear_1", "diffusion_model.time_embed.0.weight"
    [(weight, *_)] = patcher.get_key_patches(weight_key)[weight_key][:1]
    weight = weight[0] if isinstance(weight, tuple) else weight
    weight = weight.detach().cpu().float() + tensors.get(f"{layer}.diff", torch.zeros(())).float()
    scale = 1000.0 if spec.w_embedding is None else spec.w_embedding.scale
    shift = bias_shift(weight, cond_proj.float(), (spec.baked_guidance or 1.0) - 1, scale=scale)
    tensors[f"{layer}.diff_b"] = (tensors[f"{layer}.diff_b"].double() - shift).float()


def _sampling_of(patcher: Any, spec: StudentSpec) -> Any:
    """The host's sampling object for the student's prediction type, knowing its spec."""
    types = comfy.model_base.ModelType
    kind = types.V_PREDICTION if spec.prediction_type == "v_prediction" else types.EPS
    sampling = comfy.model_base.model_sampling(patcher.model.model_config, kind)
    sampling.set_sigmas(patcher.get_model_object("model_sampling").sigmas)
    sampling.fewstep = spec
    return sampling


def _hooked(cond_proj: Tensor, spec: StudentSpec) -> Callable[..., Tensor]:
    """Around one evaluation of a network that has no ``cond_proj`` of its own: a hook adds its output."""

    def apply_model(executor: Any, x: Tensor, t: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        w = _or_default(kwargs.pop(_EMBEDDED, None), spec, x)
        added = w @ cond_proj.to(x.device, torch.float32).T
        time_embed = executor.class_obj.diffusion_model.time_embed
        handle = time_embed.register_forward_pre_hook(lambda _, inputs: (inputs[0] + added.to(inputs[0]),))
        try:
            return executor(x, t, *args, **kwargs)
        finally:
            handle.remove()

    return apply_model


def _or_default(w: Tensor | None, spec: StudentSpec, x: Tensor) -> Tensor:
    """The embedded guidance of a batch; the student's default where nobody gave one."""
    if w is None:
        say(f"no sampling run said which guidance is wanted: {spec.guidance_default:g} was taken")
        w = embedded(spec, [spec.guidance_default]).expand(len(x), -1)
    return w.to(x.device, torch.float32)


# -- Guidance and the run --------------------------------------------------------------------------------


def _wrap(model_options: dict[str, Any]) -> None:
    """Put :func:`_run` around the run that these options belong to, once."""
    present = comfy.patcher_extension.get_all_wrappers(
        WrappersMP.SAMPLER_SAMPLE, model_options, is_model_options=True
    )
    if _run not in present:
        comfy.patcher_extension.add_wrapper_with_key(
            WrappersMP.SAMPLER_SAMPLE, KEY, _run, model_options, is_model_options=True
        )


def _run(executor: Any, guider: Any, sigmas: Tensor, extra_args: dict[str, Any], *args: Any, **kwargs: Any):
    """One sampling run of a student: guidance into the conditioning, cfg 1, and what there is to say."""
    spec = student_of(guider.model_patcher)
    if spec is None:
        return executor(guider, sigmas, extra_args, *args, **kwargs)
    options = guider.model_options["transformer_options"].get(KEY, Choice())
    _, noise, latent, *_ = args
    sampling = guider.inner_model.model_sampling
    if spec.direction == "encode":
        _check_encoding(spec, sampling, sigmas)
    else:
        _check_noise(sampling, noise, latent)
        _warn_of_sampler(spec, sampling, executor.class_obj, sigmas)
    _warn_of_habits(spec, options, guider)
    guidance = _guidance_of_run(spec, options, guider)
    wanted = {
        name: [_values(cond.get("guidance"), guidance, count=len(noise)) for cond in conds]
        for name, conds in guider.conds.items()
    }
    live = _live_negative(spec, wanted) if options.live_negative else NO_NEGATIVE
    for name, conds in guider.conds.items():
        for cond, values in zip(conds, wanted[name], strict=True):
            _check_guidance(spec, values, stated="guidance" in cond or options.asked is not None)
            if spec.has_dial:
                negative = name == "negative" and live is not NO_NEGATIVE
                fed = [live.negative] if negative else [value / live.cfg for value in values]
                cond["model_conds"][_EMBEDDED] = comfy.conds.CONDRegular(embedded(spec, fed))
    with _cfg(guider, extra_args["model_options"], live.cfg):
        return executor(guider, sigmas, extra_args, *args, **kwargs)


def _live_negative(spec: StudentSpec, wanted: Mapping[str, list[list[float]]]) -> LiveNegative:
    """How a run heeds its negative prompt; both evaluations share one guidance."""
    if "negative" not in wanted or not spec.has_dial:
        return NO_NEGATIVE
    guidances = sorted({value for values in wanted["positive"] for value in values})
    if len(guidances) > 1:
        raise BadInput(
            "a live negative prompt needs one guidance for all prompts, regions and pictures; "
            f"{', '.join(f'{value:g}' for value in guidances)} were given"
        )
    return live_negative(spec, guidances[0])


def _check_guidance(spec: StudentSpec, values: Sequence[float], *, stated: bool) -> None:
    """BadInput out of the trained range. A baked file minds only a guidance that was ``stated`` for it: a
    host's cfg of 1 is right there, and another one is warned of."""
    if spec.has_dial or (spec.baked_guidance is not None and stated):
        for value in values:
            spec.check_guidance(value)
    if spec.has_dial and 1 in values:
        say(UNGUIDED, "info")


def _guidance_of_run(spec: StudentSpec, options: Choice, guider: Any) -> float:
    """Where no conditioning says otherwise: a FewStep node's, the host's cfg, the loader's, the default."""
    usual = spec.guidance_default if options.guidance is None else options.guidance
    if options.asked is not None:
        return options.asked
    given = options.cfg_is_guidance and "negative" in guider.conds
    return _cfg_of(guider) if given else usual


def _cfg_of(guider: Any) -> float:
    """What a sampler node calls cfg; a guider of two has its prompt's as ``cfg1``."""
    return float(getattr(guider, "cfg1", guider.cfg))


def _values(found: Any, otherwise: float, count: int) -> list[float]:
    """A conditioning's guidance: one for all pictures of a batch, or one each."""
    if found is None:
        return [otherwise]
    values = [float(value) for value in found] if isinstance(found, Sequence | Tensor) else [float(found)]
    if len(values) not in (1, count):
        raise BadInput(
            f"{len(values)} guidances were given for a batch of {count}; give one, or one for each picture"
        )
    return values


@contextmanager
def _cfg(guider: Any, model_options: dict[str, Any], cfg: float) -> Iterator[None]:
    """The guider's cfg for one run; at 1, the positive conditioning alone is evaluated, also in guiders with
    arithmetic of their own. ``model_options`` are the run's."""
    before = guider.cfg
    guider.cfg = cfg
    if cfg == 1:
        model_options.pop("sampler_cfg_function", None)
        if not model_options.get("sampler_post_cfg_function"):  # some read the negative's evaluation
            model_options.pop("disable_cfg1_optimization", None)
        if _has_own_arithmetic(guider):
            comfy.patcher_extension.add_wrapper_with_key(
                WrappersMP.PREDICT_NOISE, KEY, _positive_only, guider.model_options, is_model_options=True
            )
    try:
        yield
    finally:
        guider.cfg = before


def _has_own_arithmetic(guider: Any) -> bool:
    return type(guider).predict_noise is not comfy.samplers.CFGGuider.predict_noise


def _positive_only(
    executor: Any, x: Tensor, timestep: Tensor, model_options: dict[str, Any], seed: Any = None
):
    guider = executor.class_obj
    return comfy.samplers.sampling_function(
        guider.inner_model, x, timestep, None, guider.conds["positive"], 1.0, model_options, seed
    )


def _warn_of_habits(spec: StudentSpec, options: Choice, guider: Any) -> None:
    """What people's graphs do out of habit and a student does not heed."""
    cfg = _cfg_of(guider)
    if "negative" in guider.conds and not options.live_negative:
        say(f"{negative_ignored(spec)} (live_negative heeds one)", "info")
    if spec.unusual_clip_skip:
        say(
            f"{clip_skip_differs(spec)}: CLIP Set Last Layer at -{spec.clip_skip} is right for it, and "
            "FewStepLoadStudent sets that by itself",
            "info",
        )
    if spec.baked_guidance is not None and "negative" in guider.conds and cfg not in (1, spec.baked_guidance):
        say(baked_ignores(spec, cfg))
    elif spec.w_embedding is None and cfg != 1:
        say(no_dial(cfg))
    if "sampler_cfg_function" in guider.model_options:
        say("RescaleCFG and other changes of the cfg formula have no effect on a student: there is no cfg")
    if any(guider.model_options.get(f"sampler_{when}_cfg_function") for when in ("pre", "post")):
        say(
            "PAG, SAG, SEG, APG and other corrections around cfg may still act, some at an evaluation or two "
            "more a step; the student was not trained for them"
        )
    if _has_own_arithmetic(guider):
        say(f"{type(guider).__name__} has no effect on a student: the positive prompt alone is evaluated")


def _check_encoding(spec: StudentSpec, sampling: Any, sigmas: Tensor) -> None:
    """BadInput unless an encoder walks its own grid upwards, which no stock sampler node lets it do."""
    schedule = schedule_of(sampling.sigmas)
    own = encoding_grid(spec, len(schedule)).sigmas(schedule).to(sigmas)
    if own.shape != sigmas.shape or not torch.allclose(own, sigmas, rtol=1e-4):
        require_decoder(spec)


def _check_noise(sampling: Any, noise: Tensor, latent: Tensor) -> None:
    """BadInput if a run adds noise to a latent that is noise already, as an encoder leaves it. The root mean
    square tells: 1.3 at most of 64 drawings of the demo, and of their noise a third of the level at least."""
    if bool(noise.any()) and float(latent.square().mean().sqrt()) > float(sampling.sigma_max) / 4:
        raise BadInput(
            "this latent is noise already, and the sampler adds noise to it; switch add_noise off in "
            "KSampler (FewStep), KSampler (Advanced) or SamplerCustom, or connect DisableNoise"
        )


def _warn_of_sampler(spec: StudentSpec, sampling: Any, sampler: Any, sigmas: Tensor) -> None:
    """A sampler other than ours is right only for deterministic students, as Euler, on the trained grid."""
    function = getattr(sampler, "sampler_function", None)
    if function is sample_fewstep:
        return
    trained = sampling.sigmas[list(spec.timesteps)].to(sigmas)
    visited = sigmas[sigmas > 0]
    on_grid = all(bool(((trained / level - 1).abs() < 1e-4).any()) for level in visited)
    euler = function is comfy.k_diffusion.sampling.sample_euler and spec.sampler == "deterministic"
    if not (on_grid and euler):
        name = getattr(function, "__name__", type(sampler).__name__).removeprefix("sample_")
        say(not_the_students_sampler(spec, name, KEY))


# -- Sampling --------------------------------------------------------------------------------------------


def sample_fewstep(
    model: Any, x: Tensor, sigmas: Tensor, extra_args: Any = None, callback: Any = None, disable: Any = None
) -> Tensor:
    """The host's sampler ``fewstep``: the student's own, on its own grid between the first and the last of
    ``sigmas``."""
    if len(sigmas) < 2:
        return x
    guider = model.inner_model
    spec = expect_student(guider.model_patcher, "the sampler fewstep")
    schedule = schedule_of(guider.inner_model.model_sampling.sigmas)
    seed = (extra_args or {}).get("seed") or 0
    plan = plan_walk(spec, schedule, sigmas, seeds=[seed])
    start = plan.sigmas[0].to(x)
    if plan.note:
        say(plan.note, "info")
        x = model.latent_image + (x - model.latent_image) * (start / sigmas[0].to(x))
    show_run(f"timesteps {', '.join(map(str, plan.timesteps))}")
    callback = _in_steps(callback, len(sigmas), plan.sigmas)
    if spec.sampler == "deterministic":
        # The host's own Euler: bit for bit what its sampler "euler" does on these levels.
        euler = comfy.k_diffusion.sampling.sample_euler
        return euler(model, x, plan.sigmas.to(x), extra_args, callback, disable)
    return plan.sampler(model, x, plan.sigmas, extra_args, callback)


def _in_steps(callback: Any, given: int, sigmas: Tensor) -> Callable[[dict[str, Any]], None] | None:
    """The host counts the steps that it gave; ours are told in that count, the last one as its last."""
    if callback is None:
        return None
    ratio = (given - 1) / (len(sigmas) - 1)
    return lambda state: callback({**state, "i": round((state["i"] + 1) * ratio) - 1})


def fewstep_scheduler(model_sampling: Any, steps: int) -> Tensor:
    """The host's scheduler ``fewstep``: a student's trained levels if asked for their number, else a trailing
    grid of ``steps`` (of which the host keeps the tail for a denoise below 1)."""
    spec: StudentSpec | None = getattr(model_sampling, KEY, None)
    timesteps = spec.timesteps if spec is not None and spec.steps == steps else trailing_timesteps(steps)
    schedule = schedule_of(model_sampling.sigmas)
    return schedule.sigma(torch.tensor([*timesteps, CLEAN])).float()


def _from_callers(name: str, wanted: Callable[[Any], bool]) -> Any:
    """The local variable of that name, if it is as wanted, of the nearest caller that has one; else None."""
    frame = sys._getframe(1)
    while frame is not None:
        found = frame.f_locals.get(name)
        if wanted(found):
            return found
        frame = frame.f_back
    return None


_FAMILIES = {"SD15": "sd1", "SD20": "sd2"} | dict.fromkeys(
    ("SDXL", "SSD1B", "Segmind_Vega", "KOALA_700M", "KOALA_1B"), "sdxl"
)
"""The host's classes that students can be of."""


def register() -> None:
    """Add students to what the host can load, and our names to its samplers and schedulers; idempotent."""
    models = comfy.supported_models.models
    present = {cls.__name__ for cls in models}
    for name, family in _FAMILIES.items():
        cls = _student_config(getattr(comfy.supported_models, name), family)
        if cls.__name__ not in present:
            models.insert(0, cls)
    comfy.k_diffusion.sampling.sample_fewstep = sample_fewstep
    samplers = comfy.samplers
    for names in (samplers.KSAMPLER_NAMES, samplers.SAMPLER_NAMES, samplers.KSampler.SAMPLERS):
        if KEY not in names:
            names.append(KEY)
    samplers.SCHEDULER_HANDLERS[KEY] = samplers.SchedulerHandler(fewstep_scheduler)
    for names in (samplers.SCHEDULER_NAMES, samplers.KSampler.SCHEDULERS):
        if KEY not in names:
            names.append(KEY)
