"""The main command on a tiny random checkpoint, as a person would call it."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from leaks import leaks
from make_checkpoint import make_teacher, make_tokenizer
from make_lora import ATTENTION, named, random_factors, save_lora, weights_of
from PIL import Image

from toolkit import assembly, distill
from toolkit.diffusion.errors import BadInput
from toolkit.evaluation.showcase import Showcase, showcase
from toolkit.runtime.files import load_tensors, read_spec, save_tensors, sha256_of
from toolkit.training import loop, plan
from toolkit.training.checkpoint import open_checkpoint
from toolkit.training.guests import Guests
from toolkit.training.prompts import with_triggers
from toolkit.training.samples import draw_batch

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    make_teacher(folder / "tiny.safetensors", shape="tiny", dtype=torch.float16)
    make_tokenizer(folder / "tokenizer")
    return folder


@pytest.fixture
def arguments(models, tmp_path) -> list[str]:
    return [
        *("--ckpt", str(models / "tiny.safetensors"), "--tokenizer", str(models / "tokenizer")),
        *("--out", str(tmp_path / "run"), "--cache-dir", str(tmp_path / "cache")),
        *("--steps", "2", "--finest", "4", "--pictures", "6", "--updates", "3", "--batch-size", "2"),
        *("--guidance", "1", "8", "--guidance-default", "4", "--report-prompts", "0", "--device", "cpu"),
    ]


@pytest.fixture(autouse=True)
def short_reference(monkeypatch) -> None:
    """Reports compare with a teacher of a few steps: their pictures are not the point here."""
    monkeypatch.setattr(assembly, "showcase", partial(showcase, reference_steps=5))


@pytest.fixture
def call(monkeypatch):
    def run(arguments: list[str]) -> None:
        monkeypatch.setattr(sys, "argv", ["distill", *arguments])
        before = signal.getsignal(signal.SIGTERM)
        try:
            distill.main()
        finally:
            signal.signal(signal.SIGTERM, before)

    return run


def test_a_run_without_any_network_leaves_students_report_and_log(arguments, call, tmp_path, monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the network was touched")

    for name in ("socket", "create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, refuse)
    call([*arguments, "--report-prompts", "1"])
    out = tmp_path / "run"
    written = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert written >= {
        *(
            "student.safetensors",
            "students/4.safetensors",
            "students/2.safetensors",
            "report.html",
            "run.jsonl",
        ),
        *("config.toml", "samples/start.png", "samples/guided.png", "samples/fold-2.png", "state/latest.pt"),
    }
    assert not [name for name in written if "partial" in name]
    shown = [out / name for name in written if not name.startswith(("config.toml", "state/"))]
    assert leaks(shown, str(tmp_path), "pytest-of-") == []
    spec = read_spec(out / "student.safetensors")
    assert spec is not None and spec.timesteps == (999, 499) and spec.prediction_type == "v_prediction"
    assert (spec.guidance_min, spec.guidance_max, spec.guidance_default) == (1, 8, 4)
    assert spec.teacher_sha256 == open_checkpoint(arguments[1]).sha256
    assert (out / "student.safetensors").read_bytes() == (out / "students/2.safetensors").read_bytes()
    page = (out / "report.html").read_text(encoding="utf-8")
    assert str(tmp_path) not in page and "fold-2" in page and "data:image/png" in page


def test_killed_at_any_moment_and_resumed_gives_the_same_student(arguments, call, tmp_path):
    call(arguments)
    whole = (tmp_path / "run" / "student.safetensors").read_bytes()
    arguments[arguments.index("--out") + 1] = str(tmp_path / "again")
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-m", "toolkit.distill", *arguments]
    deadline = time.monotonic() + 120
    for delay in (6, 9, 13):
        resume = ["--resume"] if (tmp_path / "again" / "config.toml").exists() else []
        process = subprocess.Popen(
            [*command, *resume],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            process.wait(timeout=delay)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        assert time.monotonic() < deadline
    resume = ["--resume"] if (tmp_path / "again" / "config.toml").exists() else []
    done = subprocess.run([*command, *resume], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "again" / "student.safetensors").read_bytes() == whole


def test_a_dry_run_prints_the_plan_and_writes_nothing(arguments, call, tmp_path, capsys):
    call([*arguments, "--dry-run", "--json"])
    answer = json.loads(capsys.readouterr().out)
    assert [phase["name"] for phase in answer["plan"]["phases"]] == ["guided", "fold-2"]
    assert [phase["evaluations"] for phase in answer["plan"]["phases"]] == [3 * 2 * 3, 3 * 2 * 2]
    assert answer["plan"]["sample_evaluations"] == 6 * 16 * 2
    assert answer["plan"]["memory_bytes"] > 0 and answer["plan"]["seconds"] > 0
    assert answer["reasons"]["steps"] == "you" and answer["settings"]["updates"] == [3, 3]
    assert not (tmp_path / "run").exists() and not (tmp_path / "cache").exists()


def test_a_plan_for_several_processes_says_what_each_takes(arguments, call, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    call([*arguments, "--dry-run", "--json"])
    plan = json.loads(capsys.readouterr().out)["plan"]
    assert (
        plan["processes"] == 2 and "1 picture at once, 2 processes with 1 of an update's 2" in plan["route"]
    )
    for extra, sentence in (
        ("--batch-size 3", "by 2 processes"),
        ("--device cuda:1", "leave out the number"),
    ):
        with pytest.raises(BadInput, match=sentence):
            call([*arguments, *extra.split(), "--dry-run"])
    monkeypatch.setenv("RANK", "1")
    call([*arguments, "--dry-run", "--json"])
    assert capsys.readouterr().out == ""


def test_a_training_step_that_does_not_fit_the_memory_is_not_tried(arguments, call, capsys, monkeypatch):
    monkeypatch.setattr(plan, "free_memory", lambda device: 0)
    call([*arguments, "--dry-run", "--json"])
    answer = json.loads(capsys.readouterr().out)["plan"]
    assert not answer["measured"] and answer["seconds"] > 0


def test_samples_are_found_again_by_a_later_run(arguments, call, tmp_path, capsys):
    call(arguments)
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.safetensors")}
    assert len(made) == 2
    arguments[arguments.index("--out") + 1] = str(tmp_path / "second")
    call([*arguments, "--updates", "1", "--origin", "pair"])
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.safetensors")} == made


def test_samples_of_another_vae_are_not_taken_for_these(arguments, call, tmp_path):
    call(arguments)
    other = make_teacher(tmp_path / "other.safetensors", shape="tiny", seed=1)
    arguments[arguments.index("--out") + 1] = str(tmp_path / "second")
    call([*arguments, "--vae", str(other)])
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_a_folder_of_pictures_can_be_the_data_and_what_is_wrong_with_it_is_said(
    arguments, call, tmp_path, caplog, capsys
):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(4):
        Image.effect_noise((40 + number, 50), 90).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_bytes(f"picture {number}".encode("utf-16"))
    (folder / "1.png").write_bytes(b"no picture")
    (folder / "2.png").write_bytes((folder / "2.png").read_bytes()[:1000])
    Image.new("RGB", (8, 8)).save(folder / "lonely.png")
    arguments += ["--data", str(folder), "--flip", "--json"]
    with caplog.at_level("INFO"):
        call(arguments)
    assert "1.png: not a picture" in caplog.text and "2.png: not a picture" in caplog.text
    assert "1 pictures without a caption are left out, lonely.png first" in caplog.text
    said = "2 pictures; 2 damaged ones were skipped"
    assert json.loads(capsys.readouterr().out)["data"] == said
    assert f"data: {said}" in caplog.messages[-1]
    assert said in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    (shard,) = (tmp_path / "cache").rglob("00000.safetensors")
    assert load_tensors(shard)["text"].tolist() == [1, 1, 3, 3]
    call([*arguments, "--resume"])
    (folder / "3.txt").write_text("another caption", encoding="utf-8")
    with pytest.raises(BadInput, match="the data or the prompts have changed since this run began"):
        call([*arguments, "--resume"])


def test_a_config_file_says_the_same_as_flags_and_flags_win(arguments, call, tmp_path):
    call(arguments)
    written = tmp_path / "run" / "config.toml"
    call(["--config", str(written), "--out", str(tmp_path / "copy")])
    assert (tmp_path / "copy/student.safetensors").read_bytes() == (
        tmp_path / "run/student.safetensors"
    ).read_bytes()
    with pytest.raises(BadInput, match='steps = "four"; expected a whole number'):
        written.write_text('steps = "four"\n', encoding="utf-8")
        call(["--config", str(written)])
    with pytest.raises(BadInput, match="top_share: not an option of method progressive"):
        written.write_text("top_share = 0.1\n", encoding="utf-8")
        call(["--config", str(written), *arguments])
    with pytest.raises(BadInput, match="unknown key stepz"):
        written.write_text("stepz = 3\n", encoding="utf-8")
        call(["--config", str(written)])


@pytest.mark.parametrize(
    ("extra", "sentence"),
    [
        (["--steps", "0"], "--steps 0: expected 1 to 128"),
        (["--guidance", "0.5", "8"], "expected 1 <= LO <= HI"),
        (["--guidance", "8", "2"], "expected 1 <= LO <= HI"),
        (["--guidance", "1", "nan"], "expected 1 <= LO <= HI"),
        (["--guidance-default", "9"], "lies outside --guidance 1 8"),
        (
            ["--method", "magic"],
            "--method magic: no such method; there are consistency, guided, inversion, progressive, sfddm",
        ),
        (["--updates", "1", "2", "3"], "this run has 2 phases (guided, fold-2)"),
        (["--updates", "0"], "every phase needs at least 1 update"),
        (["--resolution", "33"], "multiples of"),
        (["--resolution", "big"], "WIDTHxHEIGHT"),
        (["--device", "cuda:9"], "cannot use it"),
        (["--ckpt", "missing.safetensors"], "missing.safetensors"),
        (["--tokenizer", "nowhere"], "nowhere"),
        (["--prompts", "nowhere.txt"], "nowhere.txt: cannot be read"),
        (["--data", "nowhere"], "no such folder"),
        (["--data", str(ROOT / "web")], "no picture that can be used"),
        (["--flip"], "--flip mirrors the pictures of --data"),
        (["--prompts", __file__, "--prompt-style", "tags"], "leave one out"),
        (["--caption-dropout", "1.5"], "--caption-dropout 1.5: expected 0 to 1"),
        (["--lr", "0"], "--lr 0.0: expected a number above 0"),
        (["--resume"], "holds no run to go on with"),
        (["--finest", "0"], "must be at least 1"),
        (["--cache-dir", __file__ + "/cache"], "choose another --cache-dir"),
        (["--out", __file__ + "/out"], "cannot be written"),
    ],
)
def test_bad_input_is_one_sentence_and_nothing_is_written(arguments, call, tmp_path, extra, sentence):
    with pytest.raises(BadInput) as caught:
        call([*arguments, *extra])
    assert sentence in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_run_that_does_not_fit_the_disk_stops_before_it_writes(arguments, call, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1_000_000))
    with pytest.raises(BadInput, match=r"writes up to \d+ MiB, but the disk of .* has 1 MiB free"):
        call(arguments)
    assert not (tmp_path / "run").exists()


def test_another_run_is_not_overwritten_and_resuming_keeps_its_settings(arguments, call, tmp_path):
    call(arguments)
    before = (tmp_path / "run" / "student.safetensors").read_bytes()
    with pytest.raises(BadInput, match="holds a run already"):
        call(arguments)
    with pytest.raises(BadInput, match=r"--steps 4 was asked for, but the run in .* has 2"):
        call(["--resume", "--out", str(tmp_path / "run"), "--steps", "4"])
    call([*arguments, "--resume"])
    assert (tmp_path / "run" / "student.safetensors").read_bytes() == before


def test_a_damaged_teacher_and_a_student_as_teacher_are_refused(arguments, call, tmp_path, models):
    tensors = load_tensors(models / "tiny.safetensors")
    key = "cond_stage_model.transformer.text_model.final_layer_norm.weight"
    broken = tmp_path / "nan.safetensors"
    save_tensors({**tensors, key: tensors[key] * float("nan")}, {}, broken)
    with pytest.raises(BadInput, match="damaged"):
        call([*arguments, "--ckpt", str(broken)])
    assert not (tmp_path / "run").exists()
    call(arguments)
    with pytest.raises(BadInput, match="this is a student"):
        call(
            [
                *arguments,
                "--ckpt",
                str(tmp_path / "run" / "student.safetensors"),
                "--out",
                str(tmp_path / "b"),
            ]
        )


def test_the_command_ends_with_code_2_and_without_a_traceback():
    done = subprocess.run(
        [sys.executable, "-m", "toolkit.distill", "--ckpt", "no.safetensors"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr and done.stdout == ""
    assert len(done.stderr.strip().splitlines()[-1]) > 20


def test_a_lora_is_merged_first_recorded_and_part_of_what_samples_are_found_by(
    arguments, call, models, tmp_path, capsys
):
    teacher = open_checkpoint(models / "tiny.safetensors")
    tensors = named("kohya", teacher, random_factors(weights_of(teacher, ATTENTION)))
    style = save_lora(tmp_path / "style.safetensors", tensors, {"modelspec.trigger_phrase": "sks"})
    call([*arguments, "--lora", f"{style}:0.5", "--lora", str(style), "--dry-run", "--json"])
    said = json.loads(capsys.readouterr().out)["loras"]
    assert [(lora["name"], lora["strength"], lora["trigger_words"]) for lora in said] == [
        ("style", 0.5, ["sks"]),
        ("style", 1.0, ["sks"]),
    ]
    arguments[arguments.index("--updates") + 1] = "1"
    call([*arguments, "--lora", f"{style}:0.5", "--lr", "1e-12"])
    spec = read_spec(tmp_path / "run" / "student.safetensors")
    assert spec is not None and spec.teacher_sha256 == teacher.sha256
    assert [(lora.name, lora.sha256, lora.strength) for lora in spec.loras] == [
        ("style", sha256_of(style), 0.5)
    ]
    key = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q.weight"
    factors = [
        tensors[f"lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q.lora_{x}.weight"]
        for x in ("up", "down")
    ]
    trained = load_tensors(tmp_path / "run" / "students" / "4.safetensors")[key].float()
    merged = teacher.tensors[key].float() + 0.5 * factors[0] @ factors[1]
    assert torch.allclose(trained, merged, atol=2e-3)
    assert not torch.allclose(trained, teacher.tensors[key].float(), atol=2e-2)
    assert "style" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    caches = len(list((tmp_path / "cache").iterdir()))
    for number, strength in enumerate(("0.5", "0.6")):
        arguments[arguments.index("--out") + 1] = str(tmp_path / f"run-{number}")
        call([*arguments, "--lora", f"{style}:{strength}"])
    assert len(list((tmp_path / "cache").iterdir())) == caches + 1
    call([*arguments, "--lora", f"{style}:0.6", "--resume"])
    with pytest.raises(BadInput, match="--lora"):
        call([*arguments, "--lora", f"{style}:0.7", "--resume"])


def test_a_stopped_run_is_finished_early_goes_on_and_starts_another(
    arguments, call, tmp_path, monkeypatch, caplog
):
    step, steps = loop.PhaseTrainer.step, 0

    def stopping(self):
        nonlocal steps
        steps += 1
        if steps == 5:  # the second of the second phase
            signal.raise_signal(signal.SIGTERM)
        return step(self)

    out = tmp_path / "run"
    with pytest.raises(BadInput, match="holds no run to go on with"):
        call(["--finish", "--out", str(out)])
    monkeypatch.setattr(loop.PhaseTrainer, "step", stopping)
    with pytest.raises(KeyboardInterrupt):
        call(arguments)
    assert not (out / "student.safetensors").exists()
    call(["--finish", "--out", str(out)])
    spec = read_spec(out / "student.safetensors")
    assert spec is not None and spec.timesteps == (999, 499) and not (out / "students/2.safetensors").exists()
    says = "the student of phase fold-2 as it was after 2 of 3 updates"
    assert says in (out / "report.html").read_text(encoding="utf-8")
    so_far = (out / "student.safetensors").read_bytes()
    with caplog.at_level("INFO"):
        call(["--resume", "--out", str(out), "--watch"])
    assert "watch the run at http://127.0.0.1:" in caplog.text
    assert (
        (out / "student.safetensors").read_bytes() == (out / "students/2.safetensors").read_bytes() != so_far
    )
    place = arguments.index("--steps")
    del arguments[place : place + 2]
    arguments[arguments.index("--out") + 1] = str(tmp_path / "further")
    call([*arguments, "--init", str(out / "student.safetensors"), "--steps", "1"])
    spec = read_spec(tmp_path / "further" / "student.safetensors")
    assert spec is not None and spec.timesteps == (999,) and spec.guidance_max == 8
    assert [path.name for path in (tmp_path / "further" / "students").iterdir()] == ["1.safetensors"]
    page = (tmp_path / "further" / "report.html").read_text(encoding="utf-8")
    assert "a student of 2 steps, method progressive" in page
    assert "No pictures were compared (--report-prompts 0)" in page
    assert re.search(r"updates \d+</", page) and not re.search(r"[(\[][\d.]*,?[)\]]", page.split("Loss")[0])


def test_hours_choose_updates_and_method_and_say_why(arguments, call, tmp_path, capsys, caplog):
    for name in ("--updates", "--finest"):
        place = arguments.index(name)
        del arguments[place : place + 2]
    with caplog.at_level("INFO"):
        call([*arguments, "--hours", "1000", "--dry-run", "--json"])
    answer = json.loads(capsys.readouterr().out)
    assert "1000 h allow 4 times the usual updates of method progressive" in caplog.text
    assert answer["settings"]["updates"] == [6000, 2400, 2400, 3200]
    assert answer["reasons"]["updates"] == "--hours 1000"
    with pytest.raises(BadInput, match=r"--hours 1e-05 is too short on this machine: .* take about .* h"):
        call([*arguments, "--hours", "0.00001"])
    with pytest.raises(BadInput, match="leave out --updates"):
        call([*arguments, "--hours", "1", "--updates", "3"])
    with pytest.raises(BadInput, match="--hours 0: expected a number above 0"):
        call([*arguments, "--hours", "0"])
    assert not (tmp_path / "run").exists()


def test_a_single_fold_to_a_list_of_timesteps_stochastic_unguided_and_as_a_lora(arguments, call, tmp_path):
    for name in ("--finest", "--guidance-default"):
        place = arguments.index(name)
        del arguments[place : place + 2]
    arguments[arguments.index("--guidance") + 2] = "1"
    wanted = ["--method", "sfddm", "--timesteps", "999", "320", "--sampler", "stochastic", "--rank", "2"]
    wanted += ["--on-policy", "0.5", "--inside", "0", "--resolution", "64x32"]
    call([*arguments, *wanted, "--report-prompts", "1"])
    out = tmp_path / "run"
    assert open_checkpoint(out / "student.safetensors").resolution == (64, 32)
    assert "64 x 32" in (out / "report.html").read_text(encoding="utf-8")
    for file, container in (("student", "checkpoint"), ("student-lora", "lora")):
        spec = read_spec(out / f"{file}.safetensors")
        assert spec is not None and spec.timesteps == (999, 320) and spec.sampler == "stochastic"
        assert spec.w_embedding is None and not spec.has_dial and spec.baked_guidance is None
        assert (spec.guidance_min, spec.guidance_max, spec.guidance_default) == (1, 1, 1)
        assert spec.container == container and spec.method == "sfddm" and not spec.any_start
        assert not [key for key in load_tensors(out / f"{file}.safetensors") if "cond_proj" in key]
    (shard,) = (tmp_path / "cache").rglob("00000.safetensors")
    assert load_tensors(shard)["states"].shape[1] == 16
    call(["--resume", "--out", str(out)])


def test_an_encoder_has_no_dial_an_ascending_grid_and_a_report_of_round_trips(arguments, call, tmp_path):
    del arguments[arguments.index("--finest") : arguments.index("--finest") + 2]
    call([*arguments, "--method", "inversion", "--report-prompts", "2"])
    out = tmp_path / "run"
    spec = read_spec(out / "student.safetensors")
    assert spec is not None and spec.direction == "encode" and spec.timesteps == (0, 499)
    assert spec.w_embedding is None and spec.guidance_max == 1 and not spec.any_start
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "dB PSNR" in page and "data:image/png" in page


def test_trigger_words_stand_in_every_second_prompt():
    assert with_triggers(["a", "b", "c"], ["sks", "art"]) == ["sks, art, a", "b", "sks, art, c"]
    assert with_triggers(["a", "b"], []) == ["a", "b"]


def test_a_lora_beside_the_run_changes_the_student_and_is_measured(
    arguments, call, models, tmp_path, monkeypatch
):
    teacher = open_checkpoint(models / "tiny.safetensors")
    tensors = named("kohya", teacher, random_factors(weights_of(teacher, ATTENTION)))
    style = save_lora(tmp_path / "style.safetensors", tensors)
    before = style.read_bytes()
    asked = set()

    def spied(*rest, trajectory_share, **more):
        asked.add((present.now, trajectory_share))
        return draw_batch(*rest, trajectory_share=trajectory_share, **more)

    present = SimpleNamespace(now=False)

    @contextmanager
    def visit(self, generator):
        with whole_visit(self, generator) as visited:
            present.now = visited
            yield visited

    whole_visit = Guests.visit
    monkeypatch.setattr(Guests, "visit", visit)
    monkeypatch.setattr(loop, "draw_batch", spied)
    monkeypatch.setattr(assembly, "showcase", lambda *_, **__: Showcase((), (), None))
    call([*arguments, "--report-prompts", "0"])
    plain = (tmp_path / "run" / "student.safetensors").read_bytes()
    lora = ["--student", "lora", "--rank", "2"]
    for name, more in (("full", ["--report-prompts", "1"]), ("lora", [*lora, "--report-prompts", "0"])):
        out = tmp_path / name
        arguments[arguments.index("--out") + 1] = str(out)
        call([*arguments, *more, "--with-lora", f"{style}:0.5-1"])
        assert (out / "student.safetensors").read_bytes() != plain
    assert "it acts as in the teacher at" in (tmp_path / "full" / "report.html").read_text(encoding="utf-8")
    spec = read_spec(tmp_path / "full" / "student.safetensors")
    assert spec is not None and spec.loras == ()
    assert style.read_bytes() == before
    assert asked == {(False, 0.5), (True, 0.0)}, "kept trajectories are those without the LoRA"
