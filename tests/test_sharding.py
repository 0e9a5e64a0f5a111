"""FSDP2 on two processes: what is trained is divided, what is learned, written and shown is the same."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest
import torch
from make_checkpoint import make_teacher, make_tokenizer
from test_loop import CPU, SCHEDULE, equal, job, tiny_unet, with_losses
from test_ranks import EQUAL, PLAIN, apart, forks, together

from toolkit import assembly, distill
from toolkit.assembly import Teacher
from toolkit.diffusion.errors import BadInput
from toolkit.diffusion.guidance import smooth_features
from toolkit.diffusion.method import Setting
from toolkit.methods import sfddm
from toolkit.training import adapters, loop, pilot
from toolkit.training.adapters import COND_PROJ
from toolkit.training.checkpoint import open_checkpoint
from toolkit.training.loop import Interrupted, sizes, train
from toolkit.training.memory import SLACK, Needs, weights_bytes
from toolkit.training.networks import UNetNetwork
from toolkit.training.plan import Costs
from toolkit.training.ranks import Ranks
from toolkit.training.sharding import own, taking_part

SETTINGS = dataclasses.replace(PLAIN, micro_batch=2, updates=(1, 2), sample_minutes=0)
WHOLE = sum(parameter.numel() for parameter in tiny_unet().parameters())


def work_of(out: Path, **changes: object) -> tuple[loop.Job, dict[str, dict[str, torch.Tensor]]]:
    """Two phases that ask the student where some rows get to by themselves, the last with a critic."""
    config = sfddm.Config(on_policy=0.5, sharpen=0.25)
    return job(out, phases=sfddm.phases(config, Setting(SCHEDULE, "epsilon", 2)), **changes)


@pytest.fixture
def descent(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """As in test_ranks, with moments; the numbers that each optimiser has."""
    held: list[int] = []

    def make(name: str, parameters: object, *, lr: float, device: torch.device) -> torch.optim.Optimizer:
        made = torch.optim.SGD(parameters, lr=lr, momentum=0.9)  # type: ignore[arg-type]
        held.append(sum(own(p).numel() for group in made.param_groups for p in group["params"]))
        return made

    monkeypatch.setattr(loop, "make_optimizer", make)
    return held


@pytest.fixture
def weightless(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans count no activations, which takes a while."""
    nothing = dict.fromkeys(("step", "evaluation", "decoding", "masks"), 0)
    monkeypatch.setattr(Needs, "_working", lambda self, dtype: nothing)


def both(out: Path, run: Callable[[Ranks], None]) -> list[str]:
    import_module("torch.distributed.fsdp")  # once, and not in every process that is forked
    return together(out, lambda ranks: run(dataclasses.replace(ranks, divides=True)))


@forks
def test_a_divided_student_learns_what_a_whole_one_does_and_is_shown(tmp_path, descent, monkeypatch):
    monkeypatch.setattr(adapters, "CHECKPOINT_GRADIENTS_ABOVE", 0)
    monkeypatch.setattr(loop, "LEAST", 1)
    monkeypatch.setattr(pilot, "MINUTES", 0)
    work, whole = work_of(tmp_path / "alone")
    train(work, SETTINGS, device=CPU)
    cond = {"text": torch.ones(1, 5, 16)}
    x, sigma = torch.ones(1, 4, 4, 4), torch.tensor([3.0])

    def half(ranks: Ranks) -> None:
        shown: dict[str, torch.Tensor] = {}
        work, students = work_of(
            tmp_path / "together",
            pilot_pictures=1,
            look=lambda name, student, phase: shown.update({name: student.network(x, sigma, cond, sigma)}),
        )
        train(work, dataclasses.replace(SETTINGS, micro_batch=1), device=CPU, ranks=ranks)
        torch.save((students, shown, descent[-1]), tmp_path / f"{ranks.number}.pt")
        changed(loop.make_holder(work, SETTINGS, CPU, ranks).pair(None, teacher="pair"))

    @torch.no_grad()
    def changed(pair: adapters.Pair) -> None:
        """Every change of the weights is seen at once."""
        unet = tiny_unet()
        pair.student(x, sigma, cond, sigma)
        for parameters in (pair.trained.values(), unet.parameters()):
            for parameter in parameters:
                own(parameter).add_(0.01)
        assert torch.allclose(pair.student(x, sigma, cond, sigma), UNetNetwork(unet)(x, sigma, cond, sigma))

    assert both(tmp_path, half) == ["done", "done"]
    (first, shown, held), (second, *others) = (torch.load(tmp_path / f"{number}.pt") for number in range(2))
    assert second == {} and others == [{}, WHOLE - held] and 0.45 * WHOLE < held < 0.55 * WHOLE
    assert "all weights are finite" in loop.verdict_path(tmp_path / "together").read_text()
    frozen = smooth_features() == 0
    for name, student in first.items():
        assert apart(student, whole[name], SETTINGS) < EQUAL
        assert [bool(student[COND_PROJ][:, columns].any()) for columns in (frozen, ~frozen)] == [False, True]
        unet = tiny_unet()
        unet.load_state_dict(student)
        with torch.no_grad():
            assert torch.allclose(UNetNetwork(unet)(x, sigma, cond, sigma), shown[name], atol=1e-6)
    with torch.no_grad():
        assert torch.allclose(UNetNetwork(tiny_unet())(x, sigma, cond, sigma), shown["start"], atol=1e-6)


