"""A card that is shared, updates that slow down, and ways to run a network: with stand-ins for the GPU."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from toolkit import cards
from toolkit.neighbours import keep_to_free
from toolkit.training.memory import GIB
from toolkit.training.pace import Pace
from toolkit.training.tuning import tuned

TOLD = """GPU-aaaa, 41, /usr/bin/python, 2048
GPU-aaaa, 42, /usr/bin/python3.11, 3000
GPU-bbbb, 43, other, 900
GPU-aaaa, 44, C:\\Games\\a, b.exe, [N/A]
GPU-aaaa, 45, compositor, 3072
what is no such line"""


def card(monkeypatch: pytest.MonkeyPatch, *, free: float, reserved: float = 0) -> list[tuple[float, int]]:
    """A stand-in of 12 GiB; what its memory was capped at."""
    capped: list[tuple[float, int]] = []
    found: dict[str, Any] = {
        "current_device": lambda: 1,
        "mem_get_info": lambda index: (round(free * GIB), 12 * GIB),
        "memory_reserved": lambda index: round(reserved * GIB),
        "set_per_process_memory_fraction": lambda share, index: capped.append((share, index)),
        "get_device_properties": lambda index: SimpleNamespace(uuid="aaaa"),
    }
    for name, stand_in in found.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    return capped


def test_a_run_keeps_to_what_is_free_and_says_who_holds_the_rest(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cards, "ask", lambda query: TOLD)
    monkeypatch.setattr("os.getpid", lambda: 42)
    capped = card(monkeypatch, free=6, reserved=0.5)
    keep_to_free(torch.device("cuda"))
    assert capped == [(6.5 / 12, 1)]
    assert caplog.messages == [
        "other programs hold 5.5 GiB of this card's 12.0 GiB (compositor 3.0 GiB, python 2.0 GiB, a, b.exe); "
        "the run keeps to the 6.5 GiB that are free"
    ]


def test_a_card_of_one_s_own_and_a_processor_need_no_word(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    capped = card(monkeypatch, free=11.5)
    keep_to_free(torch.device("cuda", 0))
    keep_to_free(torch.device("cpu"))
    assert capped == [(11.5 / 12, 0)] and not caplog.messages


def test_without_nvidia_smi_the_amount_alone_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cards, "HOLDERS", ("no-such-program-as-this",))
    card(monkeypatch, free=6)
    keep_to_free(torch.device("cuda"))
    assert "other programs hold 6.0 GiB of this card's 12.0 GiB; the run keeps to the 6.0" in caplog.text


def test_updates_that_suddenly_take_many_times_as_long_are_told_once_until_they_recover() -> None:
    pace = Pace()

    def told(seconds: float, count: int) -> list[str]:
        return [says for _ in range(count) if (says := pace.note(seconds))]

    assert not told(9.0, 2) and not told(1.0, 30), "the first are slow by themselves"
    assert not told(20.0, 2), "two slow ones are none"
    assert not told(1.0, 10) and not told(3.5, 60), "so much more costs half a micro-batch"
    first = told(40.0, 100)
    assert len(first) == 1 and "takes 40 s now, 11 times as long as before" in first[0]
    assert not told(3.5, 10) and len(told(40.0, 5)) == 1


def test_a_network_laid_out_channels_last_computes_the_same() -> None:
    unet: Any = torch.nn.Conv2d(4, 8, 3)
    x = torch.randn(2, 4, 6, 6)
    expected, before = unet(x), unet.weight.clone()
    assert tuned(unet, memory_format="channels_last", compiled=False) is unet
    assert unet.weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(unet.weight, before)
    torch.testing.assert_close(unet(x), expected)


def test_where_compiling_fails_the_network_runs_without_it_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    calls: list[str] = []

    def compile(forward: Any) -> Any:
        def fast(x: torch.Tensor) -> torch.Tensor:
            calls.append("fast")
            if len(x) == 3:
                raise torch.OutOfMemoryError
            if len(x) == 2:
                raise RuntimeError("no compiler was found\nand much more")
            return forward(x)

        return fast

    monkeypatch.setattr(torch, "compile", compile)
    unet: Any = torch.nn.Linear(2, 2)
    keys = set(unet.state_dict())
    tuned(unet, memory_format="contiguous", compiled=True)
    assert set(unet.state_dict()) == keys
    unet(torch.zeros(1, 2))
    with pytest.raises(torch.OutOfMemoryError):
        unet(torch.zeros(3, 2))
    for _ in range(2):
        assert torch.equal(unet(torch.zeros(2, 2)), unet.bias.expand(2, 2))
    assert calls == ["fast"] * 3
    assert caplog.messages == [
        "torch.compile does not work here (no compiler was found); going on without it"
    ]
    assert all(record.levelno == logging.WARNING for record in caplog.records)
