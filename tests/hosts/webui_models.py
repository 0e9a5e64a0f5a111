"""Random checkpoints and LoRAs for a WebUI: the smallest UNet that Forge takes, all else true to size, in
half precision (0.5 GB a file)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from hosts.models import LORA_BAKED_GUIDANCE, Model, student_lora_tensors, style_lora_tensors
from hosts.webui import Host, small_config
from make_checkpoint import make_spec, make_tensors
from torch import Tensor

from toolkit.diffusion.grid import trailing_timesteps
from toolkit.runtime.files import save_tensors, sha256_of
from toolkit.training.checkpoint import student_metadata, write_checkpoint

SIZE = (64, 64)


class WebUIModels:
    """``models.epsilon``, ...: files under the host's model folder; what a test first asks for is made."""

    def __init__(self, host: Host, folder: Path) -> None:
        self.host, self.folder = host, folder

    @cached_property
    def teacher(self) -> Model:
        path = self._path("teacher")
        save_tensors({**_unet(1), **self._carried}, {}, path)
        return Model(path)

    @cached_property
    def stranger(self) -> Model:
        """A checkpoint that no student was distilled from."""
        path = self._path("stranger")
        save_tensors({**_unet(8), **self._carried}, {}, path)
        return Model(path)

    @cached_property
    def epsilon(self) -> Model:
        return self._student("epsilon", _unet(3, dial=1.0))

    @cached_property
    def two_steps(self) -> Model:
        return self._student("two_steps", _unet(9, dial=1.0), timesteps=trailing_timesteps(2))

    @cached_property
    def velocity(self) -> Model:
        """Of a schedule of its own, too."""
        return self._student(
            "velocity", _unet(4, dial=1.0), own=True, prediction_type="v_prediction", ztsnr=True
        )

    @cached_property
    def stochastic(self) -> Model:
        return self._student("stochastic", _unet(5, dial=1.0), own=True, sampler="stochastic")

    @cached_property
    def inpaint(self) -> Model:
        return self._student("inpaint", _unet(6, in_channels=9, dial=1.0), own=True, inpaint=True)

    @cached_property
    def style_lora(self) -> Model:
        path = self.folder / "Lora" / "style.safetensors"
        save_tensors(style_lora_tensors(), {"ss_base_model_version": "sd_v1"}, path)
        return Model(path)

    @cached_property
    def student_lora(self) -> Model:
        spec = make_spec(container="lora", baked_guidance=LORA_BAKED_GUIDANCE, lora_rank=4)
        path = self.folder / "Lora" / "student.safetensors"
        metadata = {**student_metadata(spec, SIZE), "ss_base_model_version": "sd_v1"}
        save_tensors(student_lora_tensors(_unet(1)), metadata, path)
        return Model(path, spec)

    @cached_property
    def _carried(self) -> dict[str, Tensor]:
        return make_tensors("small", seed=100, dtype=torch.float16, parts=("vae", "text_encoder"))

    def _student(self, name: str, unet: Mapping[str, Tensor], *, own: bool = False, **changes: Any) -> Model:
        """``own``: of another teacher than ``teacher``."""
        teacher = "0" * 64 if own else sha256_of(self.teacher.path)
        spec = make_spec(teacher_sha256=teacher, teacher_name="teacher", **changes)
        path = self._path(name, inpaint=spec.inpaint)
        write_checkpoint(path, tensors={**unet, **self._carried}, spec=spec, resolution=SIZE)
        return Model(path, spec)

    def _path(self, name: str, *, inpaint: bool = False) -> Path:
        path = self.folder / "Stable-diffusion" / f"{name}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        if self.host.kind == "a1111":
            small_config(self.host, path.with_suffix(".yaml"), inpaint=inpaint)
        return path


def _unet(seed: int, **choices: Any) -> dict[str, Tensor]:
    return make_tensors("small", seed=seed, dtype=torch.float16, parts=("unet",), **choices)
