"""The training loop on a tiny network: exact resuming, phases, averages, and what it says when something is
wrong.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import signal
import sys
import weakref
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from windows import keep_what_is_in_use

from toolkit.diffusion.denoiser import Guided, NetworkDenoiser
from toolkit.diffusion.errors import BadInput
from toolkit.diffusion.guidance import smooth_features
from toolkit.diffusion.hidden import watching
from toolkit.diffusion.method import Phase, Setting
from toolkit.diffusion.prediction import prediction_from_velocity
from toolkit.diffusion.schedule import NoiseSchedule
from toolkit.methods import find_methods
from toolkit.methods.progressive import Config, phases
from toolkit.training import loop
from toolkit.training.adapters import LoraShape, OneNetwork
from toolkit.training.loop import (
    Interrupted,
    Job,
    LoopSettings,
    PhaseTrainer,
    Progress,
    Start,
    cut_back,
    keep_verdict,
    lr_factor,
    make_holder,
    stop_requests,
    train,
    verdict_path,
)
from toolkit.training.networks import UNetNetwork
from toolkit.training.samples import GuidanceRange, Order, Samples

SCHEDULE = NoiseSchedule.scaled_linear()
CPU = torch.device("cpu")


def tiny_unet(conditioned: bool = True) -> UNet2DConditionModel:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=4, in_channels=4, out_channels=4, block_out_channels=(32,), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",),
        cross_attention_dim=16, attention_head_dim=8, time_cond_proj_dim=256 if conditioned else None,
    )  # fmt: skip
    if conditioned:
        torch.nn.init.zeros_(unet.get_parameter("time_embedding.cond_proj.weight"))
    return unet


def samples(count: int = 6) -> Samples:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).half()

    shard = {
        "x0": draw(count, 4, 4, 4),
        "text": 1 + torch.arange(count) % 3,
        "guidance": 1 + 3 * torch.rand(count, generator=generator),
        "states": draw(count, 2, 4, 4, 4),
    }
    return Samples([shard], {"text": draw(4, 5, 16)}, state_timesteps=(999, 499))


SETTINGS = LoopSettings(
    updates=(4, 3), batch_size=4, micro_batch=3, lr=1e-3, warmup=1, clip=1.0, ema=0.9, seed=3,
    precision="fp32", guidance=GuidanceRange(1, 8), trajectory_share=0.5,
)  # fmt: skip

LORA = dataclasses.replace(SETTINGS, lora=LoraShape(rank=2))
EITHER = pytest.mark.parametrize("settings", [SETTINGS, LORA], ids=["full", "lora"])


def job(out: Path, **changes: object) -> tuple[Job, dict[str, dict[str, Tensor]]]:
    students: dict[str, dict[str, Tensor]] = {}

    def finished(phase: Phase, state: dict[str, Tensor]) -> None:
        students[phase.name] = {name: value.clone() for name, value in state.items()}

    values = dict(
        phases=phases(Config(finest=2), Setting(SCHEDULE, "epsilon", 1)),
        teacher_prediction="epsilon",
        schedule=SCHEDULE,
        samples=samples(),
        new_unet=tiny_unet,
        finished=finished,
        look=lambda name, student, phase: None,
        out=out,
    )
    out.mkdir(exist_ok=True)
    return Job(**{**values, **changes}), students  # type: ignore[arg-type]


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_the_untrained_student_is_the_teacher_bit_for_bit_at_any_guidance():
    plain, student = tiny_unet(conditioned=False), tiny_unet()
    plain.load_state_dict({k: v for k, v in student.state_dict().items() if "cond_proj" not in k})
    z, t = torch.randn(3, 4, 4, 4), torch.tensor([0, 500, 999])
    cond = {"text": torch.randn(3, 5, 16)}
    with torch.no_grad():
        expected = UNetNetwork(plain)(z, t, cond, None)
        for w in (None, torch.tensor([0.0, 3.0, 14.0])):
            assert torch.equal(UNetNetwork(student)(z, t, cond, w), expected)


def test_averages_off_the_device_are_the_same_and_visit_it_only_to_be_shown(tmp_path: Path) -> None:
    kept, shown = [], []

    def trainer(name: str, **changes: object) -> PhaseTrainer:
        settings = dataclasses.replace(SETTINGS, **changes)  # type: ignore[arg-type]
        work, _ = job(tmp_path / name, look=lambda name, student, phase: shown.append(weights(made)))
        made = PhaseTrainer(
            work, settings, 0, make_holder(work, settings, CPU), torch.GradScaler(enabled=False), CPU, 3
        )
        return made

    def weights(of: PhaseTrainer) -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in of.trained.items()}

    plain, off = trainer("plain"), trainer("off", averages="cpu")
    assert all(value.device == CPU for value in off.average.values())
    assert off.average.keys() == off.trained.keys(), "of what is trained only"
    off.average = {name: value.double() for name, value in off.average.items()}  # as good as another device
    for each in (plain, off):
        for _ in range(2):
            each.step()
        before = weights(each)
        each.look("now")
        kept.append({name: value.clone() for name, value in each.average.items()})
        assert equal(weights(each), before)
    assert all(value.dtype == torch.float64 for value in off.average.values())
    assert all(value.dtype == torch.float32 for value in shown[1].values())
    for name, value in kept[0].items():
        assert torch.equal(shown[0][name], value) and torch.equal(shown[1][name], kept[1][name].float())
        torch.testing.assert_close(kept[1][name].float(), value, rtol=1e-5, atol=1e-7)


def test_a_run_trains_every_phase_and_leaves_a_student_of_each(tmp_path):
    work, students = job(tmp_path)
    train(work, SETTINGS, device=CPU)
    assert list(students) == ["guided", "fold-1"]
    assert not equal(students["guided"], students["fold-1"])
    projection = students["fold-1"]["time_embedding.cond_proj.weight"]
    frozen = smooth_features() == 0
    assert bool((projection[:, frozen] == 0).all()) and bool((projection[:, ~frozen] != 0).any())
    lines = [json.loads(line) for line in (tmp_path / "run.jsonl").read_text().splitlines()]
    assert {"time", "phase", "update", "loss", "lr", "images_per_second", "eta_seconds"} <= lines[-1].keys()
    assert [(line["phase"], line["update"]) for line in lines] == [("guided", 4), ("fold-1", 3)]


def watch(loss, factor):
    """The loss, times what ``factor`` says at each call."""

    def call(**arguments):
        return loss(**arguments) * factor()

    return call


def test_the_network_of_the_first_pictures_is_let_go_of_before_the_training(tmp_path):
    made: list[weakref.ref[UNet2DConditionModel]] = []
    alive: list[bool] = []

    def counted() -> UNet2DConditionModel:
        unet = tiny_unet()
        made.append(weakref.ref(unet))
        return unet

    work, _ = job(tmp_path, new_unet=counted)
    guided = dataclasses.replace(
        work.phases[0], loss=watch(work.phases[0].loss, lambda: alive.append(made[0]() is not None) or 1.0)
    )
    train(dataclasses.replace(work, phases=[guided]), SETTINGS, device=CPU)
    assert len(made) == 3 and not any(alive)


def test_a_run_in_bf16_keeps_float32_weights_and_learns_about_the_same(tmp_path):
    losses: dict[str, list[float]] = {}
    for precision in ("fp32", "bf16"):
        work, students = job(tmp_path / precision)
        train(work, dataclasses.replace(SETTINGS, precision=precision), device=CPU)
        assert {value.dtype for value in students["fold-1"].values()} == {torch.float32}
        lines = (tmp_path / precision / "run.jsonl").read_text().splitlines()
        losses[precision] = [json.loads(line)["loss"] for line in lines]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.05) and losses["bf16"] != losses["fp32"]


def test_in_fp16_gradients_are_unscaled_and_an_update_that_overflows_is_left_out(tmp_path, monkeypatch):
    norms: list[float] = []
    clip = torch.nn.utils.clip_grad_norm_

    def clipped(parameters, limit):
        norms.append(float(clip(parameters, limit)))

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clipped)
    measured: dict[str, list[float]] = {}
    for precision in ("fp32", "fp16"):
        work, _ = job(tmp_path / precision)
        guided = dataclasses.replace(work, phases=work.phases[:1])
        train(guided, dataclasses.replace(SETTINGS, precision=precision, updates=(4,)), device=CPU)
        measured[precision], norms = norms, []
    assert measured["fp16"] == pytest.approx(measured["fp32"], rel=0.05)

    factors = iter([1.0, 1.0, 1e38, 1e38] + [1.0] * 100)  # two micro-batches an update
    work, students = job(tmp_path / "overflows")
    watched = [dataclasses.replace(p, loss=watch(p.loss, lambda: next(factors))) for p in work.phases[:1]]
    settings = dataclasses.replace(SETTINGS, precision="fp16", updates=(4,))
    train(dataclasses.replace(work, phases=watched), settings, device=CPU)
    assert [math.isfinite(norm) for norm in norms] == [True, False, True, True]
    assert all(bool(value.isfinite().all()) for value in students["guided"].values())

    work, _ = job(tmp_path / "always")
    watched = [dataclasses.replace(p, loss=watch(p.loss, lambda: 1e38)) for p in work.phases]
    settings = dataclasses.replace(SETTINGS, precision="fp16", updates=(40, 1))
    with pytest.raises(BadInput, match=r"gradients of phase guided overflow .*--precision bf16"):
        train(dataclasses.replace(work, phases=watched), settings, device=CPU)


def one_network() -> OneNetwork:
    return OneNetwork(
        tiny_unet, LoraShape(2), seed=1, device=CPU, dtype=torch.float32, autocast=lambda network: network
    )


def ask(network, w: Tensor | None = None) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    z, text = torch.randn(3, 4, 4, 4, generator=generator), torch.randn(3, 5, 16, generator=generator)
    with torch.no_grad():
        return network(z, torch.tensor([0, 500, 999]), {"text": text}, w)


def disturbed(parameters: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: p.detach() + 0.1 * torch.randn(p.shape, generator=generator) for n, p in parameters.items()}


def test_an_untrained_lora_student_is_the_teacher_bit_for_bit_at_any_guidance():
    expected = ask(UNetNetwork(tiny_unet()))
    holder = one_network()
    pair = holder.pair(None, teacher="pair")
    for w in (None, torch.tensor([0.0, 3.0, 14.0])):
        assert torch.equal(ask(pair.student, w), expected) and torch.equal(
            ask(holder.untrained(), w), expected
        )
    assert torch.equal(ask(pair.teacher), expected)


def test_one_network_is_the_teacher_an_earlier_student_and_the_student_in_turn():
    holder, w = one_network(), torch.tensor([0.0, 3.0, 7.0])
    first = disturbed(holder.pair(None, teacher="pair").trained, 1)
    pair = holder.pair(first, teacher="previous")
    earlier = ask(pair.student, w)
    assert not torch.allclose(earlier, ask(holder.untrained(), w), atol=0.05)
    assert torch.equal(ask(pair.teacher, w), earlier)
    with torch.no_grad():
        for name, value in disturbed(pair.trained, 2).items():
            pair.trained[name].copy_(value)
    assert torch.equal(ask(pair.teacher, w), earlier) and not torch.allclose(ask(pair.student, w), earlier)
    again = holder.pair(first, teacher="pair")
    assert torch.equal(ask(again.student, w), earlier)
    assert torch.equal(ask(again.teacher), ask(UNetNetwork(tiny_unet())))
    assert all(parameter.requires_grad for parameter in again.trained.values())


def test_a_lora_run_keeps_one_network_and_only_what_is_trained_in_states(tmp_path):
    made = 0

    def counted() -> UNet2DConditionModel:
        nonlocal made
        made += 1
        return tiny_unet()

    work, students = job(tmp_path, new_unet=counted)
    train(work, dataclasses.replace(LORA, state_minutes=0), device=CPU)
    assert made == 1 and list(students) == ["guided", "fold-1"]
    student = students["fold-1"]
    weights = {name for name in student if ".lora_" not in name}
    assert weights == {
        f"time_embedding.{n}" for n in ("cond_proj.weight", "linear_1.weight", "linear_1.bias")
    }
    assert all(bool(value.any()) for name, value in student.items() if "lora_B" in name)
    frozen = smooth_features() == 0
    assert not student["time_embedding.cond_proj.weight"][:, frozen].any()
    whole = sum(parameter.numel() for parameter in tiny_unet().parameters())
    state = torch.load(tmp_path / "state" / "phase-1.pt", weights_only=True)
    assert equal(state, student) and sum(value.numel() for value in state.values()) < whole / 3


def test_a_lora_run_in_bf16_trains_float32_and_starts_as_its_teacher(tmp_path):
    asked: list[bool] = []

    def compared(loss):
        def call(*, student, teacher, batch, generator):
            sigma = SCHEDULE.sigma(torch.full((len(batch.x0),), 500)).float()
            with torch.no_grad():
                answers = [d.velocity(batch.x0, sigma, cond=batch.cond) for d in (student, teacher)]
            asked.append(torch.equal(*answers))
            return loss(student=student, teacher=teacher, batch=batch, generator=generator)

        return call

    work, students = job(tmp_path)
    watched = [dataclasses.replace(phase, loss=compared(phase.loss)) for phase in work.phases]
    settings = dataclasses.replace(LORA, precision="bf16")
    train(dataclasses.replace(work, phases=watched), settings, device=CPU)
    assert asked[0] and not asked[-1]
    assert {value.dtype for value in students["fold-1"].values()} == {torch.float32}


class Killed(Exception):
    pass


@pytest.mark.parametrize("at", range(7))
@EITHER
def test_a_run_stopped_anywhere_and_resumed_gives_the_same_bytes(tmp_path, at, settings):
    work, whole = job(tmp_path / "whole")
    train(work, settings, device=CPU)

    stops = 0

    def interrupting(loss):
        def call(**arguments):
            nonlocal stops
            stops += 1
            if stops == 2 * at + 1:
                signal.raise_signal(signal.SIGTERM)
            return loss(**arguments)

        return call

    work, resumed = job(tmp_path / "stopped")
    stopping = [dataclasses.replace(phase, loss=interrupting(phase.loss)) for phase in work.phases]
    with pytest.raises(Interrupted):
        train(dataclasses.replace(work, phases=stopping), settings, device=CPU)
    train(work, settings, device=CPU)
    assert equal(resumed["fold-1"], whole["fold-1"])


@pytest.mark.parametrize("at", [0, 3, 5])
@EITHER
def test_a_run_killed_without_warning_goes_on_from_its_last_state(tmp_path, at, settings, monkeypatch):
    """On Windows too, where a state that is mapped into memory could not be replaced."""
    if sys.platform.startswith("linux"):
        keep_what_is_in_use(monkeypatch)
    work, whole = job(tmp_path / "whole")
    train(work, settings, device=CPU)

    calls = 0

    def killing(loss):
        def call(**arguments):
            nonlocal calls
            calls += 1
            if calls == 2 * at + 2:
                raise Killed
            return loss(**arguments)

        return call

    work, resumed = job(tmp_path / "killed")
    dying = [dataclasses.replace(phase, loss=killing(phase.loss)) for phase in work.phases]
    with pytest.raises(Killed):
        train(
            dataclasses.replace(work, phases=dying),
            dataclasses.replace(settings, state_minutes=0),
            device=CPU,
        )
    train(work, settings, device=CPU)
    assert equal(resumed["fold-1"], whole["fold-1"])
    lines = [json.loads(line) for line in (tmp_path / "killed" / "run.jsonl").read_text().splitlines()]
    assert [(line["phase"], line["update"]) for line in lines] == [("guided", 4), ("fold-1", 3)]


def memory_for(pictures, at=0):
    """Losses of phases under which more ``pictures`` at once do not fit, from the call numbered ``at`` on."""
    calls = itertools.count()

    def limited(loss):
        def call(*, batch, **arguments):
            if next(calls) >= at and len(batch.x0) > pictures:
                raise torch.OutOfMemoryError
            return loss(batch=batch, **arguments)

        return call

    return limited


def with_losses(work: Job, change) -> Job:
    return dataclasses.replace(
        work, phases=[dataclasses.replace(phase, loss=change(phase.loss)) for phase in work.phases]
    )


def updates_of(out: Path) -> list[tuple[str, int, int]]:
    lines = [json.loads(line) for line in (out / "run.jsonl").read_text().splitlines()]
    return [(line["phase"], line["update"], line["micro_batch"]) for line in lines]


@EITHER
def test_out_of_memory_halves_the_micro_batch_and_keeps_the_batch_and_its_samples(tmp_path, settings, caplog):
    drawn: dict[str, list[list[float]]] = {"calm": [], "tight": []}
    for name, change in (("calm", memory_for(4)), ("tight", memory_for(2, at=2))):

        def seen(loss, change=change, now=drawn[name]):
            limited = change(loss)

            def call(*, batch, **arguments):
                losses = limited(batch=batch, **arguments)
                now.append(batch.x0.flatten(1).sum(1).tolist())
                return losses

            return call

        work, _ = job(tmp_path / name)
        train(with_losses(work, seen), settings, device=CPU)
    assert updates_of(tmp_path / "calm") == [("guided", 4, 3), ("fold-1", 3, 3)]
    assert updates_of(tmp_path / "tight") == [("guided", 4, 2), ("fold-1", 3, 2)]
    assert [len(piece) for piece in drawn["calm"]] == [3, 1] * 7
    assert [len(piece) for piece in drawn["tight"]] == [3, 1] + [2, 1, 1] * 6
    calm, tight = (list(itertools.chain(*pieces)) for pieces in drawn.values())
    assert tight == calm
    assert [record.message for record in caplog.records] == [
        "out of memory at update 1 of phase guided with 3 pictures at once; going on with 2, the batch "
        "stays 4"
    ]


def test_where_in_an_update_the_memory_was_out_leaves_no_trace(tmp_path):
    def result(at: int) -> dict[str, Tensor]:
        calls = itertools.count()

        def failing(loss):
            def call(**arguments):
                if next(calls) == at:
                    raise torch.OutOfMemoryError
                return loss(**arguments)

            return call

        work, students = job(tmp_path / str(at))
        train(with_losses(work, failing), SETTINGS, device=CPU)
        return students["fold-1"]

    assert equal(result(2), result(3)), "the first and the second micro-batch of the second update"


@pytest.mark.parametrize("killed", [5, 8, 14])
@EITHER
def test_a_run_out_of_memory_then_killed_and_resumed_gives_the_same_bytes(tmp_path, killed, settings):
    """Resumed on a device that has memory enough: the run must not go back to its first micro-batch."""
    work, whole = job(tmp_path / "whole")
    train(with_losses(work, memory_for(2, at=3)), settings, device=CPU)
    work, resumed = job(tmp_path / "killed")
    calls = itertools.count()

    def killing(loss):
        limited = memory_for(2)(loss)

        def call(**arguments):
            number = next(calls)
            if number == killed:
                raise Killed
            return (limited if number >= 3 else loss)(**arguments)

        return call

    with pytest.raises(Killed):
        train(with_losses(work, killing), settings, device=CPU)
    train(work, settings, device=CPU)
    assert equal(resumed["fold-1"], whole["fold-1"])
    assert updates_of(tmp_path / "killed") == updates_of(tmp_path / "whole")


def test_out_of_memory_with_one_picture_at_once_is_said_in_a_sentence(tmp_path, caplog):
    work, _ = job(tmp_path)
    with pytest.raises(BadInput, match=r"cannot be helped by fewer pictures at once; .*state.*--resume"):
        train(with_losses(work, memory_for(0, at=2)), SETTINGS, device=CPU)
    assert [record.message.partition("; ")[2] for record in caplog.records] == [
        f"going on with {count}, the batch stays 4" for count in (2, 1)
    ]
    train(work, SETTINGS, device=CPU)
    assert updates_of(tmp_path) == [("guided", 4, 1), ("fold-1", 3, 1)]


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_state(tmp_path):
    work, students = job(tmp_path)
    calls = 0

    def poisoned(loss):
        def call(**arguments):
            nonlocal calls
            calls += 1
            return loss(**arguments) * (math.nan if calls > 4 else 1)

        return call

    broken = [dataclasses.replace(phase, loss=poisoned(phase.loss)) for phase in work.phases]
    with pytest.raises(BadInput, match=r"nan at update 2 of phase guided.*lower --lr"):
        train(
            dataclasses.replace(work, phases=broken),
            dataclasses.replace(SETTINGS, state_minutes=0),
            device=CPU,
        )
    train(work, SETTINGS, device=CPU)
    assert list(students) == ["guided", "fold-1"]


def test_a_loss_that_is_not_finite_before_anything_was_learned_is_not_blamed_on_the_rate(tmp_path):
    for precision, flag in (("bf16", "--precision fp32"), ("fp32", "another --cache-dir")):
        work, _ = job(tmp_path / precision)
        broken = [dataclasses.replace(p, loss=watch(p.loss, lambda: math.nan)) for p in work.phases]
        settings = dataclasses.replace(SETTINGS, precision=precision)
        with pytest.raises(BadInput, match=f"nan at update 0 of phase guided.*{flag}"):
            train(dataclasses.replace(work, phases=broken), settings, device=CPU)


@EITHER
def test_a_run_that_starts_from_a_student_begins_with_it_and_may_imitate_it(tmp_path, settings):
    work, students = job(tmp_path / "first")
    train(work, settings, device=CPU)
    start = Start("epsilon", lambda: students["guided"])
    looked: list[str] = []
    still = dataclasses.replace(settings, updates=(1,), lr=1e-12)
    work, after = job(tmp_path / "second", start=start, look=lambda name, *rest: looked.append(name))
    train(dataclasses.replace(work, phases=work.phases[:1]), still, device=CPU)
    for name, value in students["guided"].items():
        assert torch.allclose(after["guided"][name], value, atol=1e-6)
    assert looked == ["start", "guided"]

    same: list[bool] = []
    folds = phases(Config(finest=2, velocity_at=0), Setting(SCHEDULE, "epsilon", 1))[1:]

    def compared(*, student, teacher, batch, generator):
        sigma = SCHEDULE.sigma(torch.full((len(batch.x0),), 500)).float()
        with torch.no_grad():
            answers = [d.velocity(batch.x0, sigma, cond=batch.cond, w=batch.w) for d in (student, teacher)]
        same.append(torch.equal(*answers))
        return folds[0].loss(student=student, teacher=teacher, batch=batch, generator=generator)

    work, _ = job(tmp_path / "third", start=start, phases=[dataclasses.replace(folds[0], loss=compared)])
    train(work, dataclasses.replace(settings, updates=(2,)), device=CPU)
    assert folds[0].teacher == "previous" and same[0] and not same[-1]


@EITHER
def test_a_run_that_starts_from_a_student_killed_and_resumed_gives_the_same_bytes(tmp_path, settings):
    work, students = job(tmp_path / "first")
    train(work, settings, device=CPU)
    start = Start("epsilon", lambda: students["guided"])
    work, whole = job(tmp_path / "whole", start=start)
    train(work, settings, device=CPU)
    assert not equal(whole["fold-1"], students["fold-1"])
    calls = 0

    def killing(**arguments):
        nonlocal calls
        calls += 1
        if calls == 5:
            raise Killed
        return work.phases[0].loss(**arguments)

    again, resumed = job(tmp_path / "killed", start=start)
    dying = dataclasses.replace(
        again, phases=[dataclasses.replace(work.phases[0], loss=killing), *work.phases[1:]]
    )
    with pytest.raises(Killed):
        train(dying, dataclasses.replace(settings, state_minutes=0), device=CPU)
    train(again, settings, device=CPU)
    assert equal(resumed["fold-1"], whole["fold-1"])


PILOTED = dataclasses.replace(SETTINGS, updates=(24,))


def first_phase(out: Path, **changes: object) -> tuple[Job, dict[str, dict[str, Tensor]]]:
    work, students = job(out, **changes)
    return dataclasses.replace(work, phases=work.phases[:1]), students


def test_the_pilot_stops_a_run_whose_loss_rises_and_resuming_goes_on_all_the_same(tmp_path):
    work, students = first_phase(tmp_path)
    factors = iter(range(1, 1000))
    rising = [dataclasses.replace(p, loss=watch(p.loss, lambda: next(factors) ** 2)) for p in work.phases]
    with pytest.raises(BadInput, match=r"stopped this run after 20 updates: the loss rose .* a lower --lr"):
        train(dataclasses.replace(work, phases=rising), PILOTED, device=CPU)
    assert "not going well (the loss rose" in verdict_path(tmp_path).read_text(encoding="utf-8")
    assert torch.load(tmp_path / "state" / "latest.pt", weights_only=True)["update"] == 20
    train(dataclasses.replace(work, phases=rising), PILOTED, device=CPU)
    assert "guided" in students


def test_the_pilot_changes_nothing_of_a_run_that_goes_well(tmp_path):
    work, piloted = first_phase(tmp_path / "a", pilot_pictures=2)
    train(work, PILOTED, device=CPU)
    assert "after 20 updates: going well" in verdict_path(tmp_path / "a").read_text(encoding="utf-8")
    work, plain = first_phase(tmp_path / "b")
    keep_verdict(tmp_path / "b", "there was a pilot")
    train(work, PILOTED, device=CPU)
    assert equal(piloted["guided"], plain["guided"])


def test_a_state_is_on_the_disk_before_it_takes_the_place_of_the_last(tmp_path, monkeypatch):
    done: list[str] = []
    fsync, replace = os.fsync, os.replace

    def synced(number: int) -> None:
        done.append("synced")
        fsync(number)

    def replaced(source: Path, target: Path) -> None:
        done.append("replaced")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    loop.save_state(tmp_path / "latest.pt", {"a": torch.ones(2)})
    assert done == ["synced", "replaced"]
    assert torch.equal(torch.load(tmp_path / "latest.pt", weights_only=True)["a"], torch.ones(2))


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has another signal for closed windows")
def test_a_closed_terminal_asks_for_a_stop_unless_it_is_to_be_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        for handler, asks in ((signal.SIG_DFL, True), (signal.SIG_IGN, False)):
            signal.signal(signal.SIGHUP, handler)
            with stop_requests() as stop:
                signal.raise_signal(signal.SIGHUP)
                assert stop.requested is asks
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_state_is_kept_also_where_nothing_can_be_printed_any_more(tmp_path, monkeypatch):
    def closed(*rest: object) -> None:
        raise OSError(5, "the terminal is gone")

    def asking(**arguments):
        signal.raise_signal(signal.SIGTERM)
        return work.phases[0].loss(**arguments)

    work, _ = first_phase(tmp_path)
    stopping = [dataclasses.replace(work.phases[0], loss=asking)]
    monkeypatch.setattr(loop.tqdm, "update", closed)
    with pytest.raises((OSError, KeyboardInterrupt)):
        train(
            dataclasses.replace(work, phases=stopping),
            dataclasses.replace(SETTINGS, updates=(4,), micro_batch=4),
            device=CPU,
        )
    assert torch.load(tmp_path / "state" / "latest.pt", weights_only=True)["update"] == 1


@EITHER
def test_samples_are_looked_at_with_the_averaged_weights_and_training_goes_on_unchanged(tmp_path, settings):
    work, undisturbed = job(tmp_path / "a")
    train(work, settings, device=CPU)
    names: list[str] = []
    work, looked = job(tmp_path / "b", look=lambda name, student, phase: names.append(name))
    train(work, dataclasses.replace(settings, sample_minutes=0), device=CPU)
    assert names[0] == "start" and names[-1] == "fold-1" and "guided-000002" in names
    assert equal(looked["fold-1"], undisturbed["fold-1"])


@EITHER
def test_without_an_average_the_trained_weights_are_the_student_also_when_resumed(tmp_path, settings):
    settings = dataclasses.replace(settings, ema=0.0, updates=(3,), state_minutes=0)
    work, whole = job(tmp_path / "whole")
    work = dataclasses.replace(work, phases=work.phases[:1])
    train(work, settings, device=CPU)
    calls = 0

    def killing(**arguments):
        nonlocal calls
        calls += 1
        if calls == 5:
            raise Killed
        return work.phases[0].loss(**arguments)

    again, resumed = job(tmp_path / "killed")
    dying = dataclasses.replace(again, phases=[dataclasses.replace(work.phases[0], loss=killing)])
    with pytest.raises(Killed):
        train(dying, settings, device=CPU)
    train(dataclasses.replace(again, phases=work.phases), settings, device=CPU)
    assert equal(resumed["guided"], whole["guided"])
    state = torch.load(tmp_path / "whole" / "state" / "phase-0.pt", weights_only=True)
    assert equal(state, whole["guided"])


def test_every_epoch_is_a_permutation_of_its_own():
    updates = Order([torch.arange(10)], batch=4, micro_batch=3, updates=5, seed=1)
    assert [len(part) for part in updates(2)] == [3, 1]
    order = torch.cat([part for update in range(5) for part in updates(update)])
    assert sorted(order[:10].tolist()) == sorted(order[10:].tolist()) == list(range(10))
    assert order[:10].tolist() != order[10:].tolist()


def test_the_learning_rate_warms_up_and_falls_to_zero():
    factors = [lr_factor(update, 100, 10) for update in range(100)]
    assert (
        factors[0] == pytest.approx(1 / 11) and max(factors) == 1.0 and factors[-1] == pytest.approx(1 / 90)
    )


def test_run_jsonl_is_cut_back_to_the_state_also_when_its_last_line_is_torn(tmp_path):
    path = tmp_path / "run.jsonl"
    lines = [json.dumps({"phase_index": p, "update": u}) for p, u in [(0, 10), (0, 20), (1, 10), (1, 20)]]
    path.write_text("\n".join(lines) + '\n{"phase_in')
    cut_back(path, Progress(1, 10))
    assert path.read_text().splitlines() == lines[:3]


def test_guidance_is_drawn_over_the_whole_range_with_more_at_its_low_end():
    drawn = GuidanceRange(1, 15).draw(20_000, generator=torch.Generator().manual_seed(0))
    assert 1 <= drawn.min() < 1.01 and 14.9 < drawn.max() <= 15
    assert float((drawn < 4).float().mean()) == pytest.approx(
        0.5 * 3 / 14 + 0.5 * math.log(4) / math.log(15), abs=0.02
    )


def test_the_features_shown_make_the_output_also_those_of_the_guided_pair():
    unet = tiny_unet(conditioned=False)
    plain = NetworkDenoiser(UNetNetwork(unet), SCHEDULE, "epsilon")
    generator = torch.Generator().manual_seed(0)
    x, text = torch.randn(3, 4, 4, 4, generator=generator), torch.randn(4, 5, 16, generator=generator)
    sigma, w = torch.tensor([0.5, 1.0, 2.0]), torch.tensor([0.0, 3.0, 7.0])
    guided = Guided(plain, {"text": text[3:]})
    with torch.no_grad():
        with watching() as seen:
            velocity = guided.velocity(x, sigma, cond={"text": text[:3]}, w=w)
        made = unet.conv_out(seen[0])
    expected = prediction_from_velocity(velocity, x, sigma, "epsilon")
    assert len(seen) == 1 and torch.allclose(made, expected, atol=1e-5)


@pytest.mark.parametrize("name", sorted(set(find_methods()) - {"guided", "progressive"}))
@EITHER
def test_every_method_killed_and_resumed_gives_the_same_bytes(tmp_path, name, settings):
    method = find_methods()[name]
    setting = Setting(SCHEDULE, "epsilon", 2)
    options = {"on_policy": 0.5} if hasattr(method.Config, "on_policy") else {}
    found = method.phases(method.Config(**options), setting)
    changes = dict(phases=found, new_unet=lambda: tiny_unet(conditioned=found[0].dial))
    settings = dataclasses.replace(settings, updates=(3,) * len(found), state_minutes=0)
    work, whole = job(tmp_path / "whole", **changes)
    train(work, settings, device=CPU)
    calls = 0

    def killing(**arguments):
        nonlocal calls
        calls += 1
        if calls == 5:
            raise Killed
        return found[0].loss(**arguments)

    work, resumed = job(tmp_path / "killed", **changes)
    dying = [dataclasses.replace(found[0], loss=killing), *found[1:]]
    with pytest.raises(Killed):
        train(dataclasses.replace(work, phases=dying), settings, device=CPU)
    train(work, settings, device=CPU)
    assert equal(resumed[found[-1].name], whole[found[-1].name])
