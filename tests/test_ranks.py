"""Several processes of one run: they learn what one would, and end together."""

from __future__ import annotations

import dataclasses
import json
import math
import multiprocessing
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_loop import CPU, EITHER, LORA, SETTINGS, Killed, job, with_losses

from toolkit.diffusion.errors import BadInput
from toolkit.training import loop
from toolkit.training import ranks as processes
from toolkit.training.loop import Interrupted, PhaseTrainer, make_holder, sizes, train
from toolkit.training.ranks import ALONE, Ranks, as_of, gathered, require_shares

ROOT = Path(__file__).parents[1]
HALVES = [dataclasses.replace(ALONE, number=number, count=2) for number in range(2)]


def test_the_pieces_of_a_micro_batch_get_the_random_numbers_of_its_rows():
    def draw(rows: int) -> list[torch.Tensor]:
        return [
            torch.rand(rows, generator=generator),
            torch.rand((), generator=generator).expand(rows),
            torch.randn((rows, 2, 3), generator=generator),
            torch.randn(rows, 2, generator=generator),
            torch.randint(9, (rows,), generator=generator),
            torch.randint(3, 1000, (rows,), generator=generator),
        ]

    generator = torch.Generator().manual_seed(1)
    begun = generator.get_state()
    whole, after = draw(5), generator.get_state()
    for ranks in (*HALVES, ALONE):
        for rows in ranks.pieces(5, at_once=2):
            generator.set_state(begun)
            with as_of(rows, 5):
                pieces = draw(len(rows))
            assert all(torch.equal(a, b[rows]) for a, b in zip(pieces, whole, strict=True))
            assert torch.equal(generator.get_state(), after)
    rows = [int(row) for ranks in HALVES for piece in ranks.pieces(5, at_once=2) for row in piece]
    assert rows == [0, 1, 2, 3, 4]


@EITHER
def test_the_gradients_of_two_halves_add_up_to_those_of_the_whole(tmp_path, settings):
    settings = dataclasses.replace(settings, micro_batch=4, batch_size=8)

    def gradients(ranks: Ranks, at_once: int) -> tuple[float, dict[str, torch.Tensor]]:
        work, _ = job(tmp_path)
        holder = make_holder(work, settings, CPU)
        trainer = PhaseTrainer(work, settings, 0, holder, torch.GradScaler("cpu", enabled=False), CPU,
                               at_once, 4, ranks)  # fmt: skip
        loss = trainer._gradients()
        assert loss is not None
        return loss, {n: p.grad.clone() for n, p in trainer.trained.items() if p.grad is not None}

    loss, whole = gradients(ALONE, 4)
    (one, first), (other, second) = (gradients(ranks, 1) for ranks in HALVES)
    assert one + other == pytest.approx(loss, rel=1e-5) and one != pytest.approx(other, rel=0.01)
    largest = max(float(value.abs().max()) for value in whole.values())
    for name, value in whole.items():
        assert torch.allclose(first[name] + second[name], value, rtol=0, atol=1e-5 * largest), name
        assert float(value.abs().max()) < 1e-3 * largest or not torch.allclose(
            2 * first[name], value, rtol=0, atol=1e-2 * float(value.abs().max())
        )


def test_gradients_are_added_up_in_lots_of_one_dtype(monkeypatch):
    monkeypatch.setattr(processes, "BUCKET_BYTES", 40)
    sent: list[torch.Tensor] = []

    def twice(flat: torch.Tensor) -> None:
        sent.append(flat)
        flat *= 2

    monkeypatch.setattr(processes.dist, "all_reduce", twice)
    shapes = [(3,), (2, 3), (4,), (30,), (1, 1)]
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
    parameters.append(torch.nn.Parameter(torch.zeros(2, dtype=torch.float64)))
    for number, parameter in enumerate(parameters):
        parameter.grad = torch.full_like(parameter, number + 1)
    parameters.append(torch.nn.Parameter(torch.zeros(1)))
    HALVES[0].add_up(parameters)
    assert [len(flat) for flat in sent] == [9, 4, 30, 1, 2]
    for number, parameter in enumerate(parameters[:-1]):
        assert torch.equal(parameter.grad, torch.full_like(parameter, 2 * number + 2))


def test_a_state_tells_the_pictures_that_all_processes_share():
    four = Ranks(0, 4)
    settings = dataclasses.replace(SETTINGS, batch_size=16, micro_batch=2)
    assert sizes(None, settings, ALONE) == (2, 2) and sizes(None, settings, four) == (2, 8)
    assert sizes({"at_once": 1, "part": 8}, settings, ALONE) == (1, 8)
    assert sizes({"at_once": 2, "part": 2}, settings, HALVES[0]) == (2, 2)
    assert sizes({"at_once": 1, "part": 3}, settings, HALVES[0]) == (1, 2), "one picture for two"
    assert sizes({}, settings, ALONE) == (2, 2), "a state of an earlier version"


def test_a_batch_that_cannot_be_shared_equally_is_refused():
    require_shares(16, 4)
    with pytest.raises(BadInput, match=r"16 pictures cannot be shared equally by 3 processes; .*multiple"):
        require_shares(16, 3)


