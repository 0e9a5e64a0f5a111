"""Samplers on exact denoisers, against diffusers, and the one rule for starts in between."""

from __future__ import annotations

import pytest
import torch
from closed_form import SCHEDULE, GaussianTeacher, PerfectStudent, means
from diffusers import DPMSolverMultistepScheduler

from toolkit.diffusion.denoiser import Cond
from toolkit.diffusion.errors import BadInput
from toolkit.diffusion.grid import Grid
from toolkit.diffusion.schedule import like
from toolkit.diffusion.solvers import roll_2m
from toolkit.runtime.samplers import (
    entry_below,
    initial_latent,
    later_noise,
    sample_consistency,
    sample_deterministic,
    sample_dpmpp_2m,
    sample_stochastic,
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


def test_a_perfect_encoder_lands_on_the_exact_flow_and_its_decoder_brings_the_picture_back():
    teacher, cond = GaussianTeacher(), means(3)
    up, down = Grid.encoding(4), Grid.trailing(4)
    x0 = torch.linspace(-1, 1, 12).reshape(3, 1, 2, 2).double()
    sigmas = up.sigmas(SCHEDULE)
    encoder = PerfectStudent(teacher, up, up.refined(125), roll=roll_2m)
    noise = sample_deterministic(encoder, x0, sigmas, {"cond": cond})
    exact = teacher.flow(x0, sigmas[:1].expand(3), sigmas[-1:].expand(3), cond=cond)
    assert torch.allclose(noise, exact, rtol=2e-3)
    decoder = PerfectStudent(teacher, down, down.refined(125), roll=roll_2m)
    back = sample_deterministic(decoder, noise, down.sigmas(SCHEDULE), {"cond": cond})
    assert torch.allclose(back, x0, atol=5e-3)


def test_a_rolled_2m_is_the_sampler_and_may_wait_first():
    teacher, cond = GaussianTeacher(), means(2)
    sigmas = Grid.trailing(6).sigmas(SCHEDULE)
    x = initial_latent((2, 1, 2, 2), seed=3, sigma=float(sigmas[0])).double()
    expected = sample_dpmpp_2m(teacher, x, sigmas, {"cond": cond})
    for waits in ((), (0,), (0, 0)):
        levels = sorted([*sigmas.tolist(), *(float(sigmas[i]) for i in waits)], reverse=True)
        found = roll_2m(teacher, x, [x.new_full((2,), level) for level in levels], cond=cond, w=None)
        assert torch.allclose(found, expected, atol=1e-12)


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
        student_sampler("new", noise=later_noise([0]))  # type: ignore[arg-type]


class ExactJumps:
    """The x0 with which one Euler step of two cells lands exactly on the flow of Gaussian data."""

    def __init__(self, teacher: GaussianTeacher, levels: list[float]):
        self.teacher, self.levels = teacher, levels

    def __call__(self, x: torch.Tensor, sigma_t: torch.Tensor, *, cond: Cond) -> torch.Tensor:
        i = min(range(len(self.levels)), key=lambda j: abs(self.levels[j] - float(sigma_t[0])))
        sigma_s = torch.full_like(sigma_t, min(self.levels[i : i + 3]))
        landed = self.teacher.flow(x, sigma_t, sigma_s, cond=cond)
        return (like(sigma_t, x) * landed - like(sigma_s, x) * x) / like(sigma_t - sigma_s, x)


def test_the_stochastic_sampler_keeps_the_distribution_when_every_jump_is_exact():
    teacher, count = GaussianTeacher(), 20_000
    cond = means(1)
    sigmas = Grid.trailing(4).sigmas(SCHEDULE)
    exact = {name: value.expand(count, *value.shape[1:]) for name, value in cond.items()}
    generator = torch.Generator().manual_seed(0)
    top = sigmas[0]
    x0 = exact["mean"] + teacher.spread * torch.randn(count, 1, 1, 1, generator=generator).double()
    x = x0 + top * torch.randn(count, 1, 1, 1, generator=generator).double()
    drawn = sample_stochastic(
        ExactJumps(teacher, sigmas.tolist()), x, sigmas, {"cond": exact}, noise=later_noise([1])
    )
    assert float(drawn.mean()) == pytest.approx(float(cond["mean"].mean()), abs=0.02)
    assert float(drawn.std()) == pytest.approx(teacher.spread, rel=0.03)


def test_the_stochastic_sampler_jumps_two_cells_and_adds_one_cell_of_noise():
    seen: list[float] = []

    def clean(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        seen.append(float(x.std()) / float(sigma[0]))
        return torch.zeros_like(x)

    sigmas = Grid.trailing(4).sigmas(SCHEDULE)
    x = sigmas[0] * torch.randn(1, 1, 200, 200, generator=torch.Generator().manual_seed(0)).double()
    end = sample_stochastic(clean, x, sigmas, noise=later_noise([5]))
    assert seen == pytest.approx([1, 1, 1, 1], rel=0.02) and float(end.abs().max()) == 0
    early = sample_stochastic(clean, x, sigmas[:2], noise=later_noise([5]), beyond=float(sigmas[2]))
    assert float(early.std()) == pytest.approx(float(sigmas[1]), rel=0.02)


def test_the_consistency_sampler_starts_every_step_from_fresh_noise_on_its_own_x0():
    sigmas = torch.tensor([14.0, 2.0, 0.0], dtype=torch.float64)
    seen: list[torch.Tensor] = []

    def ones(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        seen.append(x)
        return torch.ones_like(x)

    sample_consistency(ones, torch.zeros(1, 1, 2, 2), sigmas, noise=later_noise([7]))
    expected = torch.randn(1, 1, 2, 2, generator=torch.Generator().manual_seed(8))
    assert torch.allclose((seen[1] - 1) / 2, expected)


def test_later_noise_belongs_to_each_seed_and_is_one_stream_for_a_batch_of_one_seed():
    x = torch.zeros(2, 1, 2, 2)
    each = later_noise([3, 9])(x)
    assert torch.equal(each[:1], later_noise([3])(x[:1])) and torch.equal(each[1:], later_noise([9])(x[:1]))
    stream = torch.randn(2, 1, 2, 2, generator=torch.Generator().manual_seed(4))
    assert torch.equal(later_noise([3])(x), stream)


def test_a_start_above_the_first_entry_is_the_first_entry():
    sigmas = walk([899, 449], SCHEDULE, start_sigma=float(SCHEDULE.sigma(torch.tensor(999))))
    assert timesteps_of(sigmas) == [899, 449]


def test_the_entry_below_a_trained_level_is_the_next_one_and_below_the_last_clean():
    level = float(SCHEDULE.sigma(torch.tensor(499)))
    assert entry_below([999, 499, 249], SCHEDULE, level) == float(SCHEDULE.sigma(torch.tensor(249)))
    assert entry_below([999, 499, 249], SCHEDULE, 0.1) == 0
