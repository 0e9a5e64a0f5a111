"""The folder that export --share writes: what is in it, what its card says, and what it keeps to itself."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from leaks import leaks
from make_checkpoint import make_spec, make_student, make_teacher, make_tokenizer
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from test_files import without_folders

from toolkit import export as command
from toolkit.diffusion.errors import BadInput
from toolkit.diffusion.spec import AppliedLora
from toolkit.evaluation.painter import Painter
from toolkit.evaluation.pictures import to_image
from toolkit.runtime.files import load_tensors, read_metadata, read_spec
from toolkit.runtime.stock import simple_timesteps, stock_settings
from toolkit.sharing import DIAL_ALONE, Card, Shared, share
from toolkit.training.checkpoint import Checkpoint, open_checkpoint

USER = "zaphod"
STEM = "dreamer-v1-4steps"
BAKED = f"{STEM}-cfg5"


@pytest.fixture(scope="module", autouse=True)
def person(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A home of a person with a name."""
    home = tmp_path_factory.mktemp("home") / USER
    home.mkdir()
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name in ("HOME", "USERPROFILE"):
            monkeypatch.setenv(name, str(home))
        for name in ("USER", "USERNAME", "LOGNAME"):
            monkeypatch.setenv(name, USER)
        yield home


def make(folder: Path, **spec: Any) -> Checkpoint:
    words = make_tokenizer(folder / "My Words")
    told = {"teacher_name": "dreamer v1", "loras": (AppliedLora("ink", "1" * 64, 0.8),), **spec}
    path = make_student(folder / "student.safetensors", spec=make_spec(**told))
    return open_checkpoint(path, tokenizer=words)


@pytest.fixture(scope="module")
def student(person: Path) -> Checkpoint:
    return make(person / "My Models")


@pytest.fixture(scope="module")
def shared(student: Checkpoint, person: Path) -> Shared:
    return share(student, person / "upload", guidance=5.0, licence="CreativeML Open RAIL-M")


@pytest.fixture
def png(tmp_path: Path) -> Path:
    """A person's picture, whose file tells where it was made."""
    chunks = PngInfo()
    chunks.add_itxt("workflow", f'{{"path": "/home/{USER}/x.png"}}')
    path = tmp_path / "cover.png"
    Image.new("RGB", (600, 300), (200, 30, 40)).save(path, pnginfo=chunks)
    return path


def said(*arguments: Any, **named: Any) -> str:
    with pytest.raises(BadInput) as caught:
        share(*arguments, **named)
    assert "\n" not in str(caught.value)
    return without_folders(str(caught.value))


def card_settings(text: str) -> dict[str, tuple[str, str]]:
    """The card's table: row -> what to set in ComfyUI and in A1111."""
    table = text.partition("## Settings\n\n")[2].partition("\n\n")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    assert rows[0][1:] == ["ComfyUI", "A1111, Forge"]
    return {name: (comfyui, a1111) for name, comfyui, a1111 in rows[2:]}


def test_the_folder_holds_a_baked_file_in_fp16_its_picture_and_the_card(shared: Shared) -> None:
    assert [file.name for file in shared.files] == [f"{BAKED}.safetensors", f"{BAKED}.png", "README.md"]
    assert sorted(path.name for path in shared.files[0].parent.iterdir()) == sorted(
        file.name for file in shared.files
    )
    tensors = load_tensors(shared.files[0])
    assert {value.dtype for value in tensors.values()} == {torch.float16}
    spec = read_spec(shared.files[0])
    assert spec is not None and spec.baked_guidance == 5.0 and spec.loras[0].name == "ink"
    assert 0 < shared.difference < 0.01


def test_the_metadata_name_origin_licence_use_and_hash_and_hold_a_small_picture(shared: Shared) -> None:
    found = read_metadata(shared.files[0])
    assert found["modelspec.license"] == "CreativeML Open RAIL-M"
    assert "dreamer v1" in found["modelspec.description"] and "ink at 0.8" in found["modelspec.description"]
    assert found["modelspec.usage_hint"] == "sampler euler, scheduler simple, 4 steps, cfg 1"
    content = shared.files[0].read_bytes()
    after = content[8 + int.from_bytes(content[:8], "little") :]
    assert found["modelspec.hash_sha256"] == "0x" + hashlib.sha256(after).hexdigest()
    kind, _, data = found["modelspec.thumbnail"].partition(",")
    picture = Image.open(io.BytesIO(base64.b64decode(data)))
    assert kind == "data:image/jpeg;base64" and max(picture.size) <= 256 and len(data) < 100_000


