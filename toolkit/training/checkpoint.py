"""Checkpoints: opening any Stable Diffusion 1 file or folder, and writing students beside them.

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
from typing import Any, Literal

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from ..diffusion.errors import BadInput
from ..diffusion.guidance import W_DIM
from ..diffusion.prediction import PREDICTION_TYPES, PredictionType
from ..diffusion.schedule import NoiseSchedule
from ..diffusion.spec import SPEC_KEY, StudentSpec
from ..runtime.files import modelspec, save_tensors, sha256_of, spec_from, tensor_bytes
from .layout import (
    COND_PROJ,
    UNET_PREFIX,
    VAE_PREFIX,
    text_from_ldm,
    unet_from_ldm,
    unet_to_ldm,
    vae_from_ldm,
)
from .recognise import FAMILIES, INPUTS, PREFIXES, Part, build, config_of, expected_keys, problems, recognise
from .vocabulary import load_tokenizer
from .weights import Config, Weights, read_folder, read_weights

log = logging.getLogger("fewstep")

V_PRED = "v_pred"
"""An empty tensor by which hosts know a v-prediction checkpoint."""

ZTSNR = "ztsnr"
NATIVE_RESOLUTION = (512, 512)


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """``tensors``: memory-mapped, under single-file keys; ``configs``: what a folder's own JSON says.

    ``resolution``: (width, height) in pixels that the file says it was trained for, else the family's.
    """

    path: Path
    name: str
    kind: Literal["teacher", "student", "baked"]
    family: Literal["sd1"]
    inpaint: bool
    prediction_type: PredictionType
    ztsnr: bool
    spec: StudentSpec | None
    resolution: tuple[int, int]
    tensors: Mapping[str, Tensor]
    configs: Mapping[str, Config]
    tokenizer_from: Path | Literal["hub"] | None

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
    def conditioned(self) -> bool:
        """Whether the UNet has the guidance input."""
        return COND_PROJ in self.tensors

    def config(self, part: Part) -> dict[str, Any]:
        """Constructor arguments of a part's network (``unet``, ``vae``, ``text_encoder``)."""
        return config_of(part, self.tensors, self.configs)

    def unet(self, *, dtype: torch.dtype = torch.float32, conditioned: bool = False) -> UNet2DConditionModel:
        """A copy of the UNet, to evaluate; ``conditioned`` adds a zero guidance input where there is none.

        With the zero input the untrained student equals the teacher bit for bit. Raises BadInput for NaN.
        """
        tensors = dict(self.tensors)
        if conditioned and not self.conditioned:
            width = tensors[UNET_PREFIX + "input_blocks.0.0.weight"].shape[0]
            tensors[COND_PROJ] = torch.zeros(width, W_DIM)
        network = build("unet", config_of("unet", tensors, self.configs))
        return self._filled("unet", network, unet_from_ldm(self._known("unet", network, tensors)), dtype)

    def vae(self, dtype: torch.dtype = torch.float32) -> AutoencoderKL:
        """A copy of the VAE in evaluation mode; BadInput for NaN."""
        network = build("vae", self.config("vae"))
        return self._filled("vae", network, vae_from_ldm(self._known("vae", network, self.tensors)), dtype)

    def text_encoder(self, dtype: torch.dtype = torch.float32) -> CLIPTextModel:
        """A copy of the text encoder in evaluation mode; BadInput for NaN."""
        network = build("text_encoder", self.config("text_encoder"))
        state = text_from_ldm(self._known("text_encoder", network, self.tensors))
        if any(key.startswith("text_model.") for key in network.state_dict()):
            state = {f"text_model.{key}": value for key, value in state.items()}
        return self._filled("text_encoder", network, state, dtype)

    def tokenizer(self) -> CLIPTokenizer:
        """The vocabulary, found as vocabulary.py says; BadInput if none is, or not of the encoder's size."""
        config = self.config("text_encoder")
        length = config["max_position_embeddings"]
        tokenizer = load_tokenizer(self.tokenizer_from, beside=self.path, length=length)
        if len(tokenizer) != config["vocab_size"]:
            raise BadInput(
                f"{self.path}: the text encoder knows {config['vocab_size']} tokens and the tokenizer has "
                f"{len(tokenizer)}; give the one that belongs to it as --tokenizer"
            )
        return tokenizer

    def carried(self) -> dict[str, Tensor]:
        """VAE and text encoder under single-file keys: what a student's file takes over unchanged."""
        return {
            key: value
            for key, value in self.tensors.items()
            if key.startswith((VAE_PREFIX, "cond_stage_model.")) and not key.startswith(VAE_PREFIX + "loss.")
        }

    def empty_networks(self) -> dict[Part, Any]:
        """The three networks on the meta device: configurations and shapes without weights."""
        return {part: build(part, self.config(part)) for part in PREFIXES}

    def network_tensors(self) -> dict[str, Tensor]:
        """What the three networks use, under single-file keys, memory-mapped."""
        return {
            key: self.tensors[key]
            for part, network in self.empty_networks().items()
            for key in expected_keys(part, network)
        }

    def carried_sha256(self) -> str:
        """Of what :meth:`carried` holds: tells one replaced VAE or text encoder from another."""
        digest = hashlib.sha256()
        for key, value in sorted(self.carried().items()):
            digest.update(key.encode())
            digest.update(tensor_bytes(value))
        return digest.hexdigest()

    def _known(
        self, part: Part, network: torch.nn.Module, tensors: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        return {key: tensors[key] for key in expected_keys(part, network)}

    def _filled(self, part: Part, network: Any, state: Mapping[str, Tensor], dtype: torch.dtype) -> Any:
        for key, value in state.items():
            if not is_finite(value):
                raise BadInput(
                    f"{self.path}: the weights of the {part} are damaged ({key} holds NaN or infinity)"
                )
        filled = {key: value.to(dtype, copy=True) for key, value in state.items()}
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
    vae: Path | str | None = None,
) -> Checkpoint:
    """Open a single file (.safetensors, .ckpt) or a diffusers folder of the family Stable Diffusion 1.

    ``text_encoder`` and ``vae``, files or folders, stand in for those that the checkpoint has or lacks;
    ``tokenizer`` is a folder, or "hub" to allow a download. Raises BadInput for everything that cannot be
    used.
    """
    path = Path(path)
    weights = _read(path)
    found = recognise(weights.tensors)
    if found.container not in ("checkpoint", "unet"):
        article = "an" if found.container[0] in "ae" else "a"
        what = (
            "no Stable Diffusion weights" if found.container == "unknown" else f"{article} {found.container}"
        )
        raise BadInput(f"{path}: this is {what}, and a Stable Diffusion checkpoint was expected")
    if found.family != "sd1":
        family = FAMILIES[found.family or ""]
        raise BadInput(f"{path}: this is a {family} checkpoint; only Stable Diffusion 1 can be opened so far")
    tensors, configs = dict(found.tensors), dict(weights.configs)
    _replace_part(tensors, configs, "text_encoder", text_encoder)
    _replace_part(tensors, configs, "vae", vae)
    channels = _input_channels(path, tensors)
    _check_schedule(path, configs.get("scheduler", {}))
    _check_parts(path, tensors, configs)
    spec = spec_from(weights.metadata, weights.tensors, path)
    return Checkpoint(
        path=path,
        name=path.resolve().name if path.is_dir() else path.stem,
        kind="teacher" if spec is None and COND_PROJ not in tensors else _student_kind(path, spec),
        family="sd1",
        inpaint=channels == 9,
        prediction_type=prediction_type_of(weights, spec),
        ztsnr=ztsnr_of(weights, spec),
        spec=spec,
        resolution=resolution_of(weights.metadata),
        tensors=tensors,
        configs=configs,
        tokenizer_from=None if tokenizer is None else "hub" if str(tokenizer) == "hub" else Path(tokenizer),
    )


