"""What a plan adds up, and that its times are measured on what is there."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from toolkit.diffusion.method import Setting
from toolkit.diffusion.schedule import NoiseSchedule
from toolkit.methods import sfddm
from toolkit.training.loop import LoopSettings
from toolkit.training.plan import Costs, make_plan, measure
from toolkit.training.samples import GuidanceRange

CPU = torch.device("cpu")


@pytest.mark.parametrize("optimizer, ema, saved", [("adamw", 0.9, 16), ("adamw8bit", 0.0, 6)])
def test_time_and_disk_of_a_plan(optimizer: str, ema: float, saved: int):
    """Of each trained number a state has ``saved`` bytes: value, moments and average."""
    setting = Setting(schedule=NoiseSchedule.scaled_linear(), prediction_type="epsilon", steps=4, guided=True)
    phases = sfddm.phases(sfddm.Config(), setting)
    settings = LoopSettings(
        updates=(10,), batch_size=8, micro_batch=4, lr=1e-3, warmup=1, clip=1.0, ema=ema, seed=0,
        precision="fp32", guidance=GuidanceRange(1, 8), trajectory_share=0.5, optimizer=optimizer,
    )  # fmt: skip
    plan = make_plan(
        phases,
        settings,
        Costs(trained=1, evaluation_seconds=2.0, training_seconds=5.0, update_seconds=30.0),
        on_trajectory=True,
        sample_evaluations=7,
        sample_bytes=1,
        student_bytes=1,
        memory={},
        free_bytes=1,
        files=(),
        route="",
    )
    (phase,) = phases
    asked = phase.teacher_evaluations / 2
    assert plan.phases[0].seconds == pytest.approx(10 * (8 * (asked * 2 + 5) + 30))
    assert plan.seconds == pytest.approx(plan.phases[0].seconds + 7 * 2)
    assert plan.disk["state"] == 2 * saved + 2 * 4


def test_measuring_leaves_the_network_as_it_was():
    network = nn.Conv2d(1, 1, 1)
    before = [parameter.detach().clone() for parameter in network.parameters()]
    costs = measure(
        lambda z, t, cond, w: network(z),
        trained=list(network.parameters()),
        latent=(1, 4, 4),
        cond={},
        w=None,
        batch=2,
        device=CPU,
        precision="fp32",
        optimizer="adamw",
    )
    assert min(costs.evaluation_seconds, costs.training_seconds, costs.update_seconds) > 0
    for parameter, value in zip(network.parameters(), before, strict=True):
        assert torch.equal(parameter, value) and parameter.grad is None
