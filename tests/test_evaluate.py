"""Evaluations: what is compared with what, rows, resuming, and the command."""

from __future__ import annotations

import argparse
import html
import json
from dataclasses import replace

import pytest
import torch
from make_checkpoint import make_spec, make_student, make_teacher, make_tokenizer
from make_lora import ATTENTION, named, random_factors, save_lora, weights_of
from torch import Tensor

from toolkit import evaluate
from toolkit.diffusion.errors import BadInput
from toolkit.diffusion.grid import trailing_timesteps
from toolkit.evaluation.evaluate import Evaluation, FolderStore, MemoryStore, Request, Yardstick, table
from toolkit.evaluation.metrics import frechet_distance
from toolkit.evaluation.painter import Painter
from toolkit.evaluation.pictures import save_png, to_image
from toolkit.evaluation.showcase import showcase, side_by_side, verdict
from toolkit.evaluation.standing import standings
from toolkit.training.checkpoint import open_checkpoint

PROMPTS = tuple(f"prompt {number}" for number in range(8))
ROW_NAMES = {
    "task", "model", "name", "noise", "sampler", "steps", "evaluations", "guidance", "strength", "samples",
    "adherence", "frechet_real", "frechet_teacher", "frechet_ratio", "kernel_teacher", "precision", "recall",
    "psnr_teacher", "colour", "contrast", "sharpness", "clip_score", "seconds_per_image", "paired_teacher",
    "paired_ratio", "prompt_lost", "prompt_ratio", "width", "height",
}  # fmt: skip


class EvenJudge:
    """Right for prompts with an even number; features are the mean colours."""

    def adherence(self, images: Tensor, captions: list[str]) -> Tensor:
        return torch.tensor([int(caption.split()[1]) % 2 == 0 for caption in captions])

    def features(self, images: Tensor) -> Tensor:
        return images.mean((2, 3))


