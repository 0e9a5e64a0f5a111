"""What is kept for later runs: how large it may grow, and what the cleaning command takes and leaves."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from toolkit import clean
from toolkit.diffusion.errors import BadInput
from toolkit.training.caches import find_caches, require_room
from toolkit.training.memory import GIB

A, B, C = (f"{kind}-{digit * 16}" for kind, digit in (("teacher", "a"), ("images", "b"), ("teacher", "c")))


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Two caches that nobody needs, the first old; one of a run that goes on; and other people's files."""
    runs = tmp_path / "runs"
    for name, count in ((A, 1000), (B, 200), (C, 30)):
        folder = runs / "cache" / name
        folder.mkdir(parents=True)
        (folder / "00000.safetensors").write_bytes(b"0" * count)
    os.utime(runs / "cache" / A, (1, 1))
    for name in ("holiday", "teacher-mine", "teacher-" + "d" * 15):
        (runs / "cache" / name).mkdir()
        (runs / "cache" / name / "photo.png").write_bytes(b"0" * 5000)
    (runs / "cache" / f"images-{'e' * 16}").write_bytes(b"a file")
    for name, cache, done in (("finished", B, True), ("begun", C, False)):
        (runs / name / "state").mkdir(parents=True)
        (runs / name / "state" / "samples.txt").write_text(cache)
        if done:
            (runs / name / "student.safetensors").write_bytes(b"0")
    return runs


def cleaned(runs: Path, capsys: pytest.CaptureFixture[str], *more: str) -> dict[str, bool]:
    clean.main(["--cache-dir", str(runs / "cache"), "--runs", str(runs), "--json", *more])
    answer = json.loads(capsys.readouterr().out)
    left = {path.name for path in (runs / "cache").iterdir()}
    for row in answer["caches"]:
        assert row["deleted"] == (row["name"] not in left)
    assert {"holiday", "teacher-mine", "teacher-" + "d" * 15, f"images-{'e' * 16}"} <= left
    return {row["name"]: row["deleted"] for row in answer["caches"]}


def test_nothing_goes_until_it_is_said(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cleaned(runs, capsys) == {A: False, B: False, C: False}


def test_what_an_unfinished_run_needs_stays(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cleaned(runs, capsys, "--delete") == {A: True, B: True, C: False}
    assert (runs / "finished" / "student.safetensors").exists()


def test_only_old_caches_go_if_asked(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cleaned(runs, capsys, "--older-than", "30", "--delete") == {A: True, B: False, C: False}


def test_a_folder_without_caches_is_clean(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clean.main(["--cache-dir", str(tmp_path / "none"), "--runs", str(tmp_path), "--json"])
    assert json.loads(capsys.readouterr().out)["bytes"] == 0


def test_caches_are_held_to_the_size_that_is_named(runs: Path) -> None:
    cache = runs / "cache"
    assert sum(found.bytes for found in find_caches(cache)) == 1230
    new, limit = cache / f"teacher-{'f' * 16}", 1500 / GIB
    require_room(cache, new, needed=270, limit_gb=limit)
    require_room(cache, cache / A, needed=1200, limit_gb=limit)  # of which 1000 are there
    with pytest.raises(BadInput, match=r"holds 0 MiB, this run keeps 0 MiB there.*toolkit\.clean"):
        require_room(cache, new, needed=271, limit_gb=limit)
    with pytest.raises(BadInput, match=r"--cache-gb is .*fewer --pictures"):
        require_room(cache, new, needed=1501, limit_gb=limit)
