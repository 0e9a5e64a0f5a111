"""Prompts as ComfyUI's own tokenizers and encoders read them, with small random CLIPs of every family."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hosts.comfyui import Host
from hosts.test_comfyui_families import work
from make_checkpoint import TINY, make_spec, make_student, make_teacher, make_tokenizer
from safetensors.torch import load_file, save_file
from torch import Tensor

from toolkit.diffusion.spec import AppliedEmbedding
from toolkit.training.checkpoint import Checkpoint, open_checkpoint
from toolkit.training.embeddings import with_prompting
from toolkit.training.networks import encode_prompts, load_encoders

SKIPS = {"sd1": (1, 2), "sd2": (2, 3), "sdxl": (2, 3)}
PROMPTS = {
    "plain": "a red fox",
    "weights": r"a (red:1.4) ((fox)) (in (it:0.6) now:1.2) \(x\)",
    "zero": "a (red:0) fox",
    "unclosed": "a (b (c) :) (d",
    "chunks": "one prompt that is longer than one chunk, and than two of them",
    "short parts": "sixteen letters so(much:1.1)(together:1.2) or(not)",
    "weighted chunks": "one (prompt that is longer:1.3) than one chunk and (than:0.5) two of them",
    "inversion": "a embedding:style, (embedding:style:1.3) hat",
    "inversion in chunks": "a prompt of some letters (and then:1.2) embedding:style\nembedding:style b",
}

WORKER = """
import comfy.sdxl_clip

asked = json.loads((folder / "asked.json").read_text())
answers = {}

class TextModel(comfy.clip_model.CLIPTextModel):
    # ComfyUI's, with a vocabulary and a projection of any size.
    def __init__(self, config_dict, dtype, device, operations):
        super().__init__(config_dict, dtype, device, operations)
        width, words, projected = (config_dict[k] for k in ("hidden_size", "vocab_size", "projection"))
        where = {"dtype": dtype, "device": device}
        self.set_input_embeddings(operations.Embedding(words, width, **where))
        self.text_projection = operations.Linear(width, projected, bias=False, **where)

for family, entry in asked["families"].items():
    tensors = load_file(folder / f"{family}.safetensors")
    state = getattr(comfy.supported_models, entry["class"])({}).process_clip_state_dict(tensors)
    models, tokenizers = {}, {}
    for name, part in entry["encoders"].items():
        config, length = part["config"], part["config"]["max_position_embeddings"]
        model = models[name] = comfy.sd1_clip.SDClipModel(
            max_length=length,
            textmodel_json_config=config,
            model_class=TextModel,
            dtype=torch.float32,
            special_tokens=part["special"],
            **part["layer"],
        )
        own = {k.removeprefix(f"{name}."): v for k, v in state.items() if k.startswith(f"{name}.")}
        model.load_state_dict(own, strict=False)
        tokenizers[name] = comfy.sd1_clip.SDTokenizer(
            tokenizer_path=str(folder / "tokenizer"),
            max_length=length,
            pad_with_end=part["special"]["pad"] != 0,
            embedding_directory=str(folder / "embeddings" / family),
            embedding_size=config["hidden_size"],
            embedding_key=name,
            tokenizer_args={"model_max_length": 8192},
        )
    for skip in entry["skips"]:
        for model in models.values():
            model.set_clip_options({"layer": -skip})
        for label, prompt in asked["prompts"].items():
            tokens = {name: each.tokenize_with_weights(prompt) for name, each in tokenizers.items()}
            if family == "sdxl":
                states, pooled = comfy.sdxl_clip.SDXLClipModel.encode_token_weights(
                    types.SimpleNamespace(**models), {"g": tokens["clip_g"], "l": tokens["clip_l"]}
                )
                answers[f"{family}/{skip}/{label}/pooled"] = pooled
            else:
                ((name, model),) = models.items()
                states, _ = model.encode_token_weights(tokens[name])
            answers[f"{family}/{skip}/{label}"] = states

loading = importlib.import_module("pack.nodes.loading")
layers = {}

class Clip:
    def __init__(self):
        self.layer = None

    def clone(self):
        return Clip()

    def clip_layer(self, layer):
        self.layer = layer

for path in sorted(folder.glob("student*.safetensors")):
    loading.student_path = lambda *_, path=path: path
    loading.load_checkpoint = lambda *_: (None, Clip(), None)
    loading.with_choice = lambda *_: None
    clip = loading.FewStepLoadStudent.execute(path.name, True, 0.0, False).result[1]
    told = loading.facts(path.name, loading.read_student(path))
    layers[path.stem] = [clip.layer, told]
(folder / "layers.json").write_text(json.dumps(layers))