YARDSTICK = Yardstick(EvenJudge(), torch.rand(40, 3, generator=torch.Generator().manual_seed(0)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    make_teacher(folder / "teacher.safetensors")
    make_tokenizer(folder / "tokenizer")
    (folder / "students").mkdir()
    for steps in (2, 1):
        spec = make_spec(timesteps=trailing_timesteps(steps), guidance_max=6.0, guidance_default=3.0)
        make_student(folder / "students" / f"{steps}.safetensors", spec=spec, dial=0.0)
    return folder


@pytest.fixture(scope="module")
def painters(folder):
    def opened(name: str) -> Painter:
        painter = Painter.open(open_checkpoint(folder / name, tokenizer=folder / "tokenizer"))
        return replace(painter, size=(16, 16))

    return {
        "teacher": opened("teacher.safetensors"),
        2: opened("students/2.safetensors"),
        1: opened("students/1.safetensors"),
    }


def evaluation(painters, *, store=None, judge=True, **request) -> Evaluation:
    values = {"prompts": PROMPTS, "guidances": (1.0,), "steps": (2,), "seed": 0, "reference_steps": 3}
    return Evaluation(
        teacher=painters["teacher"],
        students={"two": painters[2], "one": painters[1]},
        request=Request(**values | request),
        yardstick=YARDSTICK if judge else Yardstick(),
        store=store or MemoryStore(),
    )


def test_every_row_has_every_name_and_the_reference_is_compared_with_nothing(painters):
    rows = list(evaluation(painters, guidances=(1.0, 4.0), strengths=(0.5,)).rows())
    assert all(set(row) == ROW_NAMES for row in rows)
    references = [row for row in rows if row["steps"] == 3 and row["noise"] == "same"]
    assert [(row["guidance"], row["strength"]) for row in references] == [(1, 1), (1, 0.5), (4, 1), (4, 0.5)]
    assert all(row["psnr_teacher"] is row["frechet_teacher"] is None for row in references)
    assert all(row["psnr_teacher"] is not None for row in rows if row not in references)
    assert all(row["adherence"] == 0.5 and row["frechet_real"] > 0 for row in rows)
    assert [row["frechet_ratio"] for row in rows if row["noise"] == "other"] == [1.0] * 4
    assert "other noise" in table(rows)


def test_a_student_is_beside_what_is_there_for_free_at_no_fewer_evaluations(painters):
    """Guided, a teacher's step is two evaluations; from a strength on, fewer steps are left."""
    for guidance, strength, steps in ((1.0, 1.0, {1, 2}), (4.0, 1.0, {1}), (4.0, 0.5, {1})):
        measured = evaluation(painters, steps=(), guidances=(guidance,))
        free = [cell for cell in measured.cells(guidance, strength) if cell.sampler == "dpmpp_2m"]
        assert {cell.steps for cell in free} == steps and all(cell.strength == strength for cell in free)
    consistency = replace(painters[2].spec, sampler="consistency")
    measured = evaluation({**painters, 2: replace(painters[2], spec=consistency)}, steps=(7,))
    student = next(cell for cell in measured.cells(4.0, 1.0) if cell.model == "student" and cell.steps == 7)
    assert measured.for_free(student).steps == 4


def test_other_sizes_second_passes_and_what_a_person_uses_have_rows(painters):
    measured = evaluation(
        painters, prompts=PROMPTS[:2], own=("dpmpp_2m", 3), strengths=(0.5,), sizes=((24, 16),),
        second_passes=(0.5,),
    )  # fmt: skip
    rows = list(measured.rows())
    groups = {(row["task"], row["strength"], row["width"], row["height"]) for row in rows}
    assert groups == {
        ("paint", 1.0, 16, 16), ("paint", 0.5, 16, 16), ("paint", 1.0, 16, 24), ("second", 0.5, 32, 32),
    }  # fmt: skip
    own = [row for row in rows if row["sampler"] == "dpmpp_2m" and row["steps"] == 3]
    assert len(own) == len(groups)
    assert "two, second pass" in table(rows)
    enlarged, size = measured.images_to_enlarge(1.0)
    assert size == (32, 32) and enlarged.shape[2] == 32 // measured.teacher.downscale
    first = measured.teacher.decode(measured.latents(measured.reference(1.0))[0])
    again = torch.nn.functional.avg_pool2d(measured.teacher.decode(enlarged), 2)
    encoded = measured.teacher.decode(measured.teacher.encode(first))
    assert (again - encoded).square().mean() < (again - encoded.roll(1, 0)).square().mean()
    found = [each for each in standings(rows) if each.student["name"] == "one"]
    assert [(each.student["task"], each.student["height"]) for each in found] == [
        ("paint", 16), ("paint", 16), ("paint", 24), ("second", 32),
    ]  # fmt: skip
    assert all(each.other["height"] == each.for_free["height"] == each.student["height"] for each in found)


def test_a_student_that_equals_its_teacher_gets_its_teachers_figures(painters):
    """With a zero dial the student is the unguided teacher, so at guidance 1 it is the teacher's DDIM."""
    rows = list(evaluation(painters).rows())
    ddim = next(row for row in rows if row["sampler"] == "ddim" and row["steps"] == 2)
    student = next(row for row in rows if row["name"] == "two")
    for name in ("psnr_teacher", "frechet_teacher", "frechet_real", "evaluations", "frechet_ratio"):
        assert student[name] == ddim[name]


def test_consistency_students_have_rows_at_other_step_counts_too(painters):
    spec = replace(painters[2].spec, sampler="consistency")
    measured = evaluation({**painters, 2: replace(painters[2], spec=spec)}, steps=(2, 3), judge=False)
    rows = [row for row in measured.rows() if row["model"] == "student"]
    assert [(row["name"], row["steps"], row["evaluations"]) for row in rows] == [
        ("two", 2, 2), ("one", 1, 1), ("two", 3, 3),
    ]  # fmt: skip
    with pytest.raises(BadInput, match="0 steps"):
        replace(painters[2], spec=spec).plan(steps=0)


def test_each_distance_is_to_the_reference_at_the_same_guidance_and_strength(painters):
    measured = evaluation(painters, guidances=(1.0, 5.0), strengths=(0.5,))
    unit = sum(float(column.std()) for column in YARDSTICK.real.T) / 3
    for row in measured.rows():
        if row["name"] != "two":
            continue
        source = None if row["strength"] == 1 else measured.images_to_start_from(row["guidance"])
        pictures = [
            painter.decode(measured.latents(cell, source)[0]).mean((2, 3))
            for painter, cell in (
                (painters["teacher"], measured.reference(row["guidance"], row["strength"])),
                (
                    painters[2],
                    next(c for c in measured.cells(row["guidance"], row["strength"]) if c.name == "two"),
                ),
            )
        ]
        assert row["frechet_teacher"] == pytest.approx(frechet_distance(*pictures) / unit**2, rel=1e-2)


def test_image_to_image_starts_from_the_references_picture_of_the_prompt_before(painters):
    measured = evaluation(painters)
    reference = measured.latents(measured.reference(1.0))[0]
    assert torch.equal(measured.images_to_start_from(1.0), torch.cat([reference[-1:], reference[:-1]]))


def test_without_a_judge_only_what_needs_none_is_measured_and_no_second_reference_is_painted(painters):
    rows = list(evaluation(painters, judge=False).rows())
    assert {row["noise"] for row in rows} == {"same"}
    assert all(row["adherence"] is row["frechet_real"] is row["frechet_ratio"] is None for row in rows)


def test_a_student_has_no_row_at_a_guidance_that_it_was_not_trained_for(painters):
    rows = list(evaluation(painters, guidances=(6.0, 7.0)).rows())
    assert {row["guidance"] for row in rows if row["model"] == "student"} == {6.0}
    assert {row["guidance"] for row in rows if row["model"] == "teacher"} == {6.0, 7.0}


def test_a_stopped_evaluation_goes_on_without_painting_anything_twice(painters, tmp_path, monkeypatch):
    painted: list[str] = []
    latents = Painter.latents

    def counted(self, *arguments, **named):
        painted.append(f"{named['sampler']} {named['steps']}")
        return latents(self, *arguments, **named)

    monkeypatch.setattr(Painter, "latents", counted)
    stopped = evaluation(painters, store=FolderStore(tmp_path)).rows()
    first = [next(stopped) for _ in range(3)]
    assert len(painted) == 3
    again = list(evaluation(painters, store=FolderStore(tmp_path)).rows())
    assert again[:3] == first and len(painted) == len(again)
    fresh = list(evaluation(painters).rows())
    for kept, new in zip(again, fresh, strict=True):
        assert kept | {"seconds_per_image": 0} == new | {"seconds_per_image": 0}


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"prompts": PROMPTS[::-1]}, {"negative": "grey"}, {"reference_steps": 4}]
)
def test_kept_latents_serve_no_other_question(painters, tmp_path, change):
    for request in ({}, change):
        measured = evaluation(painters, store=FolderStore(tmp_path), **request)
        measured.latents(measured.reference(4.0))
    assert len(list(tmp_path.iterdir())) == 2


