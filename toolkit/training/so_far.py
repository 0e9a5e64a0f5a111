"""The best student of a run that is not over yet (``--finish``).

A phase's rate falls linearly to zero, so half-way three quarters of its learning, the sum of its rates, is
done: from there on its averaged weights are taken, before that the finished student of the phase before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..diffusion.errors import BadInput
from .adapters import State
from .loop import load_state

ENOUGH = 0.5
"""Of a phase's updates, for its student to be preferred to that of the phase before."""


@dataclass(frozen=True, eq=False)
class SoFar:
    """``index``: of the phase whose student this is; ``says``: what it is and why, for people."""

    index: int
    state: State
    says: str


def best_so_far(folder: Path, names: Sequence[str], updates: Sequence[int], *, earlier: bool) -> SoFar:
    """The best student in a run's state; ``earlier``: the run started from a finished one. BadInput where
    there is none yet.
    """
    saved = load_state(folder / "latest.pt")
    if saved is None:
        raise BadInput(
            f"{folder.parent} holds no student yet: no state of its training was saved; go on by --resume"
        )
    index, update = saved["phase"], saved["update"]
    if "student" not in saved:
        says = f"the finished student of phase {names[index - 1]}"
        if index == len(names):
            return _finished(folder, index - 1, f"{says}, the last one: this run is complete")
        return _finished(folder, index - 1, f"{says}; phase {names[index]} has not begun")
    here = f"{update} of {updates[index]} updates of phase {names[index]}"
    weights: dict[str, Any] = saved["student"] if saved["average"] is None else saved["average"]
    broken = not all(bool(value.isfinite().all()) for value in weights.values())
    enough = update >= ENOUGH * updates[index] and not broken
    if enough or (index == 0 and not earlier and not broken):
        says = f"the student of phase {names[index]} as it was after {here}"
        return SoFar(index, weights, says if enough else f"{says}, less than half: expect little of it")
    why = (
        "its weights are not finite" if broken else "less than half: the student before it is the better one"
    )
    if index == 0:
        raise BadInput(
            f"{folder.parent}: {here} are done, {why}, and no other phase is finished; "
            + ("keep the student of --init" if earlier else "start anew with a lower --lr")
        )
    return _finished(folder, index - 1, f"the finished student of phase {names[index - 1]} ({here}, {why})")


def _finished(folder: Path, index: int, says: str) -> SoFar:
    state = load_state(folder / f"phase-{index}.pt")
    if state is None:
        raise BadInput(f"{folder} has lost phase-{index}.pt; its student is still in the folder students")
    return SoFar(index, state, says)
