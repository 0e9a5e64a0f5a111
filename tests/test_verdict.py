"""The verdict without a judge: its figures and sentences, and that it ranks students as the judge does."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from toolkit.demo.ranking import CHANGES, Place, Spoilt, agreement, spearman
from toolkit.evaluation.painter import Painter
from toolkit.evaluation.standing import standings

ROOT = Path(__file__).parents[1]


def row(model: str, frechet: float | None, paired: float, *, drift: float = 0.0, **more) -> dict:
    """As far from the teacher's in pixels and in prompts as in features; another seed's PSNR is 16."""
    return {
        "task": "paint", "model": model, "name": model, "noise": "same", "sampler": "dpmpp_2m", "steps": 2,
        "evaluations": 4, "guidance": 4.0, "strength": 1.0, "width": 32, "height": 32, "samples": 64,
        "frechet_ratio": frechet, "paired_ratio": paired, "prompt_ratio": paired,
        "psnr_teacher": 16 - 20 * math.log10(paired), "colour": 0.0, "contrast": 0.0, "sharpness": drift,
        **more,
    }  # fmt: skip


def teacher(free: float | None = 9.0, *, drift: float = -0.2, **more) -> list[dict]:
    few = {} if free is not None else {"frechet_ratio": None}
    other = row("teacher", 1.0, 1.0, noise="other", sampler="ddim", steps=50, evaluations=100, drift=0.04)
    return [{**other, **few, **more}, row("teacher", free, 0.8, drift=drift, **more)]


def student(frechet: float | None, paired: float = 0.3, **more) -> dict:
    return row("student", frechet, paired, **{"sampler": "deterministic", "steps": 4, **more})


@pytest.mark.parametrize(("frechet", "scaled"), [(1.0, 0.0), (9.0, 1.0), (5.0, 0.5), (0.5, -0.0625)])
def test_another_seed_is_zero_and_what_is_there_for_free_is_one(frechet, scaled):
    (found,) = standings([*teacher(), student(frechet, drift=-0.12)])
    assert found.scaled("frechet") == pytest.approx(scaled)
    assert (found.score, found.score_for_free) == (pytest.approx(0.3), pytest.approx(0.8))
    assert found.scaled("sharpness") == pytest.approx(0.5)  # 12 % between 4 and 20
    assert found.scaled("colour") is None  # DPM++ 2M drifts no more than chance


@pytest.mark.parametrize("lost", [None, 0.0])
def test_where_no_picture_lost_its_prompt_the_distances_alone_count_for_both(lost):
    (found,) = standings([*teacher(), student(5.0, prompt_ratio=lost)])
    assert (found.score, found.score_for_free) == (pytest.approx(0.3), pytest.approx(0.8))
    assert found.sentence
    (found,) = standings([*teacher(prompt_ratio=lost), student(5.0, prompt_ratio=0.9)])
    assert found.score == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (
            [*teacher(), student(0.7)],
            "At 4 steps and guidance 4, 32 x 32, the student passes for ",
        ),
        ([*teacher(0.5), student(0.7)], "passes for its teacher, and so does DPM++ 2M: "),
        (
            [*teacher(), student(0.7, drift=0.3)],
            "is nearer to its teacher than DPM++ 2M is with as many evalua",
        ),
        ([*teacher(), student(3.0)], "is nearer to its teacher than DPM++ 2M is with as many eval"),
        ([*teacher(), student(300.0, 0.3)], "is no nearer to its teacher than DPM++ 2M"),
        ([*teacher(), student(300.0)], "all together, 300 times as far as those of another seed (9 times)"),
        ([*teacher(), student(3.0, 0.8)], "is no nearer to its teacher than DPM++ 2M"),
        (
            [*teacher(), student(3.0)],
            "each picture is 30% as far from the teacher's as one of ",
        ),
        ([*teacher(), student(3.0)], "(DPM++ 2M in 2 steps: 80%); all together, 3 times as far as those of "),
        ([*teacher(), student(3.0, drift=-0.12)], " of another seed (9 times), with 12% less sharpness."),
        ([*teacher(), student(3.0, drift=0.03)], " of another seed (9 times)."),  # another seed drifts more
        (
            [*teacher(None), student(None)],
            "than DPM++ 2M is with as many evaluations: each picture",
        ),
        ([*teacher(None), student(None)], "(DPM++ 2M in 2 steps: 80%)."),
    ],
)
def test_the_sentence_says_where_the_student_stands(rows, said):
    (found,) = standings(rows)
    assert said in found.sentence and found.told()["sentence"] == found.sentence
    assert ("all together" in found.sentence) == (found.student["frechet_ratio"] is not None)


def test_a_student_is_measured_against_its_own_kind_of_use_and_never_against_fewer_evaluations():
    large, image = {"width": 48, "task": "second"}, {"strength": 0.5}
    rows = [
        *teacher(), *teacher(7.0, **large), *teacher(3.0, **image),
        row("teacher", 30.0, 0.9, evaluations=2), student(2.0), student(2.0, **large), student(2.0, **image),
    ]  # fmt: skip
    assert [each.for_free["frechet_ratio"] for each in standings(rows)] == [9.0, 7.0, 3.0]
    sentences = [each.sentence for each in standings(rows)]
    assert "Second pass: at 4 steps and guidance 4, 48 x 32, " in sentences[1]
    assert "strength 0.5" in sentences[2]
    assert standings([*teacher(), student(2.0, evaluations=5)]) == []
    assert standings(rows[1:2]) == []


def test_the_score_is_half_of_likeness_and_half_of_the_prompt():
    rows = [*teacher(), student(2.0, 0.4, prompt_ratio=1.0), student(2.0, 0.4, psnr_teacher=16.0)]
    assert [each.score for each in standings(rows)] == [
        pytest.approx(0.4**0.5), pytest.approx((0.4**0.5 * 0.4) ** 0.5),
    ]  # fmt: skip


def test_ranks_are_compared_with_equal_values_sharing_theirs():
    assert spearman([1, 2, 3, 4], [10, 20, 30, 99]) == pytest.approx(1)
    assert spearman([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    assert spearman([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(0.9486833)  # as scipy.stats.spearmanr
    found = agreement([Place("a", 1.0, 5.0, 0.9), Place("b", 2.0, 7.0, 0.8), Place("c", 3.0, 6.0, 0.7)])
    assert found == {
        "judge": pytest.approx(0.8660254),
        "distance": pytest.approx(0.5),
        "adherence": pytest.approx(1),
        "distance_adherence": pytest.approx(0.5),
    }


def test_spoilt_students_are_what_they_are_called(monkeypatch):
    heard = {}
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    painter = Painter(*[None] * 3, schedule=None, size=(8, 8))  # type: ignore[arg-type]
    monkeypatch.setattr(Painter, "latents", lambda self, prompts, **how: heard.update(how))
    monkeypatch.setattr(Painter, "decode", lambda self, x0: images)
    Spoilt.of(painter, louder=2.0).latents(["a"], seeds=[0], guidance=4.0)
    assert heard["guidance"] == 8.0
    for name, change in CHANGES.items():
        changed = Spoilt.of(painter, change=change).decode(images)
        assert changed.shape == images.shape and not torch.equal(changed, images), name
    assert CHANGES["blurred"](images).diff(dim=3).abs().mean() < images.diff(dim=3).abs().mean()


RUNS = {"good": (4, 120), "under-trained": (4, 15), "two steps": (2, 120), "one step": (1, 120)}
"""Steps and updates."""


@pytest.mark.slow
def test_the_verdict_ranks_students_as_the_judge_does(tmp_path):
    """Of four students of the demo teacher, and eight spoilt ones; none is trained for long."""

    def call(module: str, *arguments: object) -> None:
        subprocess.run(
            [sys.executable, "-m", f"toolkit.{module}", *map(str, arguments)], check=True, cwd=ROOT
        )

    for name, (steps, updates) in RUNS.items():
        call(
            *("distill", "--demo", "--method", "sfddm", "--steps", steps, "--updates", updates),
            *("--pictures", 192, "--report-prompts", 0, "--cache-dir", tmp_path / "cache"),
            *("--out", tmp_path / name, "--device", "cpu"),
        )
    students = [tmp_path / name / "student.safetensors" for name in RUNS]
    call("demo.ranking", *students, "--samples", 96, "-o", tmp_path / "ranking")
    ranking = json.loads((tmp_path / "ranking" / "ranking.json").read_text(encoding="utf-8"))
    assert len(ranking["students"]) == len(RUNS) + len(CHANGES) + 1
    assert ranking["spearman"]["judge"] >= 0.8