def test_the_showcase_has_pictures_over_guidance_steps_and_strength_and_a_verdict_in_numbers(painters):
    shown = showcase(
        painters["teacher"],
        {2: painters[2], 1: painters[1]},
        prompts=PROMPTS[:2],
        sample_prompts=PROMPTS,
        yardstick=YARDSTICK,
        guidance=3.0,
        guidances=(1.0, 4.0, 8.0),
        strengths=(0.5,),
        reference_steps=3,
    )
    guidance, steps, strength, between = shown.pictures
    assert between[0].startswith("From one noise to another")
    assert "Over guidance" in guidance[0] and "Over step counts at guidance 3" in steps[0]
    assert "Image to image at guidance 3" in strength[0]
    assert guidance[1].width > 4 * 96 and steps[1].height > 6 * 96
    assert {row["name"] for row in shown.rows if row["model"] == "student"} == {
        "2-step student",
        "1-step student",
    }
    assert shown.verdict is not None
    assert "At 1 step and guidance 3" in shown.verdict and "50% of 8 pictures" in shown.verdict


def test_a_showcase_outside_the_usual_guidances_shows_the_students_own(painters):
    shown = showcase(
        painters["teacher"], {1: painters[1]}, prompts=PROMPTS[:1], guidance=5.0, guidances=(7.0, 8.0),
        strengths=(), reference_steps=2,
    )  # fmt: skip
    assert len(shown.pictures) == 3
    assert "as far from the teacher's as one of another seed" in (shown.verdict or "")
    assert shown.sentences == (shown.verdict,)