@forks
def test_a_divided_run_that_was_stopped_is_gone_on_with_by_two_and_by_one(tmp_path, descent):
    settings = dataclasses.replace(SETTINGS, batch_size=2, updates=(3,), clip=0.5)
    fold = work_of(tmp_path)[0].phases[:1]

    def half(ranks: Ranks) -> None:
        mine = dataclasses.replace(settings, micro_batch=1)
        work, whole = job(tmp_path / "whole", phases=fold)
        train(work, mine, device=CPU, ranks=ranks)
        signals: list[None] = []

        def stopping(loss):
            def call(**arguments):
                if ranks.number == 1 and not signals:
                    signals.append(os.kill(os.getpid(), signal.SIGTERM))
                return loss(**arguments)

            return call

        work, _ = job(tmp_path / "stopped", phases=fold)
        with pytest.raises(Interrupted):
            train(with_losses(work, stopping), mine, device=CPU, ranks=ranks)
        if ranks.writes:
            shutil.copytree(tmp_path / "stopped", tmp_path / "resumed")
        ranks.wait()
        work, resumed = job(tmp_path / "resumed", phases=fold)
        train(work, mine, device=CPU, ranks=ranks)
        assert not ranks.writes or equal(resumed["single-fold-2"], whole["single-fold-2"])
        torch.save(whole, tmp_path / f"{ranks.number}.pt")

    assert both(tmp_path, half) == ["done", "done"]
    saved = torch.load(tmp_path / "stopped" / "state" / "latest.pt", weights_only=True)
    assert (saved["phase"], saved["update"], saved["at_once"], saved["part"]) == (0, 1, 1, 2)
    kinds = {type(v) for of in saved["optimizer"]["state"].values() for v in of.values()}
    assert kinds <= {torch.Tensor, type(None)}
    work, alone = job(tmp_path / "stopped", phases=fold)
    train(work, settings, device=CPU)
    whole = torch.load(tmp_path / "0.pt")["single-fold-2"]
    assert apart(alone["single-fold-2"], whole, settings) < EQUAL


@forks
def test_a_lack_of_memory_in_one_process_ends_both(tmp_path, descent):
    def lacking(loss):
        def call(**arguments):
            raise torch.OutOfMemoryError

        return call

    def half(ranks: Ranks) -> None:
        work, _ = work_of(tmp_path / "short")
        work = with_losses(work, lacking) if ranks.number else work
        train(work, SETTINGS, device=CPU, ranks=ranks)

    first, second = both(tmp_path, half)
    assert first.startswith("BadInput: another process of this run has ended")
    assert second.startswith("BadInput: out of memory; the last state") and "smaller --micro-batch" in second


