"""The comparison of methods: equal work, what is run and measured once, and its tables."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest

from toolkit import assembly, compare
from toolkit.compare import TRAINED, Bench, Run, runs_of
from toolkit.comparison import tables
from toolkit.contenders import CONTENDERS, Contender
from toolkit.diffusion.errors import BadInput

FOLD = Contender("fold", "one fold", {"method": "sfddm"}, steps=(4, 2), seeds=2, seeded=(2,))


@pytest.fixture
def bench(tmp_path, monkeypatch) -> Bench:
    made = Bench(tmp_path / "out", work=20_000, samples=8)
    made.begin()
    made.called = []
    monkeypatch.setattr(made, "_call", lambda *what: made.called.append(what))
    return made


def arguments(bench: Bench) -> list[str]:
    (_, _, said) = bench.called.pop()
    return list(said)


def after(said: list[str], option: str) -> list[str]:
    """The values of an option."""
    values = said[said.index(option) + 1 :]
    return values[: next((i for i, value in enumerate(values) if value.startswith("--")), len(values))]


def test_only_the_named_step_counts_are_repeated_with_other_seeds():
    assert [one.name for one in runs_of(FOLD)] == ["fold-4", "fold-2", "fold-2-seed1"]


def test_every_contender_gets_the_work_that_was_asked_for(bench):
    """Counted by hand: a fold's samples off the trajectories cost its teacher's steps twice (guidance)."""
    (updates,) = bench.updates({"method": "sfddm", "steps": 4})
    per_update = 32 * (0.2 * 2 * 3 + TRAINED)  # 20 % off the trajectories, 3 substeps, two branches each
    assert abs(updates * per_update - bench.work) <= per_update
    (updates,) = bench.updates({"method": "consistency", "steps": 4})
    per_update = 32 * (2 + 1 + TRAINED)  # the guided teacher, the student at the next point
    assert abs(updates * per_update - bench.work) <= per_update
    halvings = bench.updates({"method": "progressive", "origin": "guided", "steps": 4})
    assert len(halvings) == 3  # stage 1, 8, 4: equal parts
    assert abs(halvings[0] * 32 * (2 + TRAINED) - bench.work / 3) <= 32 * (2 + TRAINED)


def test_every_contender_can_be_planned(bench, monkeypatch):
    routes = {}

    def once(asked, teacher, **more):  # half a second each time, and no part of the work
        kind = asked.get("student")
        routes[kind] = routes.get(kind) or choose(asked, teacher, **more)
        return routes[kind]

    choose = assembly._choose_route
    monkeypatch.setattr(assembly, "_choose_route", once)
    for contender in (contender for contender in CONTENDERS if not contender.students_of):
        planned = bench.updates({"steps": contender.steps[-1], **contender.options})
        if contender.updates:
            assert len(contender.updates) == len(planned)
        assert min(planned) > 0


def test_a_finished_run_is_left_alone_and_a_begun_one_is_resumed(bench):
    one = Run(FOLD, 4, 0)
    bench.train(one)
    said = arguments(bench)
    assert after(said, "--method") == ["sfddm"] and after(said, "--seed") == ["0"] and "--resume" not in said
    assert int(after(said, "--updates")[0]) > 0
    folder = bench.out / one.name
    folder.mkdir()
    (folder / "config.toml").touch()
    bench.train(one)
    assert arguments(bench)[-1] == "--resume"
    (folder / "report.html").touch()
    bench.train(one)
    assert bench.called == []


def finish(bench: Bench, name: str) -> None:
    (bench.out / name).mkdir()
    (bench.out / name / "report.html").touch()


def test_students_are_measured_together_and_once_after_the_last_of_them(bench):
    first, *others = runs_of(FOLD)
    finish(bench, first.name)
    bench.run(first, [FOLD])
    assert bench.called == []
    for one in others:
        finish(bench, one.name)
        bench.run(one, [FOLD])
    assert len(bench.called) == 1
    said = arguments(bench)
    assert after(said, "--student") == [
        str(bench.out / f"{name}/student.safetensors") for name in ("fold-4", "fold-2", "fold-2-seed1")
    ]
    assert after(said, "--samples") == ["8"] and after(said, "--guidance") == ["2.0", "4.0", "8.0"]
    bench.run(first, [FOLD])
    assert bench.called == []


def test_who_measures_anothers_students_waits_for_them_and_trains_none(bench):
    guest = dataclasses.replace(FOLD, name="guest", students_of="fold", strengths=(0.5,))
    for one in runs_of(FOLD):
        finish(bench, one.name)
    bench.run(runs_of(FOLD)[0], [FOLD, guest])
    said = arguments(bench)
    assert after(said, "--strength") == ["0.5"] and after(said, "--out")[0].endswith("guest")
    assert after(said, "--student") == after(arguments(bench), "--student")


def test_who_goes_on_from_anothers_student_takes_that_of_its_seed_and_waits_for_it(bench):
    later = next(contender for contender in CONTENDERS if contender.starts_from)
    one = next(one for one in runs_of(later) if one.seed == 1)
    waited: list[bool] = []

    class Task:
        def result(self):
            waited.append(True)

    bench.tasks[f"{later.starts_from}-1-seed1"] = Task()
    bench.train(one)
    said = arguments(bench)
    student = bench.out / f"{later.starts_from}-1-seed1" / "students" / f"{one.steps}.safetensors"
    assert after(said, "--init") == [str(student)] and waited == [True]


def test_a_failing_command_is_one_sentence_that_names_its_log(tmp_path):
    bench = Bench(tmp_path, work=1, samples=1)
    with pytest.raises(BadInput, match=r"try: toolkit.distill ended with exit code 2; .*try\.txt"):
        bench._call("try", "toolkit.distill", ["--steps", "none"])
    assert "--steps" in (tmp_path / "logs" / "try.txt").read_text(encoding="utf-8")


def test_another_amount_of_work_needs_another_folder(bench):
    with pytest.raises(BadInput, match="choose another --out"):
        Bench(bench.out, work=1, samples=8).begin()


def results(bench: Bench, contender: Contender, adherences: list[float]) -> None:
    """A results.json as toolkit.evaluate writes it for the contender's students."""
    names = ["student.safetensors", "fold-2/student.safetensors", "fold-2-seed1/student.safetensors"]
    common = {"guidance": 4.0, "strength": 1.0, "frechet_ratio": 0.5, "psnr_teacher": 30.0, "noise": "same"}
    teacher = {**common, "model": "teacher", "name": "t", "sampler": "ddim", "steps": 50, "adherence": 0.99}
    students = [
        {**common, "model": "student", "name": name, "sampler": "x", "steps": steps, "adherence": adherence}
        for name, steps, adherence in zip(names, (4, 2, 2), adherences, strict=True)
    ]
    folder = bench.out / "measured" / contender.name
    folder.mkdir(parents=True)
    said = {"students": names, "rows": [teacher, *students]}
    (folder / "results.json").write_text(json.dumps(said), encoding="utf-8")


