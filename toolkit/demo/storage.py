"""The demo's files, fp16 safetensors: the teacher in SD1's single-file layout."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

from diffusers import AutoencoderKL
from safetensors.torch import load_file
from torch import Tensor, nn

from ..runtime.files import modelspec, save_tensors
from ..training.layout import text_to_ldm, unet_to_ldm, vae_to_ldm
from .autoencoder import new_autoencoder
from .drawings import SIZE
from .teacher import Teacher

Network = TypeVar("Network", bound=nn.Module)


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
    inpaint = teacher.unet.config["in_channels"] == 9
    how = (
        "The demo teacher, trained on for inpainting by toolkit.demo.train --inpaint."
        if inpaint
        else "Trained from nothing on captioned drawings by toolkit.demo.train."
    )
    metadata = modelspec(
        title="FewStep demo inpainting teacher" if inpaint else "FewStep demo teacher",
        architecture="stable-diffusion-v1" + ("-inpainting" if inpaint else ""),
        prediction_type="epsilon",
        resolution=(SIZE, SIZE),
        author="The FewStep authors",
        license="Apache-2.0",
        description=how,
    )
    write_half(state, path, metadata)


def write_half(state: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write a state as fp16 safetensors, whole or not at all, the same bytes for the same weights."""
    save_tensors({key: value.half() for key, value in state.items()}, metadata or {}, path)


def _filled(network: Network, state: Mapping[str, Tensor]) -> Network:
    """The network with these weights, in float32 and frozen."""
    network.load_state_dict({key: value.float() for key, value in state.items()})
    return network.eval().requires_grad_(False)