def row(model: str, sampler: str, steps: int, adherence: float | None, psnr: float | None = None) -> dict:
    return {
        "model": model, "noise": "same", "sampler": sampler, "steps": steps, "guidance": 4.0, "strength": 1.0,
        "adherence": adherence, "psnr_teacher": psnr, "samples": 256, "name": model,
        "evaluations": steps if model == "student" else 2 * steps,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("student", "ddim", "said"),
    [
        (0.81, 0.29, "the student beats the teacher's DDIM: 81% of 256 pictures"),
        (0.29, 0.81, "the student does not reach the teacher's DDIM"),
        (0.81, 0.80, "256 samples show no difference"),
    ],
)
def test_the_verdict_claims_no_more_than_the_samples_show(student, ddim, said):
    rows = [
        row("teacher", "ddim", 50, 0.96),
        row("teacher", "ddim", 2, ddim),
        row("student", "d", 2, student),
    ]
    assert said in (verdict(rows) or "") and "2 against 4 network evaluations" in (verdict(rows) or "")
    assert verdict(rows[:2]) is None and verdict(rows[2:]) is None


def test_there_is_no_verdict_against_a_reference_of_the_students_own_steps_without_a_judge():
    row = {"strength": 1, "guidance": 4.0, "noise": "same", "samples": 4, "steps": 2, "adherence": None}
    student = {**row, "model": "student", "sampler": "deterministic", "evaluations": 2, "psnr_teacher": 20.0}
    reference = {**row, "model": "teacher", "sampler": "ddim", "evaluations": 4, "psnr_teacher": None}
    assert verdict([student, reference]) is None


def test_the_psnr_verdict_says_who_is_nearer():
    rows = [
        row("teacher", "ddim", 50, None),
        row("teacher", "ddim", 2, None, 16.0),
        row("student", "d", 2, None, 22.0),
    ]
    assert "are nearer to" in (verdict(rows) or "") and "22.0 dB against 16.0 dB" in (verdict(rows) or "")


def command(folder, out, *more):
    return [
        *("--teacher", str(folder / "teacher.safetensors"), "--student", str(folder / "students")),
        *("--tokenizer", str(folder / "tokenizer"), "--samples", "2", "--reference-steps", "3"),
        *("--device", "cpu", "--own", "none", "-o", str(out), *more),
    ]


