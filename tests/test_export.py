"""Exports: the same answers in another program's form, and nothing kept that answers otherwise."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from leaks import leaks
from make_checkpoint import TINY, make_spec, make_student, make_teacher, make_tokenizer
from test_files import without_folders
from torch import Tensor

from toolkit import export as command
from toolkit.diffusion.errors import BadInput
from toolkit.diffusion.guidance import w_embedding
from toolkit.runtime.files import load_tensors, read_metadata, read_spec, save_tensors
from toolkit.training import export
from toolkit.training.checkpoint import Checkpoint, open_checkpoint
from toolkit.training.export import export_baked, export_checkpoint, export_diffusers, export_lora
from toolkit.training.layout import COND_PROJ

PREDICTIONS = ("epsilon", "v_prediction")
TELLING = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"
SHIFTED = "model.diffusion_model.time_embed.0.bias"


@pytest.fixture(scope="module", params=PREDICTIONS)
def student(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return make(tmp_path_factory.mktemp("student"), prediction_type=request.param)


@pytest.fixture(scope="module")
def epsilon(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return make(tmp_path_factory.mktemp("epsilon"))


def make(folder: Path, **spec: Any) -> Checkpoint:
    path = make_student(folder / "student.safetensors", spec=make_spec(**spec))
    return open_checkpoint(path, tokenizer=make_tokenizer(folder / "words"))


def answer(unet: Any, *, guidance: float | None, seed: int = 7) -> Tensor:
    """The network's answer to a random input; guidance None runs without the dial."""
    generator = torch.Generator().manual_seed(seed)
    z, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 24, 64, generator=generator)
    embedded = None if guidance is None else w_embedding(torch.full((2,), guidance - 1))
    with torch.no_grad():
        return unet(z, torch.tensor([999, 321]), text, timestep_cond=embedded).sample


def said(call: Callable[..., Any], *arguments: Any, **named: Any) -> str:
    with pytest.raises(BadInput) as caught:
        call(*arguments, **named)
    assert "\n" not in str(caught.value)
    return without_folders(str(caught.value))


def test_the_dial_of_the_fixture_does_something(student: Checkpoint) -> None:
    unet = student.unet()
    assert float((answer(unet, guidance=2.0) - answer(unet, guidance=8.0)).abs().max()) > 0.05


def test_a_checkpoint_export_is_the_student_bit_for_bit(student: Checkpoint, tmp_path: Path) -> None:
    exported = export_checkpoint(student, tmp_path / "out.safetensors")
    found = open_checkpoint(tmp_path / "out.safetensors")
    assert exported.difference == 0 and found.spec == student.spec and found.kind == "student"
    assert found.prediction_type == student.prediction_type
    assert all(torch.equal(found.tensors[key], value) for key, value in student.tensors.items())


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float16, 0.01), (torch.bfloat16, 0.1)])
def test_a_dtype_is_applied_to_everything_and_changes_answers_by_rounding(
    epsilon: Checkpoint, tmp_path: Path, dtype: torch.dtype, bound: float
) -> None:
    exported = export_checkpoint(epsilon, tmp_path / "out.safetensors", dtype=dtype)
    tensors = load_tensors(tmp_path / "out.safetensors")
    assert {value.dtype for value in tensors.values()} == {dtype}
    assert 0 < exported.difference < bound


@pytest.mark.parametrize("guidance", [1.0, 4.0, 15.0])
def test_a_baked_file_equals_the_live_student_at_its_guidance(
    student: Checkpoint, tmp_path: Path, guidance: float
) -> None:
    path = tmp_path / "baked.safetensors"
    exported = export_baked(student, path, guidance=guidance)
    found = open_checkpoint(path)
    live = answer(student.unet(), guidance=guidance)
    assert torch.allclose(answer(found.unet(), guidance=None), live, atol=1e-5, rtol=1e-5)
    assert exported.difference < 1e-5
    assert (
        found.kind == "baked" and not found.conditioned and found.prediction_type == student.prediction_type
    )
    assert student.spec is not None
    assert found.spec == dataclasses.replace(student.spec, baked_guidance=guidance, guidance_default=guidance)


def test_a_baked_v_student_tells_every_host_so(tmp_path: Path) -> None:
    student = make(tmp_path, prediction_type="v_prediction")
    exported = export_baked(student, tmp_path / "baked.safetensors", guidance=4.0)
    assert "v_pred" in load_tensors(tmp_path / "baked.safetensors")
    assert read_metadata(tmp_path / "baked.safetensors")["modelspec.prediction_type"] == "v"
    yaml = pytest.importorskip("yaml").safe_load((tmp_path / "baked.yaml").read_text(encoding="utf-8"))
    params = yaml["model"]["params"]
    assert params["parameterization"] == "v"
    assert params["unet_config"]["params"]["channel_mult"] == [1, 2]
    assert params["unet_config"]["params"]["attention_resolutions"] == [1]
    assert params["first_stage_config"]["params"]["ddconfig"]["ch_mult"] == [1, 2]
    assert exported.files == (tmp_path / "baked.safetensors", tmp_path / "baked.yaml")
    assert any("cannot tell of Stable Diffusion 1: put ModelSampling" in note for note in exported.notes)