def save_student(
    path: Path,
    *,
    unet_state: Mapping[str, Tensor],
    spec: StudentSpec,
    source: Checkpoint,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a student as one single file: its UNet and what its source carries; atomic, reproducible.

    ``unet_state``: diffusers' keys, with ``time_embedding.cond_proj.weight`` if the student has a dial.
    ``dtype`` is the UNet's in the file (default: as it comes); the rest is taken over unchanged.
    """
    tensors = unet_to_ldm({key: value.detach().to(dtype or value.dtype) for key, value in unet_state.items()})
    write_checkpoint(path, tensors=tensors | source.carried(), spec=spec, resolution=source.resolution)


def write_checkpoint(
    path: Path, *, tensors: Mapping[str, Tensor], spec: StudentSpec, resolution: tuple[int, int]
) -> None:
    """Write a student's tensors, under single-file keys, with the markers and metadata of its spec."""
    plain = {key: value for key, value in tensors.items() if key not in (V_PRED, ZTSNR)}
    save_tensors(
        plain | {key: torch.zeros(0) for key in markers_of(spec)}, student_metadata(spec, resolution), path
    )


def markers_of(spec: StudentSpec) -> tuple[str, ...]:
    """The empty tensors by which hosts know what a checkpoint predicts and where its schedule ends."""
    wanted = {V_PRED: spec.prediction_type == "v_prediction", ZTSNR: spec.ztsnr}
    return tuple(key for key, is_wanted in wanted.items() if is_wanted)


def student_metadata(spec: StudentSpec, resolution: tuple[int, int]) -> dict[str, str]:
    """``fewstep.spec`` and ``modelspec.*`` of a student's file."""
    steps = "1 step" if spec.steps == 1 else f"{spec.steps} steps"
    architecture = {
        "sd1": "stable-diffusion-v1",
        "sd2": "stable-diffusion-v2",
        "sdxl": "stable-diffusion-xl-v1-base",
    }
    suffix = ("-inpainting" if spec.inpaint else "") + ("/lora" if spec.container == "lora" else "")
    described = modelspec(
        title=f"{spec.teacher_name}, FewStep, {steps}",
        architecture=architecture.get(spec.family, spec.family) + suffix,
        prediction_type=spec.prediction_type,
        resolution=resolution,
    )
    return {SPEC_KEY: spec.to_json(), **described}


def prediction_type_of(weights: Weights, spec: StudentSpec | None) -> PredictionType:
    """What the network predicts, by its spec, marker key, modelspec, A1111's .yaml or the scheduler."""
    said = str(weights.configs.get("scheduler", {}).get("prediction_type", "epsilon"))
    if spec is not None:
        return spec.prediction_type
    if said not in PREDICTION_TYPES:
        raise BadInput(
            f"{weights.path}: the scheduler's prediction_type {said!r} is none of {PREDICTION_TYPES}"
        )
    if V_PRED in weights.tensors or weights.metadata.get("modelspec.prediction_type") in (
        "v",
        "v_prediction",
    ):
        return "v_prediction"
    yaml = weights.path.with_suffix(".yaml")
    if yaml.is_file() and re.search(
        r"""parameterization:\s*["']?v["']?\s*$""", yaml.read_text("utf-8-sig"), re.M
    ):
        return "v_prediction"
    return said


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
    tensors: dict[str, Tensor], configs: dict[str, Config], part: Part, given: Path | str | None
) -> None:
    """Put a part from a file or a folder of its own in place of the checkpoint's."""
    if given is None:
        return
    weights = read_weights(Path(given))
    found = {
        key: value
        for key, value in recognise(weights.tensors).tensors.items()
        if key.startswith(PREFIXES[part])
    }
    if not found:
        raise BadInput(
            f"{given}: a Stable Diffusion {part.replace('_', ' ')} was expected, and this file holds none"
        )
    for key in [key for key in tensors if key.startswith(PREFIXES[part])]:
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


