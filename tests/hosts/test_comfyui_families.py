"""Every family's keys, text encoders and students in the real ComfyUI, beside the toolkit's own networks.

ComfyUI's modules run without its server, in one process that answers all the tests.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hosts.comfyui import Host
from make_checkpoint import (
    SHAPES,
    TINY,
    keys_of_shape,
    make_spec,
    make_student,
    make_teacher,
    make_tokenizer,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

from toolkit.diffusion.grid import trailing_timesteps
from toolkit.diffusion.guidance import w_embedding
from toolkit.runtime.files import spec_tensor
from toolkit.training.checkpoint import open_checkpoint, seen_by_comfyui
from toolkit.training.layout import COND_PROJ
from toolkit.training.networks import denoiser, encode_prompts, load_encoders, random_cond, with_sizes

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = ["a red fox", "", "as long as it can be in 24 now"]
FAMILIES = ("sd2", "sdxl")
GUIDANCE = 4.0
STUDENTS = {
    "sd2": {"family": "sd2"},
    "sd2 v": {"family": "sd2", "prediction_type": "v_prediction"},
    "sdxl": {"family": "sdxl"},
    "sdxl v": {"family": "sdxl", "prediction_type": "v_prediction"},
    "sdxl ztsnr": {"family": "sdxl", "prediction_type": "v_prediction", "ztsnr": True},
}

PRELUDE = """
import importlib, json, sys, types
from pathlib import Path

root, folder = Path(sys.argv[1]), Path(sys.argv[2])
sys.argv = [sys.argv[0], "--cpu"]
import torch

sys.path.insert(0, "")
import comfy.options

comfy.options.enable_args_parsing()
import comfy.clip_model
import comfy.model_detection
import comfy.sd1_clip
import comfy.supported_models
from safetensors.torch import load_file, save_file

for name, path in (("pack", root), ("pack.nodes", root / "nodes")):  # without the nodes of nodes/__init__.py
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [str(path)]
messages = sys.modules["pack.nodes.messages"] = types.ModuleType("pack.nodes.messages")  # needs a server
messages.say = messages.show_run = lambda *_, **__: None
importlib.import_module("pack.nodes.host").register()

mode = torch.inference_mode()  # in which ComfyUI runs nodes
mode.__enter__()
UNET = "model.diffusion_model."
"""
"""ComfyUI's modules without its server, with the pack's host; ``folder``: where a script's files are."""

