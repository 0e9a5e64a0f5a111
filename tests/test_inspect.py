"""What a file is, in words and in JSON, and how a lost spec is put back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from make_checkpoint import TINY, make_spec, make_student, make_teacher, make_tensors

from toolkit.diffusion.errors import BadInput
from toolkit.inspect import describe, main
from toolkit.runtime.files import load_tensors, read_spec, save_tensors, sha256_of
from toolkit.training.checkpoint import open_checkpoint
from toolkit.training.export import export_baked, export_lora

CONV_IN = "model.diffusion_model.input_blocks.0.0.weight"


@pytest.fixture
def student(tmp_path: Path) -> Path:
    return make_student(tmp_path / "student.safetensors")


def merged(student: Path, path: Path) -> Path:
    """As a merger leaves it: the tensors without the metadata."""
    save_tensors(load_tensors(student), {}, path)
    return path


def test_a_teacher_is_described(tmp_path: Path) -> None:
    path = make_teacher(tmp_path / "teacher.safetensors", dtype=torch.float16)
    found = describe(path)
    assert (found["kind"], found["family"], found["inpaint"]) == ("teacher", "sd1", False)
    assert (found["prediction_type"], found["dtype"]) == ("epsilon", "fp16")
    assert (found["channels"], found["out_channels"]) == (4, 4) and found["spec"] is None
    assert found["sha256"] == sha256_of(path)
    assert found["parameters"]["total"] == sum(value.numel() for value in load_tensors(path).values())
    assert found["missing"] == found["extra"] == found["misshapen"] == found["damaged"] == []


def test_kinds_are_told_apart(student: Path, tmp_path: Path) -> None:
    opened = open_checkpoint(student)
    export_baked(opened, tmp_path / "baked.safetensors", guidance=4.0)
    export_lora(opened, tmp_path / "patch.safetensors", guidance=4.0)
    inpainting = make_teacher(tmp_path / "inpaint.safetensors", in_channels=9)
    tensors = make_tensors()
    vae = {key: value for key, value in tensors.items() if key.startswith("first_stage_model.")}
    save_tensors(vae, {}, tmp_path / "vae.safetensors")
    assert describe(student)["kind"] == "student" and describe(student)["dial"]
    assert describe(merged(student, tmp_path / "merged.safetensors"))["kind"] == "student"
    baked = describe(tmp_path / "baked.safetensors")
    assert baked["kind"] == "baked" and not baked["dial"] and baked["spec"]["baked_guidance"] == 4.0
    patch = describe(tmp_path / "patch.safetensors")
    assert patch["kind"] == "lora" and patch["family"] == "sd1" and patch["dial"]
    assert describe(inpainting)["inpaint"] and describe(inpainting)["channels"] == 9
    assert describe(tmp_path / "vae.safetensors")["kind"] == "vae"
    assert not describe(tmp_path / "vae.safetensors")["missing"]


def test_other_families_are_named(tmp_path: Path) -> None:
    key = "conditioner.embedders.1.model.ln_final.weight"
    save_tensors({key: torch.zeros(1), CONV_IN: torch.zeros(320, 4, 3, 3)}, {}, tmp_path / "xl.safetensors")
    found = describe(tmp_path / "xl.safetensors")
    assert (found["kind"], found["family"]) == ("teacher", "sdxl")


def test_what_is_wrong_with_a_file_is_listed(tmp_path: Path) -> None:
    tensors = make_tensors()
    removed = "first_stage_model.decoder.conv_out.bias"
    del tensors[removed]
    misshapen, damaged = "model.diffusion_model.out.0.bias", "model.diffusion_model.out.2.bias"
    tensors |= {misshapen: torch.zeros(3), damaged: torch.full((4,), float("nan"))}
    tensors |= {"model.diffusion_model.strange": torch.zeros(1), "model_ema.decay": torch.zeros(1)}
    save_tensors(tensors, {}, tmp_path / "broken.safetensors")
    found = describe(tmp_path / "broken.safetensors")
    assert found["missing"] == [removed] and found["extra"] == ["model.diffusion_model.strange"]
    assert found["damaged"] == [damaged]
    assert found["misshapen"] == [f"{misshapen} has shape 3, and 32 was expected"]


def test_a_lost_spec_is_put_back_without_touching_the_weights(
    student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = make_spec(prediction_type="v_prediction", timesteps=(999, 499))
    path = merged(student, tmp_path / "merged.safetensors")
    (tmp_path / "spec.json").write_text(spec.to_json(), encoding="utf-16")  # PowerShell's >
    before = load_tensors(path)
    main([str(path), "--attach-spec", str(tmp_path / "spec.json"), "--json"])
    assert json.loads(capsys.readouterr().out)["spec"]["timesteps"] == [999, 499]
    after = load_tensors(path)
    assert read_spec(path) == spec and set(after) == {*before, "v_pred"}
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert open_checkpoint(path).prediction_type == "v_prediction"


def test_the_json_of_a_student_is_a_spec_that_can_be_attached(
    student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([str(student), "--json"])
    spec = json.loads(capsys.readouterr().out)["spec"]
    (tmp_path / "spec.json").write_text(json.dumps(spec), encoding="utf-8")
    path = merged(student, tmp_path / "merged.safetensors")
    main([str(path), "--attach-spec", str(tmp_path / "spec.json")])
    assert read_spec(path) == read_spec(student) == make_spec()


@pytest.mark.parametrize("channels", [4, 9])
@pytest.mark.parametrize("family", TINY)
def test_a_stripped_student_of_every_family_is_recognised_and_mended(
    family: str, channels: int, tmp_path: Path
) -> None:
    spec = make_spec(family=family, inpaint=channels == 9, prediction_type="v_prediction", ztsnr=True)
    made = make_student(tmp_path / "s.safetensors", spec=spec, shape=TINY[family], in_channels=channels)
    tensors = {key: v.half() for key, v in load_tensors(made).items() if key not in ("v_pred", "ztsnr")}
    save_tensors(tensors, {"format": "pt"}, made)
    found = describe(made)
    assert (found["kind"], found["family"], found["inpaint"]) == ("student", family, channels == 9)
    assert found["spec"] is None and found["dial"] and found["missing"] == found["extra"] == []
    (tmp_path / "spec.json").write_text(spec.to_json(), encoding="utf-8")
    main([str(made), "--attach-spec", str(tmp_path / "spec.json")])
    opened = open_checkpoint(made)
    assert opened.spec == spec and opened.ztsnr and opened.prediction_type == "v_prediction"
    others = (
        make_spec(family="sd2" if family == "sd1" else "sd1"),
        make_spec(family=family, inpaint=channels == 4),
    )
    for other in (*others, make_spec(family=family, container="lora", baked_guidance=4.0)):
        (tmp_path / "spec.json").write_text(other.to_json(), encoding="utf-8")
        with pytest.raises(BadInput, match=r"the spec is of .*, and this is "):
            main([str(made), "--attach-spec", str(tmp_path / "spec.json")])
    assert open_checkpoint(made).spec == spec


def test_a_stripped_student_lora_is_mended(student: Path, tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    export_lora(open_checkpoint(student), path, guidance=4.0)
    spec = read_spec(path)
    assert spec is not None
    merged(path, path)
    assert describe(path)["spec"] is None and describe(path)["kind"] == "lora"
    (tmp_path / "spec.json").write_text(spec.to_json(), encoding="utf-8")
    main([str(path), "--attach-spec", str(tmp_path / "spec.json")])
    assert read_spec(path) == spec


def test_what_a_person_says_of_a_file_goes_before_what_was_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(make_teacher(tmp_path / "teacher.safetensors"))
    main([path, "--override", "prediction_type=v_prediction,ztsnr=true"])
    assert "predicts: v_prediction, zero-terminal SNR" in capsys.readouterr().out
    main([path, "--override", "family=sd2", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["family"] == "sd2" and found["prediction_type"] == "epsilon" and found["extra"]
    with pytest.raises(BadInput, match="family=sd3 is unknown"):
        main([path, "--override", "family=sd3"])


def test_a_spec_that_does_not_fit_is_refused_and_the_file_left_alone(student: Path, tmp_path: Path) -> None:
    teacher = make_teacher(tmp_path / "teacher.safetensors")
    before = teacher.read_bytes()
    (tmp_path / "spec.json").write_text(make_spec().to_json(), encoding="utf-8")
    (tmp_path / "bad.json").write_text('{"format": 1}', encoding="utf-8")
    with pytest.raises(BadInput, match="a dial of 256 numbers, and this is a student without guidance dial"):
        main([str(teacher), "--attach-spec", str(tmp_path / "spec.json")])
    with pytest.raises(BadInput, match="unknown or missing"):
        main([str(student), "--attach-spec", str(tmp_path / "bad.json")])
    with pytest.raises(BadInput, match="cannot be read"):
        main([str(student), "--attach-spec", str(tmp_path / "absent.json")])
    assert teacher.read_bytes() == before


def test_people_get_lines(student: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(student)])
    text = capsys.readouterr().out
    assert "student, Stable Diffusion 1" in text and "999, 749, 499, 249" in text


def test_unreadable_files_are_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "page.safetensors").write_text("<html></html>")
    with pytest.raises(BadInput, match="web page"):
        main([str(tmp_path / "page.safetensors")])
