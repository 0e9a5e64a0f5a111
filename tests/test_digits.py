"""Distillation in pixel space: the whole way of the digits' demo on a few made-up pictures."""

from __future__ import annotations

import json

import pytest
import torch

from toolkit.demo import digits
from toolkit.demo.digits import CLASSES, SCHEDULE, SIZE, ClassUNet, Digits, Reader
from toolkit.diffusion.errors import BadInput
from toolkit.diffusion.grid import Grid
from toolkit.diffusion.solvers import roll
from toolkit.training.networks import denoiser


@pytest.fixture(scope="module")
def data() -> Digits:
    generator = torch.Generator().manual_seed(0)
    return Digits(torch.rand(40, 1, SIZE, SIZE, generator=generator) * 2 - 1, torch.arange(40) % CLASSES)


def test_the_command_leaves_a_student_that_its_file_alone_opens(data, tmp_path, monkeypatch):
    monkeypatch.setattr(digits, "load", lambda: (data, data))
    monkeypatch.setattr(digits, "train_reader", lambda _: Reader().requires_grad_(False))
    few = ["--teacher-updates", "2", "--updates", "1", "--pictures", "10", "--samples", "12", "--steps", "2"]
    digits.main(["--out", str(tmp_path), *few])
    model, spec = digits.open_model(tmp_path / "student.safetensors")
    assert spec is not None and spec.family == "pixel" and not spec.has_dial and spec.w_embedding is None
    assert spec.timesteps == Grid.trailing(2, 1000).timesteps
    pictures = digits.paint(model, torch.arange(12) % CLASSES, spec.timesteps, seed=7)
    assert pictures.shape == (12, 1, SIZE, SIZE) and pictures.abs().max() <= 1
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results) == {"held back", *(f"teacher, {n} steps" for n in (50, 16, 2)), "student, 2 steps"}
    assert (tmp_path / "digits.png").exists()


def test_the_network_is_told_the_class():
    torch.manual_seed(0)
    model = denoiser(ClassUNet(**digits.CONFIG).eval(), schedule=SCHEDULE, prediction_type="v_prediction")
    with torch.no_grad():
        one, same, other = (
            digits.paint(model, torch.tensor([label]), (999, 499), seed=1) for label in (3, 3, 4)
        )
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_a_trajectory_leads_from_its_noise_through_its_points_to_its_picture():
    torch.manual_seed(0)
    teacher, kept = ClassUNet(**digits.CONFIG).eval(), Grid.trailing(16)
    samples = digits.trajectories(teacher, count=3, kept=kept)
    rows, fine = samples.rows(torch.arange(3)), kept.refined(3)
    assert samples.state_timesteps == kept.timesteps and rows["states"].shape == (3, 16, 1, SIZE, SIZE)
    model = denoiser(teacher, schedule=SCHEDULE, prediction_type="v_prediction")
    for entry in (0, 15):
        levels = [sigma.float().expand(3) for sigma in fine.sigmas(SCHEDULE)[3 * entry :]]
        with torch.no_grad():
            landed = roll(model, rows["states"][:, entry], levels, cond=samples.cond(rows), w=None)
        assert torch.allclose(landed, rows["x0"], atol=1e-4)


def test_real_pictures_are_at_no_distance_from_themselves_and_noise_is_far(data):
    torch.manual_seed(0)
    reader = Reader().requires_grad_(False)
    assert digits.measure(reader, data, data.pictures, data.labels)["frechet"] == pytest.approx(0, abs=1e-4)
    far = digits.measure(reader, data, -torch.ones_like(data.pictures), data.labels)
    assert far["frechet"] > 1


def test_no_steps_are_bad_input(tmp_path):
    with pytest.raises(BadInput, match="--steps 0"):
        digits.main(["--out", str(tmp_path), "--steps", "0"])
