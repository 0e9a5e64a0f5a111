"""The caches of teachers' pictures, people's, and tiny decoders' pairs: their sizes, and which runs need
them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..diffusion.errors import BadInput
from .memory import GIB, size

_NAME = re.compile(r"(teacher|images|decoder)-[0-9a-f]{16}")


@dataclass(frozen=True)
class Cache:
    """A folder of samples; ``used``: when its last shard was written, in seconds since 1970; ``needed_by``:
    the unfinished runs that go on with it.
    """

    folder: Path
    bytes: int
    used: float
    needed_by: tuple[str, ...] = ()


def find_caches(cache: Path, needs: Mapping[str, Sequence[str]] | None = None) -> list[Cache]:
    """All in a folder, by name; what else lies there is nobody's business. ``needs``: of
    :func:`unfinished_runs`.
    """
    folders = cache.iterdir() if cache.is_dir() else ()
    return [
        Cache(folder, bytes_in(folder), folder.stat().st_mtime, tuple((needs or {}).get(folder.name, ())))
        for folder in sorted(folders)
        if folder.is_dir() and not folder.is_symlink() and _NAME.fullmatch(folder.name)
    ]


def unfinished_runs(runs: Path) -> dict[str, list[str]]:
    """Names of the runs in a folder that have begun and written no student yet, by the name of their
    cache.
    """
    found: dict[str, list[str]] = {}
    for path in sorted(runs.glob("*/state/samples.txt")):
        run = path.parents[1]
        if not (run / "student.safetensors").exists():
            found.setdefault(path.read_text(encoding="utf-8").strip(), []).append(run.name)
    return found


def bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def require_room(cache: Path, folder: Path, *, needed: int, limit_gb: float) -> None:
    """BadInput where the caches would outgrow ``limit_gb`` with ``needed`` bytes in ``folder``, of which some
    may be there.
    """
    limit, others = round(limit_gb * GIB), sum(c.bytes for c in find_caches(cache) if c.folder != folder)
    if others + needed <= limit:
        return
    if needed > limit:
        raise BadInput(
            f"this run keeps {size(needed)} of pictures and trajectories, and --cache-gb is {limit_gb:g}; "
            "give a higher one, or fewer --pictures"
        )
    raise BadInput(
        f"{cache} holds {size(others)}, this run keeps {size(needed)} there, and --cache-gb is {limit_gb:g}; "
        f'python -m toolkit.clean --cache-dir "{cache}" says what can go'
    )
