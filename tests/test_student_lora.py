"""A run with --student lora, and what its files are to others: merged, in diffusers, exported again."""

from __future__ import annotations

import dataclasses
import json
import re
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from leaks import leaks
from make_checkpoint import make_teacher, make_tokenizer
from make_lora import ATTENTION, named, random_factors, save_lora, weights_of
from torch import Tensor

from toolkit import distill, evaluate
from toolkit.diffusion.errors import BadInput
from toolkit.diffusion.guidance import w_embedding
from toolkit.inspect import describe
from toolkit.runtime.files import load_tensors, read_metadata, read_spec, save_tensors
from toolkit.sharing import share
from toolkit.training import student_lora
from toolkit.training.checkpoint import Checkpoint, open_checkpoint
from toolkit.training.export import export_lora, pipeline_class, pipeline_scheduler
from toolkit.training.student_lora import compare_with_merged, save_lora_student, unet_of

LOW_RANK = re.compile(r"\.(lora_down\.weight|lora_up\.weight|alpha)$")
SHIFTED = ("lora_unet_time_embedding_linear_1.diff", "lora_unet_time_embedding_linear_1.diff_b")


def call(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["distill", *arguments])
    before = signal.getsignal(signal.SIGTERM)
    try:
        distill.main()
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("lora")
    make_teacher(folder / "tiny.safetensors", shape="tiny")
    make_tokenizer(folder / "tokenizer")
    return [
        *("--ckpt", str(folder / "tiny.safetensors"), "--tokenizer", str(folder / "tokenizer")),
        *("--out", str(folder / "run"), "--cache-dir", str(folder / "cache"), "--student", "lora"),
        *("--steps", "2", "--finest", "4", "--pictures", "4", "--updates", "4", "--batch-size", "2"),
        *("--guidance", "1", "8", "--guidance-default", "4", "--report-prompts", "0", "--device", "cpu"),
        *("--rank", "3", "--dtype", "fp32", "--lr", "0.01"),
    ]


@pytest.fixture(scope="module")
def run(arguments: list[str]) -> Path:
    with pytest.MonkeyPatch.context() as monkeypatch:
        call(arguments, monkeypatch)
    return Path(arguments[arguments.index("--out") + 1])


@pytest.fixture(scope="module")
def teacher(arguments: list[str]) -> Checkpoint:
    return open_checkpoint(arguments[1])


def ask(unet: Any, guidance: float | None) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    z, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 24, 64, generator=generator)
    embedded = None if guidance is None else w_embedding(torch.full((2,), guidance - 1))
    with torch.no_grad():
        return unet(z, torch.tensor([999, 321]), text, timestep_cond=embedded).sample


def test_a_lora_run_leaves_a_merged_student_and_its_lora_of_every_phase(
    run: Path, teacher: Checkpoint
) -> None:
    for name, steps in (("student", 2), ("students/2", 2), ("students/4", 4)):
        merged, lora = read_spec(run / f"{name}.safetensors"), read_spec(run / f"{name}-lora.safetensors")
        assert merged is not None and lora is not None and merged.lora_rank == lora.lora_rank == 3
        assert merged.steps == steps and merged.container == "checkpoint" and merged.baked_guidance is None
        assert lora.container == "lora" and lora.baked_guidance == 4 and lora.has_dial
        assert lora.prediction_type == "epsilon", "a 2-step LoRA keeps its teacher's prediction"
    tensors = load_tensors(run / "student-lora.safetensors")
    assert {key for key in tensors if not LOW_RANK.search(key)} == {*SHIFTED, "fewstep.cond_proj.weight"}
    assert all(key.startswith("lora_unet_") for key in tensors if LOW_RANK.search(key))
    assert all(bool(value.any()) for key, value in tensors.items() if key.endswith("lora_up.weight"))
    assert describe(run / "student-lora.safetensors")["kind"] == "lora"
    merged = open_checkpoint(run / "student.safetensors")
    assert not torch.allclose(ask(merged.unet(), 4.0), ask(teacher.unet(), None), atol=1e-3)
    assert [file.name for file in evaluate._student_files([run / "students"]).values()] == [
        "4.safetensors",
        "2.safetensors",
    ]


