"""The mathematics against closed forms and against diffusers."""

from __future__ import annotations

import json
from fractions import Fraction

import pytest
import torch
from closed_form import SCHEDULE, GaussianTeacher, means
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from diffusers.models.embeddings import TimestepEmbedding
from diffusers.pipelines.latent_consistency_models.pipeline_latent_consistency_text2img import (
    LatentConsistencyModelPipeline,
)

from toolkit.diffusion.denoiser import Guided
from toolkit.diffusion.errors import BadInput
from toolkit.diffusion.grid import Grid, trailing_timesteps
from toolkit.diffusion.guidance import bias_shift, smooth_features, w_embedding
from toolkit.diffusion.prediction import (
    PREDICTION_TYPES,
    prediction_from_velocity,
    velocity_from,
    x0_from,
)
from toolkit.diffusion.schedule import NoiseSchedule, alpha, like
from toolkit.diffusion.solvers import chord_velocity, euler_step, roll
from toolkit.diffusion.spec import StudentSpec


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_schedule_has_the_published_values_of_stable_diffusion():
    for timestep, sigma in {0: 0.02917, 249: 0.6932, 499: 1.613, 749: 4.082, 999: 14.615}.items():
        assert float(SCHEDULE.sigma(torch.tensor(timestep))) == pytest.approx(sigma, rel=1e-3)
    assert float(SCHEDULE.sigma(torch.tensor(-1))) == 0.0


def test_schedule_equals_diffusers_also_with_zero_terminal_snr():
    ours = SCHEDULE.alphas_cumprod
    options = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    theirs = DDIMScheduler(**options).alphas_cumprod.double()
    assert torch.allclose(ours, theirs, rtol=1e-5, atol=0)
    zero = DDIMScheduler(**options, rescale_betas_zero_snr=True).alphas_cumprod.double()
    assert torch.allclose(SCHEDULE.zero_terminal_snr().alphas_cumprod[:-1], zero[:-1], rtol=1e-4, atol=1e-9)
    assert float(SCHEDULE.zero_terminal_snr().sigmas[-1]) == pytest.approx(4519, rel=1e-3)


def test_every_timestep_is_found_again_from_its_sigma():
    timesteps = torch.arange(1000)
    assert torch.equal(SCHEDULE.timestep(SCHEDULE.sigma(timesteps)), timesteps)
    assert torch.equal(SCHEDULE.timestep(SCHEDULE.sigma(timesteps).float()), timesteps)


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_predictions_convert_there_and_back(kind):
    x, prediction = random(6, 4, 3, 3), random(6, 4, 3, 3, seed=1)
    sigma = SCHEDULE.sigma(torch.tensor([0, 19, 249, 499, 749, 999]))
    velocity = velocity_from(prediction, x, sigma, kind)
    assert torch.allclose(prediction_from_velocity(velocity, x, sigma, kind), prediction, atol=1e-12)
    assert torch.allclose(
        x0_from(prediction, x, sigma, kind),
        prediction_from_velocity(velocity, x, sigma, "sample"),
        atol=1e-12,
    )


def test_trailing_grids_are_the_rounded_rationals_and_nest():
    assert trailing_timesteps(4) == (999, 749, 499, 249)
    assert trailing_timesteps(3) == (999, 666, 332)
    assert trailing_timesteps(16)[1] == 937 and round(Fraction(875, 2)) == 438
    for coarse in range(1, 17):
        for times in (2, 3, 4):
            assert trailing_timesteps(coarse * times)[::times] == trailing_timesteps(coarse)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 6, 7, 8, 16, 50])
def test_trailing_grids_equal_diffusers_trailing_spacing(steps):
    scheduler = DPMSolverMultistepScheduler(timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    assert tuple(scheduler.timesteps.tolist()) == trailing_timesteps(steps)


def test_cells_are_half_open_at_their_lower_end():
    grid = Grid((999, 749, 499, 249))
    timesteps = torch.tensor([999, 750, 749, 748, 499, 250, 249, 0])
    assert grid.cell(timesteps).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_an_euler_step_is_diffusers_ddim_step():
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="trailing",
        clip_sample=False, set_alpha_to_one=True,
    )  # fmt: skip
    scheduler.set_timesteps(4)
    z, eps = random(1, 4, 3, 3).float(), random(1, 4, 3, 3, seed=1).float()
    sigmas = Grid.trailing(4).sigmas(SCHEDULE)
    for i, timestep in enumerate(scheduler.timesteps):
        t, s = sigmas[i : i + 1].float(), sigmas[i + 1 : i + 2].float()
        x = z / like(alpha(t), z)
        stepped = euler_step(x, x0_from(eps, x, t, "epsilon"), t, s) * like(alpha(s), z)
        assert torch.allclose(stepped, scheduler.step(eps, timestep, z).prev_sample, atol=2e-5)


@pytest.mark.parametrize("substeps", [1, 2, 3, 8])
def test_one_step_with_the_chord_lands_where_the_teachers_steps_landed(substeps):
    teacher, cond = GaussianTeacher(), means(4)
    ends = Grid.trailing(4).sigmas(SCHEDULE)
    for j in range(4):
        x = random(4, 2, 3, 3, seed=j) * (1 + ends[j] ** 2).sqrt()
        path = [
            torch.full((4,), float(s), dtype=torch.float64)
            for s in torch.linspace(ends[j], ends[j + 1], substeps + 1)
        ]
        landed = roll(teacher, x, path, cond=cond, w=None)
        velocity = chord_velocity(x, landed, path[0], path[-1])
        x0 = prediction_from_velocity(velocity, x, path[0], "sample")
        assert torch.allclose(euler_step(x, x0, path[0], path[-1]), landed, atol=1e-11)