def test_the_card_says_how_to_run_it_what_it_is_and_its_hashes(shared: Shared) -> None:
    text = shared.files[-1].read_text(encoding="utf-8")
    assert card_settings(text) == {
        "sampler": ("euler", "Euler"),
        "scheduler": ("simple", "Simple"),
        "steps": ("4", "4"),
        "cfg": ("1", "1"),
        "size": ("32 x 32", "32 x 32"),
    }
    sha256 = hashlib.sha256(shared.files[0].read_bytes()).hexdigest()
    assert shared.hashes == {f"{BAKED}.safetensors": sha256}
    assert f"`{sha256[:10].upper()}` | `{sha256}`" in text
    assert "0" * 64 in text and "ink at 0.8" in text and "CreativeML Open RAIL-M" in text
    assert f"({BAKED}.png)" in text and DIAL_ALONE not in text


def test_the_pictures_own_text_makes_it_again_from_the_shared_file(shared: Shared, person: Path) -> None:
    picture = Image.open(shared.files[1])
    prompt, line = picture.text["parameters"].splitlines()  # pyright: ignore[reportAttributeAccessIssue]
    settings = dict(entry.split(": ") for entry in line.split(", "))
    assert settings["Model hash"] == shared.hashes[f"{BAKED}.safetensors"][:10]
    assert (settings["Sampler"], settings["Schedule type"], settings["CFG scale"]) == ("Euler", "Simple", "1")
    opened = open_checkpoint(shared.files[0], tokenizer=person / "My Models" / "My Words")
    again = to_image(Painter.open(opened).paint([prompt], seeds=[int(settings["Seed"])])[0])
    assert settings["Size"] == f"{again.width}x{again.height}"
    again = again.resize(picture.size, Image.Resampling.NEAREST)
    furthest = max(abs(a - b) for a, b in zip(again.tobytes(), picture.tobytes(), strict=True))
    assert furthest <= 3


def test_no_path_and_no_user_name_is_in_any_byte(shared: Shared, student: Checkpoint, png: Path) -> None:
    assert USER in str(student.path), "or nothing could leak"
    again = share(
        student,
        shared.files[0].parent.parent / "second",
        forms=("checkpoint",),
        licence=f"as in /home/{USER}/My Models/licence.txt",
        thumbnail=png,
    )
    assert leaks([*shared.files, *again.files], USER, str(student.path.parent), "My Models") == []
    assert "licence.txt" in again.files[-1].read_text(encoding="utf-8")


def test_a_dial_shared_alone_is_warned_of_and_beside_a_baked_file_it_is_not(
    student: Checkpoint, tmp_path: Path, png: Path, caplog: pytest.LogCaptureFixture
) -> None:
    alone = share(student, tmp_path / "alone", forms=("checkpoint",), thumbnail=png)
    text = alone.files[-1].read_text(encoding="utf-8")
    assert alone.notes[0] == DIAL_ALONE and DIAL_ALONE in text
    assert "euler" not in text and "cfg (the guidance) 1 to 15" in text
    assert "FewStep" in read_metadata(alone.files[0])["modelspec.usage_hint"]
    arguments = [str(student.path), "--share", "--to", "checkpoint", "--thumbnail", str(png)]
    command.main([*arguments, "-o", str(tmp_path / "alone")])
    assert [r.message for r in caplog.records if r.levelname == "WARNING"] == [f"note: {DIAL_ALONE}"]
    both = share(student, tmp_path / "both", forms=("checkpoint", "baked"), thumbnail=png)
    assert DIAL_ALONE not in both.notes and len(both.hashes) == 2