@forks
def test_the_file_of_a_divided_student_holds_its_averages(tmp_path, monkeypatch, weightless):
    make_tokenizer(tmp_path / "tokenizer")
    given = {
        **{"ckpt": str(make_teacher(tmp_path / "tiny.safetensors")), "cache_dir": str(tmp_path / "cache")},
        **{"tokenizer": str(tmp_path / "tokenizer"), "out": str(tmp_path / "run"), "student": "full"},
        **{"pictures": 2, "updates": [1], "batch_size": 2, "device": "cpu", "report_prompts": 1},
        **{"method": "guided", "steps": 2, "dtype": "fp32"},
    }
    monkeypatch.setattr(assembly, "_report", lambda *arguments, **options: None)

    def half(ranks: Ranks) -> None:
        teacher = Teacher.open(given)
        settings, _ = assembly.settle(given, {}, teacher)
        phases = assembly.phases_of(settings, teacher)
        assembly.run_all(
            settings, phases, teacher, assembly.data_request(settings, phases, teacher), ranks=ranks
        )

    assert both(tmp_path, half) == ["done", "done"]
    average = torch.load(tmp_path / "run" / "state" / "phase-0.pt", weights_only=True)
    student = open_checkpoint(tmp_path / "run" / "student.safetensors")
    unet, taught = student.unet(conditioned=True).state_dict(), Teacher.open(given).checkpoint
    assert equal(unet, average)
    assert not equal(unet, taught.unet(conditioned=True).state_dict())
    assert (tmp_path / "run" / "samples" / "start.png").exists()


def test_launched_to_divide_the_plan_counts_it_and_says_what_does_not_go_with_it(
    tmp_path, monkeypatch, capsys, caplog, weightless
):
    assert weights_bytes(1000, 1000, precision="bf16", ema=0.9, divided=4) == 1000 * 2 + 1000 * 20 // 4
    path = make_teacher(tmp_path / "tiny.safetensors")
    make_tokenizer(tmp_path / "tokenizer")
    one, four = (Needs(open_checkpoint(path), 32, 32, 1, False, divided=divided) for divided in (1, 4))
    whole = one.checkpoint.unet_parameters
    every, lora = (
        [needs.stages(rank=rank, precision="fp32", ema=0.9)["training"] for needs in (one, four)]
        for rank in (None, 2)
    )
    assert every[0] - every[1] == pytest.approx(SLACK * (20 * whole * 3 / 4 - four._together()), abs=2)
    assert lora[0] == lora[1] and 0 < four._together() < 16 * whole

    monkeypatch.setattr(distill, "measure_costs", lambda *_, **__: Costs(1000, 1.0, 1.0, 1.0))
    monkeypatch.setattr(distill, "raise_on_stops", lambda: None)
    launched = {"WORLD_SIZE": "2", "RANK": "0", "ACCELERATE_USE_FSDP": "true"}

    def planned(version: str, *more: str) -> str:
        for name, value in {**launched, "FSDP_VERSION": version}.items():
            monkeypatch.setenv(name, value)
        given = ["--ckpt", str(path), "--cache-dir", str(tmp_path / "c"), "--device", "cpu", "--dry-run"]
        monkeypatch.setattr(sys, "argv", ["distill", *given, *more])
        caplog.clear()
        with caplog.at_level("INFO"):
            distill.main()
        return caplog.text + capsys.readouterr().out

    assert "which divide weights, averages, gradients and moments" in planned("2", "--student", "full")
    told = planned("2", "--student", "lora")
    assert "a LoRA is small: every process holds all of it" in told and "divide weights" not in told
    with pytest.raises(BadInput, match=r"--fsdp_version 1 .*give --fsdp_version 2"):
        planned("1", "--student", "full")
    with pytest.raises(BadInput, match="--precision fp16, --compile: not with weights that FSDP divides"):
        planned("2", "--student", "full", "--precision", "fp16", "--compile")


def test_divided_processes_are_asked_equally_often():
    two = Ranks(0, 2, divides=True)
    settings = dataclasses.replace(SETTINGS, batch_size=12, micro_batch=1)
    odd = {"at_once": 1, "part": 3}
    assert sizes(odd, settings, two) == (1, 2) and sizes(odd, settings, Ranks(0, 2)) == (1, 3)
    assert sizes({"at_once": 2, "part": 4}, settings, two) == (2, 4)


def test_a_network_that_is_asked_nothing_answers_nothing_and_a_divided_one_takes_part():
    unet = UNetNetwork(tiny_unet())
    asked: list[int] = []

    def watched(z, timestep, cond, w):
        asked.append(len(z))
        return unet(z, timestep, cond, w)

    for network in (watched, taking_part(watched)):
        for w in (None, torch.ones(3)):
            x, t, cond = torch.ones(3, 4, 4, 4), torch.ones(3), {"text": torch.ones(3, 5, 16)}
            assert network(x, t, cond, w).shape == (3, 4, 4, 4)
            none = {"text": cond["text"][:0]}
            assert network(x[:0], t[:0], none, w if w is None else w[:0]).shape == (0, 4, 4, 4)
    assert asked == [3, 0, 3, 0, 3, 1, 3, 1]