def test_what_comfyui_makes_of_a_baked_v_student_is_said_by_family(tmp_path: Path) -> None:
    """That ComfyUI does so is tested with its own code."""
    notes: dict[str, str] = {}
    for name, family, telling in (("sd2", "sd2", 0.0), ("sd2 v", "sd2", 0.2), ("sdxl", "sdxl", 0.0)):
        spec = make_spec(family=family, prediction_type="v_prediction")
        path = make_student(tmp_path / f"{name}.safetensors", spec=spec, shape=TINY[family])
        student = open_checkpoint(path)
        bias = telling * torch.tensor([-1.0, 1.0])
        student = dataclasses.replace(student, tensors={**student.tensors, TELLING: bias})
        notes[name] = export._comfyui_note(student)
    assert "cannot tell of Stable Diffusion 2" in notes["sd2"] and "statistic" in notes["sd2 v"]
    assert "v_pred" in notes["sdxl"] and "ModelSampling" not in notes["sdxl"]


def test_a_baked_epsilon_student_needs_nothing_beside_it(epsilon: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    velocity = make(tmp_path / "other", prediction_type="v_prediction")
    export_baked(velocity, tmp_path / "baked.safetensors", guidance=4.0)
    exported = export_baked(epsilon, tmp_path / "baked.safetensors", guidance=4.0)
    assert exported.files == (tmp_path / "baked.safetensors",)
    assert not (tmp_path / "baked.yaml").exists(), "the earlier export's .yaml would make hosts predict v"
    assert "v_pred" not in load_tensors(tmp_path / "baked.safetensors")


def test_somebody_elses_yaml_is_not_overwritten(epsilon: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "baked.yaml").write_text("model: {}\n", encoding="utf-8")
    assert "baked.yaml" in said(export_baked, epsilon, tmp_path / "baked.safetensors", guidance=4.0)
    assert os.listdir(tmp_path) == ["baked.yaml"]


def test_the_patch_is_the_baked_shift_in_the_keys_that_hosts_read(
    student: Checkpoint, tmp_path: Path
) -> None:
    export_lora(student, tmp_path / "patch.safetensors", guidance=4.0)
    patch = load_tensors(tmp_path / "patch.safetensors")
    name = "lora_unet_time_embedding_linear_1"
    assert set(patch) == {f"{name}.diff", f"{name}.diff_b", "fewstep.cond_proj.weight"}
    assert patch[f"{name}.diff"].shape == (128, 32) and not patch[f"{name}.diff"].any()
    assert torch.equal(patch["fewstep.cond_proj.weight"], student.tensors[COND_PROJ])
    export_baked(student, tmp_path / "baked.safetensors", guidance=4.0)
    baked = load_tensors(tmp_path / "baked.safetensors", keys=[SHIFTED])[SHIFTED]
    assert torch.allclose(student.tensors[SHIFTED] + patch[f"{name}.diff_b"], baked, atol=1e-6)
    spec = read_spec(tmp_path / "patch.safetensors")
    assert spec is not None and spec.container == "lora" and spec.baked_guidance == 4.0
    metadata = read_metadata(tmp_path / "patch.safetensors")
    assert metadata["modelspec.architecture"] == "stable-diffusion-v1/lora"


def test_a_diffusers_folder_opens_again_as_the_same_student(student: Checkpoint, tmp_path: Path) -> None:
    exported = export_diffusers(student, tmp_path / "folder")
    found = open_checkpoint(tmp_path / "folder")
    assert exported.difference == 0 and found.spec == student.spec and found.kind == "student"
    assert found.prediction_type == student.prediction_type and found.resolution == student.resolution
    assert all(torch.equal(found.tensors[key], value) for key, value in student.network_tensors().items())
    assert found.tokenizer()("a cat").input_ids == student.tokenizer()("a cat").input_ids
    config = json.loads((tmp_path / "folder" / "unet" / "config.json").read_text())
    assert config["time_cond_proj_dim"] == 256 and config["sample_size"] == 16
    scheduler = json.loads((tmp_path / "folder" / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["prediction_type"] == student.prediction_type
    assert {key: scheduler[key] for key in ("solver_order", "algorithm_type", "final_sigmas_type")} == {
        "solver_order": 1,
        "algorithm_type": "dpmsolver++",
        "final_sigmas_type": "zero",
    }
    assert scheduler["timestep_spacing"] == "trailing"
    files = [file for file in (tmp_path / "folder").rglob("*") if file.is_file()]
    assert leaks(files, str(tmp_path), str(student.path.parent), "pytest-of-") == []


def test_a_folder_again_is_the_same_bytes(epsilon: Checkpoint, tmp_path: Path) -> None:
    for name in ("a", "b"):
        export_diffusers(epsilon, tmp_path / name)
    files = sorted(file.relative_to(tmp_path / "a") for file in (tmp_path / "a").rglob("*") if file.is_file())
    assert len(files) > 8
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file


def test_grids_that_stock_diffusers_cannot_walk_are_said_to_be(tmp_path: Path) -> None:
    student = make(tmp_path, timesteps=(999, 600, 100))
    exported = export_diffusers(student, tmp_path / "folder")
    assert any("cannot walk" in note for note in exported.notes)


def test_an_export_that_answers_otherwise_is_not_kept(
    epsilon: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "_shift", lambda *_: torch.ones(128, dtype=torch.float64))
    for make_export in (export_baked, export_lora):
        text = said(make_export, epsilon, tmp_path / "out.safetensors", guidance=4.0)
        assert "answers differently" in text
    assert os.listdir(tmp_path) == []


def test_a_file_that_reads_back_otherwise_is_not_kept(
    epsilon: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = export.write_checkpoint

    def damage(path: Path, *, tensors: dict[str, Tensor], **rest: Any) -> None:
        key = "first_stage_model.decoder.conv_in.bias"
        write(path, tensors={**tensors, key: tensors[key] + 1}, **rest)

    monkeypatch.setattr(export, "write_checkpoint", damage)
    text = said(export_checkpoint, epsilon, tmp_path / "out.safetensors")
    assert "conv_in.bias" in text and os.listdir(tmp_path) == []


def test_only_earlier_exports_are_overwritten(epsilon: Checkpoint, tmp_path: Path) -> None:
    export_baked(epsilon, tmp_path / "out.safetensors", guidance=2.0)
    export_baked(epsilon, tmp_path / "out.safetensors", guidance=3.0)
    spec = read_spec(tmp_path / "out.safetensors")
    assert spec is not None and spec.baked_guidance == 3.0
    export_diffusers(epsilon, tmp_path / "folder")
    export_diffusers(epsilon, tmp_path / "folder")
    teacher = make_teacher(tmp_path / "teacher.safetensors")
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("x")
    for path, call in (
        (teacher, export_checkpoint),
        (tmp_path / "precious", export_diffusers),
        (tmp_path / "out.safetensors", export_diffusers),
    ):
        assert "exists already" in said(call, epsilon, path)
    assert "the student itself" in said(export_checkpoint, epsilon, epsilon.path)
    assert (tmp_path / "precious" / "thesis.txt").exists()


def test_what_cannot_be_exported_is_one_sentence(epsilon: Checkpoint, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    teacher = open_checkpoint(make_teacher(tmp_path / "teacher.safetensors"))
    assert "this is a teacher" in said(export_checkpoint, teacher, out)
    nameless = dataclasses.replace(epsilon, spec=None)
    assert "--attach-spec" in said(export_baked, nameless, out, guidance=2.0)
    assert "guidance 1 to 15" in said(export_baked, epsilon, out, guidance=20.0)
    assert ".safetensors" in said(export_checkpoint, epsilon, tmp_path / "out.ckpt")
    plain = {key: value for key, value in epsilon.tensors.items() if key != COND_PROJ}
    undialled = dataclasses.replace(epsilon, tensors=plain, spec=make_spec(w_embedding=None))
    assert "no guidance dial" in said(export_baked, undialled, out, guidance=2.0)
    assert export_checkpoint(undialled, out).difference == 0
    bias = torch.full_like(epsilon.tensors["first_stage_model.quant_conv.bias"], float("nan"))
    damaged = dataclasses.replace(
        epsilon, tensors={**epsilon.tensors, "first_stage_model.quant_conv.bias": bias}
    )
    assert "NaN" in said(export_checkpoint, damaged, out)


def test_leftovers_of_training_stay_behind(epsilon: Checkpoint, tmp_path: Path) -> None:
    extra = {"model_ema.decay": torch.ones(1), "model.diffusion_model.strange.weight": torch.ones(1)}
    save_tensors({**epsilon.tensors, **extra}, read_metadata(epsilon.path), tmp_path / "fat.safetensors")
    export_checkpoint(open_checkpoint(tmp_path / "fat.safetensors"), tmp_path / "out.safetensors")
    assert set(load_tensors(tmp_path / "out.safetensors")) == set(epsilon.tensors)


def test_the_command_says_what_it_did(
    epsilon: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "baked.safetensors"
    command.main(
        [str(epsilon.path), "--to", "baked", "--guidance", "4", "--dtype", "fp16", "--json", "-o", str(out)]
    )
    found = json.loads(capsys.readouterr().out)
    assert found["files"] == [str(out)] and found["max_difference"] < 0.01
    assert "--guidance" in said(
        command.main, [str(epsilon.path), "--to", "checkpoint", "--guidance", "4", "-o", str(out)]
    )
