"""Every method found by the scan, on Gaussian data whose exact teacher is known."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import pytest
import torch
from closed_form import SCHEDULE, GaussianTeacher, PerfectStudent, means

from toolkit.diffusion.denoiser import Guided
from toolkit.diffusion.errors import BadInput
from toolkit.diffusion.folding import FoldLoss, Posed, routes
from toolkit.diffusion.grid import Grid
from toolkit.diffusion.hidden import show, watching
from toolkit.diffusion.method import Batch, Phase, Setting, draw_timesteps, truncated_snr_weight
from toolkit.diffusion.schedule import like
from toolkit.diffusion.solvers import roll, roll_2m
from toolkit.methods import find_methods, options_of
from toolkit.methods.progressive import Config, phases

METHODS = find_methods()
SETTING = Setting(SCHEDULE, "epsilon", 4)


def batch(size: int = 32, **changes: object) -> Batch:
    generator = torch.Generator().manual_seed(0)
    values = dict(
        x0=torch.randn(size, 2, 3, 3, generator=generator),
        cond=means(size),
        uncond=means(1, 0.0),
        w=torch.linspace(0, 7, size),
    )
    return Batch(**{**values, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_one_file_with_help_config_and_phases(name):
    method = METHODS[name]
    assert method.__doc__ and method.__doc__.splitlines()[0].endswith(".")
    assert method.Config.__dataclass_params__.frozen
    assert all(option.help for option in options_of(method))
    found = method.phases(method.Config(), SETTING)
    assert found[-1].grid in (Grid.trailing(4), Grid.encoding(4))
    assert found[0].teacher == "pair" and len({phase.name for phase in found}) == len(found)


@pytest.mark.parametrize("name", METHODS)
def test_losses_are_one_a_sample_differentiable_and_drawn_from_the_generator_alone(name):
    class Student(GaussianTeacher):
        def __call__(self, x, sigma, *, cond, w=None):
            return scale * super().__call__(x, sigma, cond=cond)

    scale = torch.tensor(0.9, requires_grad=True)
    for phase in METHODS[name].phases(METHODS[name].Config(), SETTING):
        losses = [
            phase.loss(
                student=Student(),
                teacher=GaussianTeacher(),
                batch=batch(),
                generator=torch.Generator().manual_seed(7),
            )
            for _ in range(2)
        ]
        assert losses[0].shape == (32,) and losses[0].dtype == torch.float32 and bool((losses[0] > 0).all())
        assert torch.equal(*losses)
        (gradient,) = torch.autograd.grad(losses[0].sum(), scale)
        assert gradient != 0


def test_a_perfect_guided_student_has_zero_loss():
    (phase,) = METHODS["guided"].phases(METHODS["guided"].Config(), SETTING)
    data, teacher = batch(), GaussianTeacher()
    perfect = Guided(teacher, data.uncond)
    loss = phase.loss(
        student=perfect, teacher=teacher, batch=data, generator=torch.Generator().manual_seed(1)
    )
    assert loss.max() < 1e-10
    unguided = phase.loss(
        student=teacher, teacher=teacher, batch=data, generator=torch.Generator().manual_seed(1)
    )
    assert unguided[0] < 1e-10 and unguided[1:].min() > 1e-10


def fold(grid: Grid, finer: Grid, *, cells: int = 1, **changes: object) -> FoldLoss:
    values = dict(routes=routes(grid, finer, cells=cells), schedule=SCHEDULE, guide=False, inside=0.5)
    return FoldLoss(grid, **{**values, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("cells", [1, 2])
@pytest.mark.parametrize("steps", [1, 2, 3, 6])
def test_a_perfect_student_of_a_fold_has_zero_loss_also_inside_the_cells(steps, cells):
    grid, finer = Grid.trailing(steps), Grid.trailing(2 * steps)
    loss, teacher = fold(grid, finer, cells=cells), GaussianTeacher()

    def of(student: object) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1)
        return loss(student=student, teacher=teacher, batch=batch(256), generator=generator)  # type: ignore[arg-type]

    assert of(PerfectStudent(teacher, grid, finer, cells)).max() < 1e-8
    assert of(teacher).mean() > 1e-4
    other = 2 if cells == 1 else 1
    assert steps == 1 or of(PerfectStudent(teacher, grid, finer, other)).mean() > 1e-4


def test_routes_go_over_one_cell_or_two_and_wait_before_short_ones():
    grid = Grid.trailing(4)
    assert routes(grid, Grid.trailing(8), cells=1) == ((874, 749), (624, 499), (374, 249), (124, -1))
    assert routes(grid, grid, cells=2) == ((749, 499), (499, 249), (249, -1), (249, -1))
    free = Grid((999, 499, 9))
    assert routes(free, free.refined(2), cells=1) == ((749, 499), (254, 9), (4, -1))


def test_the_teachers_path_is_its_route_and_waits_at_starts_inside_a_cell():
    loss = fold(Grid.trailing(2), Grid.trailing(4))
    path = torch.stack(loss.teacher_path(torch.tensor([999, 800, 600, 499, 300, 100])), dim=1)
    assert path.tolist() == [
        [999, 749, 499],
        [800, 749, 499],
        [600, 600, 499],
        [499, 249, -1],
        [300, 249, -1],
        [100, 100, -1],
    ]


@pytest.mark.parametrize("timesteps", [(), (999, 700, 333, 40)])
@pytest.mark.parametrize("sampler", ["deterministic", "stochastic"])
def test_a_perfect_single_fold_student_has_zero_loss_on_any_grid(sampler, timesteps):
    config = METHODS["sfddm"].Config(timesteps=timesteps, substeps=4, feature_weight=0.1)
    (phase,) = METHODS["sfddm"].phases(config, dataclasses.replace(SETTING, sampler=sampler, guided=False))
    cells = 1 if sampler == "deterministic" else 2
    assert phase.sampler == sampler and phase.grid == (Grid(timesteps) if timesteps else Grid.trailing(4))
    teacher = GaussianTeacher()
    perfect = PerfectStudent(teacher, phase.grid, phase.grid.refined(4 // cells), cells, roll=roll_2m)

    class Observed(GaussianTeacher):
        def velocity(self, x, sigma, *, cond, w=None):
            with watching():
                answer = perfect.velocity(x, sigma, cond=cond)
            show(x + self.spread)
            return answer

    for offset, expected in ((0.0, 0.0), (2.0, 0.2)):
        values = phase.loss(
            student=Observed(offset),
            teacher=teacher,
            batch=batch(256, w=None),
            generator=torch.Generator().manual_seed(1),
        )
        assert values.tolist() == pytest.approx([expected] * 256, abs=1e-6)


def test_the_released_single_fold_target_is_reached_before_training_and_the_rollout_is_not():
    teacher, losses = GaussianTeacher(), {}
    for target in ("released", "rollout"):
        config = METHODS["sfddm"].Config(sfddm_target=target)
        (phase,) = METHODS["sfddm"].phases(config, dataclasses.replace(SETTING, guided=False))
        losses[target] = phase.loss(
            student=teacher, teacher=teacher, batch=batch(w=None), generator=torch.Generator().manual_seed(1)
        )
    assert losses["released"].max() == 0 and losses["rollout"].mean() > 1e-3


def test_lists_of_timesteps_that_are_no_grid_are_refused():
    for timesteps, sentence in {
        (999, 499): "--steps 2",
        (999, 499, 499, 1): "falling list",
        (900, 499, 99, 1): "begins at 999",
        (999, 499, 9, -1): "ends at 0",
    }.items():
        with pytest.raises(BadInput, match=sentence):
            METHODS["sfddm"].phases(METHODS["sfddm"].Config(timesteps=timesteps), SETTING)


@pytest.mark.parametrize("sampler", ["deterministic", "stochastic"])
def test_on_policy_rows_start_where_the_student_gets_to_and_a_perfect_student_has_zero_loss(sampler):
    grid, finer, teacher = Grid.trailing(4), Grid.trailing(8), GaussianTeacher()
    cells = 1 if sampler == "deterministic" else 2
    loss = fold(grid, finer, cells=cells, on_policy=1.0, sampler=sampler)

    class Flat(GaussianTeacher):
        """Every picture is grey."""

        def __call__(self, x, sigma, *, cond, w=None):
            return torch.zeros_like(x)

    def pose(student: object) -> Posed:
        generator = torch.Generator().manual_seed(1)
        return loss.pose(student=student, teacher=teacher, batch=batch(512), generator=generator)  # type: ignore[arg-type]

    perfect = PerfectStudent(teacher, grid, finer, cells)
    posed = pose(perfect)
    answer = perfect.velocity(posed.x, posed.sigma, cond=batch(512).cond)
    assert posed.error(answer).max() < 1e-8
    visited = pose(Flat())
    at_entry = torch.isin(visited.sigma, grid.sigmas(SCHEDULE).float()[1:])
    noise = visited.x[at_entry] / like(visited.sigma[at_entry], visited.x)
    assert float(noise.std()) == pytest.approx(1, abs=0.05)


def consistency(steps: int, **options: object) -> Phase:
    (phase,) = METHODS["consistency"].phases(
        METHODS["consistency"].Config(**options), dataclasses.replace(SETTING, steps=steps, guided=False)
    )
    return phase


@pytest.mark.parametrize("loss", ["snr", "lcm"])
@pytest.mark.parametrize(("ends", "steps"), [("clean", 4), ("phase", 2), ("phase", 5)])
def test_a_perfect_consistency_student_has_zero_loss(ends, steps, loss):
    phase, teacher = consistency(steps, ends=ends, consistency_loss=loss), GaussianTeacher()
    jumps = Grid.trailing(1) if ends == "clean" else phase.grid
    values = [
        phase.loss(
            student=student,  # type: ignore[arg-type]
            teacher=teacher,
            batch=batch(256, w=None),
            generator=torch.Generator().manual_seed(1),
        )
        for student in (PerfectStudent(teacher, jumps, Grid.trailing(50)), GaussianTeacher(spread=0.4))
    ]
    assert values[0].max() < (1e-6 if loss == "snr" else 1e-4) and values[1].mean() > 1e-3


def test_free_ends_lie_anywhere_below_and_only_a_straight_flow_suits_them_all():
    phase, curved = consistency(4, ends="free"), GaussianTeacher()
    below, end = phase.loss.below(torch.full((4000,), 999), torch.Generator().manual_seed(0))  # type: ignore[attr-defined]
    assert set(below.tolist()) == {979} and set(end.tolist()) == set(Grid.trailing(50).points) - {999}
    straight = GaussianTeacher(spread=0.0)
    means_of = [
        float(
            phase.loss(
                student=PerfectStudent(teacher, Grid.trailing(1), Grid.trailing(50)),
                teacher=teacher,
                batch=batch(256, w=None),
                generator=torch.Generator().manual_seed(1),
            ).mean()
        )
        for teacher in (straight, curved)
    ]
    assert means_of[0] < 1e-8 and means_of[1] > 1e-4


def test_consistency_students_say_how_they_are_sampled():
    samplers = {ends: consistency(4, ends=ends).sampler for ends in ("clean", "phase", "free")}
    assert samplers == {"clean": "consistency", "phase": "deterministic", "free": "deterministic"}
    method, stochastic = METHODS["consistency"], dataclasses.replace(SETTING, sampler="stochastic")
    assert method.phases(method.Config(ends="free"), stochastic)[0].sampler == "stochastic"
    with pytest.raises(BadInput, match="leave it out"):
        method.phases(method.Config(), stochastic)
    with pytest.raises(BadInput, match="expected 4"):
        consistency(4, solver_steps=3)


@pytest.mark.parametrize("steps", [1, 3, 4])
def test_a_perfect_encoder_has_zero_loss_and_starts_from_the_picture_itself(steps):
    method, data = METHODS["inversion"], batch(256)
    (phase,) = method.phases(method.Config(), dataclasses.replace(SETTING, steps=steps))
    teacher = GaussianTeacher()
    perfect = PerfectStudent(teacher, phase.grid, phase.grid.refined(-(-16 // steps)), roll=roll_2m)
    starts: list[torch.Tensor] = []

    class Observed(GaussianTeacher):
        def velocity(self, x, sigma, *, cond, w=None):
            assert w is None, "encoding is unguided"
            starts.append(x[sigma == SCHEDULE.sigmas[0].float()])
            return perfect.velocity(x, sigma, cond=cond)

    losses = [
        phase.loss(student=student, teacher=teacher, batch=data, generator=torch.Generator().manual_seed(1))
        for student in (Observed(), teacher)
    ]
    assert losses[0].max() < 1e-6 and losses[1].mean() > 1e-4
    assert len(starts[0]) and all(any(torch.equal(x, x0) for x0 in data.x0) for x in starts[0])
    assert not phase.dial and not phase.any_start and phase.teacher_evaluations == -(-16 // steps)


def test_without_guidance_progressive_halves_the_teacher_itself_and_students_have_no_dial():
    unguided = dataclasses.replace(SETTING, guided=False)
    found = phases(Config(finest=16), unguided)
    assert [(phase.name, phase.teacher) for phase in found] == [("fold-8", "pair"), ("fold-4", "previous")]
    assert [phase.teacher_evaluations for phase in found] == [2, 2]
    assert not any(phase.dial for phase in found)
    assert [phase.name for phase in phases(Config(finest=4), unguided)] == ["fold-4"]
    grid, finer, teacher = Grid.trailing(8), Grid.trailing(16), GaussianTeacher()
    values = found[0].loss(
        student=PerfectStudent(teacher, grid, finer),
        teacher=teacher,
        batch=batch(w=None),
        generator=torch.Generator().manual_seed(1),
    )
    assert values.max() < 1e-8
    with pytest.raises(BadInput, match="leaves none"):
        METHODS["guided"].phases(METHODS["guided"].Config(), unguided)


def test_progressive_halves_from_the_finest_grid_and_converts_to_velocity_where_told():
    found = phases(Config(finest=16, velocity_at=2), dataclasses.replace(SETTING, steps=1))
    assert [phase.name for phase in found] == ["guided", "fold-8", "fold-4", "fold-2", "fold-1"]
    assert [phase.prediction_type for phase in found] == ["epsilon"] * 3 + ["v_prediction"] * 2
    assert [len(phase.grid) for phase in found] == [16, 8, 4, 2, 1]
    (only,) = phases(Config(origin="pair", substeps=3), SETTING)
    assert only.teacher == "pair" and only.teacher_evaluations == 6 and only.name == "fold-4"
    with pytest.raises(BadInput, match="substeps 0"):
        phases(Config(origin="pair", substeps=0), SETTING)


def test_rows_on_the_trajectory_start_from_its_points_and_the_others_from_noised_data():
    states = torch.full((4, 2, 2, 3, 3), 5.0)
    data = batch(
        4, states=states, state_timesteps=(999, 499), on_trajectory=torch.tensor([True, True, True, False])
    )
    x = data.start(torch.tensor([499, 999, 700, 499]), schedule=SCHEDULE, generator=torch.Generator())
    assert bool((x[:2] == 5).all()) and not bool((x[2:] == 5).any())


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_on_a_kept_trajectory_the_teacher_is_not_asked_and_a_perfect_student_has_zero_loss(steps):
    class Silent(GaussianTeacher):
        def __call__(self, x, sigma, *, cond, w=None):
            raise AssertionError("the teacher was asked")

    teacher, grid, kept = GaussianTeacher(), Grid.trailing(steps), Grid.trailing(16)
    data = batch(256)
    sigmas = [sigma.float().expand(256) for sigma in kept.sigmas(SCHEDULE)]
    points = [torch.randn(256, 2, 3, 3, generator=torch.Generator().manual_seed(2)) * 14.6]
    for sigma_t, sigma_s in pairwise(sigmas):
        points.append(roll(teacher, points[-1], [sigma_t, sigma_s], cond=data.cond, w=None))
    data = dataclasses.replace(
        data,
        x0=points[-1],
        states=torch.stack(points[:-1], dim=1),
        state_timesteps=kept.timesteps,
        on_trajectory=torch.ones(256, dtype=torch.bool),
    )
    loss = fold(grid, Grid.trailing(2 * steps), inside=0.3, on_policy=0.5)
    generator = torch.Generator().manual_seed(1)
    values = loss(
        student=PerfectStudent(teacher, grid, kept), teacher=Silent(), batch=data, generator=generator
    )
    assert values.max() < 1e-7


def test_half_of_the_noised_rows_at_the_top_are_pure_noise_of_unit_variance():
    data = batch(4000, x0=torch.full((4000, 1, 1, 1), 40.0))
    top = torch.full((4000,), 999)
    z = (
        data.start(top, schedule=SCHEDULE, generator=torch.Generator().manual_seed(0))
        / (1 + 14.6146**2) ** 0.5
    )
    assert float(z.mean()) == pytest.approx(0.5 * 40 * 0.0683, abs=0.08)
    assert float(z.var()) == pytest.approx(1 + (0.5 * 40 * 0.0683) ** 2, rel=0.06)


def test_a_share_of_the_timesteps_lies_inside_the_cells():
    drawn = draw_timesteps((999, 499), 4000, inside=0.25, generator=torch.Generator().manual_seed(0))
    at_entries = ((drawn == 999) | (drawn == 499)).float().mean()
    assert float(at_entries) == pytest.approx(0.75, abs=0.03)
    assert drawn.min() >= 0 and drawn.max() <= 999


def test_the_truncated_snr_weight_on_velocity_is_max_of_signal_and_noise():
    weight = truncated_snr_weight(torch.tensor([1e-3, 1.0, 1e3]))
    assert weight.tolist() == pytest.approx([1, 0.5, 1], abs=1e-5)
