"""Checkpoints: opening a file or folder of any family in families.py, and writing students beside them.

Every kind of input becomes one thing, memory-mapped tensors under single-file keys; networks are built from
their shapes. ``model_ema.*`` is ignored, as hosts do. What is wrong with a file is one sentence, said when it
is opened; NaN is found when a part is loaded.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from ..diffusion.errors import BadInput
from ..diffusion.guidance import W_DIM
from ..diffusion.prediction import PREDICTION_TYPES, PredictionType
from ..diffusion.schedule import NoiseSchedule
from ..diffusion.spec import SPEC_KEY, AppliedLora, StudentSpec
from ..runtime.files import modelspec, save_tensors, sha256_of, sha256_of_tensors, spec_from, tensor_bytes
from .families import (
    FAMILIES,
    NAMES,
    REFUSED,
    UNET_PREFIX,
    VAE_PREFIX,
    Family,
    FamilyName,
    Override,
    Part,
    TextPart,
    resolution_for,
)
from .layout import COND_PROJ, PROJECTION, text_from_ldm, unet_from_ldm, unet_to_ldm, vae_from_ldm
from .prompting import Embedding
from .prompts import encoding_of
from .recognise import (
    INPUTS,
    Recognised,
    build,
    config_of,
    expected_keys,
    problems,
    recognise,
    text_state,
)
from .vocabulary import load_tokenizer
from .weights import Config, Weights, read_folder, read_weights

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

log = logging.getLogger("fewstep")

V_PRED = "v_pred"
"""An empty tensor by which hosts know a v-prediction checkpoint."""

ZTSNR = "ztsnr"
_TELLING = UNET_PREFIX + "output_blocks.11.1.transformer_blocks.0.norm1.bias"
"""In Stable Diffusion 2, its standard deviation tells v-prediction (ComfyUI's rule: above 0.09)."""


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """``tensors``: memory-mapped, under single-file keys; ``configs``: what a folder's own JSON says.

    ``resolution``: (width, height) in pixels that the file says it was trained for, else the family's.
    ``loras``: what is merged into the tensors, beyond what the file holds. How its owner uses it:
    ``clip_skip`` (1: the family's usual layer), textual inversions that prompts may name, and the rescaled
    guidance of a teacher.
    """

    path: Path
    name: str
    kind: Literal["teacher", "student", "baked"]
    family: FamilyName
    inpaint: bool
    prediction_type: PredictionType
    ztsnr: bool
    spec: StudentSpec | None
    resolution: tuple[int, int]
    tensors: Mapping[str, Tensor]
    configs: Mapping[str, Config]
    tokenizer_from: Path | Literal["hub"] | None
    loras: tuple[AppliedLora, ...] = ()
    clip_skip: int = 1
    embeddings: tuple[Embedding, ...] = ()
    cfg_rescale: float = 0.0

    @property
    def of(self) -> Family:
        """What the family implies."""
        return FAMILIES[self.family]

    @cached_property
    def sha256(self) -> str:
        """Of the whole file; of a folder, of its UNet files in name order."""
        return sha256_of(self.path)

    @cached_property
    def schedule(self) -> NoiseSchedule:
        schedule = NoiseSchedule.scaled_linear()
        return schedule.zero_terminal_snr() if self.ztsnr else schedule

    @property
    def scaling_factor(self) -> float:
        """x0 = scaling_factor * encode(image)."""
        return float(self.config("vae")["scaling_factor"])

    @property
    def downscale(self) -> int:
        """Pixels of a picture for one of its latent, along each side."""
        return 2 ** (len(self.config("vae")["block_out_channels"]) - 1)

    @property
    def unet_parameters(self) -> int:
        return sum(value.numel() for key, value in self.tensors.items() if key.startswith(UNET_PREFIX))

    @property
    def latent_channels(self) -> int:
        return int(self.config("vae")["latent_channels"])

    @property
    def room(self) -> int:
        """Tokens in a chunk of a prompt, without its start and end mark: 75 in CLIP."""
        return int(self.config("text_encoder")["max_position_embeddings"]) - 2

    @property
    def conditioned(self) -> bool:
        """Whether the UNet has the guidance input."""
        return COND_PROJ in self.tensors

    def config(self, part: Part) -> dict[str, Any]:
        """Constructor arguments of a part's network (``unet``, ``vae``, ``text_encoder``, ...)."""
        return config_of(part, self.tensors, self.configs, self.of)

    def unet(
        self,
        *,
        dtype: torch.dtype | None = torch.float32,
        conditioned: bool = False,
        exact: str | None = None,
    ) -> UNet2DConditionModel:
        """A copy of the UNet, to evaluate; ``conditioned`` adds a zero guidance input where there is none;
        what begins with ``exact`` stays in float32. With dtype None the weights are the file's, uncopied.

        With the zero input the untrained student equals the teacher bit for bit. Raises BadInput for NaN.
        """
        tensors = dict(self.tensors)
        if conditioned and not self.conditioned:
            width = tensors[UNET_PREFIX + "input_blocks.0.0.weight"].shape[0]
            tensors[COND_PROJ] = torch.zeros(width, W_DIM)
        network = build("unet", config_of("unet", tensors, self.configs, self.of))
        state = unet_from_ldm(self._known("unet", network, tensors))
        return self._filled("unet", network, state, dtype, exact)

    def vae(self, dtype: torch.dtype = torch.float32) -> AutoencoderKL:
        """A copy of the VAE in evaluation mode; BadInput for NaN."""
        network = build("vae", self.config("vae"))
        return self._filled("vae", network, vae_from_ldm(self._known("vae", network, self.tensors)), dtype)

    def vae_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype to run the VAE in beside a UNet in ``dtype``: SDXL's overflows in float16."""
        return torch.float32 if self.of.vae_overflows and dtype == torch.float16 else dtype

    def text_encoder(
        self, dtype: torch.dtype = torch.float32, *, part: TextPart = "text_encoder"
    ) -> CLIPTextModel | CLIPTextModelWithProjection:
        """A copy of a text encoder in evaluation mode; BadInput for NaN."""
        network = build(part, self.config(part), self.of)
        keys = {key.removeprefix("text_model.") for key in network.state_dict()}
        found = text_from_ldm(self.tensors, self.of.encoder(part))
        state = {key: value for key, value in found.items() if key in keys}
        if any(key.startswith("text_model.") for key in network.state_dict()):
            state = {key if key == PROJECTION else f"text_model.{key}": v for key, v in state.items()}
        return self._filled(part, network, state, dtype)

    def tokenizer(self, part: TextPart = "text_encoder") -> CLIPTokenizer:
        """A text encoder's vocabulary, found as vocabulary.py says; BadInput if none is, or not of its
        size."""
        config, folder = self.config(part), self.of.encoder(part).tokenizer
        length = config["max_position_embeddings"]
        tokenizer = load_tokenizer(self.tokenizer_from, beside=self.path, length=length, folder=folder)
        if len(tokenizer) != config["vocab_size"]:
            raise BadInput(
                f"{self.path}: the text encoder knows {config['vocab_size']} tokens and the tokenizer has "
                f"{len(tokenizer)}; give the one that belongs to it as --tokenizer"
            )
        return tokenizer

    def carried(self) -> dict[str, Tensor]:
        """VAE and text encoders under single-file keys: what a student's file takes over unchanged."""
        kept = (VAE_PREFIX, "cond_stage_model.", "conditioner.")
        return {
            key: value
            for key, value in self.tensors.items()
            if key.startswith(kept) and not key.startswith(VAE_PREFIX + "loss.")
        }

    def empty_networks(self) -> dict[Part, Any]:
        """The networks on the meta device: configurations and shapes without weights."""
        return {part: build(part, self.config(part), self.of) for part in self.of.prefixes}

    def network_tensors(self) -> dict[str, Tensor]:
        """What the networks use, under single-file keys, memory-mapped."""
        return {
            key: self.tensors[key]
            for part, network in self.empty_networks().items()
            for key in expected_keys(part, network, self.of)
        }

    def carried_sha256(self) -> str:
        """Of what :meth:`carried` holds: tells one replaced VAE or text encoder from another."""
        return _sha256_by_key(self.carried())

    def vae_sha256(self) -> str:
        """Of the VAE's tensors, whatever the rest of the file is."""
        return _sha256_by_key({k: v for k, v in self.tensors.items() if k.startswith(VAE_PREFIX)})

    def _known(
        self, part: Part, network: torch.nn.Module, tensors: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        return {key: tensors[key] for key in expected_keys(part, network, self.of)}

    def _filled(
        self,
        part: Part,
        network: Any,
        state: Mapping[str, Tensor],
        dtype: torch.dtype | None,
        exact: str | None = None,
    ) -> Any:
        for key, value in state.items():
            if not is_finite(value):
                raise BadInput(
                    f"{self.path}: the weights of the {part} are damaged ({key} holds NaN or infinity)"
                )
        filled = dict(state)
        if dtype is not None:
            for key, value in state.items():
                exactly = exact is not None and key.startswith(exact)
                filled[key] = value.to(torch.float32 if exactly else dtype, copy=True)
        network.load_state_dict(filled, strict=False, assign=True)
        for module in network.modules():
            if isinstance(getattr(module, "position_ids", None), Tensor):
                module.position_ids = torch.arange(module.position_ids.shape[-1])[None]
        return network.requires_grad_(True)


def open_checkpoint(
    path: Path | str,
    *,
    tokenizer: Path | str | None = None,
    text_encoder: Path | str | None = None,
    text_encoder_2: Path | str | None = None,
    vae: Path | str | None = None,
    override: Override | None = None,
) -> Checkpoint:
    """Open a single file (.safetensors, .ckpt) or a diffusers folder.

    ``text_encoder``, ``text_encoder_2`` and ``vae``, files or folders, stand in for those that the checkpoint
    has or lacks; ``tokenizer`` is a folder, or "hub" to allow a download. Raises BadInput for everything that
    cannot be used.
    """
    override = override or Override()
    path = Path(path)
    weights = _read(path)
    found = recognise(weights.tensors)
    if found.container not in ("checkpoint", "unet"):
        article = "an" if found.container[0] in "ae" else "a"
        what = (
            "no Stable Diffusion weights" if found.container == "unknown" else f"{article} {found.container}"
        )
        raise BadInput(f"{path}: this is {what}, and a Stable Diffusion checkpoint was expected")
    if found.family is None or found.family not in FAMILIES:
        name, why = NAMES[found.family or ""], REFUSED.get(found.family or "", "")
        known = ", ".join(family.name for family in FAMILIES.values())
        raise BadInput(
            f"{path}: this is a {name} checkpoint, which cannot be opened"
            + (f" ({why})" if why else f"; those of {known} can")
        )
    spec = spec_from(weights.metadata, weights.tensors, path)
    family = FAMILIES[override.family or _family_of_student(path, spec) or found.family]
    tensors, configs = dict(found.tensors), dict(weights.configs)
    given = {"text_encoder": text_encoder, "text_encoder_2": text_encoder_2, "vae": vae}
    for part in family.prefixes:
        _replace_part(tensors, configs, part, family, given.get(part))
    channels = _input_channels(path, tensors)
    _check_schedule(path, configs.get("scheduler", {}))
    _check_parts(path, tensors, configs, family)
    prediction_type = override.prediction_type or prediction_type_of(weights, spec, found)
    return Checkpoint(
        path=path,
        name=path.resolve().name if path.is_dir() else path.stem,
        kind="teacher" if spec is None and COND_PROJ not in tensors else _student_kind(spec),
        family=family.key,
        inpaint=channels == 9,
        prediction_type=prediction_type,
        ztsnr=ztsnr_of(weights, spec) if override.ztsnr is None else override.ztsnr,
        spec=spec,
        resolution=resolution_of(weights.metadata, resolution_for(family, prediction_type)),
        tensors=tensors,
        configs=configs,
        clip_skip=1 if spec is None else spec.clip_skip,
        tokenizer_from=None if tokenizer is None else "hub" if str(tokenizer) == "hub" else Path(tokenizer),
    )


def _sha256_by_key(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for key, value in sorted(tensors.items()):
        digest.update(key.encode())
        digest.update(tensor_bytes(value))
    return digest.hexdigest()


def save_student(
    path: Path,
    *,
    unet_state: Mapping[str, Tensor],
    spec: StudentSpec,
    source: Checkpoint,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write a student as one single file: its UNet and what its source carries; atomic, reproducible. Answers
    where it is (:func:`..runtime.files.free_path`).

    ``unet_state``: diffusers' keys, with ``time_embedding.cond_proj.weight`` if the student has a dial.
    ``dtype`` is the UNet's in the file (default: as it comes); the rest is taken over unchanged.
    """
    tensors = unet_to_ldm({key: value.detach().to(dtype or value.dtype) for key, value in unet_state.items()})
    return write_checkpoint(path, tensors=tensors | source.carried(), spec=spec, resolution=source.resolution)


def write_checkpoint(
    path: Path,
    *,
    tensors: Mapping[str, Tensor],
    spec: StudentSpec,
    resolution: tuple[int, int],
    more: Mapping[str, str] | None = None,
) -> Path:
    """Write a student's tensors, under single-file keys, with the markers and metadata of its spec, and
    ``more``."""
    plain = {key: value for key, value in tensors.items() if key not in (V_PRED, ZTSNR)}
    marked = plain | {key: torch.zeros(0) for key in markers_of(spec)}
    return save_tensors(marked, student_metadata(spec, resolution) | described(marked, more), path)


def described(tensors: Mapping[str, Tensor], more: Mapping[str, str] | None) -> dict[str, str]:
    """``more`` metadata of a file that is shared, and the hash of its tensors, which takes a while."""
    return {} if more is None else {**more, "modelspec.hash_sha256": "0x" + sha256_of_tensors(tensors)}


def markers_of(spec: StudentSpec) -> tuple[str, ...]:
    """The empty tensors by which hosts know what a checkpoint predicts and where its schedule ends."""
    wanted = {V_PRED: spec.prediction_type == "v_prediction", ZTSNR: spec.ztsnr}
    return tuple(key for key, is_wanted in wanted.items() if is_wanted)


def student_metadata(spec: StudentSpec, resolution: tuple[int, int]) -> dict[str, str]:
    """``fewstep.spec`` and ``modelspec.*`` of a student's file."""
    steps = "1 step" if spec.steps == 1 else f"{spec.steps} steps"
    known = FAMILIES.get(spec.family)
    suffix = ("-inpainting" if spec.inpaint else "") + ("/lora" if spec.container == "lora" else "")
    described = modelspec(
        title=f"{spec.teacher_name}, FewStep, {steps}",
        architecture=(known.architecture if known else spec.family) + suffix,
        prediction_type=spec.prediction_type,
        resolution=resolution,
    )
    return {SPEC_KEY: spec.to_json(), **described}


def prediction_type_of(weights: Weights, spec: StudentSpec | None, found: Recognised) -> PredictionType:
    """What the network predicts, by its spec, marker key, modelspec, A1111's .yaml, a folder's scheduler, or
    in Stable Diffusion 2 a statistic."""
    if spec is not None:
        return spec.prediction_type
    scheduler = weights.configs.get("scheduler", {})
    said = str(scheduler.get("prediction_type", "epsilon"))
    if said not in PREDICTION_TYPES:
        raise BadInput(
            f"{weights.path}: the scheduler's prediction_type {said!r} is none of {PREDICTION_TYPES}"
        )
    modelspec_says = weights.metadata.get("modelspec.prediction_type")
    if V_PRED in weights.tensors or modelspec_says in ("v", "v_prediction"):
        return "v_prediction"
    yaml = weights.path.with_suffix(".yaml")
    if yaml.is_file():
        return _said_by_yaml((data := yaml.read_bytes()).decode(encoding_of(data), errors="replace"))
    if scheduler or modelspec_says or found.family != "sd2" or _TELLING not in found.tensors:
        return said
    guess = seen_by_comfyui(found.tensors, "sd2")
    other = "epsilon" if guess == "v_prediction" else "v_prediction"
    log.info(
        "%s: nothing in it says what it predicts; taken for %s, as a statistic of its weights suggests "
        "(if pictures are noise: --override prediction_type=%s)",
        weights.path.name,
        guess,
        other,
    )
    return guess


def seen_by_comfyui(tensors: Mapping[str, Tensor], family: str) -> PredictionType:
    """What a stock ComfyUI takes a checkpoint for: it reads the key ``v_pred`` of SDXL alone, and judges
    Stable Diffusion 2 by a statistic of a weight."""
    if family == "sdxl":
        return "v_prediction" if V_PRED in tensors else "epsilon"
    is_plain = tensors[UNET_PREFIX + "input_blocks.0.0.weight"].shape[1] == 4
    if family != "sd2" or _TELLING not in tensors or not is_plain:
        return "epsilon"
    return "v_prediction" if float(tensors[_TELLING].float().std(correction=0)) > 0.09 else "epsilon"


def _said_by_yaml(text: str) -> PredictionType:
    return "v_prediction" if re.search(r"""parameterization:\s*["']?v["']?\s*$""", text, re.M) else "epsilon"


def ztsnr_of(weights: Weights, spec: StudentSpec | None) -> bool:
    """Whether the schedule ends at zero signal: the spec's word, the marker key, a folder's scheduler's."""
    if spec is not None:
        return spec.ztsnr
    return ZTSNR in weights.tensors or bool(
        weights.configs.get("scheduler", {}).get("rescale_betas_zero_snr")
    )


def _read(path: Path) -> Weights:
    return read_folder(path) if path.is_dir() else read_weights(path)


def _replace_part(
    tensors: dict[str, Tensor],
    configs: dict[str, Config],
    part: Part,
    family: Family,
    given: Path | str | None,
) -> None:
    """Put a part from a file or a folder of its own in place of the checkpoint's."""
    if given is None:
        return
    weights, prefix = read_weights(Path(given)), family.prefixes[part]
    if part == "vae":
        ldm = recognise(weights.tensors).tensors
        found = {key: value for key, value in ldm.items() if key.startswith(prefix)}
    else:
        found = text_state(weights.tensors, family.encoder(part))
    if not found:
        raise BadInput(
            f"{given}: a Stable Diffusion {part.replace('_', ' ')} was expected, and this file holds none"
        )
    for key in [key for key in tensors if key.startswith(prefix)]:
        del tensors[key]
    tensors |= found
    configs[part] = weights.configs.get("config", {})


def _input_channels(path: Path, tensors: Mapping[str, Tensor]) -> int:
    key = UNET_PREFIX + "input_blocks.0.0.weight"
    if key not in tensors or tensors[key].ndim != 4:
        raise BadInput(f"{path}: the key {key} is missing or misshapen, so this is no complete checkpoint")
    channels = tensors[key].shape[1]
    if channels not in (4, 9):
        purpose = INPUTS.get(channels) or "unknown"
        raise BadInput(
            f"{path}: this UNet takes {channels} channels ({purpose} model); ordinary (4) and inpainting (9) "
            "checkpoints can be opened"
        )
    return channels


def _check_schedule(path: Path, said: Config) -> None:
    """BadInput for a folder whose scheduler has another noise schedule than Stable Diffusion's."""
    ours = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    for name, value in {**ours, "num_train_timesteps": 1000, "trained_betas": None}.items():
        if said.get(name, value) != value:
            raise BadInput(
                f"{path}: the scheduler's {name} is {said[name]}, and Stable Diffusion's {value} was expected"
            )


def _check_parts(
    path: Path, tensors: Mapping[str, Tensor], configs: Mapping[str, Config], family: Family
) -> None:
    """BadInput for a part that is not there, missing keys and wrong shapes; extra keys are only mentioned."""
    if any(key.endswith((".scale_weight", ".weight_scale", "scaled_fp8")) for key in tensors):
        raise BadInput(
            f"{path}: its weights are scaled float8, which cannot be read; get it as fp16 or plain fp8"
        )
    if any(
        re.search(r"\.(quant_state\.|absmax$|nested_absmax$|SCB$|qweight$|qzeros$)", key) for key in tensors
    ):
        raise BadInput(
            f"{path}: its weights are quantised, which cannot be read; get it as fp16 or plain fp8"
        )
    for part, prefix in family.prefixes.items():
        if not any(key.startswith(prefix) for key in tensors):
            flag, name = "--" + part.replace("_", "-"), part.replace("_", " ")
            raise BadInput(f"{path}: this file has no {name}; give the file or folder of one with {flag}")
    try:
        wrong = problems(tensors, configs, family=family, parts=tuple(family.prefixes))
    except BadInput as error:
        raise BadInput(f"{path}: {error}") from None
    for first in wrong.missing[:1]:
        others = f" (and {len(wrong.missing) - 1} others)"
        raise BadInput(f"{path}: the key {first}{others} is missing, so this is no complete checkpoint")
    if wrong.misshapen:
        raise BadInput(f"{path}: {wrong.misshapen[0]}")
    if wrong.extra:
        log.info("%s: %d keys are unknown and not used (%s ...)", path.name, len(wrong.extra), wrong.extra[0])


def _student_kind(spec: StudentSpec | None) -> Literal["student", "baked"]:
    return "baked" if spec is not None and spec.baked_guidance is not None else "student"


def _family_of_student(path: Path, spec: StudentSpec | None) -> FamilyName | None:
    if spec is None:
        return None
    if spec.family == "pixel":
        raise BadInput(f"{path}: this student is of the family {spec.family}, which cannot be opened")
    return spec.family


def resolution_of(metadata: Mapping[str, str], usual: tuple[int, int]) -> tuple[int, int]:
    """(width, height) in pixels that a file's metadata gives, else the family's usual."""
    match = re.fullmatch(r"(\d+)x(\d+)", metadata.get("modelspec.resolution", ""))
    return (int(match[1]), int(match[2])) if match else usual


def is_finite(value: Tensor) -> bool:
    """Whether a tensor is free of NaN and infinity."""
    if not value.is_floating_point():
        return True
    return bool(torch.isfinite(value.float() if value.element_size() == 1 else value).all())
