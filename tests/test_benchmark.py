"""The benchmark's two sides do the work that they say, and its figures are quotients of what was measured."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from make_checkpoint import make_student, make_teacher

from toolkit import benchmark
from toolkit.diffusion.errors import BadInput
from toolkit.evaluation import race as racing
from toolkit.evaluation.race import peak_memory, race, ratio
from toolkit.training import shapes
from toolkit.training.adapters import LoraShape
from toolkit.training.checkpoint import Checkpoint, open_checkpoint
from toolkit.training.reference import LcmReference, NewUnet
from toolkit.training.rehearsal import Rehearsal

CPU = torch.device("cpu")
KINDS = pytest.mark.parametrize("lora", [None, LoraShape(2)], ids=["full", "lora"])


@pytest.fixture
def teacher(tmp_path: Path) -> Checkpoint:
    return open_checkpoint(make_teacher(tmp_path / "tiny.safetensors"))


def common(lora: LoraShape | None) -> dict[str, Any]:
    return {
        "size": (32, 32),
        "batch": 2,
        "precision": "fp32",
        "device": CPU,
        "lora": lora,
        "recompute": False,
    }


@KINDS
def test_the_reference_asks_four_times_and_holds_three_networks_or_two(
    teacher: Checkpoint, lora: LoraShape | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    networks = NewUnet(teacher)
    reference = LcmReference(teacher, networks, **common(lora))
    assert len(networks.made) == (3 if lora is None else 2)
    for part, module in (("vae", reference._vae.encoder), ("text", reference._words[0].model)):
        module.register_forward_pre_hook(lambda *_, part=part: asked.append(part))
    frozen, student, *averaged = (dict(unet.named_parameters()) for unet in networks.made)
    before = [{name: value.clone() for name, value in unet.items()} for unet in (frozen, student, *averaged)]
    for _ in range(2):
        reference.step()
    assert networks.evaluations / 2 == 2 * 4
    assert asked == ["vae", "text"] * 2
    changed = [
        {name for name, value in now.items() if not torch.equal(value, then[name])}
        for now, then in zip((frozen, student, *averaged), before, strict=True)
    ]
    assert not changed[0], "the teacher is frozen"
    if lora is None:
        assert changed[1] and set() < changed[2] <= changed[1], "a running average of the student"
    else:
        assert changed[1] and all("lora_" in name for name in changed[1])


@KINDS
def test_ours_asks_three_times_and_once_on_kept_trajectories(
    teacher: Checkpoint, lora: LoraShape | None, tmp_path: Path
) -> None:
    networks = NewUnet(teacher)
    ours = Rehearsal(teacher, networks, **common(lora), out=tmp_path)
    assert len(networks.made) == (2 if lora is None else 1)
    counts: list[float] = []
    for work in (ours.step, ours.cached_step, ours.making_step):
        before = networks.evaluations
        work()
        counts.append((networks.evaluations - before) / 2)
    assert counts == [3, 1, 2]
    assert ours.making_steps == 16 and ours.uses == pytest.approx((600 + 600) * 32 / 4096)


def test_works_take_turns_and_every_second_round_runs_backwards(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    now = 0.0

    def lasting(name: str, seconds: float) -> Any:
        def work() -> None:
            nonlocal now
            now += seconds
            order.append(name)

        return work

    monkeypatch.setattr(racing.torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(racing.time, "process_time", lambda: now)
    found = race({"a": lasting("a", 2.0), "b": lasting("b", 1.0)}, rounds=2, device=CPU)
    assert order == ["a", "b", "a", "b", "b", "a"]
    assert found == {"a": [2.0, 2.0], "b": [1.0, 1.0]}
    assert ratio([2.0, 6.0, 9.0], [1.0, 2.0, 9.0]) == [1.0, 2.0, 3.0], "of each round, not of the medians"


def test_peak_memory_counts_real_tensors_at_their_largest_moment() -> None:
    def make() -> Callable[[], None]:
        held = torch.ones(5000) * torch.ones(5000)  # 20000 bytes stay, 20000 do not

        def work() -> None:
            a = held[:1000] * 2  # 4000 bytes
            b = a * 2
            del a
            torch.ones(1500).sum()
            del b

        return work

    assert peak_memory(make, CPU) == 20000 + 4000 + 6000 + 4


@pytest.mark.parametrize("name, count", [("sd15", 859_520_964), ("sdxl", 2_567_463_684)])
def test_random_checkpoints_have_their_family_s_true_shapes(
    name: str, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shapes, "_random", lambda key, shape, generator: torch.empty(shape, device="meta"))
    checkpoint = shapes.random_checkpoint(name)
    assert checkpoint.unet_parameters == count
    assert checkpoint.network_tensors().keys() == checkpoint.tensors.keys()
    assert (checkpoint.downscale, checkpoint.latent_channels) == (8, 4)


def test_the_command_answers_with_ratios_that_agree_with_their_parts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = make_teacher(tmp_path / "tiny.safetensors")
    arguments = [
        "--ckpt",
        str(file),
        "--student",
        "lora",
        "--rank",
        "2",
        "--batch-size",
        "2",
        "--rounds",
        "2",
    ]
    benchmark.main([*arguments, "--only", "training", "--device", "cpu", "--json"])
    answer = json.loads(capsys.readouterr().out)
    training = answer["training"]
    assert (answer["device"], answer["precision"], answer["shape"]) == ("cpu", "fp32", "tiny")
    assert training["evaluations_per_image"] == {"reference": 4, "ours": 3, "cached": 1}
    peaks = training["peak_bytes"]
    assert training["peak_memory_ratio"] == [peaks["ours"] / peaks["reference"]] * 3
    for name in ("", "cached_", "amortised_"):
        low, middle, high = training[f"{name}images_per_second_ratio"]
        assert 0 < low <= middle <= high
    speed = {name: values[1] for name, values in training["images_per_second"].items()}
    assert speed["amortised"] < speed["cached"]


def test_the_command_compares_the_sampler_with_bare_forwards_and_the_teacher_with_a_student(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = make_teacher(tmp_path / "tiny.safetensors")
    counts: dict[str, int] = {}

    def raced(works: Any, *, rounds: int, device: torch.device) -> dict[str, list[float]]:
        for name, work in works.items():
            before = len(calls)
            work()
            counts[name] = sum(calls[before:])
        return {name: [float(counts[name])] for name in works}

    calls: list[int] = []
    forward = benchmark.UNetNetwork.__call__

    def counting(self: Any, z: torch.Tensor, *rest: Any) -> torch.Tensor:
        calls.append(len(z))
        return forward(self, z, *rest)

    monkeypatch.setattr(benchmark.UNetNetwork, "__call__", counting)
    monkeypatch.setattr(benchmark, "race", raced)
    benchmark.main(["--ckpt", str(file), "--only", "sampling", "--device", "cpu", "--json"])
    sampling = json.loads(capsys.readouterr().out)["sampling"]
    assert counts == {"bare": 4, "sampler": 4, "student": 4, "ddim_50": 100, "dpmpp_2m_25": 50}
    assert sampling["overhead_ratio"] == [1, 1, 1]
    assert sampling["teacher_over_student"] == {"ddim_50": [25] * 3, "dpmpp_2m_25": [12.5] * 3}


def test_the_command_holds_a_picture_s_decoding_against_an_evaluation_and_one_layout_against_the_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = {"evaluation": [2.0], "full": [6.0], "tiny": [0.5], "contiguous": [3.0], "channels_last": [2.0]}

    def raced(works: Any, **_: Any) -> dict[str, list[float]]:
        for work in works.values():
            work()
        return {name: seconds[name] for name in works}

    monkeypatch.setattr(benchmark, "race", raced)
    file = make_teacher(tmp_path / "tiny.safetensors")
    benchmark.main(["--ckpt", str(file), "--only", "decoding", "layout", "--device", "cpu", "--json"])
    answer = json.loads(capsys.readouterr().out)
    parameters = answer["decoding"].pop("parameters")
    assert parameters["tiny"] < parameters["full"]
    assert answer["decoding"] == {
        "full_over_evaluation": [3, 3, 3],
        "tiny_over_evaluation": [0.25] * 3,
        "full_over_tiny": [12, 12, 12],
    }
    assert answer["layout"] == {"channels_last_speed_ratio": [1.5] * 3}


def test_what_cannot_be_measured_is_said_in_a_sentence(tmp_path: Path) -> None:
    student = make_student(tmp_path / "student.safetensors")
    inpainting = make_teacher(tmp_path / "inpainting.safetensors", in_channels=9)
    for arguments, message in (
        (["--ckpt", str(student)], "this is a student; give the checkpoint"),
        (["--ckpt", str(inpainting)], "inpainting"),
        (["--rounds", "0"], "--rounds 0: expected 1 or more"),
        (["--rank", "4"], "--rank 4 is of a LoRA"),
        (["--resolution", "33"], "--resolution 33: this teacher needs multiples of"),
    ):
        with pytest.raises(BadInput, match=message):
            benchmark.main([*arguments, "--device", "cpu"])
