"""What to set for a student in hosts that know nothing of FewStep, from its spec alone."""

from __future__ import annotations

from dataclasses import dataclass

from ..diffusion.spec import StudentSpec

TOP = 999

NAMES = {"deterministic": ("euler", "Euler"), "consistency": ("lcm", "LCM")}
"""A StudentSpec's sampler by the stock names of ComfyUI and A1111; no host has the stochastic one."""


@dataclass(frozen=True)
class StockSettings:
    """ComfyUI's words, then A1111's (1.10 and newer; Forge's too).
    ``exact``: on the trained timesteps, not one beside some of them."""

    sampler: tuple[str, str]
    scheduler: tuple[str, str]
    steps: int
    cfg: float
    exact: bool


def simple_timesteps(steps: int) -> tuple[int, ...]:
    """Where the hosts' scheduler "simple" evaluates."""
    return tuple(TOP - int(step * ((TOP + 1) / steps)) for step in range(steps))


def stock_settings(spec: StudentSpec) -> StockSettings | None:
    """What runs this student, of one guidance, in a stock host; None where no stock host can.

    "simple" is the trained grid where the steps divide 1000, and elsewhere one timestep off at most.
    """
    timesteps = simple_timesteps(spec.steps)
    off = max(abs(a - b) for a, b in zip(timesteps, spec.timesteps, strict=True))
    if spec.direction != "decode" or spec.sampler not in NAMES or off > 1:
        return None
    return StockSettings(NAMES[spec.sampler], ("simple", "Simple"), spec.steps, 1.0, exact=off == 0)
