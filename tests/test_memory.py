"""What a run takes of the device's memory, and the route that is chosen by it; true sizes without weights."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from make_checkpoint import make_teacher, make_tokenizer, weightless

from toolkit import assembly, distill
from toolkit.assembly import Teacher
from toolkit.training import memory
from toolkit.training.adapters import LoraShape, OneNetwork
from toolkit.training.checkpoint import Checkpoint, open_checkpoint
from toolkit.training.memory import GIB, PLACES, Needs, Route, choose_route, peak, weights_bytes
from toolkit.training.networks import Turns, lazily
from toolkit.training.presets import Room


def route(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, free: float, **asked: Any) -> Route:
    monkeypatch.setattr(assembly, "free_memory", lambda device: round(free * GIB))
    return assembly._choose_route(asked, Teacher(False, checkpoint), device="cpu")


GPU = {"precision": "bf16", "report_prompts": 6}
"""What a GPU would make the defaults."""


def test_sd15_at_512_and_768_takes_a_lora_on_12_gb(monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = weightless("sd15")
    for resolution in ("512", "768"):
        found = route(checkpoint, monkeypatch, 12, **GPU, resolution=resolution)
        assert (found.student, found.rank, found.precision) == ("lora", 64, "bf16")
        assert "training every weight takes about 2" in found.reasons["student"]
        assert "12.0 GiB are free" in found.reasons["student"]
    assert route(checkpoint, monkeypatch, 40, **GPU).student == "full"
    assert route(checkpoint, monkeypatch, 12, **GPU, student="full").student == "full", "what was asked for"
    assert route(checkpoint, monkeypatch, 40, **GPU, rank=8).reasons["student"] == "--rank"
    on_cpu = route(checkpoint, monkeypatch, 4.5)
    assert (on_cpu.rank, on_cpu.precision) == (64, "bf16") and "in fp32" in on_cpu.reasons["precision"]


class Stated:
    """Stands in for Needs: 20 GiB for every weight, 10 for a LoRA of rank 64, 4 and 1 of it the average's."""

    def stages(self, *, rank: int | None, precision: str, ema: float, optimizer: str) -> dict[str, int]:
        average = (4 if rank is None else 1) if ema else 0
        return {"training": ((16 if rank is None else 9 * rank // 64) + average) * GIB}


def test_averages_leave_a_card_that_is_too_small_for_them_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def found(free: int, places: tuple[str, ...] = PLACES, **asked: Any) -> Route:
        route: dict[str, Any] = {"student": None, "rank": None, **asked}
        needs: Any = Stated()
        return choose_route(
            needs, free=free * GIB, ranks=[64, 32], precisions=["bf16"], ema=0.9, places=places, **route
        )

    assert (found(20).student, found(20).averages) == ("full", "device")
    tight = found(16)
    assert (tight.student, tight.averages) == ("full", "cpu")
    assert tight.reasons == {
        "student": "training every weight takes about 16.0 GiB, and 16.0 GiB are free",
        "averages": "on the device too it takes about 20.0 GiB, and 16.0 GiB are free",
    }
    assert found(16, ("device",)).student == "lora"
    assert (found(9).rank, found(9).averages) == (64, "cpu"), "rather than a smaller rank"
    assert found(10).averages == "device"
    assert found(3, student="full").averages == "cpu"
    asked: list[Any] = []
    monkeypatch.setattr(assembly, "choose_route", lambda needs, **options: asked.append(options["places"]))
    for device, kept in (("cuda", {}), ("cpu", {}), ("cuda", {"averages": "cpu"})):
        assembly._choose_route(
            {**GPU, **kept}, Teacher(False, weightless("sd15")), device=device, room=Room(free=1)
        )
    assert asked == [("device", "cpu"), ("device",), ["cpu"]]


def test_sdxl_at_1024_takes_a_smaller_lora_on_12_gb(monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = weightless("sdxl")
    found = route(checkpoint, monkeypatch, 12, **GPU)
    assert (found.student, found.rank) == ("lora", 32)
    assert "rank 64 takes about 12." in found.reasons["rank"] and "12.0 GiB" in found.reasons["rank"]
    needs = Needs(checkpoint, 1024, 1024, 1, True)
    stages = needs.stages(rank=32, precision="bf16", ema=0.999)
    assert 9 * GIB < stages["training"] < 12 * GIB and max(stages.values()) < 12 * GIB
    # Activations are recomputed, and attention keeps no matrix of 4096 x 4096 pairs.
    assert 0.5 * GIB < needs._working(torch.bfloat16)["step"] < GIB


def test_counts_are_those_of_the_networks_themselves(tmp_path: Path) -> None:
    teacher = open_checkpoint(make_teacher(tmp_path / "tiny.safetensors"))
    holder = OneNetwork(
        lambda: teacher.unet(conditioned=True),
        LoraShape(3),
        seed=0,
        device=torch.device("cpu"),
        dtype=torch.float32,
        autocast=lambda network: network,
    )
    trained = holder.pair(None, teacher="pair").trained
    needs = Needs(teacher, 32, 32, 1, False)
    assert needs.lora_parameters(3) == sum(value.numel() for value in trained.values())
    assert weights_bytes(1000, 1000, precision="bf16", ema=0.9) == 1000 * (2 + 4 + 4 + 8 + 4 + 2)
    assert weights_bytes(1000, 10, precision="bf16", ema=0) == 1000 * 2 + 10 * (4 + 4 + 8 + 4 + 2)
    assert "report" not in needs.stages(rank=3, precision="fp32", ema=0)


def test_a_peak_counts_what_lives_at_once_and_forgets_the_rest() -> None:
    def work() -> None:
        a = torch.empty(1000, device="meta")  # 4000 bytes
        b = a.view(10, 100) + 1
        del a
        c = b.relu_() * 2
        del b, c
        torch.empty(1500, device="meta")

    assert peak(work) == 8000


def test_a_network_under_a_lora_is_loaded_in_the_precision_of_the_run(tmp_path: Path) -> None:
    teacher = open_checkpoint(make_teacher(tmp_path / "tiny.safetensors"))
    unet = teacher.unet(dtype=torch.bfloat16, conditioned=True, exact="time_embedding.")
    dtypes = {name: parameter.dtype for name, parameter in unet.named_parameters()}
    assert {d for name, d in dtypes.items() if name.startswith("time_embedding.")} == {torch.float32}
    assert {d for name, d in dtypes.items() if not name.startswith("time_embedding.")} == {torch.bfloat16}


def test_networks_take_turns_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    from toolkit.training import networks

    moved: list[tuple[str, str]] = []
    names = {torch.nn.Linear(2, 2): "a", torch.nn.Linear(2, 2): "b"}
    monkeypatch.setattr(networks, "place", lambda m, device: moved.append((names[m], str(device))) or m)
    turns = Turns("cuda")
    a, b = (turns.admit(module) for module in names)
    for module in (a, a, b, a):
        module(torch.zeros(1, 2))
    assert moved == [("a", "cuda"), ("a", "cpu"), ("b", "cuda"), ("b", "cpu"), ("a", "cuda")]


def test_a_lazy_network_is_loaded_once_and_only_when_asked() -> None:
    loads: list[int] = []

    def load() -> Any:
        loads.append(1)
        return lambda z, timestep, cond, w: z

    network = lazily(load)
    assert not loads
    for _ in range(2):
        network(torch.zeros(1), torch.zeros(1), {}, None)
    assert loads == [1]


def test_the_plan_is_made_for_the_memory_that_is_named_and_says_its_route(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = make_teacher(tmp_path / "tiny.safetensors")
    make_tokenizer(tmp_path / "tokenizer")
    arguments = ["--ckpt", str(teacher), "--cache-dir", str(tmp_path / "c"), "--device", "cpu", "--dry-run"]

    def planned(*more: str) -> Any:
        monkeypatch.setattr(sys, "argv", ["distill", *arguments, *more, "--json"])
        before = signal.getsignal(signal.SIGTERM)
        try:
            distill.main()
        finally:
            signal.signal(signal.SIGTERM, before)
        return json.loads(capsys.readouterr().out)

    plain, tight = planned(), planned("--vram", "0.02", "--batch-size", "1")
    assert plain["settings"]["student"] == "full" and "every weight is trained" in plain["plan"]["route"]
    assert tight["settings"]["student"] == "lora" and tight["settings"]["rank"] < 32
    assert f"a LoRA of rank {tight['settings']['rank']}" in tight["plan"]["route"]
    assert tight["plan"]["free_bytes"] == round(0.02 * GIB)
    assert set(tight["plan"]["memory"]) == {"texts", "pictures", "training", "report"}
    assert memory.size(tight["plan"]["memory_bytes"]).endswith("MiB")