def test_a_line_is_the_mean_of_its_seeds_and_how_far_they_lie_from_it(bench):
    results(bench, FOLD, [0.9, 0.8, 0.84])
    rows = list(bench.rows([FOLD]))
    assert [row["run"] for row in rows] == ["teacher", "fold-4", "fold-2", "fold-2-seed1"]
    text = tables(rows, [FOLD])
    assert "| DDIM | 50 | 1 |" in text
    assert "| one fold | 4 | 1 |  | 90.0 |  |  | 0.50 |  | 30.0 |" in text
    assert "| one fold | 2 | 2 |  | 82.0 ± 2.0 |  |  | 0.50 ± 0.00 |  | 30.0 ± 0.0 |" in text


def test_bad_input_is_said_before_anything_starts(tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "matplotlib", lambda: None)
    with pytest.raises(BadInput, match="--only nobody: no such contender; there are fold"):
        compare.main(["--out", str(tmp_path / "a"), "--only", "nobody"])
    with pytest.raises(BadInput, match="--jobs 0: expected 1 or more"):
        compare.main(["--out", str(tmp_path / "a"), "--jobs", "0"])
    assert not (tmp_path / "a").exists()


def test_without_matplotlib_one_sentence_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(BadInput, match="python -m pip install matplotlib"):
        compare.main(["--out", str(tmp_path / "a")])


def test_drawings_are_made_once_with_their_captions(bench, monkeypatch):
    monkeypatch.setattr(compare, "DRAWINGS", 3)
    folder = bench.drawings()
    assert sorted(path.name for path in folder.iterdir())[:2] == ["0000.png", "0000.txt"]
    assert "background" in Path(folder / "0000.txt").read_text(encoding="utf-8")
    (folder / "0000.txt").unlink()
    assert bench.drawings() == folder and not (folder / "0000.txt").exists()
