"""``python -m toolkit.edit``, and what edits are measured by."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from make_checkpoint import make_spec, make_student, make_teacher, make_tokenizer
from PIL import Image
from torch import Tensor

from toolkit import edit
from toolkit.diffusion.errors import BadInput
from toolkit.evaluation.editing import Editor, score_edits
from toolkit.evaluation.painter import Painter
from toolkit.training.checkpoint import open_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    make_teacher(folder / "teacher.safetensors")
    make_student(folder / "decoder.safetensors", dial=0.1)
    encoder = make_spec(
        method="inversion", timesteps=(0, 499), direction="encode", w_embedding=None, guidance_max=1.0
    )
    make_student(folder / "encoder.safetensors", spec=encoder, dial=None)
    make_tokenizer(folder / "tokenizer")
    Image.effect_noise((35, 33), 60).convert("RGB").save(folder / "picture.png")
    return folder


def call(folder: Path, out: Path, *more: str, ckpt: str = "decoder", encoder: str = "encoder") -> None:
    edit.main(
        [
            *(
                "--ckpt",
                str(folder / f"{ckpt}.safetensors"),
                "--encoder",
                str(folder / f"{encoder}.safetensors"),
            ),
            *("--tokenizer", str(folder / "tokenizer"), "--image", str(folder / "picture.png")),
            *("--from", "a red circle", "--to", "a blue circle", "--device", "cpu", "-o", str(out), *more),
        ]
    )


def test_an_edit_is_written_in_the_pictures_size_and_told(folder, tmp_path, capsys):
    call(folder, tmp_path / "a.png", "--guidance", "3", "--json")
    with Image.open(tmp_path / "a.png") as image:
        assert image.size == (34, 32)
    said = json.loads(capsys.readouterr().out)
    assert said["guidance"] == 3 and said["evaluations"] == {"encoder": 2, "decoder": 4}


def test_a_picture_whose_file_lies_on_its_side_is_edited_upright(folder, tmp_path):
    turned = Image.Exif()
    turned[0x0112] = 6  # to be shown turned to the right, as telephones write portraits
    path = tmp_path / "side.png"
    Image.new("RGB", (40, 32)).save(path, exif=turned)
    call(folder, tmp_path / "a.png", "--image", str(path))
    with Image.open(tmp_path / "a.png") as image:
        assert image.size == (32, 40)


@pytest.mark.parametrize(
    ("models", "sentence"),
    [
        ({"ckpt": "encoder"}, "this is an encoder; give it as --encoder"),
        ({"encoder": "decoder"}, "takes an encoder"),
    ],
)
def test_models_in_each_others_places_are_refused(folder, tmp_path, models, sentence):
    with pytest.raises(BadInput, match=sentence):
        call(folder, tmp_path / "a.png", **models)
    with pytest.raises(BadInput, match="give -o a name"):
        call(folder, tmp_path / "a.jpg")


def test_a_teacher_that_goes_up_in_many_steps_comes_back_and_an_encoder_is_its_own_steps(folder):
    teacher, encoder = (
        Painter.open(open_checkpoint(folder / f"{name}.safetensors", tokenizer=folder / "tokenizer"))
        for name in ("teacher", "encoder")
    )
    x0, prompts = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0)), ["a", "b", "c"]

    def back(steps: int) -> float:
        noise = teacher.invert(x0, prompts, steps=steps)
        found = teacher.latents(prompts, seeds=range(3), noise=noise, guidance=1.0, steps=steps).x0
        return float((found - x0).abs().mean())

    errors = [back(steps) for steps in (4, 40)]
    assert errors[1] < errors[0] / 2
    noise = encoder.invert(x0, prompts)
    alone = encoder.invert(x0[1:2], prompts[1:2])
    assert noise.shape == x0.shape and torch.allclose(noise[1:2], alone, atol=1e-5)
    with pytest.raises(BadInput, match="trained for 2"):
        encoder.invert(x0, prompts, steps=3)
    with pytest.raises(BadInput, match="distilled from one teacher"):
        Editor(replace(encoder, size=(16, 16)), teacher)


def test_edits_are_scored_by_what_changed_and_what_stayed():
    class Judge:
        def attributes(self, images: Tensor) -> dict[str, Tensor]:
            return {"colour": images[:, 0, 0, 0].long(), "shape": images[:, 1, 0, 0].long()}

    def pictures(*values: tuple[int, int]) -> Tensor:
        return torch.tensor(values)[:, :, None, None].float()

    score = score_edits(
        Judge(),
        pictures((0, 0), (0, 0), (0, 0), (1, 1)),
        pictures((1, 0), (1, 1), (0, 0), (1, 2)),
        changed=["colour", "colour", "colour", "shape"],
        wanted=[1, 1, 1, 2],
    )
    assert (score.changed, score.kept, score.all_kept) == (0.75, 0.75, 0.75)
