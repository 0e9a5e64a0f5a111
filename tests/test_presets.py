"""Names for cards, and the optimiser with small moments."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from make_checkpoint import make_teacher, weightless

from toolkit import assembly
from toolkit.assembly import Teacher, settle
from toolkit.diffusion.errors import BadInput
from toolkit.training.checkpoint import open_checkpoint
from toolkit.training.memory import GIB, Needs, weights_bytes
from toolkit.training.optimizers import make_optimizer
from toolkit.training.presets import PRESETS, Room, fitting_micro_batch
from toolkit.training.settings import Settings

CPU = torch.device("cpu")


def without_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)


def with_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A stand-in, and what its optimiser was asked for."""
    asked: list[dict[str, Any]] = []

    def adamw(parameters: Any, **options: Any) -> torch.optim.Optimizer:
        asked.append(options)
        return torch.optim.AdamW(parameters, **options)

    package = SimpleNamespace(optim=SimpleNamespace(AdamW8bit=adamw))
    monkeypatch.setitem(sys.modules, "bitsandbytes", package)
    return asked


def test_the_moments_in_8_bits_come_from_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = [torch.nn.Parameter(torch.ones(2))]
    assert type(make_optimizer("adamw", weights, lr=0.1, device=CPU)) is torch.optim.AdamW
    asked = with_bitsandbytes(monkeypatch)
    make_optimizer("adamw8bit", weights, lr=0.1, device=CPU)
    assert asked == [{"lr": 0.1, "betas": (0.9, 0.99), "weight_decay": 0.0}]
    without_bitsandbytes(monkeypatch)
    with pytest.raises(BadInput, match="bitsandbytes', which is not installed; python -m pip install"):
        make_optimizer("adamw8bit", weights, lr=0.1, device=CPU)


def test_an_optimiser_that_cannot_be_had_is_said_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = Teacher(False, open_checkpoint(make_teacher(tmp_path / "tiny.safetensors")))
    without_bitsandbytes(monkeypatch)
    given = {"ckpt": "tiny.safetensors", "device": "cpu", "optimizer": "adamw8bit"}
    with pytest.raises(BadInput, match="not installed"):
        settle(given, {}, teacher)
    with pytest.raises(BadInput, match="--optimizer sgd: expected adamw or adamw8bit"):
        settle({**given, "optimizer": "sgd"}, {}, teacher)
    with_bitsandbytes(monkeypatch)
    settings, reasons = settle(given, {}, teacher)
    assert (settings.optimizer, reasons["optimizer"]) == ("adamw8bit", "you")
    assert assembly._loop_settings(settings, teacher.checkpoint).optimizer == "adamw8bit"


def test_small_moments_are_planned_for() -> None:
    plain, small = (
        weights_bytes(1000, 1000, precision="bf16", ema=0, optimizer=name) for name in ("adamw", "adamw8bit")
    )
    assert plain - small == 6000


def test_the_largest_micro_batch_that_fits_is_taken() -> None:
    assert fitting_micro_batch(lambda count: 100 + 10 * count, free=140, batch=16) == 4
    assert fitting_micro_batch(lambda count: 100 + 10 * count, free=1000, batch=24) == 16
    assert fitting_micro_batch(lambda count: 100 + 10 * count, free=5, batch=16) == 1


def test_a_preset_decides_for_large_networks_and_flags_win(monkeypatch: pytest.MonkeyPatch) -> None:
    without_bitsandbytes(monkeypatch)
    told: set[str] = set()

    def stages(needs: Needs, *, optimizer: str, **_: object) -> dict[str, int]:
        told.add(optimizer)
        return {"training": needs.batch * GIB}

    monkeypatch.setattr(Needs, "stages", stages)
    teacher = Teacher(False, weightless("sd15"))

    def settled(preset: str, **more: Any) -> tuple[Settings, dict[str, str]]:
        given = {"ckpt": "model.safetensors", "device": "cpu", "student": "lora", **more}
        return settle(given, {}, teacher, Room(round(PRESETS[preset] * GIB), preset))

    settings, reasons = settled("8gb")
    assert (settings.precision, settings.micro_batch, settings.optimizer) == ("bf16", 4, "adamw")
    assert reasons["micro_batch"] == reasons["precision"] == "--preset 8gb" and told == {"adamw"}
    assert settled("12gb")[0].micro_batch == 8 and settled("80gb")[0].micro_batch == 16
    settings, reasons = settled("8gb", precision="fp32", micro_batch=2)
    assert (settings.precision, settings.micro_batch, reasons["micro_batch"]) == ("fp32", 2, "you")
    with_bitsandbytes(monkeypatch)
    assert settled("8gb")[0].optimizer == "adamw8bit" and told == {"adamw", "adamw8bit"}
    assert settled("80gb")[0].optimizer == "adamw"
    divided = Room(round(PRESETS["8gb"] * GIB), "8gb", processes=2, divided=2)
    given = {"ckpt": "model.safetensors", "device": "cpu", "student": "full"}
    assert settle(given, {}, teacher, divided)[0].optimizer == "adamw"