WORKER = """
asked = json.loads((folder / "asked.json").read_text())
said, answers = {"detected": {}}, {}
TELLING = UNET + "output_blocks.11.1.transformer_blocks.0.norm1.bias"

def shapes(state):
    return {key: list(value.shape) for key, value in state.items()}

for label, entry in asked["detect"].items():
    state = {key: torch.empty(shape, device="meta") for key, shape in entry["shapes"].items()}
    state |= {key: torch.zeros(value.shape) for key, value in state.items() if key == TELLING}
    if entry["spec"]:
        state["model.diffusion_model.fewstep.spec"] = torch.tensor(entry["spec"], dtype=torch.uint8)
    config = comfy.model_detection.model_config_from_unet(state, UNET)
    kind = config.model_type(state, UNET)
    model = config.get_model(state, UNET, device="meta")
    unet = {UNET + key: shape for key, shape in shapes(model.diffusion_model.state_dict()).items()}
    ours = {key: shape for key, shape in entry["shapes"].items() if key.startswith(UNET)}
    texts = {k: v for k, v in state.items() if k.startswith(("cond_stage_model.", "conditioner."))}
    found = shapes(config.process_clip_state_dict(texts))
    clip = config.clip_target().clip(device="meta", dtype=torch.float16, model_options={})
    clip = shapes(clip.state_dict())
    said["detected"][label] = {
        "class": type(config).__name__,
        "type": kind.name,
        "zsnr": bool(config.sampling_settings.get("zsnr")),
        "inpaint": bool(config.inpaint_model()),
        "heads": config.unet_config.get("num_head_channels"),
        "scale": config.latent_format.scale_factor,
        "unet": unet == ours,
        "text": all(clip.get(key) == shape for key, shape in found.items()),
        "lacking": sorted(key for key in clip if key not in found and "logit_scale" not in key),
    }

class TextModel(comfy.clip_model.CLIPTextModel):
    # ComfyUI's, with a vocabulary and a projection of any size.
    def __init__(self, config_dict, dtype, device, operations):
        super().__init__(config_dict, dtype, device, operations)
        width, words, projected = (config_dict[k] for k in ("hidden_size", "vocab_size", "projection"))
        where = {"dtype": dtype, "device": device}
        self.set_input_embeddings(operations.Embedding(words, width, **where))
        self.text_projection = operations.Linear(width, projected, bias=False, **where)

for family, entry in asked["texts"].items():
    tensors = load_file(folder / f"{family}.safetensors")
    config = getattr(comfy.supported_models, entry["class"])({})
    state = config.process_clip_state_dict(tensors)
    for name, part in entry["encoders"].items():
        model = comfy.sd1_clip.SDClipModel(
            max_length=part["config"]["max_position_embeddings"],
            textmodel_json_config=part["config"],
            model_class=TextModel,
            dtype=torch.float32,
            special_tokens=part["special"],
            layer="hidden",
            layer_idx=-2,
            layer_norm_hidden_state=part["normalised"],
        )
        own = {k.removeprefix(f"{name}."): v for k, v in state.items() if k.startswith(f"{name}.")}
        model.load_state_dict(own, strict=False)
        states, pooled = model(part["tokens"])
        answers[f"{family}/{name}/states"], answers[f"{family}/{name}/pooled"] = states, pooled

for label, entry in asked["students"].items():
    state = load_file(folder / f"{entry['file']}.safetensors")
    state["model.diffusion_model.fewstep.spec"] = torch.tensor(entry["spec"], dtype=torch.uint8)
    inputs = load_file(folder / f"{label}.inputs.safetensors")
    config = comfy.model_detection.model_config_from_unet(state, UNET)
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model(state, UNET, device="cpu")
    model.load_model_weights(state, UNET)
    more = {}
    if "pooled" in inputs:
        more["y"] = model.encode_adm(pooled_output=inputs["pooled"], width=96, height=128)
    answers[f"{label}/x0"] = model.apply_model(
        inputs["x"], inputs["sigma"], c_crossattn=inputs["text"], fewstep_w=inputs["w"], **more
    )
    answers[f"{label}/sigmas"] = model.model_sampling.sigmas
    said.setdefault("students", {})[label] = type(config).__name__

save_file({key: value.float().contiguous() for key, value in answers.items()}, folder / "answers.safetensors")
(folder / "said.json").write_text(json.dumps(said))
"""


@dataclass(frozen=True)
class Answers:
    folder: Path
    tensors: dict[str, Tensor]
    said: dict[str, Any]


def work(host: Host, script: str, folder: Path) -> None:
    """Run a script after the prelude, with the host's Python."""
    host.run_script(PRELUDE + script, ROOT, folder)


@pytest.fixture(scope="module")
def answers(comfyui_host: Host, tmp_path_factory: pytest.TempPathFactory) -> Answers:
    folder = tmp_path_factory.mktemp("families")
    make_tokenizer(folder / "tokenizer")
    asked = {"detect": _detect(), "texts": _texts(folder), "students": _students(folder)}
    (folder / "asked.json").write_text(json.dumps(asked))
    work(comfyui_host, WORKER, folder)
    said = json.loads((folder / "said.json").read_text())
    return Answers(folder, load_file(folder / "answers.safetensors"), said)


def _shapes(keys: dict[str, Tensor]) -> dict[str, list[int]]:
    return {key: list(value.shape) for key, value in keys.items()}


def _spec_bytes(**choices: Any) -> list[int]:
    return spec_tensor(make_spec(**choices)).tolist()


