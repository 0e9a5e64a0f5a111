"""TensorBoard logs of a run (``--tensorboard``): loss, rate and pace of each phase by update."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..diffusion.errors import BadInput

NAMES = ("loss", "lr", "images_per_second")


@contextmanager
def tensorboard(out: Path) -> Generator[Callable[[dict[str, Any]], None]]:
    """What writes lines of run.jsonl into the run's folder ``tensorboard``; BadInput without the package."""
    try:
        from torch.utils.tensorboard.writer import SummaryWriter
    except ImportError:
        raise BadInput(
            "--tensorboard needs the package tensorboard, which is not installed; pip install tensorboard, "
            "or take --watch instead"
        ) from None
    writer: Any = SummaryWriter(str(out / "tensorboard"), flush_secs=20)

    def write(line: dict[str, Any]) -> None:
        for name in NAMES:
            writer.add_scalar(f"{name}/{line['phase']}", line[name], line["update"])

    try:
        yield write
    finally:
        writer.close()