def _check_parts(path: Path, tensors: Mapping[str, Tensor], configs: Mapping[str, Config]) -> None:
    """BadInput for a part that is not there, missing keys and wrong shapes; extra keys are only mentioned."""
    for part, prefix in PREFIXES.items():
        if not any(key.startswith(prefix) for key in tensors):
            flag, name = "--" + part.replace("_", "-"), part.replace("_", " ")
            raise BadInput(f"{path}: this file has no {name}; give the file or folder of one with {flag}")
    try:
        wrong = problems(tensors, configs, parts=tuple(PREFIXES))
    except BadInput as error:
        raise BadInput(f"{path}: {error}") from None
    for first in wrong.missing[:1]:
        others = f" (and {len(wrong.missing) - 1} others)"
        raise BadInput(f"{path}: the key {first}{others} is missing, so this is no complete checkpoint")
    if wrong.misshapen:
        raise BadInput(f"{path}: {wrong.misshapen[0]}")
    if wrong.extra:
        log.info("%s: %d keys are unknown and not used (%s ...)", path.name, len(wrong.extra), wrong.extra[0])


def _student_kind(path: Path, spec: StudentSpec | None) -> Literal["student", "baked"]:
    if spec is not None and spec.family != "sd1":
        raise BadInput(f"{path}: this student is of the family {spec.family}; only sd1 can be opened so far")
    return "baked" if spec is not None and spec.baked_guidance is not None else "student"


def resolution_of(metadata: Mapping[str, str]) -> tuple[int, int]:
    """(width, height) in pixels that a file's metadata gives, else the family's."""
    match = re.fullmatch(r"(\d+)x(\d+)", metadata.get("modelspec.resolution", ""))
    return (int(match[1]), int(match[2])) if match else NATIVE_RESOLUTION


def is_finite(value: Tensor) -> bool:
    """Whether a tensor is free of NaN and infinity."""
    if not value.is_floating_point():
        return True
    return bool(torch.isfinite(value.float() if value.element_size() == 1 else value).all())