def test_shared_again_it_is_the_same_bytes_and_nobodys_folder_is_overwritten(
    student: Checkpoint, tmp_path: Path, png: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "upload"
    arguments = [str(student.path), "--share", "--guidance", "5", "--thumbnail", str(png), "--json"]
    written: list[dict[str, bytes]] = []
    for _ in range(2):
        command.main([*arguments, "-o", str(out)])
        written.append({path.name: path.read_bytes() for path in out.iterdir()})
    answer = json.loads(capsys.readouterr().out.partition("\n}\n")[0] + "\n}")
    assert written[0] == written[1] and answer["sha256"].keys() == {f"{BAKED}.safetensors"}
    assert any("no licence is stated" in note for note in answer["notes"])
    assert Image.open(out / f"{BAKED}.png").size == (256, 128)
    (out / "README.md").write_text("# Mine\n", encoding="utf-8")
    assert "holds other things (README.md)" in said(student, out, guidance=5.0, thumbnail=png)
    (out / "README.md").unlink()
    (out / "thesis.txt").touch()
    assert "thesis.txt" in said(student, out, guidance=5.0, thumbnail=png)


def test_what_cannot_be_shared_is_one_sentence(student: Checkpoint, tmp_path: Path, shared: Shared) -> None:
    assert "this is a teacher" in said(
        open_checkpoint(make_teacher(tmp_path / "teacher.safetensors")), tmp_path / "out"
    )
    assert "guidance 5 is baked into this file" in said(open_checkpoint(shared.files[0]), tmp_path / "out")
    assert "guidance 1 to 15" in said(student, tmp_path / "out", guidance=20.0)
    assert "read as a picture" in said(student, tmp_path / "out", thumbnail=student.path)
    encoder = make(tmp_path, direction="encode", timesteps=(0, 249, 499, 749), w_embedding=None)
    assert "encoder" in said(encoder, tmp_path / "out")
    for extra in (["--to", "diffusers"], ["--dtype", "fp32"]):
        with pytest.raises(BadInput):
            command.main([str(student.path), "--share", *extra, "-o", str(tmp_path / "out")])
    for extra in ([], ["--to", "baked", "--to", "lora"], ["--to", "baked", "--licence", "CC0"]):
        with pytest.raises(BadInput):
            command.main([str(student.path), *extra, "-o", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ({}, ("euler", "simple", True)),
        ({"timesteps": (999,)}, ("euler", "simple", True)),
        ({"timesteps": (999, 666, 332)}, ("euler", "simple", False)),
        ({"sampler": "consistency"}, ("lcm", "simple", True)),
        ({"sampler": "stochastic"}, None),
        ({"timesteps": (999, 640, 230)}, None),
    ],
)
def test_stock_settings_are_given_where_a_stock_host_can(
    spec: dict[str, Any], expected: tuple[str, str, bool] | None
) -> None:
    found = stock_settings(make_spec(**spec))
    assert (found and (found.sampler[0], found.scheduler[0], found.exact)) == expected
    assert found is None or found.cfg == 1


def test_the_hosts_simple_scheduler_is_known() -> None:
    assert simple_timesteps(4) == (999, 749, 499, 249)
    assert simple_timesteps(3) == (999, 666, 333)
    assert simple_timesteps(7) == (999, 857, 714, 571, 428, 285, 142)


def test_the_card_tells_each_host_what_a_v_student_and_other_grids_need(tmp_path: Path) -> None:
    velocity = make(tmp_path, prediction_type="v_prediction", ztsnr=True, clip_skip=2, loras=())
    assert velocity.spec is not None
    text = Card(velocity, velocity.spec, 4.0, None).text({"baked": "0" * 64}, "a.png", ["a note"])
    settings = card_settings(text)
    assert settings["prediction"][0].startswith("ModelSamplingDiscrete (v_prediction, zsnr)")
    assert ".yaml" in settings["prediction"][1]
    assert settings["CLIP layers"] == ("CLIP Set Last Layer: -2", "Clip skip: 2")
    assert "* a note" in text and "not stated" in text
    stochastic = make(tmp_path, sampler="stochastic")
    assert stochastic.spec is not None
    text = Card(stochastic, stochastic.spec, 4.0, None).text({"baked": "0" * 64}, "a.png", [])
    assert "install FewStep" in text and "euler" not in text


def test_a_name_from_a_foreign_file_stays_within_the_folder(tmp_path: Path) -> None:
    student = make(tmp_path, teacher_name="../../x|y:z\n# ä")
    assert student.spec is not None
    card = Card(student, student.spec, 4.5, None)
    assert re.fullmatch(r"[\w.-]+", card.name("baked")) and ".." not in card.name("baked")
    assert "\n# ä" not in card.text({"baked": "0" * 64}, "a.png", []).partition("\n")[2]
