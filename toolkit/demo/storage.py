"""The demo's files, fp16 safetensors: the teacher in SD1's single-file layout, or as a diffusers folder."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import TypeVar

from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTokenizer

from ..training.layout import text_from_ldm, text_to_ldm, unet_from_ldm, unet_to_ldm, vae_from_ldm, vae_to_ldm
from . import TEACHER, TOKENIZER
from .autoencoder import new_autoencoder
from .teacher import Teacher, new_text_encoder, new_unet

Network = TypeVar("Network", bound=nn.Module)
_OF_A_TEACHER = {
    "modelspec.architecture": "stable-diffusion-v1",
    "modelspec.implementation": "https://github.com/CompVis/stable-diffusion",
    "modelspec.resolution": "32x32",
    "modelspec.prediction_type": "epsilon",
}


def load_teacher(path: Path = TEACHER, tokenizer: Path = TOKENIZER) -> Teacher:
    """The stored teacher, float32, in evaluation mode."""
    state = load_file(path)
    words = CLIPTokenizer.from_pretrained(tokenizer)
    unet = _filled(new_unet(), unet_from_ldm(state))
    text = _filled(new_text_encoder(words), text_from_ldm(state))
    return Teacher(unet, text, _filled(new_autoencoder(), vae_from_ldm(state)), words)


def load_autoencoder(path: Path) -> AutoencoderKL:
    """The autoencoder that the autoencoder stage kept, float32, in evaluation mode."""
    return _filled(new_autoencoder(), load_file(path))


def write_teacher(teacher: Teacher, path: Path) -> None:
    """Write SD1's single-file layout, fp16, whole or not at all."""
    state = {
        **unet_to_ldm(teacher.unet.state_dict()),
        **vae_to_ldm(teacher.vae.state_dict()),
        **text_to_ldm(teacher.text.state_dict()),
    }
    write_half(state, path, title="FewStep demo teacher", more=_OF_A_TEACHER)


def write_half(
    state: Mapping[str, Tensor], path: Path, *, title: str, more: Mapping[str, str] | None = None
) -> None:
    """Write a state as fp16 safetensors with `modelspec.*` metadata, whole or not at all."""
    metadata = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.title": title,
        "modelspec.author": "The FewStep authors",
        "modelspec.license": "Apache-2.0",
        "modelspec.date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "modelspec.description": "Trained from nothing on captioned drawings by toolkit.demo.train.",
        **(more or {}),
    }
    fresh = path.with_name(path.name + ".new")
    save_file({key: value.half().contiguous() for key, value in state.items()}, fresh, metadata=metadata)
    fresh.chmod(0o644)
    fresh.replace(path)


def save_folder(teacher: Teacher, folder: Path) -> None:
    """Write the teacher as a diffusers `StableDiffusionPipeline` folder, whole or not at all."""
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        steps_offset=1,
        timestep_spacing="trailing",
    )
    pipeline = StableDiffusionPipeline(
        vae=teacher.vae,
        text_encoder=teacher.text,
        tokenizer=teacher.tokenizer,
        unet=teacher.unet,
        scheduler=scheduler,  # pyright: ignore[reportArgumentType]
        safety_checker=None,  # pyright: ignore[reportArgumentType]
        feature_extractor=None,  # pyright: ignore[reportArgumentType]
        requires_safety_checker=False,
    )
    fresh, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    shutil.rmtree(fresh, ignore_errors=True)
    pipeline.save_pretrained(fresh)
    if folder.exists():
        folder.rename(old)
    fresh.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _filled(network: Network, state: Mapping[str, Tensor]) -> Network:
    """The network with these weights, in float32 and frozen."""
    network.load_state_dict({key: value.float() for key, value in state.items()})
    return network.eval().requires_grad_(False)
