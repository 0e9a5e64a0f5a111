"""Say what a file of weights is, and mend a student's lost description: ``python -m toolkit.inspect
--help``."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from .command import print_json, run
from .diffusion.errors import BadInput
from .diffusion.spec import StudentSpec
from .opening import OVERRIDE_HELP
from .runtime.files import read_metadata, sha256_of, spec_from, write_metadata
from .training.checkpoint import (
    is_finite,
    markers_of,
    prediction_type_of,
    resolution_of,
    student_metadata,
    ztsnr_of,
)
from .training.families import FAMILIES, NAMES, REFUSED, SD1, UNET_PREFIX, Override, resolution_for
from .training.layout import COND_PROJ
from .training.lora import describe_lora
from .training.networks import DTYPES
from .training.prompts import read_text
from .training.recognise import INPUTS, Problems, Recognised, problems, recognise
from .training.weights import Weights, read_folder, read_weights

EXAMPLES = """examples:
  python -m toolkit.inspect model.safetensors
  python -m toolkit.inspect student.safetensors --json
  python -m toolkit.inspect model.safetensors --override family=sd2,prediction_type=v_prediction
  python -m toolkit.inspect merged.safetensors --attach-spec spec.json

A spec is printed by --json under "spec"; save it before a merger drops it.
"""
SHOWN = 5
"""Keys of a list that are printed for people."""


_WORDS = {dtype: word for word, dtype in DTYPES.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    asked = _parser().parse_args(arguments)
    if asked.attach_spec is not None:
        attach_spec(asked.file, asked.attach_spec)
    found = describe(asked.file, Override.parse(asked.override))
    if asked.json:
        print_json(found)
    else:
        print("\n".join(_lines(found)))


def describe(path: Path, override: Override | None = None) -> dict[str, Any]:
    """Everything that the file says or that its keys and shapes tell, as far as nobody says otherwise;
    BadInput only if it cannot be read."""
    override = override or Override()
    weights = read_folder(path) if path.is_dir() else read_weights(path)
    found = recognise(weights.tensors)
    if override.family and found.container in ("checkpoint", "unet"):
        found = replace(found, family=override.family)
    spec = spec_from(weights.metadata, weights.tensors, path)
    diffusion = found.container in ("checkpoint", "unet")
    lora = describe_lora(weights) if found.container == "lora" else None
    family = lora.family if lora is not None else found.family
    wrong = _problems(found, weights)
    prediction_type = override.prediction_type
    if prediction_type is None and (diffusion or spec is not None):
        prediction_type = prediction_type_of(weights, spec, found)
    usual = resolution_for(FAMILIES.get(found.family or "", SD1), prediction_type or "epsilon")
    return {
        "file": path.name,
        "kind": _kind(found, spec),
        "container": found.container,
        "family": override.family or (spec.family if spec is not None else family),
        "inpaint": _input_channels(found) == 9 or (spec is not None and spec.inpaint),
        "prediction_type": prediction_type,
        "ztsnr": ztsnr_of(weights, spec) if override.ztsnr is None else override.ztsnr,
        "resolution": list(resolution_of(weights.metadata, usual)) if diffusion else None,
        "channels": _input_channels(found),
        "out_channels": _output_channels(found),
        "dtype": _dtype(found.tensors),
        "parameters": _parameters(found),
        "dial": COND_PROJ in found.tensors or "fewstep.cond_proj.weight" in found.tensors,
        "spec": None if spec is None else asdict(spec),
        "lora": None if lora is None else lora.describe(),
        "missing": list(wrong.missing),
        "extra": list(wrong.extra if lora is None else lora.unknown),
        "misshapen": list(wrong.misshapen),
        "damaged": sorted(key for key, value in found.tensors.items() if not is_finite(value)),
        "sha256": sha256_of(path),
        "metadata": {key: value for key, value in weights.metadata.items() if key.startswith("modelspec.")},
    }


def attach_spec(path: Path, spec_path: Path) -> None:
    """Write a spec into a safetensors student whose metadata a merger dropped; the weights stay as they
    are."""
    spec = StudentSpec.from_json(read_text(spec_path))
    if path.is_dir():
        raise BadInput(f"{path}: this is a folder; attach the spec to the file that it was made from")
    found = recognise(read_weights(path).tensors)
    metadata = read_metadata(path)
    said, has = _marks_of_spec(spec), _marks_of_file(found)
    for mark, expected in said.items():
        if has[mark] != expected:
            raise BadInput(
                f"{path}: the spec is of {expected}, and this is {has[mark]}; attach the spec of the student "
                "that it was made from"
            )
    usual = resolution_for(FAMILIES.get(spec.family, SD1), spec.prediction_type)
    resolution = resolution_of(metadata, usual)
    write_metadata(path, metadata | student_metadata(spec, resolution), markers=markers_of(spec))


def _marks_of_spec(spec: StudentSpec) -> dict[str, str]:
    """By what a spec and its student's file belong together, in words."""
    live = spec.w_embedding is not None and (spec.baked_guidance is None or spec.container == "lora")
    marks = {
        "container": "a LoRA" if spec.container == "lora" else "a checkpoint",
        "dial": _dial_text(spec.w_embedding.dim if live and spec.w_embedding else None),
    }
    if spec.container == "checkpoint":
        marks["family"] = NAMES.get(spec.family, spec.family)
        marks["input"] = "an inpainting student" if spec.inpaint else "a student of 4 channels"
    return marks


