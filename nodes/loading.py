"""Loaders of students, and what a student's file says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import comfy.sd
import folder_paths
from comfy_api.latest import io, ui

from ..toolkit.diffusion.errors import BadInput
from ..toolkit.runtime.files import load_tensors
from ..toolkit.runtime.sentences import trained_with
from ..toolkit.runtime.student import StudentFile, describe, read_student
from . import host, small

CATEGORY = "FewStep"


def student_path(folder: str, name: str) -> Path:
    return Path(folder_paths.get_full_path_or_raise(folder, name))


def stamp(path: Path) -> str:
    """Changes when a file is replaced under its name."""
    status = path.stat()
    return f"{status.st_mtime_ns}-{status.st_size}"


def guidance_inputs() -> list[Any]:
    return [
        io.Boolean.Input(
            "cfg_is_guidance",
            default=True,
            tooltip="A sampler's cfg is the student's guidance, at one evaluation a step. Off: the guidance "
            "below is used.",
        ),
        io.Float.Input(
            "guidance",
            default=0.0,
            min=0.0,
            max=100.0,
            step=0.1,
            tooltip="For samplers without a cfg, and when cfg_is_guidance is off. 0: the usual one.",
        ),
        io.Boolean.Input(
            "live_negative",
            default=False,
            tooltip="Heed the negative prompt, at two evaluations a step.",
        ),
    ]


def with_choice(model: Any, cfg_is_guidance: bool, guidance: float, live_negative: bool) -> Any:
    return host.choose(
        model, cfg_is_guidance=cfg_is_guidance, guidance=guidance or None, live_negative=live_negative
    )


class FewStepLoadStudent(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FewStepLoadStudent",
            display_name="Load Student (FewStep)",
            category=CATEGORY,
            description="A distilled checkpoint, with what it says of itself, ready for any sampler.",
            inputs=[
                io.Combo.Input("ckpt_name", options=folder_paths.get_filename_list("checkpoints")),
                *guidance_inputs(),
            ],
            outputs=[io.Model.Output(), io.Clip.Output(), io.Vae.Output()],
        )

    @classmethod
    def fingerprint_inputs(cls, ckpt_name: str, **choice: Any) -> Any:
        return stamp(student_path("checkpoints", ckpt_name)), sorted(choice.items())

    @classmethod
    def execute(
        cls, ckpt_name: str, cfg_is_guidance: bool, guidance: float, live_negative: bool
    ) -> io.NodeOutput:
        path = student_path("checkpoints", ckpt_name)
        found = read_student(path)
        _check(path, found)
        model, clip, vae = load_checkpoint(path, found)
        if found.spec is not None and (skip := found.spec.unusual_clip_skip):
            clip = clip.clone()
            clip.clip_layer(-skip)
        return io.NodeOutput(with_choice(model, cfg_is_guidance, guidance, live_negative), clip, vae)


def _check(path: Path, found: StudentFile) -> None:
    if found.kind == "lora":
        raise BadInput(
            f"{path.name}: this is a student LoRA; put it into models/loras, and load it with "
            "FewStepLoadStudentLora on the checkpoint that it was made for"
        )
    if found.kind == "other":
        raise BadInput(
            f"{path.name}: this is no FewStep student; make one with `python -m toolkit.distill --ckpt "
            f"{path.name}`, or load it with Load Checkpoint"
        )


def load_checkpoint(path: Path, found: StudentFile) -> tuple[Any, Any, Any]:
    """MODEL, CLIP and VAE; what the host does not know by its size is built from its own shapes."""
    tensors = found.header.tensors
    knows_clip, knows_vae = small.knows_clip(tensors), small.knows_vae(tensors)
    embeddings = folder_paths.get_folder_paths("embeddings")
    try:
        model, clip, vae, *_ = comfy.sd.load_checkpoint_guess_config(
            str(path), output_clip=knows_clip, output_vae=knows_vae, embedding_directory=embeddings
        )
    except (BadInput, RuntimeError) as error:
        raise BadInput(f"{path.name}: {_reason(error)}; download or export it again") from None
    if host.student_of(model) is None:
        raise BadInput(f"{path.name}: this ComfyUI does not recognise the student; update FewStep")
    if missing := host.missing_weights(model, tensors):
        raise BadInput(
            f"{path.name}: {len(missing)} weights of the network are missing, {missing[0]} for one; the file "
            "is damaged: download or export it again"
        )
    if not (knows_clip and knows_vae):
        weights = load_tensors(path)
        try:
            clip = clip or small.small_clip(weights, checkpoint=path, embedding_directory=embeddings)
            vae = vae or small.small_vae(weights)
        except BadInput as error:
            raise BadInput(f"{path.name}: {error}") from None
    return model, clip, vae


def _reason(error: Exception) -> str:
    """torch's paragraph on the first of many weights that do not fit, in a few words."""
    found = re.search(r"size mismatch for (\S+): .*?torch\.Size\((\[.*?\])\)", str(error))
    return f"{found[1]} has the shape {found[2]}, which does not fit the network" if found else str(error)


