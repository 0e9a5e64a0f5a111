"""Samplers on exact denoisers, against diffusers, and the one rule for starts in between."""

from __future__ import annotations

import pytest
import torch
from closed_form import SCHEDULE, GaussianTeacher, PerfectStudent, means
from diffusers import DPMSolverMultistepScheduler

from toolkit.diffusion.errors import BadInput
from toolkit.diffusion.grid import Grid
from toolkit.runtime.samplers import (
    initial_latent,
    sample_deterministic,
    sample_dpmpp_2m,
    start_timestep,
    strength_sigma,
    student_sampler,
    walk,
)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 7])
def test_a_perfect_student_lands_where_its_teacher_lands(steps):
    teacher, cond = GaussianTeacher(), means(3)
    grid, finer = Grid.trailing(steps), Grid.trailing(32 * steps)
    x = initial_latent((3, 2, 2, 2), seed=0, sigma=float(grid.sigmas(SCHEDULE)[0])).double()
    arguments = {"cond": cond}
    by_teacher = sample_deterministic(teacher, x, finer.sigmas(SCHEDULE), arguments)
    by_student = sample_deterministic(
        PerfectStudent(teacher, grid, finer), x, grid.sigmas(SCHEDULE), arguments
    )
    assert torch.allclose(by_student, by_teacher, atol=1e-9)


def test_samplers_converge_to_the_exact_flow_and_the_second_order_one_faster():
    teacher, cond = GaussianTeacher(), means(3)
    errors: dict[str, list[float]] = {"ddim": [], "dpmpp": []}
    for steps in (20, 40, 80):
        sigmas = torch.linspace(2.0, 0.3, steps + 1, dtype=torch.float64).log().exp()
        x = torch.linspace(-3, 3, 12, dtype=torch.float64).reshape(3, 1, 2, 2)
        exact = teacher.flow(x, sigmas[:1].expand(3), sigmas[-1:].expand(3), cond=cond)
        for name, sample in (("ddim", sample_deterministic), ("dpmpp", sample_dpmpp_2m)):
            errors[name].append(float((sample(teacher, x, sigmas, {"cond": cond}) - exact).abs().max()))
    assert errors["ddim"][0] / errors["ddim"][2] == pytest.approx(4, rel=0.2)
    assert errors["dpmpp"][0] / errors["dpmpp"][2] > 10
    assert errors["dpmpp"][2] < errors["ddim"][2] / 20


@pytest.mark.parametrize("steps", [4, 7, 16])
def test_dpmpp_2m_is_diffusers(steps):
    scheduler = DPMSolverMultistepScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", algorithm_type="dpmsolver++",
        solver_order=2, final_sigmas_type="zero", timestep_spacing="trailing", lower_order_final=True,
        euler_at_final=True, prediction_type="sample",
    )  # fmt: skip
    scheduler.set_timesteps(steps)
    teacher, cond = GaussianTeacher(), means(2)
    sigmas = Grid.trailing(steps).sigmas(SCHEDULE)
    x = initial_latent((2, 1, 2, 2), seed=3, sigma=float(sigmas[0]))
    z = x / (1 + sigmas[0].float() ** 2).sqrt()
    for i, timestep in enumerate(scheduler.timesteps):
        sigma = sigmas[i].float().expand(2)
        x0 = teacher(z * (1 + sigmas[i].float() ** 2).sqrt(), sigma, cond=cond)
        z = scheduler.step(x0, timestep, z).prev_sample
    assert torch.allclose(sample_dpmpp_2m(teacher, x, sigmas, {"cond": cond}), z, atol=3e-5)


def test_the_callback_is_told_of_every_evaluation():
    seen: list[float] = []
    sigmas = Grid.trailing(3).sigmas(SCHEDULE)
    x = torch.zeros(1, 1, 1, 1)
    sample_deterministic(
        GaussianTeacher(),
        x,
        sigmas,
        {"cond": means(1)},
        callback=lambda state: seen.append(float(state["sigma"])),
    )
    assert seen == sigmas[:-1].tolist()


def test_noise_is_of_unit_variance_at_the_top_and_added_to_a_picture_below():
    top = initial_latent((1, 4, 64, 64), seed=1, sigma=14.6146)
    assert float(top.std()) == pytest.approx((1 + 14.6146**2) ** 0.5, rel=0.02)
    again = initial_latent((1, 4, 64, 64), seed=1, sigma=2.0, x0=torch.ones(1, 4, 64, 64))
    assert torch.allclose((again - 1) / 2, top / (1 + 14.6146**2) ** 0.5, atol=1e-6)


def timesteps_of(sigmas: torch.Tensor) -> list[int]:
    return SCHEDULE.timestep(sigmas[:-1]).tolist()


def test_a_walk_evaluates_the_start_and_the_trained_entries_below_it():
    trained = Grid.trailing(4).timesteps
    assert timesteps_of(walk(trained, SCHEDULE)) == [999, 749, 499, 249]
    for strength, expected in {
        0.2: [199],
        0.35: [349, 249],
        0.5: [499, 249],
        0.7: [699, 499, 249],
        1.0: [999, 749, 499, 249],
    }.items():
        sigmas = walk(trained, SCHEDULE, start_sigma=strength_sigma(strength, SCHEDULE))
        assert timesteps_of(sigmas) == expected and sigmas[-1] == 0


def test_a_walk_ends_where_it_is_told_and_snaps_where_students_cannot_start_anywhere():
    trained = Grid.trailing(4).timesteps
    end = float(SCHEDULE.sigma(torch.tensor(400)))
    sigmas = walk(trained, SCHEDULE, start_sigma=float(SCHEDULE.sigma(torch.tensor(699))), end_sigma=end)
    assert timesteps_of(sigmas) == [699, 499] and float(sigmas[-1]) == end
    snapped = walk(trained, SCHEDULE, start_sigma=float(SCHEDULE.sigma(torch.tensor(699))), any_start=False)
    assert timesteps_of(snapped) == [749, 499, 249]


def test_a_start_that_a_host_computed_in_float32_is_the_trained_entry_itself():
    trained = Grid.trailing(4).timesteps
    start = float(SCHEDULE.sigma(torch.tensor(749)).float())
    assert timesteps_of(walk(trained, SCHEDULE, start_sigma=start)) == [749, 499, 249]


@pytest.mark.parametrize("strength", [0, -1, 1.5])
def test_strengths_out_of_range_are_refused(strength):
    with pytest.raises(BadInput, match="above 0 and at most 1"):
        start_timestep(strength)


def test_an_unknown_sampler_is_refused():
    with pytest.raises(BadInput, match="update FewStep"):
        student_sampler("new")  # type: ignore[arg-type]
