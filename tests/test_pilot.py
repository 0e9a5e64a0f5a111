"""The pilot of a run, and what is kept of a shard on the way."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch import Tensor

from toolkit.training import samples
from toolkit.training.pilot import Pilot, distance
from toolkit.training.samples import forget_parts, gathered


def losses(first: float, last: float, count: int = 60) -> list[float]:
    draw = random.Random(0)
    return [(first + (last - first) * i / count) * (1 + 0.1 * draw.random()) for i in range(count)]


def judged(
    found: list[float], *, own_target: bool = False, start: float | None = None, now=None, finite=True
):
    pilot = Pilot(updates=600, start=start, losses=found)
    return pilot.judge(finite=finite, own_target=own_target, now=now)


def test_a_loss_that_falls_or_stays_is_well_and_one_that_rises_is_not():
    assert judged(losses(1, 0.4)).well and "the loss fell" in judged(losses(1, 0.4)).says
    assert judged(losses(1, 1)).well and "within its noise" in judged(losses(1, 1)).says
    rising = judged(losses(1, 3))
    assert not rising.well and "the loss rose from 1" in rising.says
    assert judged(losses(1, 3), own_target=True).well
    assert judged(losses(1, 3, count=12)).well, "too few to say"


def test_weights_that_are_not_finite_are_not_well():
    assert not judged(losses(1, 0.4), finite=False).well


@pytest.mark.parametrize(
    ("start", "now", "well"),
    [(0.2, 0.3, True), (0.2, 1.2, False), (4.0, 3.0, True), (4.0, 6.0, False), (0.2, math.nan, False)],
)
def test_pictures_may_be_far_from_the_data_only_if_they_were_so_before(start, now, well):
    assert judged(losses(1, 0.4), start=start, now=now).well == well


def test_the_distance_is_in_doublings_of_the_spread_and_spreads_of_the_mean():
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(64, 2, 8, 8, generator=generator)
    assert distance(data, data) == 0
    assert distance(data / 4, data) == pytest.approx(2, abs=0.01)
    moved = data + torch.tensor([0.0, 3.0]).reshape(1, 2, 1, 1)
    assert distance(moved, data) == pytest.approx(3, abs=0.1)
    assert not distance(torch.full_like(data, math.nan), data) <= 1


def test_the_pilot_is_due_after_a_tenth_of_the_updates_or_a_quarter_of_an_hour(monkeypatch):
    pilot = Pilot(updates=600, start=None)
    pilot.losses = [1.0] * 59
    assert not pilot.is_due()
    pilot.losses.append(1.0)
    assert pilot.is_due()
    pilot.losses = [1.0]
    pilot.began -= 901
    assert pilot.is_due()


def test_what_was_made_of_a_shard_is_kept_by_the_clock_and_taken_up_again(tmp_path, monkeypatch):
    path, parts = tmp_path / "00000.safetensors", torch.arange(10).split(3)
    asked: list[int] = []

    def make(part: Tensor) -> dict[str, Tensor]:
        if len(asked) == 2:
            raise RuntimeError("killed")
        asked.append(int(part[0]))
        return {"x0": part[:, None].float(), "guidance": part}

    monkeypatch.setattr(samples, "KEEP_MINUTES", 0.0)
    with pytest.raises(RuntimeError):
        gathered(path, parts, make)
    assert asked == [0, 3]
    asked.clear()
    whole = gathered(path, parts, make)
    assert asked == [6, 9] and whole["guidance"].tolist() == list(range(10)) and whole["x0"].shape == (10, 1)
    forget_parts(path)
    assert not list(tmp_path.iterdir())
    asked.clear()
    monkeypatch.setattr(samples, "KEEP_MINUTES", 5.0)
    with pytest.raises(RuntimeError):
        gathered(path, parts, make)
    assert not list(tmp_path.iterdir()), "nothing is written in the first minutes"