def test_the_lora_in_diffusers_own_loader_is_the_merged_student_at_the_baked_guidance(
    run: Path, teacher: Checkpoint
) -> None:
    spec = read_spec(run / "student.safetensors")
    assert spec is not None
    pipeline = pipeline_class()(
        **dict.fromkeys(("vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor")),
        unet=teacher.unet(),
        scheduler=pipeline_scheduler(spec),
        requires_safety_checker=False,
    )
    tensors = load_tensors(run / "student-lora.safetensors")
    with pytest.raises(ValueError, match="Invalid LoRA checkpoint"):
        pipeline.load_lora_weights(dict(tensors))  # why it is given the low-rank part alone
    pipeline.load_lora_weights({key: value for key, value in tensors.items() if LOW_RANK.search(key)})
    unet = pipeline.unet
    with torch.no_grad():
        for name, key in zip(("weight", "bias"), SHIFTED, strict=True):
            getattr(unet.time_embedding.linear_1, name).add_(tensors[key])
    expected = ask(open_checkpoint(run / "student.safetensors").unet(), 4.0)
    assert torch.allclose(ask(unet, None), expected, atol=1e-5, rtol=1e-5)


def test_resuming_a_finished_lora_run_changes_nothing(
    run: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (run / "student-lora.safetensors").read_bytes()
    call([*arguments, "--resume"], monkeypatch)
    assert (run / "student-lora.safetensors").read_bytes() == before
    with pytest.raises(BadInput, match=r"--rank 4 was asked for, but the run in .* has 3"):
        call(["--resume", "--out", str(run), "--rank", "4"], monkeypatch)


def test_a_lora_student_is_exported_at_another_guidance(
    run: Path, teacher: Checkpoint, tmp_path: Path
) -> None:
    student = open_checkpoint(run / "student.safetensors")
    exported = export_lora(student, tmp_path / "six.safetensors", guidance=6.0)
    assert exported.difference < 1e-5
    tensors, spec = load_tensors(tmp_path / "six.safetensors"), read_spec(tmp_path / "six.safetensors")
    assert spec is not None and spec.baked_guidance == 6 and spec.lora_rank == 3
    asked = student.spec and dataclasses.replace(student.spec, guidance_default=6.0)
    assert asked is not None
    error = compare_with_merged(
        tmp_path / "six.safetensors", student.tensors, base=unet_of(teacher), spec=asked
    )
    assert error < 1e-6
    old = load_tensors(run / "student-lora.safetensors")
    assert not torch.allclose(tensors[SHIFTED[1]], old[SHIFTED[1]], atol=1e-4)
    assert all(torch.equal(tensors[key], value) for key, value in old.items() if key != SHIFTED[1])


def test_a_lora_student_is_shared_with_its_lora_and_nothing_tells_a_path(
    run: Path, arguments: list[str], tmp_path: Path
) -> None:
    words = arguments[arguments.index("--tokenizer") + 1]
    student = open_checkpoint(run / "student.safetensors", tokenizer=words)
    shared = share(student, tmp_path / "upload", guidance=5.0)
    models = [file for file in shared.files if file.suffix == ".safetensors"]
    assert [file.name for file in models] == [
        "tiny-2steps-cfg5.safetensors",
        "tiny-2steps-cfg5-lora.safetensors",
    ]
    assert {value.dtype for value in load_tensors(models[1]).values()} == {torch.float16}
    spec, metadata = read_spec(models[1]), read_metadata(models[1])
    assert spec is not None and spec.container == "lora" and spec.baked_guidance == 5.0
    assert metadata["modelspec.architecture"].endswith("/lora") and "modelspec.thumbnail" in metadata
    card = shared.files[-1].read_text(encoding="utf-8")
    assert all(shared.hashes[file.name] in card for file in models) and "on tiny, the teacher" in card
    made = [path for path in run.rglob("*") if path.is_file() and "state" not in path.parts]
    kept = [path for path in made if path.name != "config.toml"]
    assert {"report.html", "run.jsonl", "student-lora.safetensors"} <= {path.name for path in kept}
    assert leaks([*kept, *shared.files], str(run.parent), str(tmp_path), "pytest-of-") == []


def test_a_lora_student_without_its_lora_beside_it_says_so(run: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone.safetensors"
    alone.write_bytes((run / "student.safetensors").read_bytes())
    with pytest.raises(BadInput, match=r"alone-lora\.safetensors beside it holds, and that file is missing"):
        export_lora(open_checkpoint(alone), tmp_path / "out.safetensors", guidance=4.0)
    (tmp_path / "alone-lora.safetensors").write_bytes((run / "students/4-lora.safetensors").read_bytes())
    with pytest.raises(BadInput, match=r"this is not the LoRA of alone\.safetensors"):
        export_lora(open_checkpoint(alone), tmp_path / "out.safetensors", guidance=4.0)


def trained_state(run: Path) -> dict[str, Tensor]:
    return torch.load(run / "state" / "phase-1.pt", weights_only=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_lora_file_in_any_dtype_is_the_merged_student_up_to_rounding(
    run: Path, teacher: Checkpoint, tmp_path: Path, dtype: torch.dtype
) -> None:
    spec = read_spec(run / "student.safetensors")
    assert spec is not None
    path = tmp_path / "student.safetensors"
    save_lora_student(path, trained_state(run), spec=spec, source=teacher, dtype=dtype)
    loaded = load_tensors(tmp_path / "student-lora.safetensors")
    assert {v.dtype for k, v in loaded.items() if "lora_down" in k} == {dtype}
    assert loaded["fewstep.cond_proj.weight"].dtype == torch.float32


@pytest.mark.parametrize("damaged", ["lora_up.weight", ".alpha", ".diff", ".diff_b"])
def test_a_lora_file_that_reads_back_otherwise_is_not_kept(
    run: Path, teacher: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damaged: str
) -> None:
    write, spec = student_lora.save_tensors, read_spec(run / "student.safetensors")

    def damage(tensors: dict[str, Tensor], metadata: dict[str, str], path: Path) -> Path:
        key = next(key for key in tensors if key.endswith(damaged))
        return write({**tensors, key: tensors[key] + 0.1}, metadata, path)

    monkeypatch.setattr(student_lora, "save_tensors", damage)
    assert spec is not None
    with pytest.raises(BadInput, match="differs from the merged student"):
        save_lora_student(
            tmp_path / "s.safetensors", trained_state(run), spec=spec, source=teacher, dtype=torch.float32
        )
    assert not (tmp_path / "s-lora.safetensors").exists()


def test_the_plan_says_how_the_student_is_trained_and_counts_its_files(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = {}
    for student in ("full", "lora"):
        varied = [*arguments[: arguments.index("--student")], *arguments[arguments.index("--steps") :]]
        if student == "full":
            del varied[varied.index("--rank") : varied.index("--rank") + 2]
        call(
            [*varied, "--student", student, "--out", str(tmp_path / "x"), "--dry-run", "--json"], monkeypatch
        )
        answers[student] = json.loads(capsys.readouterr().out)
    full, lora = answers["full"]["plan"], answers["lora"]["plan"]
    assert "student-lora.safetensors" in lora["files"] and "students/4-lora.safetensors" in lora["files"]
    assert not [name for name in full["files"] if "lora" in name]
    assert lora["memory_bytes"] < full["memory_bytes"] and lora["disk"]["state"] < full["disk"]["state"]
    assert answers["lora"]["reasons"]["velocity_at"].startswith("a LoRA keeps its teacher's prediction")
    assert answers["full"]["settings"]["rank"] is None


@pytest.mark.parametrize(
    ("extra", "sentence"),
    [
        (["--rank", "0"], "--rank 0: expected 1 to 1024"),
        (["--student", "full", "--rank", "4"], "--rank 4 is of a LoRA"),
    ],
)
def test_bad_input_is_one_sentence(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, extra: list[str], sentence: str
) -> None:
    with pytest.raises(BadInput, match=re.escape(sentence)):
        call([*arguments, *extra, "--out", str(tmp_path / "x")], monkeypatch)
    assert not (tmp_path / "x").exists()


def test_a_lora_of_other_layers_is_refused_by_name(run: Path, teacher: Checkpoint, tmp_path: Path) -> None:
    tensors, spec = load_tensors(run / "student-lora.safetensors"), read_spec(run / "student.safetensors")
    renamed = {key.replace("mid_block", "middle"): value for key, value in tensors.items()}
    save_tensors(renamed, {}, tmp_path / "x.safetensors")
    merged = load_tensors(run / "student.safetensors")
    assert spec is not None
    with pytest.raises(BadInput, match=r"lora_unet_middle.* is no layer of the teacher"):
        compare_with_merged(tmp_path / "x.safetensors", merged, base=unet_of(teacher), spec=spec)


def test_a_teacher_with_a_merged_lora_is_the_base_of_the_students(
    arguments: list[str],
    teacher: Checkpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    factors = random_factors(weights_of(teacher, ATTENTION))
    style = save_lora(tmp_path / "style.safetensors", named("kohya", teacher, factors))
    extra = ["--lora", f"{style}:0.8", "--origin", "pair", "--out", str(tmp_path / "run")]
    call([*arguments, *extra], monkeypatch)
    student = open_checkpoint(tmp_path / "run" / "student.safetensors")
    assert student.spec is not None and student.spec.loras[0].strength == 0.8
    exported = export_lora(student, tmp_path / "out.safetensors", guidance=4.0)
    assert "with what was merged into the teacher: style at 0.8" in exported.notes[0]
    with pytest.raises(BadInput, match="differs from the merged student"):
        compare_with_merged(
            tmp_path / "out.safetensors", student.tensors, base=unet_of(teacher), spec=student.spec
        )