def _detect() -> dict[str, Any]:
    """Keys and shapes of true-size files of each family, as teachers, for inpainting, and as students."""
    entries: dict[str, Any] = {}
    for shape in ("sd15", "sd21", "sdxl"):
        family = SHAPES[shape].family.key
        plain = keys_of_shape(shape)
        first = "model.diffusion_model.input_blocks.0.0.weight"
        nine = {first: torch.empty(320, 9, 3, 3, device="meta")}
        markers = {key: torch.empty(0, device="meta") for key in ("v_pred", "ztsnr")}
        dial = {COND_PROJ: torch.empty(320, 256, device="meta")}
        v = {"family": family, "prediction_type": "v_prediction", "ztsnr": True}
        entries[shape] = {"shapes": _shapes(plain), "spec": None}
        entries[f"{shape} inpaint"] = {"shapes": _shapes(plain | nine), "spec": None}
        entries[f"{shape} marked"] = {"shapes": _shapes(plain | markers), "spec": None}
        entries[f"{shape} student"] = {"shapes": _shapes(plain | dial), "spec": _spec_bytes(family=family)}
        entries[f"{shape} v student"] = {"shapes": _shapes(plain | dial | markers), "spec": _spec_bytes(**v)}
    return entries


def _texts(folder: Path) -> dict[str, Any]:
    """Tokens that the toolkit feeds, and sizes, of each encoder of the tiny shapes."""
    asked: dict[str, Any] = {}
    for family in FAMILIES:
        teacher = open_checkpoint(make_teacher(folder / f"{family}.safetensors", shape=TINY[family]))
        encoders: dict[str, Any] = {}
        for encoder in teacher.of.text_encoders:
            config = teacher.config(encoder.part)
            tokens = teacher.tokenizer(encoder.part)
            end, length = config["eos_token_id"], config["max_position_embeddings"]
            rows = tokens(PROMPTS, truncation=True, max_length=length).input_ids
            pad = 0 if encoder.naming == "open_clip" else end
            name = "clip_h" if family == "sd2" else "clip_l" if encoder.part == "text_encoder" else "clip_g"
            layers = config["num_hidden_layers"] + encoder.unused_layers
            encoders[name] = {
                "config": config | {"num_hidden_layers": layers, "projection": config["projection_dim"]},
                "special": {"start": end - 1, "end": end, "pad": pad},
                "normalised": not encoder.penultimate,
                "tokens": [row + [pad] * (length - len(row)) for row in rows],
            }
        asked[family] = {"class": {"sd2": "SD20", "sdxl": "SDXL"}[family], "encoders": encoders}
    return asked


def _students(folder: Path) -> dict[str, Any]:
    """Students in the narrowest UNets that ComfyUI's classes of the families take, with their inputs."""
    asked: dict[str, Any] = {}
    for label, choices in STUDENTS.items():
        spec = make_spec(timesteps=trailing_timesteps(4), **choices)
        file = f"student {label}"
        path = folder / f"{file}.safetensors"
        make_student(path, shape=f"comfy-{spec.family}", spec=spec)
        student = open_checkpoint(path)
        generator = torch.Generator().manual_seed(1)
        cond = random_cond(student, 2, generator=generator)
        sigma = student.schedule.sigma(torch.tensor([999, 249])).float()
        x = torch.randn(2, 4, 16, 12, generator=generator) * (1 + sigma**2).sqrt().reshape(-1, 1, 1, 1)
        w = w_embedding(torch.full((2,), GUIDANCE - 1))
        inputs = {"x": x, "sigma": sigma, "w": w, **{k: v for k, v in cond.items() if k != "time_ids"}}
        save_file(inputs, folder / f"{label}.inputs.safetensors")
        asked[label] = {"file": file, "spec": spec_tensor(spec).tolist()}
    return asked


