"""Distribution matching, on Gaussian data whose exact denoisers are known, and in the training loop."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from closed_form import SCHEDULE, GaussianTeacher, PerfectStudent, means
from test_loop import CPU, EITHER, Killed, equal, job

from toolkit.diffusion.denoiser import Guided
from toolkit.diffusion.errors import BadInput
from toolkit.diffusion.grid import Grid
from toolkit.diffusion.matching import DistributionMatching
from toolkit.diffusion.method import Batch, Setting
from toolkit.methods import find_methods, progressive, sfddm
from toolkit.runtime.samplers import sample_deterministic
from toolkit.training.loop import train

GRID, TEACHER, COUNT = Grid.trailing(2), GaussianTeacher(), 64
MATCHING = DistributionMatching(GRID, SCHEDULE, "epsilon", weight=1.0)


def unguided() -> Batch:
    return Batch(torch.zeros(COUNT, 2, 3, 3), means(COUNT, 0.5), means(1, 0.0), None)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Shifted(GaussianTeacher):
    """The exact denoiser of data whose mean is off."""

    def __call__(self, x, sigma, *, cond, w=None):
        return super().__call__(x, sigma, cond={"mean": cond["mean"] + 0.3})


def test_a_student_that_paints_as_its_teacher_does_is_not_pulled():
    batch, x0 = unguided(), torch.randn(COUNT, 2, 3, 3, generator=seeded())
    judged = MATCHING.judge(x0, teacher=TEACHER, critic=TEACHER, batch=batch, generator=seeded(1))
    assert judged.shape == (COUNT,) and judged.max() < 1e-12
    guided = dataclasses.replace(batch, w=torch.linspace(0, 7, COUNT))
    knows = Guided(TEACHER, batch.uncond)
    assert MATCHING.judge(x0, teacher=TEACHER, critic=knows, batch=guided, generator=seeded(1)).max() < 1e-12


def test_pictures_are_pulled_to_where_the_teacher_has_its_own():
    x0 = (0.8 + 0.6 * torch.randn(COUNT, 2, 3, 3, generator=seeded())).requires_grad_()
    judged = MATCHING.judge(x0, teacher=TEACHER, critic=Shifted(), batch=unguided(), generator=seeded(1))
    (gradient,) = torch.autograd.grad(judged.sum(), x0)
    assert (gradient > 0).all()  # the critic finds them 0.3 too high, so down is where the loss falls


def test_the_critic_learns_the_students_pictures_and_gives_them_no_gradient():
    x0 = (0.8 + 0.6 * torch.randn(COUNT, 2, 3, 3, generator=seeded())).requires_grad_()
    right, wrong = (
        MATCHING.learn(x0.detach(), critic=critic, batch=unguided(), generator=seeded(2)).mean()
        for critic in (Shifted(), TEACHER)
    )
    assert right < wrong
    assert x0.grad is None


def test_the_student_paints_as_its_sampler_does_and_the_last_step_has_the_gradient():
    asked: list[bool] = []

    class Watched(PerfectStudent):
        def __call__(self, x, sigma, *, cond, w=None):
            asked.append(torch.is_grad_enabled())
            return super().__call__(x, sigma, cond=cond, w=w)

    student, batch = Watched(TEACHER, GRID, Grid.trailing(8)), unguided()
    painted = MATCHING.paint(student, batch, generator=seeded(3))
    assert asked == [False, True]
    noise = torch.randn(batch.x0.shape, generator=seeded(3))
    sigmas = GRID.sigmas(SCHEDULE)
    start = noise * float((1 + sigmas[0] ** 2).sqrt())
    expected = sample_deterministic(student, start, sigmas, {"cond": batch.cond})
    assert torch.allclose(painted, expected, atol=1e-4)


@pytest.mark.parametrize("method", [sfddm, progressive])
def test_the_last_phase_sharpens_the_finished_student(method):
    found = method.phases(method.Config(sharpen=0.25), Setting(SCHEDULE, "epsilon", 2))
    plain = method.phases(method.Config(), Setting(SCHEDULE, "epsilon", 2))
    assert [phase.name for phase in found[:-1]] == [phase.name for phase in plain]
    last = found[-1]
    assert last.name == "sharpen-2" and last.grid == plain[-1].grid and last.teacher == "pair"
    assert last.prediction_type == plain[-1].prediction_type == "v_prediction"
    assert last.criticism is not None and plain[-1].criticism is None
    assert last.own_evaluations > plain[-1].own_evaluations


@pytest.mark.parametrize("method", [sfddm, progressive])
def test_what_cannot_be_sharpened_is_bad_input(method):
    stochastic = Setting(SCHEDULE, "epsilon", 2, sampler="stochastic")
    with pytest.raises(BadInput, match="only for deterministic students"):
        method.phases(method.Config(sharpen=0.25), stochastic)
    with pytest.raises(BadInput, match=r"--sharpen -1: expected 0 \(none\) or more"):
        method.phases(method.Config(sharpen=-1), Setting(SCHEDULE, "epsilon", 2))


def sharpening(alone: float = 0.5):
    """The phases of a one-step student, the last with a critic that begins alone."""
    setting = Setting(SCHEDULE, "epsilon", 1)
    fold, last = sfddm.phases(sfddm.Config(sharpen=0.25), setting)
    assert isinstance(last.criticism, DistributionMatching)
    return fold, dataclasses.replace(last, criticism=dataclasses.replace(last.criticism, alone=alone))


@EITHER
def test_while_the_critic_learns_alone_the_student_stays_as_it_was(tmp_path, settings):
    settings = dataclasses.replace(settings, updates=(2, 3), ema=0.0)
    work, students = job(tmp_path, phases=sharpening(alone=1.0))
    train(work, settings, device=CPU)
    assert equal(students["sharpen-1"], students["single-fold-1"])
    work, students = job(tmp_path / "other", phases=sharpening(alone=0.0))
    train(work, settings, device=CPU)
    assert not equal(students["sharpen-1"], students["single-fold-1"])


@EITHER
def test_the_critic_learns_and_the_teacher_does_not(tmp_path, settings):
    errors: list[float] = []
    answers: list[torch.Tensor] = []

    class Listening(DistributionMatching):
        def learn(self, x0, *, critic, batch, generator):
            found = super().learn(x0, critic=critic, batch=batch, generator=generator)
            errors.append(float(found.mean().detach()))
            return found

        def judge(self, x0, *, teacher, critic, batch, generator):
            sigma = SCHEDULE.sigma(torch.full((len(x0),), 500)).float()
            with torch.no_grad():
                answers.append(
                    teacher(torch.ones_like(x0)[:1], sigma[:1], cond={"text": torch.ones(1, 5, 16)})
                )
            return super().judge(x0, teacher=teacher, critic=critic, batch=batch, generator=generator)

    fold, last = sharpening(alone=0.7)
    criticism = Listening(**vars(last.criticism))
    settings = dataclasses.replace(settings, updates=(1, 40), micro_batch=4, critic_lr=5e-3)
    work, _ = job(tmp_path, phases=(fold, dataclasses.replace(last, criticism=criticism)))
    train(work, settings, device=CPU)
    assert sum(errors[20:28]) < 0.9 * sum(errors[:8])
    assert all(torch.equal(answer, answers[0]) for answer in answers)


@pytest.mark.parametrize("at", [1, 4])
@EITHER
def test_sharpening_killed_and_resumed_gives_the_same_bytes(tmp_path, at, settings):
    settings = dataclasses.replace(settings, updates=(1, 4), state_minutes=0, micro_batch=4)
    work, whole = job(tmp_path / "whole", phases=sharpening())
    train(work, settings, device=CPU)
    calls = 0

    class Dying(DistributionMatching):
        def learn(self, x0, *, critic, batch, generator):
            nonlocal calls
            calls += 1
            if calls == at:
                raise Killed
            return super().learn(x0, critic=critic, batch=batch, generator=generator)

    fold, last = sharpening()
    work, resumed = job(tmp_path / "killed", phases=sharpening())
    dying = dataclasses.replace(last, criticism=Dying(**vars(last.criticism)))
    with pytest.raises(Killed):
        train(dataclasses.replace(work, phases=(fold, dying)), settings, device=CPU)
    train(work, settings, device=CPU)
    assert equal(resumed["sharpen-1"], whole["sharpen-1"])


def test_sharpening_is_an_option_of_the_methods_that_fold():
    with_it = {name for name, method in find_methods().items() if hasattr(method.Config, "sharpen")}
    assert with_it == {"progressive", "sfddm"}
