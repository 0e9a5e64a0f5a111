"""NVIDIA cards as nvidia-smi tells of them, and the torch that computes on them; the standard library alone.

A torch for the CPU runs everything, and takes weeks where the card would take a night: that must be said.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping, Sequence

QUERY = ("nvidia-smi", "--query-gpu=driver_version,compute_cap", "--format=csv,noheader")
HOLDERS = (
    "nvidia-smi",
    "--query-compute-apps=gpu_uuid,pid,process_name,used_memory",
    "--format=csv,noheader,nounits",
)
INDEX = "https://download.pytorch.org/whl/"
CUDA_13 = "cu130"
"""For drivers from 580 on and cards from compute capability 7.5 (GTX 16, RTX 20) on."""
CUDA_12 = "cu126"
"""For those before."""


def ask(query: Sequence[str] = QUERY) -> str:
    """nvidia-smi's lines of "driver, compute capability", or of what else is asked; empty where there is no
    card or no driver."""
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def holders(uuid: str, *, but: int) -> list[tuple[str, int | None]]:
    """Programs with memory on the card of this uuid ("": on any), most first: names without their folders,
    and bytes, where the driver tells them (on Windows it does not). ``but``: a process that is left out.
    """
    found: list[tuple[str, int | None]] = []
    for line in ask(HOLDERS).splitlines():
        if line.count(", ") < 3:
            continue
        card, pid, *middle, held = line.split(", ")
        if card.removeprefix("GPU-").startswith(uuid.removeprefix("GPU-")) and pid != str(but):
            name = re.split(r"[/\\]", ", ".join(middle))[-1]
            found.append((name, int(held) * 1024**2 if held.isdigit() else None))
    return sorted(found, key=lambda row: -(row[1] or 0))


def build(told: str) -> str | None:
    """The CUDA build of torch ("cu130") for the first card that nvidia-smi told of."""
    driver, _, capability = (told.splitlines() or [""])[0].partition(",")
    try:
        is_new = float(driver.split(".")[0]) >= 580 and float(capability) >= 7.5
    except ValueError:
        return None
    return CUDA_13 if is_new else CUDA_12


def index(told: str, *, windows: bool, environment: Mapping[str, str] = os.environ) -> str | None:
    """Where pip finds that build; None where PyPI has it (Linux), where there is no card, and where a person
    chose indices by themselves.
    """
    chosen = build(told)
    if chosen is None or any(name in environment for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL")):
        return None
    return INDEX + chosen if windows or chosen != CUDA_13 else None


def mending(told: str, *, torch: str, computes: bool, python: str) -> str | None:
    """What to say where there is a card, and the installed torch (a version) cannot compute on it."""
    chosen = build(told)
    if computes or chosen is None:
        return None
    wanted = f"torch=={torch.partition('+')[0]}+{chosen}"
    return (
        f"this machine has an NVIDIA card, and this Python's torch {torch} computes on the processor alone; "
        f'mend it by typing: "{python}" -m pip install {wanted} --extra-index-url {INDEX}{chosen}'
    )