def _error(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    return float((ours - theirs).norm() / theirs.norm())


CLASSES = {"sd15": "SD15", "sd21": "SD20", "sdxl": "SDXL"}


@pytest.mark.parametrize("shape", CLASSES)
def test_true_size_files_are_the_hosts_family_with_every_key_and_shape(answers: Answers, shape: str) -> None:
    for label in (shape, f"{shape} inpaint", f"{shape} marked"):
        found = answers.said["detected"][label]
        assert found["class"] == CLASSES[shape] and found["unet"] and found["text"], (label, found)
        assert found["scale"] == SHAPES[shape].family.scaling_factor
        assert found["inpaint"] == ("inpaint" in label)
        lacking = [key for key in found["lacking"] if "text_projection" not in key]
        assert lacking == [], "the file lacks nothing that the host's text encoder has"
    marked = answers.said["detected"][f"{shape} marked"]
    assert (marked["type"], marked["zsnr"]) == (("V_PREDICTION", True) if shape == "sdxl" else ("EPS", False))
    tensors = keys_of_shape(shape) | {"v_pred": torch.empty(0)}
    tensors |= {
        key: torch.zeros(value.shape)
        for key, value in tensors.items()
        if key.endswith("11.1.transformer_blocks.0.norm1.bias")
    }
    seen = seen_by_comfyui(tensors, SHAPES[shape].family.key)
    assert (seen == "v_prediction") == (marked["type"] == "V_PREDICTION")


@pytest.mark.parametrize("shape", CLASSES)
def test_true_size_students_are_the_hosts_family_and_ours(answers: Answers, shape: str) -> None:
    plain, v = (answers.said["detected"][f"{shape} {kind}"] for kind in ("student", "v student"))
    assert plain["class"] == v["class"] == f"FewStep{CLASSES[shape]}"
    assert plain["unet"] and v["unet"], "the dial is a weight of the host's network"
    assert (plain["type"], plain["zsnr"]) == ("EPS", False)
    assert (v["type"], v["zsnr"]) == ("V_PREDICTION", True)


@pytest.mark.parametrize("family", FAMILIES)
def test_text_encoders_answer_as_in_the_host(answers: Answers, family: str) -> None:
    teacher = open_checkpoint(answers.folder / f"{family}.safetensors")
    ours = encode_prompts(PROMPTS, load_encoders(teacher))
    names = ["clip_h"] if family == "sd2" else ["clip_l", "clip_g"]
    theirs = torch.cat([answers.tensors[f"{family}/{name}/states"] for name in names], dim=-1)
    assert _error(ours["text"], theirs) < 1e-5
    if family == "sdxl":
        assert _error(ours["pooled"], answers.tensors["sdxl/clip_g/pooled"]) < 1e-5


@pytest.mark.parametrize("label", STUDENTS)
def test_a_student_answers_as_in_the_host(answers: Answers, label: str) -> None:
    student = open_checkpoint(answers.folder / f"student {label}.safetensors")
    inputs = load_file(answers.folder / f"{label}.inputs.safetensors")
    cond = {name: inputs[name] for name in ("text", "pooled") if name in inputs}
    network = denoiser(student.unet(), schedule=student.schedule, prediction_type=student.prediction_type)

    def ours(guidance: float, width: int) -> Tensor:
        w = torch.full((2,), guidance - 1)
        with torch.no_grad():
            told = with_sizes(cond, width=width, height=128)
            return network(inputs["x"], inputs["sigma"], cond=told, w=w)

    theirs = answers.tensors[f"{label}/x0"]
    assert _error(ours(GUIDANCE, 96), theirs) < 1e-4
    assert _error(ours(8.0, 96), theirs) > 1e-3, "the dial is heard"
    if "pooled" in cond:
        assert _error(ours(GUIDANCE, 256), theirs) > 1e-3, "the size is heard"
    sigmas = answers.tensors[f"{label}/sigmas"]
    torch.testing.assert_close(student.schedule.sigmas.float(), sigmas, rtol=1e-4, atol=1e-6)
