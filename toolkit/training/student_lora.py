"""A student as a LoRA file: under kohya's keys, which hosts read, at one baked guidance.

``lora_unet_MODULE.lora_down/.lora_up/.alpha`` hold the low-rank updates. The layer behind the guidance input
is a whole difference, ``lora_unet_time_embedding_linear_1.diff`` and ``.diff_b``; the bias carries what the
dial would add at the baked guidance, so that a stock host at strength 1 has that guidance. The dial itself is
``fewstep.cond_proj.weight``; our loaders take the baked shift off again. Students without a dial have
neither.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..diffusion.errors import BadInput
from ..diffusion.guidance import bias_shift
from ..diffusion.spec import StudentSpec
from ..runtime.files import load_tensors, save_tensors
from .adapters import COND_PROJ, State
from .checkpoint import Checkpoint, save_student, student_metadata
from .layout import UNET_PREFIX, unet_from_ldm

LINEAR = "time_embedding.linear_1"
LORA_COND_PROJ = "fewstep.cond_proj.weight"
LORA_DIFF = "lora_unet_time_embedding_linear_1.diff"
LORA_DIFF_BIAS = "lora_unet_time_embedding_linear_1.diff_b"


def lora_path(student: Path) -> Path:
    """Where the LoRA of a merged student stands: beside it."""
    return student.with_name(f"{student.stem}-lora{student.suffix}")


def save_lora_student(
    path: Path, trained: State, *, spec: StudentSpec, source: Checkpoint, dtype: torch.dtype
) -> Path:
    """Write the merged student, and beside it its LoRA, which is loaded back and compared with it. Answers
    where the student is.

    ``trained``: what :class:`.adapters.OneNetwork` trains; ``source``: the teacher that it was trained on.
    """
    base = unet_of(source)
    path = save_student(path, unet_state=dict(_merged(base, trained, dtype)), spec=spec, source=source)
    baked = spec.guidance_default if spec.w_embedding is not None else None
    lora = dataclasses.replace(spec, container="lora", baked_guidance=baked)
    file = save_tensors(
        lora_tensors(trained, base=base, spec=spec, dtype=dtype),
        student_metadata(lora, source.resolution),
        lora_path(path),
    )
    compare_with_merged(file, load_tensors(path), base=base, spec=spec)
    return path


def unet_of(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The UNet's weights under diffusers' keys, memory-mapped."""
    tensors = checkpoint.network_tensors()
    return unet_from_ldm({key: value for key, value in tensors.items() if key.startswith(UNET_PREFIX)})


def lora_tensors(trained: State, *, base: State, spec: StudentSpec, dtype: torch.dtype) -> dict[str, Tensor]:
    """The file's tensors; the few that carry the dial stay in float32."""
    made: dict[str, Tensor] = {}
    for key, down in trained.items():
        if key.endswith(".lora_A.weight"):
            module = key.removesuffix(".lora_A.weight")
            name = kohya_name(module)
            made[f"{name}.lora_down.weight"] = down.detach().to("cpu", dtype)
            made[f"{name}.lora_up.weight"] = trained[f"{module}.lora_B.weight"].detach().to("cpu", dtype)
            made[f"{name}.alpha"] = torch.tensor(float(down.shape[0]), dtype=dtype)
    weight, bias = (trained[f"{LINEAR}.{name}"].detach().cpu().float() for name in ("weight", "bias"))
    shift = _shift(weight, trained, spec)
    made[LORA_DIFF] = (weight - base[f"{LINEAR}.weight"].float()).to(dtype)
    made[LORA_DIFF_BIAS] = (bias.double() - base[f"{LINEAR}.bias"].double() + shift).float()
    if COND_PROJ in trained:
        made[LORA_COND_PROJ] = trained[COND_PROJ].detach().cpu().float()
    return made


def compare_with_merged(file: Path, merged: Mapping[str, Tensor], *, base: State, spec: StudentSpec) -> float:
    """The largest difference between the base with the file at strength 1, as a stock loader applies it, and
    the merged student at the baked guidance, relative to each tensor's largest value.

    Weight by weight, because another network in memory is what this training avoids. BadInput, and no file,
    where rounding does not explain it.
    """
    lora = load_tensors(file)
    expected = unet_from_ldm({key: value for key, value in merged.items() if key.startswith(UNET_PREFIX)})
    names = {kohya_name(key.removesuffix(".weight")): key for key in base if key.endswith(".weight")}
    if strange := {key.split(".")[0] for key in lora if key != LORA_COND_PROJ} - names.keys():
        raise BadInput(f"{file}: {sorted(strange)[0]} is no layer of the teacher, so the file is of no use")
    shift = _shift(expected[f"{LINEAR}.weight"].float(), expected, spec)
    worst = 0.0
    for key, value in base.items():
        name = kohya_name(key.rpartition(".")[0])
        wanted = expected[key].double() + (shift if key == f"{LINEAR}.bias" else 0.0)
        error = float((applied(value, key, name, lora) - wanted).abs().max() / (wanted.abs().max() + 1e-12))
        if not error <= 8 * torch.finfo(expected[key].dtype).eps:
            file.unlink()
            raise BadInput(
                f"{file}: loaded back, {key} differs from the merged student by {error:.2g} of its largest "
                "value, so the file was not kept"
            )
        worst = max(worst, error)
    return worst


def applied(value: Tensor, key: str, name: str, lora: Mapping[str, Tensor]) -> Tensor:
    """A base weight or bias (float64) with the file's update of it at strength 1."""
    value = value.double()
    if key.endswith(".bias"):
        return value + lora[f"{name}.diff_b"].double() if f"{name}.diff_b" in lora else value
    if f"{name}.diff" in lora:
        value = value + lora[f"{name}.diff"].double()
    if (down := lora.get(f"{name}.lora_down.weight")) is not None:
        scale = float(lora[f"{name}.alpha"]) / down.shape[0]
        value = value + scale * update(down.double(), lora[f"{name}.lora_up.weight"].double(), value)
    return value


def update(down: Tensor, up: Tensor, like: Tensor) -> Tensor:
    """``up @ down`` in the shape of the layer's weight; of a convolution, ``up`` is 1 x 1."""
    return (up.flatten(1) @ down.flatten(1)).reshape(like.shape)


def kohya_name(module: str) -> str:
    return "lora_unet_" + module.replace(".", "_")


def _merged(base: State, trained: State, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """The student's weights one after the other in ``dtype``: no second network in float32."""
    for key, value in base.items():
        module = key.removesuffix(".weight")
        if key in trained:
            yield key, trained[key].detach().to("cpu", dtype)
        elif (down := trained.get(f"{module}.lora_A.weight")) is not None:
            up = trained[f"{module}.lora_B.weight"]
            change = update(down.detach().cpu().float(), up.detach().cpu().float(), value)
            yield key, (value.float() + change).to(dtype)
        else:
            yield key, value.to(dtype)
    if COND_PROJ in trained:
        yield COND_PROJ, trained[COND_PROJ].detach().to("cpu", dtype)


def _shift(weight: Tensor, student: State, spec: StudentSpec) -> Tensor | float:
    """What the dial adds to the bias at the baked guidance; nothing where there is no dial."""
    if spec.w_embedding is None:
        return 0.0
    cond_proj = student[COND_PROJ].detach().cpu().float()
    return bias_shift(weight, cond_proj, spec.guidance_default - 1, scale=spec.w_embedding.scale)
