"""``python -m toolkit.sample``: pictures, what is said, and what is refused."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from make_checkpoint import make_spec, make_student, make_teacher, make_tokenizer
from make_lora import ATTENTION, named, random_factors, save_lora, weights_of
from PIL import Image

from toolkit import opening, sample
from toolkit.diffusion.errors import BadInput
from toolkit.evaluation.painter import Painter
from toolkit.evaluation.pictures import to_image
from toolkit.training.checkpoint import open_checkpoint
from toolkit.training.lora import merge_loras, read_lora

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    make_teacher(folder / "teacher.safetensors")
    make_student(folder / "student.safetensors", spec=make_spec(negative="blurry"), dial=0.1)
    make_tokenizer(folder / "tokenizer")
    Image.new("RGB", (51, 33), (200, 30, 30)).save(folder / "start.png")
    return folder


def paint(folder: Path, out: Path, *more: str, ckpt: str = "student.safetensors") -> None:
    sample.main(
        [
            *("--ckpt", str(folder / ckpt), "--tokenizer", str(folder / "tokenizer"), "--device", "cpu"),
            *("--prompt", "a red fox", "-o", str(out), *more),
        ]
    )


def test_a_students_picture_is_the_painters_and_carries_its_settings(folder, tmp_path, caplog):
    caplog.set_level("INFO", "fewstep")
    paint(folder, tmp_path / "new" / "fox.png", "--guidance", "5", "--seed", "7")
    image = Image.open(tmp_path / "new" / "fox.png")
    checkpoint = open_checkpoint(folder / "student.safetensors", tokenizer=folder / "tokenizer")
    expected = Painter.open(checkpoint).paint(["a red fox"], seeds=[7], guidance=5)
    assert image.tobytes() == to_image(expected[0]).tobytes()
    assert image.text["parameters"] == (
        "a red fox\nNegative prompt: blurry\nSteps: 4, Sampler: FewStep, CFG scale: 5, Seed: 7, Size: 32x32, "
        "Model: student, FewStep timesteps: 999 749 499 249"
    )
    assert "guidance 5, 4 evaluations a picture at the timesteps 999, 749, 499, 249" in caplog.text


def test_guidance_one_is_said_to_be_unguided(folder, tmp_path, caplog):
    caplog.set_level("INFO", "fewstep")
    paint(folder, tmp_path / "a.png", "--guidance", "1")
    assert "unguided" in caplog.text


def test_count_gives_one_file_a_seed_and_json_lists_them(folder, tmp_path, capsys):
    paint(folder, tmp_path / "a.png", "--count", "2", "--seed", "3", "--json")
    paint(folder, tmp_path / "b.png", "--seed", "4")
    answer = json.loads(capsys.readouterr().out)
    assert [picture["seed"] for picture in answer["pictures"]] == [3, 4]
    assert (answer["evaluations"], answer["timesteps"]) == (4, [999, 749, 499, 249])
    assert not (tmp_path / "a.png").exists()
    two, one = (Image.open(tmp_path / name).convert("RGB") for name in ("a-4.png", "b.png"))
    differences = [abs(x - y) for x, y in zip(two.tobytes(), one.tobytes(), strict=True)]
    assert max(differences) <= 1


def test_image_to_image_starts_at_the_strength_and_keeps_the_pictures_size(folder, tmp_path, capsys):
    paint(
        folder, tmp_path / "a.png", "--init-image", str(folder / "start.png"), "--strength", "0.6", "--json"
    )
    assert json.loads(capsys.readouterr().out)["timesteps"] == [599, 499, 249]
    image = Image.open(tmp_path / "a.png")
    assert image.size == (50, 32) and "Denoising strength: 0.6" in image.text["parameters"]


def test_a_start_that_snaps_is_said(folder, tmp_path, caplog):
    caplog.set_level("INFO", "fewstep")
    make_student(folder / "snaps.safetensors", spec=make_spec(any_start=False), dial=0.1)
    start = ("--init-image", str(folder / "start.png"), "--strength", "0.6")
    paint(folder, tmp_path / "a.png", *start, ckpt="snaps.safetensors")
    assert "strength 0.6 is timestep 599, the nearest start it knows is 499" in caplog.text


def test_a_teacher_runs_with_either_sampler_and_a_negative_prompt(folder, tmp_path, capsys):
    for name, more in {"ddim": (), "dpmpp_2m": ("--sampler", "dpmpp_2m")}.items():
        paint(
            folder, tmp_path / f"{name}.png", "--steps", "3", "--negative", "grey", "--json", *more,
            ckpt="teacher.safetensors",
        )  # fmt: skip
        assert json.loads(capsys.readouterr().out)["evaluations"] == 6
        text = Image.open(tmp_path / f"{name}.png").text["parameters"]
        assert "Negative prompt: grey" in text and f"Sampler: {sample.HOST_NAMES[name]}" in text
    assert (tmp_path / "ddim.png").read_bytes() != (tmp_path / "dpmpp_2m.png").read_bytes()


def test_a_prompt_over_the_encoders_length_is_heard_to_its_end(folder, tmp_path):
    for name in ("xyz", "xya"):
        paint(folder, tmp_path / f"{name}.png", "--prompt", "abcdefghijklmnopqrstuvw" + name)
    first, second = (Image.open(tmp_path / f"{name}.png").tobytes() for name in ("xyz", "xya"))
    assert first != second


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--steps", "8"), r"student\.safetensors: 8 steps were asked for.*trained for 4"),
        (("--guidance", "99"), "99 was asked for.*1 to 15"),
        (("--negative", "ugly"), "'ugly' was asked for.*'blurry'"),
        (("--sampler", "ddim"), "brings its own"),
        (("--cfg-rescale", "0.5"), "distilled in, and this one's is 0"),
        (("--clip-skip", "9"), "have 2 layers"),
        (("--embedding", "none.pt"), r"none\.pt: no such file"),
        (("--prompt", "embedding:none"), "--embedding"),
        (("--strength", "0.5"), "--init-image"),
        (("--init-image", "start.png", "--strength", "1.5"), "above 0 and at most 1"),
        (("--init-image", "start.png", "--strength", "0"), "above 0 and at most 1"),
        (("--init-image", "tokenizer/merges.txt"), r"merges\.txt: not a picture"),
        (("--init-image", "none.png"), r"none\.png: not a picture"),
        (("--width", "31"), "multiples of 2"),
        (("--height", "0"), "multiples of 2"),
        (("--seed", "-1"), "seed must be"),
        (("--count", "0"), "count at least 1"),
        (("--device", "abacus"), "'abacus' cannot be used"),
        (("-o", "picture.jpg"), r"ends in \.png"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(folder, tmp_path, more, said):
    placed = [str(folder / word) if word.endswith((".png", ".txt")) else word for word in more]
    with pytest.raises(BadInput, match=said) as caught:
        paint(folder, tmp_path / "a.png", *placed)
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def test_a_folder_that_is_a_file_is_one_sentence(folder, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(BadInput, match="cannot be written"):
        paint(folder, tmp_path / "file" / "a.png")


def test_the_command_exits_with_two_and_one_line_on_bad_input(folder):
    done = subprocess.run(
        [sys.executable, "-m", "toolkit.sample", "--ckpt", "none.ckpt", "--prompt", "x", "-o", "a.png"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1 and not done.stdout


@pytest.fixture
def demo(folder, monkeypatch):
    """The test's teacher in the demo's place."""
    monkeypatch.setattr(opening, "TEACHER", folder / "teacher.safetensors")
    monkeypatch.setattr(opening, "TOKENIZER", folder / "tokenizer")
    opening._sha256.cache_clear()
    yield hashlib.sha256((folder / "teacher.safetensors").read_bytes()).hexdigest()
    opening._sha256.cache_clear()


def test_the_demos_teacher_and_its_students_find_the_demos_words(folder, tmp_path, demo):
    copy = tmp_path / "renamed.safetensors"
    copy.write_bytes((folder / "teacher.safetensors").read_bytes())
    own = make_student(tmp_path / "own.safetensors", spec=make_spec(teacher_sha256=demo))
    for path in (copy, own):
        assert opening.open_for_people(path).tokenizer_from == folder / "tokenizer"
    other = make_teacher(tmp_path / "other.safetensors", seed=1)
    assert other.stat().st_size == copy.stat().st_size
    for path in (other, folder / "student.safetensors"):
        assert opening.open_for_people(path).tokenizer_from is None
    told = opening.open_for_people(own, tokenizer=tmp_path)
    assert told.tokenizer_from == tmp_path


def test_the_precision_follows_the_device_unless_it_is_named():
    assert opening.choose_dtype(None, torch.device("cpu")) == torch.float32
    assert opening.choose_dtype(None, torch.device("cuda")) == torch.float16
    assert opening.choose_dtype("bf16", torch.device("cuda")) == torch.bfloat16


def test_a_lora_is_merged_into_what_is_sampled_and_stands_in_the_picture(folder, tmp_path):
    checkpoint = open_checkpoint(folder / "student.safetensors", tokenizer=folder / "tokenizer")
    factors = random_factors(weights_of(checkpoint, ATTENTION))
    style = save_lora(tmp_path / "style.safetensors", named("kohya", checkpoint, factors))
    paint(folder, tmp_path / "a.png", "--lora", f"{style}:0.5", "--guidance", "5")
    merged = merge_loras(checkpoint, [(read_lora(style), 0.5)])
    image = Image.open(tmp_path / "a.png")
    assert (
        image.tobytes()
        == to_image(Painter.open(merged).paint(["a red fox"], seeds=[0], guidance=5)[0]).tobytes()
    )
    assert (
        image.tobytes()
        != to_image(Painter.open(checkpoint).paint(["a red fox"], seeds=[0], guidance=5)[0]).tobytes()
    )
    assert "LoRAs: style 0.5" in image.text["parameters"]