def test_euler_steps_converge_to_the_exact_flow_with_order_one():
    teacher, cond = GaussianTeacher(), means(3)
    x = random(3, 1, 2, 2) * 3
    exact = teacher.flow(x, torch.full((3,), 3.0), torch.full((3,), 0.5), cond=cond)
    errors: list[float] = []
    for steps in (16, 32, 64):
        path = [torch.full((3,), float(s), dtype=torch.float64) for s in torch.linspace(3.0, 0.5, steps + 1)]
        errors.append(float((roll(teacher, x, path, cond=cond, w=None) - exact).abs().max()))
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.15) and errors[1] / errors[2] == pytest.approx(
        2, rel=0.1
    )


def test_the_guided_pair_is_the_formula_and_needs_no_pair_without_w():
    teacher, cond, uncond = GaussianTeacher(), means(4), means(1, 0.0)
    x, sigma, w = (
        random(4, 1, 2, 2),
        torch.tensor([0.5, 1, 4, 14.0]).double(),
        torch.tensor([0, 1, 3, 6.5]).double(),
    )
    guided = Guided(teacher, uncond)
    c, u = teacher(x, sigma, cond=cond), teacher(x, sigma, cond=means(4, 0.0))
    assert torch.allclose(guided(x, sigma, cond=cond, w=w), c + like(w, x) * (c - u), atol=1e-12)
    assert torch.allclose(guided(x, sigma, cond=cond, w=None), c, atol=1e-12)


def test_w_embedding_is_diffusers():
    w = torch.tensor([0.0, 0.5, 3.0, 14.0])
    theirs = LatentConsistencyModelPipeline.get_guidance_scale_embedding(None, w, embedding_dim=256)
    assert torch.equal(w_embedding(w), theirs)
    assert w_embedding(w.bfloat16()).dtype == torch.float32


def test_the_bias_shift_stands_for_w_in_the_time_embedding():
    torch.manual_seed(0)
    embedding = TimestepEmbedding(32, 64, cond_proj_dim=256).double()
    sinusoid = random(2, 32)
    conditioned = embedding(sinusoid, w_embedding(torch.tensor([6.5, 6.5])).double())
    with torch.no_grad():
        embedding.linear_1.bias += bias_shift(embedding.linear_1.weight, embedding.cond_proj.weight, 6.5)
    assert torch.allclose(embedding(sinusoid), conditioned, atol=1e-12)


def test_smooth_features_turn_by_at_most_one_radian_a_unit_of_w():
    kept = smooth_features().bool()
    assert kept.sum() == 64
    moved = (w_embedding(torch.tensor([3.0])) - w_embedding(torch.tensor([3.01])))[0].abs()
    assert moved[kept].max() <= 0.0101


def spec(**changes: object) -> StudentSpec:
    values = dict(
        family="sd1", prediction_type="epsilon", method="progressive", timesteps=(999, 499),
        teacher_sha256="ab", teacher_name="t",
    )  # fmt: skip
    return StudentSpec(**{**values, **changes})  # type: ignore[arg-type]


def test_a_spec_survives_its_json():
    written = spec(w_embedding=None, baked_guidance=4.0)
    assert StudentSpec.from_json(written.to_json()) == written
    assert StudentSpec.from_json(spec().to_json()) == spec()


@pytest.mark.parametrize(
    ("change", "part"),
    [({"format": 2}, "update FewStep"), ({"oops": 1}, "oops"), ({"method": ...}, "method")],
)
def test_a_spec_that_cannot_be_understood_is_refused(change, part):
    values = json.loads(spec().to_json()) | change
    values = {name: value for name, value in values.items() if value is not ...}
    with pytest.raises(BadInput, match=part):
        StudentSpec.from_json(json.dumps(values))


def test_guidance_outside_the_trained_range_is_refused_with_the_range():
    with pytest.raises(BadInput, match="20 was asked for, but this student was trained for guidance 1 to 15"):
        spec().check_guidance(20)
    with pytest.raises(BadInput, match="guidance 4 baked in"):
        spec(baked_guidance=4.0).check_guidance(5)


def test_schedules_of_other_lengths_work():
    assert len(NoiseSchedule.scaled_linear(timesteps=64)) == 64


def test_an_encoders_grid_is_the_trailing_one_backwards_and_finer_ones_keep_its_points():
    grid = Grid.encoding(4)
    assert grid.points == (0, 249, 499, 749, 999) and grid.ascending and not Grid.trailing(4).ascending
    assert Grid.encoding(1).points == (0, 999)
    assert grid.cell(torch.tensor([0, 100, 249, 998])).tolist() == [0, 0, 1, 3]
    assert grid.refined(2).points == (0, 124, 249, 374, 499, 624, 749, 874, 999)
    assert Grid.trailing(3).refined(2) == Grid.trailing(6)
    assert Grid((999, 499, 9)).refined(2).points == (999, 749, 499, 254, 9, 4, -1)
    assert grid.sigmas(SCHEDULE)[-1] == SCHEDULE.sigma(torch.tensor(999))