def test_the_command_writes_rows_and_pictures(folder, tmp_path, capsys):
    more = ("--strength", "0.5", "--size", "32x48", "--own", "ddim:2", "--json")
    evaluate.main(command(folder, tmp_path, *more))
    answer = json.loads(capsys.readouterr().out)
    rows, written = answer["rows"], json.loads((tmp_path / "results.json").read_text())
    assert written["rows"] == rows and written["verdicts"] == answer["verdicts"]
    report = html.unescape((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert len(answer["verdicts"]) == 6 and all(each["sentence"] in report for each in answer["verdicts"])
    assert str(tmp_path) not in report
    assert {row["guidance"] for row in rows} == {3.0}
    assert {(row["name"], row["steps"]) for row in rows if row["model"] == "student"} == {
        ("2.safetensors", 2),
        ("1.safetensors", 1),
    }
    assert {row["steps"] for row in rows if row["model"] == "teacher"} == {3, 2, 1}
    assert {file.name for file in tmp_path.glob("*.png")} == {"guidance.png", "steps.png", "strength.png"}


def test_the_teacher_paints_at_its_students_size(folder):
    asked = argparse.Namespace(embedding=[], clip_skip=None, cfg_rescale=None)
    teacher, student = (open_checkpoint(folder / f"{name}.safetensors") for name in ("teacher", "students/2"))
    wide = replace(student, resolution=(64, 32))
    assert evaluate._used_alike(teacher, {"wide": wide}, asked)[0].resolution == (64, 32)
    with pytest.raises(BadInput, match="32 x 32 and 64 x 32 pixels; evaluate them apart"):
        evaluate._used_alike(teacher, {"wide": wide, "usual": student}, asked)


def test_students_of_one_file_name_are_told_apart_by_their_folders(tmp_path):
    files = [tmp_path / run / "students" / "2.safetensors" for run in ("a", "b", "c")]
    for file in files:
        file.parent.mkdir(parents=True)
        file.touch()
    named = evaluate._student_files(files)
    assert list(named.values()) == files
    assert list(named) == ["2.safetensors", "students/2.safetensors", "c/students/2.safetensors"]
    with pytest.raises(BadInput, match="given twice"):
        evaluate._student_files([file for file in files for _ in range(9)])


def test_without_a_judge_the_teachers_unet_looks_and_real_pictures_are_measured_too(folder, tmp_path, capsys):
    real = tmp_path / "real"
    for number in range(8):
        save_png(to_image(torch.rand(3, 20, 16)), real / f"{number}.png")
    evaluate.main(command(folder, tmp_path, "--samples", "8", "--real", str(real), "--json"))
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert all(row["adherence"] is None and row["frechet_real"] > 0 for row in rows)
    floor, *others = rows[1:]
    assert floor["noise"] == "other" and floor["frechet_ratio"] == 1
    assert all(0 <= row["precision"] <= 1 and row["kernel_teacher"] is not None for row in [floor, *others])
    with pytest.raises(BadInput, match="0 pictures"):
        evaluate.main(command(folder, tmp_path, "--real", str(folder / "students")))


def test_a_teachers_loras_are_merged_and_one_that_a_student_lacks_is_said(folder, tmp_path, capsys, caplog):
    teacher = open_checkpoint(folder / "teacher.safetensors")
    tensors = named("kohya", teacher, random_factors(weights_of(teacher, ATTENTION)))
    style = save_lora(tmp_path / "style.safetensors", tensors)
    rows: list[list[float]] = []
    for more in ((), ("--lora", f"{style}:0.5"), ("--lora", str(style))):
        evaluate.main(command(folder, tmp_path, *more, "--json"))
        found = json.loads(capsys.readouterr().out)["rows"]
        rows.append([row["psnr_teacher"] for row in found if row["model"] == "student"])
        said = "its teacher had these LoRAs merged: none; give the same by --lora"
        assert (said in caplog.text) == bool(more)
    assert rows[0] != rows[1] != rows[2], "the pictures of another strength are not taken for these"


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--samples", "0"), "--samples 0"),
        (("--guidance", "0.5"), "--guidance 0.5"),
        (("--strength", "1"), "--strength 1"),
        (("--second-pass", "0"), "--second-pass 0"),
        (("--size", "512"), "--size 512: expected width and height"),
        (("--own", "euler:20"), "--own euler:20: expected one of ddim, dpmpp_2m"),
        (("--own", "ddim"), "--own ddim: "),
        (("--steps", "0"), "0 steps"),
        (("--seed", "-1"), "--seed -1"),
    ],
)
def test_bad_numbers_are_one_sentence(folder, tmp_path, more, said):
    with pytest.raises(BadInput, match=said):
        evaluate.main(command(folder, tmp_path, *more))


def test_a_teacher_for_a_student_and_a_student_for_a_teacher_are_refused(folder, tmp_path):
    teacher, student = str(folder / "teacher.safetensors"), str(folder / "students" / "2.safetensors")
    words = ["--tokenizer", str(folder / "tokenizer"), "--samples", "1", "-o", str(tmp_path)]
    with pytest.raises(BadInput, match="this is a student"):
        evaluate.main(["--teacher", student, "--student", student, *words])
    with pytest.raises(BadInput, match="this is not a student"):
        evaluate.main(["--teacher", teacher, "--student", teacher, *words])


def test_an_encoder_gets_rows_of_round_trips_and_edits(folder, tmp_path, capsys):
    spec = make_spec(timesteps=(0,), direction="encode", w_embedding=None, guidance_max=1.0)
    encoder = make_student(tmp_path / "encoder.safetensors", spec=spec, dial=None)
    evaluate.main(command(folder, tmp_path, "--encoder", str(encoder), "--json"))
    rows = json.loads(capsys.readouterr().out)["edits"]
    names = ["teacher", "2.safetensors", "1.safetensors"]
    assert [(row["encoder"], row["decoder"], row["guidance"]) for row in rows] == [
        (by, name, g) for by in ("teacher", "encoder.safetensors") for name in names for g in (1, 3)
    ]
    assert all((row["psnr"] is not None) == (row["guidance"] == 1) and row["kept"] is None for row in rows)
    assert {row["encoder_evaluations"] for row in rows} == {50, 1}
    with pytest.raises(BadInput, match="takes an encoder"):
        evaluate.main(command(folder, tmp_path, "--encoder", str(folder / "students" / "2.safetensors")))


def test_pictures_show_only_students_that_run_at_the_guidance(painters):
    assert side_by_side(evaluation(painters), guidance=9.0, guidances=(9.0,), strengths=()) == ()