class FewStepLoadStudentLora(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FewStepLoadStudentLora",
            display_name="Load Student LoRA (FewStep)",
            category=CATEGORY,
            description="A student's low-rank weights on the checkpoint that it was made for, its guidance "
            "dial alive. Style LoRAs go before or after it.",
            inputs=[
                io.Model.Input("model"),
                io.Combo.Input("lora_name", options=folder_paths.get_filename_list("loras")),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=2.0,
                    step=0.01,
                    tooltip="1: the student as it was trained.",
                ),
                *guidance_inputs(),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def fingerprint_inputs(cls, lora_name: str, **others: Any) -> Any:
        values = sorted((name, value) for name, value in others.items() if name != "model")
        return stamp(student_path("loras", lora_name)), values

    @classmethod
    def execute(
        cls,
        model: Any,
        lora_name: str,
        strength: float,
        cfg_is_guidance: bool,
        guidance: float,
        live_negative: bool,
    ) -> io.NodeOutput:
        path = student_path("loras", lora_name)
        found = read_student(path)
        if found.kind != "lora" or found.spec is None:
            raise BadInput(
                f"{path.name}: this is no student LoRA of FewStep's; load other LoRAs with Load LoRA, and "
                "student checkpoints with FewStepLoadStudent"
            )
        student = host.with_student_lora(model, path, found.spec, strength)
        return io.NodeOutput(with_choice(student, cfg_is_guidance, guidance, live_negative))


class FewStepStudentInfo(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        names = [*folder_paths.get_filename_list("checkpoints"), *folder_paths.get_filename_list("loras")]
        return io.Schema(
            node_id="FewStepStudentInfo",
            display_name="Student Info (FewStep)",
            category=CATEGORY,
            description="What a student's file says of itself: steps, guidance, method, teacher.",
            inputs=[io.Combo.Input("ckpt_name", options=list(dict.fromkeys(names)))],
            outputs=[io.String.Output()],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, ckpt_name: str) -> Any:
        return stamp(_anywhere(ckpt_name))

    @classmethod
    def execute(cls, ckpt_name: str) -> io.NodeOutput:
        path = _anywhere(ckpt_name)
        text = facts(path.name, read_student(path))
        return io.NodeOutput(text, ui=ui.PreviewText(text))


def _anywhere(name: str) -> Path:
    found = folder_paths.get_full_path("checkpoints", name)
    return Path(found) if found else student_path("loras", name)


def facts(name: str, found: StudentFile) -> str:
    """What a file is, in lines for people."""
    if found.spec is None:
        return f"{name}: no FewStep student"
    spec = found.spec
    lines = [
        f"{name}: {describe(spec)}",
        f"timesteps {', '.join(map(str, spec.timesteps))}; {spec.prediction_type}, {spec.family}",
    ]
    if not found.stated:
        lines.append("its metadata is gone; these are the family's defaults")
    if spec.negative:
        lines.append(f'negative prompt baked in: "{spec.negative}"')
    lines += trained_with(spec)
    lines += [f"LoRA in the teacher: {lora.name}, strength {lora.strength:g}" for lora in spec.loras]
    return "\n".join(lines)
