"""What ``--data`` holds: pictures with their captions, in folders or in webdataset's tar shards.

A picture's caption stands in a .txt of the same name beside it, or in a ``metadata.jsonl`` of its folder or
one above (``{"file_name": ..., "text": ...}`` a line, as the library ``datasets`` has it). Shards are
``.tar`` files in which the entries of one sample have the same name (``0001.jpg``, ``0001.txt``) and stand
together.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ..diffusion.errors import BadInput
from .images import SUFFIXES, seen_size
from .prompts import decode_text, read_text
from .sizes import Size

log = logging.getLogger("fewstep")

METADATA = "metadata.jsonl"
LAYOUT = f"expected pictures with same-named .txt captions, or with a {METADATA}, or webdataset's .tar shards"


@dataclass(frozen=True)
class Entry:
    """A picture as it stands in the data: its name there, how to read it, its caption if there is one."""

    name: str
    read: Callable[[], bytes]
    caption: str | None

    def data(self) -> bytes:
        """BadInput if the file cannot be read."""
        try:
            return self.read()
        except OSError as error:
            raise BadInput(f"{self.name}: cannot be read ({error.strerror})") from None


@dataclass(frozen=True)
class Picture:
    """A picture that can be used; ``size`` is its own."""

    name: str
    sha256: str
    caption: str
    size: Size


@dataclass(frozen=True)
class Scan:
    """All usable pictures, in the order of :func:`entries`; of the others, how many are ``damaged``."""

    pictures: tuple[Picture, ...]
    damaged: int


def scan(source: Path, *, uncaptioned: str | None = None) -> Scan:
    """Read every picture once, for its hash and its size; what cannot be used is said. BadInput if nothing
    can be. ``uncaptioned``: the caption of those that have none, which are else left out.
    """
    found: list[Picture] = []
    without: list[str] = []
    damaged = 0
    for entry in entries(source):
        caption = entry.caption or uncaptioned
        if caption is None:
            without.append(entry.name)
            continue
        try:
            data = entry.data()
            size = seen_size(data, entry.name)
        except BadInput as error:
            log.warning("%s; skipped", error)
            damaged += 1
            continue
        found.append(Picture(entry.name, hashlib.sha256(data).hexdigest(), caption, size))
    if without:
        log.warning("%d pictures without a caption are left out, %s first", len(without), without[0])
    if not found:
        raise BadInput(
            f"{source}: no picture that can be used ({damaged} are damaged, {len(without)} have no caption); "
            f"{LAYOUT}"
        )
    return Scan(tuple(found), damaged)


def entries(source: Path) -> Iterator[Entry]:
    """Every picture of a folder and the folders in it, or of one shard, by name; hidden files are passed
    over.
    """
    if not source.exists():
        raise BadInput(f"{source}: no such folder; {LAYOUT}")
    root = source if source.is_dir() else source.parent
    files = {path.relative_to(root): path for path in (root.rglob("*") if source.is_dir() else [source])}
    files = {
        name.as_posix(): path
        for name, path in files.items()
        if path.is_file() and not any(part.startswith(".") for part in name.parts)
    }
    captions = _metadata(source, files)
    for name, path in sorted(files.items()):
        if path.suffix.lower() in SUFFIXES:
            text = path.with_suffix(".txt")
            caption = read_text(text) if text.is_file() else captions.get(name)
            yield Entry(name, path.read_bytes, _one_line(caption))
        elif path.suffix.lower() == ".tar":
            yield from _of_shard(path, name)
    if absent := [name for name in captions if name not in files]:
        log.warning("%d pictures of %s are not there, %s first", len(absent), METADATA, absent[0])


def _metadata(source: Path, files: dict[str, Path]) -> dict[str, str]:
    """The captions of every metadata.jsonl, by the picture's name; BadInput for a line that is none."""
    captions: dict[str, str] = {}
    for name, path in files.items():
        if path.name != METADATA:
            continue
        folder = Path(name).parent
        for number, line in enumerate(read_text(path).splitlines(), 1):
            if not line.strip():
                continue
            try:
                row: Any = json.loads(line)
                captions[(folder / row["file_name"]).as_posix()] = str(row.get("text") or "")
            except (ValueError, KeyError, TypeError, AttributeError):
                raise BadInput(
                    f'{path}: line {number} is not {{"file_name": ..., "text": ...}}; write one such '
                    "object a line"
                ) from None
    return captions


def _of_shard(path: Path, name: str) -> Iterator[Entry]:
    try:
        from webdataset.tariterators import group_by_keys, tar_file_expander
    except ModuleNotFoundError:
        raise BadInput(
            f"{path}: tar shards are read with the package webdataset; install it (pip install webdataset), "
            "or unpack them into a folder"
        ) from None

    def damaged(error: Exception) -> bool:
        log.warning("%s: damaged (%s); what stands before the damage is used", path, error.args[0])
        return False

    with open(path, "rb") as stream:
        files = tar_file_expander([{"url": name, "stream": stream}], handler=damaged)
        for sample in group_by_keys(files, handler=damaged):
            key, text = sample["__key__"], sample.get("txt")
            caption = None if text is None else decode_text(text, f"{path}: {key}.txt")
            for suffix in SUFFIXES:
                if (data := sample.get(suffix[1:])) is not None:
                    yield Entry(f"{name}/{key}{suffix}", partial(bytes, data), _one_line(caption))


def _one_line(caption: str | None) -> str | None:
    return None if caption is None else " ".join(caption.split())
