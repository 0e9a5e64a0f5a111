"""LoRAs merged into a teacher are what the real ComfyUI makes of them, for every family and kind.

ComfyUI's modules run without its server, in one process that answers all the tests.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hosts.comfyui import Host
from make_checkpoint import TINY, make_teacher
from make_lora import (
    CONVOLUTION,
    LINEAR,
    TEXT,
    comfyui_name,
    named,
    random_factors,
    save_lora,
    weights_of,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

from toolkit.training.checkpoint import Checkpoint, open_checkpoint
from toolkit.training.lora import merge_loras, read_lora

STRENGTH = 0.7
FAMILIES = tuple(TINY)
KINDS = {"plain": "kohya", "tucker": "kohya", "dora-in": "kohya", "single": "single file", "host": "comfyui"}
"""Cases, and the naming of each."""

WORKER = """
import json, sys, types
from pathlib import Path

folder = Path(sys.argv[1])
sys.argv = [sys.argv[0], "--cpu"]
sys.path.insert(0, "")
import comfy.options

comfy.options.enable_args_parsing()
import comfy.lora
import comfy.lora_convert
import comfy.model_detection
from safetensors.torch import load_file, save_file

asked, said = json.loads((folder / "asked.json").read_text()), {}
for family in asked["families"]:
    base = load_file(folder / f"{family}.base.safetensors")
    unet = {f"model.{key}": value for key, value in base.items() if key.startswith("diffusion_model.")}
    config = comfy.model_detection.detect_unet_config(unet, "model.diffusion_model.")
    family_of = types.SimpleNamespace(unet_config=config)
    model = types.SimpleNamespace(state_dict=lambda: base, model_config=family_of)
    names = comfy.lora.model_lora_keys_clip(model, comfy.lora.model_lora_keys_unet(model, {}))
    for case in asked["cases"]:
        lora = comfy.lora_convert.convert_lora(load_file(folder / f"{family}.{case}.safetensors"))
        patches = comfy.lora.load_lora(lora, names)
        said[f"{family}.{case}"] = len(patches)
        merged = {key: value.clone() for key, value in base.items()}
        for key, patch in patches.items():
            patches_of = [(asked["strength"], patch, 1.0, None, None)]
            merged[key] = comfy.lora.calculate_weight(patches_of, merged[key], key)
        merged = {key: value.contiguous() for key, value in merged.items()}
        save_file(merged, folder / f"{family}.{case}.merged.safetensors")
(folder / "said.json").write_text(json.dumps(said))
"""


@dataclass(frozen=True)
class Answers:
    """``layers``: how many ComfyUI patched, by family and case; tensors are under its own names."""

    folder: Path
    teachers: dict[str, Checkpoint]
    layers: dict[str, int]

    def theirs(self, family: str, case: str) -> dict[str, Tensor]:
        return load_file(self.folder / f"{family}.{case}.merged.safetensors")

    def ours(self, family: str, case: str) -> dict[str, Tensor]:
        lora = read_lora(self.folder / f"{family}.{case}.safetensors")
        return comfyui_state(merge_loras(self.teachers[family], [(lora, STRENGTH)]))


def comfyui_state(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The UNet and the text encoders by ComfyUI's names."""
    state = {
        key.removeprefix("model."): value
        for key, value in checkpoint.tensors.items()
        if key.startswith("model.diffusion_model.")
    }
    for encoder in checkpoint.of.text_encoders:
        name = comfyui_name(checkpoint, encoder.part)
        for key, value in checkpoint.text_encoder(part=encoder.part).state_dict().items():
            inner = (
                key if key.startswith("text_projection") else f"text_model.{key.removeprefix('text_model.')}"
            )
            state[f"{name}.transformer.{inner}"] = value.detach()
    return state


def lora_of(teacher: Checkpoint, case: str) -> dict[str, Tensor]:
    style, kind = KINDS[case], case if case in ("tucker", "dora-in") else "plain"
    tensors: dict[str, Tensor] = {}
    for number, part in enumerate(["unet", *(encoder.part for encoder in teacher.of.text_encoders)]):
        weights = weights_of(teacher, (*LINEAR, *CONVOLUTION) if part == "unet" else TEXT, part)
        factors = random_factors(weights, kind=kind, seed=number)
        tensors |= named(style, teacher, factors, part=part, alpha=2.5)
    if case == "plain":
        conv_in = teacher.unet().conv_in
        noise = torch.Generator().manual_seed(9)
        tensors["lora_unet_conv_in.diff"] = torch.randn(conv_in.weight.shape, generator=noise)
        tensors["lora_unet_conv_in.diff_b"] = torch.randn(conv_in.bias.shape, generator=noise)
    return tensors


@pytest.fixture(scope="module")
def answers(comfyui_host: Host, tmp_path_factory: pytest.TempPathFactory) -> Answers:
    folder = tmp_path_factory.mktemp("comfyui")
    teachers: dict[str, Checkpoint] = {}
    for family, shape in TINY.items():
        teachers[family] = teacher = open_checkpoint(
            make_teacher(folder / f"{family}.safetensors", shape=shape)
        )
        state = {key: value.contiguous().clone() for key, value in comfyui_state(teacher).items()}
        save_file(state, folder / f"{family}.base.safetensors")
        for case in KINDS:
            save_lora(folder / f"{family}.{case}.safetensors", lora_of(teacher, case))
    asked = {"families": FAMILIES, "cases": list(KINDS), "strength": STRENGTH}
    (folder / "asked.json").write_text(json.dumps(asked))
    said = comfyui_host.run_script(WORKER, folder)
    assert "not loaded" not in said and "ERROR" not in said, said
    return Answers(folder, teachers, json.loads((folder / "said.json").read_text()))


@pytest.mark.parametrize("case", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_merge_is_comfyuis(answers: Answers, family: str, case: str) -> None:
    ours, theirs = answers.ours(family, case), answers.theirs(family, case)
    base = comfyui_state(answers.teachers[family])
    assert ours.keys() == theirs.keys()
    errors = {key: float((ours[key] - theirs[key]).norm() / theirs[key].norm()) for key in ours}
    changed = [key for key in ours if not torch.equal(ours[key], base[key])]
    assert max(errors.values()) < 1e-5
    assert len(changed) == answers.layers[f"{family}.{case}"] > 30