save_file({key: value.float().contiguous() for key, value in answers.items()}, folder / "answers.safetensors")
"""


@pytest.fixture(scope="module")
def folder(comfyui_host: Host, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Teachers, textual inversions and the host's answers."""
    folder = tmp_path_factory.mktemp("prompts")
    make_tokenizer(folder / "tokenizer")
    families: dict[str, Any] = {}
    for family, name in (("sd1", "SD15"), ("sd2", "SD20"), ("sdxl", "SDXL")):
        teacher = open_checkpoint(make_teacher(folder / f"{family}.safetensors", shape=TINY[family]))
        _write_inversion(folder / "embeddings" / family, teacher)
        encoders = {_host_name(teacher, part): _asked(teacher, part) for part in teacher.of.text_encoders}
        families[family] = {"class": name, "skips": SKIPS[family], "encoders": encoders}
    how = {"cfg_rescale": 0.7, "embeddings": (AppliedEmbedding("style", "0" * 64),)}
    make_student(folder / "student.safetensors", spec=make_spec())
    make_student(folder / "student skipping.safetensors", spec=make_spec(clip_skip=2, **how))
    make_student(
        folder / "student sdxl.safetensors", shape="tiny-sdxl", spec=make_spec(family="sdxl", clip_skip=2)
    )
    (folder / "asked.json").write_text(json.dumps({"families": families, "prompts": PROMPTS}))
    work(comfyui_host, WORKER, folder)
    return folder


def _host_name(teacher: Checkpoint, encoder: Any) -> str:
    if teacher.family == "sd2":
        return "clip_h"
    return "clip_l" if encoder.part == "text_encoder" else "clip_g"


def _asked(teacher: Checkpoint, encoder: Any) -> dict[str, Any]:
    config = teacher.config(encoder.part)
    end = config["eos_token_id"]
    layers = config["num_hidden_layers"] + encoder.unused_layers
    projected = config.get("projection_dim", config["hidden_size"])
    usual = {"layer": "hidden", "layer_idx": -2} if teacher.family != "sd1" else {}
    return {
        "config": config | {"num_hidden_layers": layers, "projection": projected},
        "special": {"start": end - 1, "end": end, "pad": 0 if encoder.naming == "open_clip" else end},
        "layer": usual | {"layer_norm_hidden_state": not encoder.penultimate},
    }


def _write_inversion(folder: Path, teacher: Checkpoint) -> None:
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(3)
    widths = [teacher.config(of.part)["hidden_size"] for of in teacher.of.text_encoders]
    vectors = [torch.randn(3, width, generator=generator) for width in widths]
    if len(vectors) == 2:
        save_file({"clip_g": vectors[1], "clip_l": vectors[0]}, folder / "style.safetensors")
    else:
        torch.save({"string_to_token": {"*": 265}, "string_to_param": {"*": vectors[0]}}, folder / "style.pt")


def _error(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.parametrize(("family", "skip"), [(f, skip) for f, skips in SKIPS.items() for skip in skips])
def test_every_kind_of_prompt_is_encoded_as_in_the_host(folder: Path, family: str, skip: int) -> None:
    (inversion,) = (folder / "embeddings" / family).iterdir()
    teacher = open_checkpoint(folder / f"{family}.safetensors")
    used = with_prompting(teacher, embeddings=[inversion], clip_skip=skip)
    ours = encode_prompts(list(PROMPTS.values()), load_encoders(used))
    theirs = load_file(folder / "answers.safetensors")
    lengths: set[int] = set()
    for row, label in enumerate(PROMPTS):
        expected = theirs[f"{family}/{skip}/{label}"]
        lengths.add(expected.shape[1])
        assert int(ours["length"][row]) == expected.shape[1], label
        assert _error(ours["text"][row : row + 1, : expected.shape[1]], expected) < 1e-5, label
        if family == "sdxl":
            assert _error(ours["pooled"][row : row + 1], theirs[f"{family}/{skip}/{label}/pooled"]) < 1e-5
    assert len(lengths) == 3, "one, two and three chunks"
    other = next(each for each in SKIPS[family] if each != skip)
    assert _error(theirs[f"{family}/{other}/plain"], theirs[f"{family}/{skip}/plain"]) > 1e-2


def test_the_loader_reads_the_layer_that_the_student_was_trained_on(folder: Path) -> None:
    told = json.loads((folder / "layers.json").read_text())
    assert {name: layer for name, (layer, _) in told.items()} == {
        "student": None,
        "student skipping": -2,
        "student sdxl": None,
    }
    lines = told["student skipping"][1]
    assert "clip skip 2" in lines and "rescaled cfg 0.7" in lines and "style" in lines
    assert "clip skip" not in told["student"][1]