def _marks_of_file(found: Recognised) -> dict[str, str]:
    kinds = {"lora": "a LoRA", "checkpoint": "a checkpoint", "unet": "a checkpoint"}
    dial = found.tensors.get("fewstep.cond_proj.weight" if found.container == "lora" else COND_PROJ)
    channels = _input_channels(found)
    return {
        "container": kinds.get(found.container, f"{found.container}"),
        "dial": _dial_text(None if dial is None else dial.shape[1]),
        "family": NAMES.get(found.family or "", f"{found.family}"),
        "input": "an inpainting student" if channels == 9 else f"a student of {channels} channels",
    }


def _dial_text(width: int | None) -> str:
    return "a student without guidance dial" if width is None else f"a student with a dial of {width} numbers"


def _kind(found: Recognised, spec: StudentSpec | None) -> str:
    if found.container not in ("checkpoint", "unet"):
        return found.container
    if spec is not None and spec.baked_guidance is not None:
        return "baked"
    return "student" if spec is not None or COND_PROJ in found.tensors else "teacher"


def _problems(found: Recognised, weights: Weights) -> Problems:
    if found.family not in FAMILIES and found.container not in ("vae", "text encoder"):
        return Problems((), (), ())
    try:
        return problems(found.tensors, weights.configs, family=FAMILIES.get(found.family or "", SD1))
    except BadInput as error:
        return Problems((), (), (str(error),))


def _input_channels(found: Recognised) -> int | None:
    return _size(found, UNET_PREFIX + "input_blocks.0.0.weight", 1)


def _output_channels(found: Recognised) -> int | None:
    return _size(found, UNET_PREFIX + "out.2.weight", 0)


def _size(found: Recognised, key: str, axis: int) -> int | None:
    shape = found.tensors[key].shape if key in found.tensors else ()
    return shape[axis] if len(shape) > axis else None


def _dtype(tensors: Mapping[str, Tensor]) -> str | None:
    """The dtype that most numbers are in."""
    counts: Counter[str] = Counter()
    for value in tensors.values():
        if value.is_floating_point():
            counts[_WORDS.get(value.dtype, str(value.dtype).removeprefix("torch."))] += value.numel()
    return counts.most_common(1)[0][0] if counts else None


def _parameters(found: Recognised) -> dict[str, int]:
    parts = {
        part: sum(value.numel() for key, value in found.tensors.items() if key.startswith(prefix))
        for part, prefix in FAMILIES.get(found.family or "", SD1).prefixes.items()
    }
    return {**parts, "total": sum(value.numel() for value in found.tensors.values())}


def _lines(found: Mapping[str, Any]) -> list[str]:
    """The description for people."""
    family, spec = found["family"], found["spec"]
    lines = [f"{found['file']}: {found['kind']}" + (f", {NAMES.get(family, family)}" if family else "")]
    if family is not None and family not in FAMILIES and found["kind"] == "teacher":
        lines.append("it cannot be opened here" + (f": {REFUSED[family]}" if family in REFUSED else ""))
    if channels := found["channels"]:
        purpose = INPUTS.get(channels, "")
        lines.append(f"input: {channels} channels" + (f" ({purpose})" if purpose else ""))
        lines.append(
            f"predicts: {found['prediction_type']}" + (", zero-terminal SNR" if found["ztsnr"] else "")
        )
        lines.append(f"guidance dial: {'yes' if found['dial'] else 'no'}")
    sizes = ", ".join(
        f"{part.replace('_', ' ')} {count / 1e6:.1f} M"
        for part, count in found["parameters"].items()
        if count
    )
    lines.append(f"parameters: {sizes}; mostly {found['dtype']}")
    if lora := found["lora"]:
        ranks = "/".join(map(str, lora["ranks"]))
        lines.append(
            f"holds: {', '.join(lora['kinds'])}, {lora['layers']} layers"
            + (f", rank {ranks}" if ranks else "")
        )
        if lora["unsupported"]:
            lines.append(f"cannot be merged here: {', '.join(lora['unsupported'])}")
        lines.append(f"trigger words: {', '.join(lora['trigger_words']) or 'none in its metadata'}")
    if spec is not None:
        timesteps = ", ".join(map(str, spec["timesteps"]))
        baked = "" if spec["baked_guidance"] is None else f", {spec['baked_guidance']:g} baked in"
        lines.append(f"student: {spec['method']}, {spec['sampler']}, timesteps {timesteps}")
        lines.append(f"guidance: {spec['guidance_min']:g} to {spec['guidance_max']:g}{baked}")
        lines.append(f"teacher: {spec['teacher_name']} ({spec['teacher_sha256'][:10]})")
    elif found["kind"] == "student":
        lines.append("student: without a description; put it back with --attach-spec SPEC.json")
    for name in ("missing", "extra", "misshapen", "damaged"):
        if keys := found[name]:
            shown = ", ".join(keys[:SHOWN]) + (f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else "")
            lines.append(f"{name} keys: {shown}")
    lines.append(f"sha256: {found['sha256']}")
    return lines


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m toolkit.inspect",
        description="Say what a file of weights is: family, kind, what it predicts, its student's "
        "description, and which keys are missing, unknown, misshapen or damaged.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="a file of weights, or a diffusers folder")
    parser.add_argument(
        "--attach-spec", type=Path, metavar="SPEC.json", help="write this spec into the file first"
    )
    parser.add_argument("--override", metavar="NAME=VALUE,...", help=OVERRIDE_HELP)
    parser.add_argument("--json", action="store_true", help="everything, as JSON")
    return parser


if __name__ == "__main__":
    run(main)
