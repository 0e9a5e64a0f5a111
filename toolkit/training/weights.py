"""Reading weights: a safetensors file, a pickle without code, or a diffusers folder, all as named tensors.

Nothing is copied into memory here (safetensors and today's pickles are memory-mapped) but an OpenCLIP text
encoder from a diffusers folder, whose single-file form joins some of its matrices.
"""

from __future__ import annotations

import contextlib
import json
import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from ..diffusion.errors import BadInput
from ..runtime.files import check_file, load_tensors, read_header
from .families import FAMILIES, SD1, Family
from .layout import text_to_ldm, unet_to_ldm, vae_to_ldm, with_unused_layers

Config = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Weights:
    """``tensors`` with the file's own keys; ``configs``: what a folder's JSON files say, by part."""

    path: Path
    tensors: dict[str, Tensor]
    metadata: dict[str, str] = field(default_factory=dict[str, str])
    configs: dict[str, Config] = field(default_factory=dict[str, Config])


class _LightningCallback:
    """Stands for a class that PyTorch Lightning names in its checkpoints; it is never called."""


_HARMLESS: list[Any] = [(_LightningCallback, "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint")]
_TENSOR_FILES = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt")


def read_weights(path: Path) -> Weights:
    """A file of weights, or a folder of one network (with config.json); BadInput for anything else."""
    if path.is_dir():
        return Weights(path, _folder_tensors(path), configs={"config": read_json(path / "config.json")})
    check_file(path)
    if path.suffix.lower() in (".ckpt", ".pt", ".pth", ".bin"):
        return Weights(path, _pickled_tensors(path))
    return Weights(path, load_tensors(path), read_header(path).metadata)


def read_folder(path: Path) -> Weights:
    """A diffusers folder's UNet, and its VAE and text encoders where it has them, under single-file keys."""
    if not (path / "unet").is_dir():
        raise BadInput(f"{path}: a diffusers folder with unet/ in it, or a checkpoint file, was expected")
    unet = read_weights(path / "unet")
    refuse_foreign_unet(unet)
    tensors = unet_to_ldm(unet.tensors)
    configs: dict[str, Config] = {"unet": unet.configs["config"]}
    if (path / "vae").is_dir():
        vae = read_weights(path / "vae")
        tensors |= vae_to_ldm(_todays_vae_names(vae.tensors))
        configs["vae"] = vae.configs["config"]
    for encoder in _family_of(unet.tensors).text_encoders:
        if (path / encoder.part).is_dir():
            text = read_weights(path / encoder.part)
            bare = {
                k.removeprefix("text_model."): v for k, v in text.tensors.items() if "position_ids" not in k
            }
            tensors |= text_to_ldm(with_unused_layers(bare, encoder), encoder)
            configs[encoder.part] = text.configs["config"]
    configs["scheduler"] = read_json(path / "scheduler" / "scheduler_config.json")
    metadata = next(
        (read_header(file).metadata for file in _weight_files(path / "unet", "*.safetensors")), {}
    )
    return Weights(path, tensors, metadata, configs)


def read_json(path: Path) -> Config:
    """A JSON object; empty if there is no such file."""
    if not path.exists():
        return {}
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise BadInput(f"{path}: this JSON file cannot be read ({error})") from None
    if not isinstance(found, dict):
        raise BadInput(f"{path}: a JSON object was expected")
    return cast(Config, found)


def refuse_foreign_unet(weights: Weights) -> None:
    """BadInput for what is no UNet of Stable Diffusion's, before its keys are translated."""
    keys = weights.tensors
    for key, family in (
        ("class_embedding.weight", "an upscaler's UNet"),
        ("class_embedding.linear_1.weight", "an unCLIP UNet"),
        ("transformer_blocks.0.attn.to_q.weight", "a transformer (SD3, Flux or PixArt)"),
        ("controlnet_cond_embedding.conv_in.weight", "a ControlNet"),
    ):
        if key in keys:
            raise BadInput(
                f"{weights.path}: this is {family}, and one of Stable Diffusion or SDXL was expected"
            )
    if "conv_in.weight" not in keys or "time_embedding.linear_1.weight" not in keys:
        raise BadInput(f"{weights.path}: these weights are no Stable Diffusion UNet")


def _family_of(unet: Mapping[str, Tensor]) -> Family:
    """Of a UNet with diffusers' keys; which text encoders to look for."""
    if "add_embedding.linear_1.weight" in unet:
        return FAMILIES["sdxl"]
    linear = (value.ndim == 2 for key, value in unet.items() if key.endswith(".proj_in.weight"))
    context = (value.shape[1] for key, value in unet.items() if key.endswith(".attn2.to_k.weight"))
    return FAMILIES["sd2"] if next(linear, False) or next(context, 0) == 1024 else SD1


def _folder_tensors(path: Path) -> dict[str, Tensor]:
    for pattern in _TENSOR_FILES:
        if files := _weight_files(path, pattern):
            tensors: dict[str, Tensor] = {}
            for file in files:
                tensors |= read_weights(file).tensors
            return tensors
    raise BadInput(f"{path}: this folder holds no weights (*.safetensors or *.bin)")


def _weight_files(path: Path, pattern: str) -> list[Path]:
    """The files of one set of weights, all its shards: the plain one rather than a variant (fp16, non_ema);
    BadInput if shards are missing."""
    sets: dict[str, list[Path]] = {}
    for file in sorted(path.glob(pattern)):
        sets.setdefault(re.sub(_SHARD, "", file.name), []).append(file)
    if not sets:
        return []
    files = sets[min(sets, key=lambda name: (name.count("."), name))]
    if (match := re.search(_SHARD, files[0].name)) and len(files) != int(match[1]):
        raise BadInput(f"{path}: {len(files)} of the {int(match[1])} shards are here; download the others")
    return files


_SHARD = r"-\d{5}-of-(\d{5})"


def _pickled_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a .ckpt or .bin, unwrapped from training state; code in the pickle is refused, never run."""
    try:
        with _harmless_classes():
            found: Any = torch.load(
                path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
            )
    except pickle.UnpicklingError as error:
        if match := re.search(r"GLOBAL (\S+)", str(error)):
            raise BadInput(
                f"{path}: this pickle wants to run code ({match[1].rstrip('.,')}), which is refused; "
                "get the checkpoint as .safetensors"
            ) from None
        raise BadInput(
            f"{path}: this pickle cannot be read without running code from it, which is refused; get the "
            "checkpoint as .safetensors"
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError, AttributeError, TypeError):
        raise BadInput(f"{path}: the file is truncated or no checkpoint; download it again") from None
    while isinstance(found, dict) and isinstance(cast(dict[str, Any], found).get("state_dict"), dict):
        found = cast(dict[str, Any], found)["state_dict"]
    if not isinstance(found, dict):
        raise BadInput(f"{path}: this pickle holds no named tensors, so it is no checkpoint")
    values = cast(dict[Any, Any], found)
    return {str(key): value for key, value in values.items() if isinstance(value, Tensor)}


def _harmless_classes() -> contextlib.AbstractContextManager[None]:
    """Allows the names in pickles that are never called; torch before 2.6 cannot, and refuses such files."""
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 6):
        return contextlib.nullcontext()
    return torch.serialization.safe_globals(_HARMLESS)


def _todays_vae_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Early diffusers called the VAE's attention query, key, value and proj_attn."""
    todays = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    pattern = re.compile(r"(?<=\.attentions\.0\.)(query|key|value|proj_attn)(?=\.)")
    return {pattern.sub(lambda match: todays[match[1]], key): value for key, value in tensors.items()}
