"""What the card of a shared student says is true: a ComfyUI without FewStep, set as it says, makes the
student's own picture.

ComfyUI's loader, samplers and schedulers run without its server. It gets the texts from the toolkit: text
encoders it builds of the true sizes only.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hosts.comfyui import Host
from hosts.reference import relative_error
from make_checkpoint import make_spec, make_student, make_tokenizer
from PIL import Image
from safetensors.torch import load_file, save_file
from test_share import card_settings
from torch import Tensor

from toolkit.diffusion.grid import trailing_timesteps
from toolkit.evaluation.painter import Painter
from toolkit.sharing import share
from toolkit.training.checkpoint import Checkpoint, open_checkpoint

GUIDANCE, SEED, PROMPT = 4.0, 11, "a red fox in deep snow"
STUDENTS: dict[str, dict[str, Any]] = {
    "epsilon": {"timesteps": trailing_timesteps(4)},
    "velocity": {"timesteps": trailing_timesteps(2), "prediction_type": "v_prediction"},
}

WORKER = """
import json, sys
from pathlib import Path

folder = Path(sys.argv[1])
sys.argv = [sys.argv[0], "--cpu"]
import torch

sys.path.insert(0, "")
import comfy.options

comfy.options.enable_args_parsing()
import comfy.sample
import comfy.sd
from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete
from safetensors.torch import load_file, save_file

mode = torch.inference_mode()  # in which ComfyUI runs nodes
mode.__enter__()
answers = {}
for name, asked in json.loads((folder / "asked.json").read_text()).items():
    text = load_file(folder / f"{name}.text.safetensors")["text"]
    model = comfy.sd.load_checkpoint_guess_config(asked["path"], output_vae=False, output_clip=False)[0]
    if "ModelSamplingDiscrete" in asked["node"]:
        model = ModelSamplingDiscrete().patch(model, "v_prediction", "zsnr" in asked["node"])[0]
    nothing = torch.zeros(asked["shape"])
    answers[name] = comfy.sample.sample(
        model,
        comfy.sample.prepare_noise(nothing, asked["seed"]),
        int(asked["steps"]),
        float(asked["cfg"]),
        asked["sampler"],
        asked["scheduler"],
        [[text, {}]],
        [[torch.zeros_like(text), {}]],
        nothing,
        seed=asked["seed"],
    ).float()
save_file(answers, folder / "answers.safetensors")
"""


@dataclass(frozen=True)
class Shared:
    """``found``: the host's latent, scaled as the toolkit's are."""

    student: Checkpoint
    shared: Checkpoint
    found: Tensor

    def latent(self, checkpoint: Checkpoint, guidance: float) -> Tensor:
        return Painter.open(checkpoint).latents([PROMPT], seeds=[SEED], guidance=guidance).x0


@pytest.fixture(scope="module")
def everything(comfyui_host: Host, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Shared]:
    folder = tmp_path_factory.mktemp("share")
    words = make_tokenizer(folder / "words")
    Image.new("RGB", (64, 64)).save(folder / "cover.png")
    asked: dict[str, Any] = {}
    opened: dict[str, tuple[Checkpoint, Checkpoint]] = {}
    for name, changes in STUDENTS.items():
        spec = make_spec(family="sd2", guidance_default=GUIDANCE, **changes)
        path = make_student(folder / f"{name}.safetensors", spec=spec, shape="comfy-sd2")
        student = open_checkpoint(path, tokenizer=words)
        files = share(student, folder / name, thumbnail=folder / "cover.png").files
        shared = open_checkpoint(files[0], tokenizer=words)
        opened[name] = student, shared
        painter = Painter.open(shared)
        save_file({"text": painter.texts([PROMPT])["text"].contiguous()}, folder / f"{name}.text.safetensors")
        card = card_settings((folder / name / "README.md").read_text(encoding="utf-8"))
        told = {key: card[key][0] for key in ("sampler", "scheduler", "steps", "cfg")}
        asked[name] = {
            **told,
            "node": card.get("prediction", ("", ""))[0],
            "path": str(files[0]),
            "seed": SEED,
            "shape": [1, *painter.latent_shape()],
        }
    (folder / "asked.json").write_text(json.dumps(asked))
    comfyui_host.run_script(WORKER, folder)
    answers = load_file(folder / "answers.safetensors")
    return {
        name: Shared(student, shared, answers[name] * student.scaling_factor)
        for name, (student, shared) in opened.items()
    }


@pytest.mark.parametrize("name", STUDENTS)
def test_a_stock_comfyui_set_as_the_card_says_makes_the_students_picture(
    everything: dict[str, Shared], name: str
) -> None:
    one = everything[name]
    assert relative_error(one.found, one.latent(one.shared, GUIDANCE)) < 1e-4
    rounding = relative_error(one.found, one.latent(one.student, GUIDANCE))
    other = relative_error(one.found, one.latent(one.student, GUIDANCE + 2))
    assert rounding < 0.03 and other > 5 * rounding, (rounding, other)


def test_the_pictures_are_not_all_alike(everything: dict[str, Shared]) -> None:
    founds = [one.found for one in everything.values()]
    assert all(torch.isfinite(found).all() and found.std() > 0.1 for found in founds)
    assert relative_error(founds[0], founds[1]) > 0.1