def together(out: Path, run: Callable[[Ranks], None]) -> list[str]:
    """What became of two processes that did this: the last words of each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def process(number: int) -> None:
        os.environ |= {
            **{"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"},
            **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"},
        }
        said = "done"
        try:
            ranks = gathered(cpu=True)
            run(ranks)
            ranks.leave()
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        (out / f"{number}.txt").write_text(said)
        os._exit(0)

    # Forked, for both would take long to import everything.
    context = multiprocessing.get_context("fork")
    started = [context.Process(target=process, args=(number,)) for number in range(2)]
    for each in started:
        each.start()
    for each in started:
        each.join(timeout=120)
        assert not each.is_alive(), "a process hangs"
    return [(out / f"{number}.txt").read_text() for number in range(2)]


forks = pytest.mark.skipif(
    torch.cuda.is_available() or not hasattr(os, "fork"), reason="autograd of a CUDA build does not fork"
)


PLAIN = dataclasses.replace(SETTINGS, micro_batch=4, lr=3e-4, clip=1e9)
EQUAL = 1e-3
"""Of what was learned, by plain gradient descent: Adam would divide what is rounded in another order by
gradients that are next to nothing, and hide a gradient of another size."""


@pytest.fixture
def descent(monkeypatch):
    def make(name: str, parameters: object, *, lr: float, device: torch.device) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=lr)  # type: ignore[arg-type]

    monkeypatch.setattr(loop, "make_optimizer", make)


def apart(students: dict[str, torch.Tensor], others: dict[str, torch.Tensor], settings: object) -> float:
    """How far two students are from each other, over how far the second is from where both began."""
    holder = make_holder(job(Path("."))[0], settings, CPU)  # type: ignore[arg-type]
    begun = {name: value.detach() for name, value in holder.pair(None, teacher="pair").trained.items()}

    def far(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
        return math.sqrt(sum(float((a[name] - b[name]).double().square().sum()) for name in b))

    return far(students, others) / far(begun, others)


@forks
def test_two_processes_with_half_the_batch_each_learn_what_one_does_and_one_writes(tmp_path, descent):
    settings = dataclasses.replace(PLAIN, state_minutes=0)
    work, whole = job(tmp_path / "alone")
    train(work, settings, device=CPU)

    def half(ranks: Ranks) -> None:
        out = tmp_path / "together"
        mine = dataclasses.replace(settings, micro_batch=2)
        work, students = job(out)
        train(work, mine, device=CPU, ranks=ranks)
        torch.save(students, tmp_path / f"students-{ranks.number}.pt")

    assert together(tmp_path, half) == ["done", "done"]
    first, second = (torch.load(tmp_path / f"students-{number}.pt") for number in range(2))
    assert list(first) == ["guided", "fold-1"] and second == {}, "the second process has written a student"
    for name, student in whole.items():
        assert apart(first[name], student, settings) < EQUAL
    lines = [
        [json.loads(line) for line in (tmp_path / name / "run.jsonl").read_text().splitlines()]
        for name in ("alone", "together")
    ]
    assert [line["loss"] for line in lines[1]] == pytest.approx([line["loss"] for line in lines[0]], rel=1e-4)


@forks
def test_a_stop_of_one_process_stops_both_and_one_process_goes_on_with_the_run(tmp_path, descent):
    settings = dataclasses.replace(PLAIN, lora=LORA.lora)
    work, whole = job(tmp_path / "alone")
    train(work, settings, device=CPU)

    def half(ranks: Ranks) -> None:
        def stopping(loss):
            def call(**arguments):
                if ranks.number == 1:
                    os.kill(os.getpid(), signal.SIGTERM)
                return loss(**arguments)

            return call

        work, _ = job(tmp_path / "stopped")
        mine = dataclasses.replace(settings, micro_batch=2)
        phases = [work.phases[0], *with_losses(work, stopping).phases[1:]]
        train(dataclasses.replace(work, phases=phases), mine, device=CPU, ranks=ranks)

    assert [said.partition(":")[0] for said in together(tmp_path, half)] == [Interrupted.__name__] * 2
    saved = torch.load(tmp_path / "stopped" / "state" / "latest.pt", weights_only=True)
    assert (saved["phase"], saved["update"], saved["at_once"], saved["part"]) == (1, 1, 2, 4)
    work, resumed = job(tmp_path / "stopped")
    train(work, settings, device=CPU)
    assert apart(resumed["fold-1"], whole["fold-1"], settings) < EQUAL


@forks
def test_an_error_or_a_lack_of_memory_in_one_process_leaves_none_waiting(tmp_path, descent):
    def failing(ranks: Ranks) -> None:
        def fails(loss):
            def call(**arguments):
                if ranks.number == 1:
                    raise Killed
                return loss(**arguments)

            return call

        work, _ = job(tmp_path / "failing")
        settings = dataclasses.replace(PLAIN, micro_batch=2)
        train(with_losses(work, fails), settings, device=CPU, ranks=ranks)

    first, second = together(tmp_path, failing)
    assert second == "Killed: " and first.startswith("BadInput: another process of this run has ended")

    def short(ranks: Ranks) -> None:
        def lacks(loss):
            def call(*, batch, **arguments):
                if ranks.number == 1 and len(batch.x0) > 1:
                    raise torch.OutOfMemoryError
                return loss(batch=batch, **arguments)

            return call

        work, students = job(tmp_path / "short")
        work = dataclasses.replace(work, phases=work.phases[:1])
        settings = dataclasses.replace(PLAIN, micro_batch=2, updates=(2,))
        train(with_losses(work, lacks), settings, device=CPU, ranks=ranks)
        if ranks.writes:
            torch.save(students, tmp_path / "short.pt")

    assert together(tmp_path, short) == ["done", "done"]
    work, students = job(tmp_path / "enough")
    settings = dataclasses.replace(PLAIN, updates=(2,))
    train(dataclasses.replace(work, phases=work.phases[:1]), settings, device=CPU)
    assert apart(torch.load(tmp_path / "short.pt")["guided"], students["guided"], settings) < EQUAL
