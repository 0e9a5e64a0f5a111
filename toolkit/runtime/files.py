"""Weight files: reading and writing safetensors, with every failure as one sentence.

Written files are reproducible: the same tensors and metadata give the same bytes in every process (the
safetensors library itself writes metadata in an order that changes from process to process). They appear
under their name complete or not at all.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import hashlib
import itertools
import json
import logging
import os
import secrets
import shutil
import struct
import time
from collections.abc import Generator, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..diffusion.errors import BadInput
from ..diffusion.spec import SPEC_KEY, StudentSpec

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""safetensors' names of the dtypes that weights come in."""

SAVED_SPEC = f"model.diffusion_model.{SPEC_KEY}"
"""Where a host that writes no foreign metadata keeps a student's spec: among the UNet's weights, as bytes."""

WAITS = (0.1, 0.2, 0.4, 0.8, 1.6)
"""Seconds between attempts to put a file in its place: virus scanners and previews soon let go of it."""

log = logging.getLogger("fewstep")

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LONGEST_HEADER = 100_000_000
_READ = 16 * 2**20
_WINDOWS_PATH = 220
"""Characters, of the 260 that Windows takes unless told otherwise, before the temporary name counts."""


@dataclass(frozen=True)
class Header:
    """What a safetensors file says before its data; ``tensors``: name -> empty tensor on the meta device."""

    metadata: dict[str, str]
    tensors: dict[str, Tensor]


def read_header(path: Path) -> Header:
    """Names, shapes, dtypes and metadata of a safetensors file, checked against its length."""
    found = _read_header_json(path)
    metadata = found.pop("__metadata__", {})
    try:
        tensors = {
            name: torch.empty(entry["shape"], dtype=DTYPES[entry["dtype"]], device="meta")
            for name, entry in found.items()
        }
        return Header({str(key): str(value) for key, value in metadata.items()}, tensors)
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise BadInput(
            f"{path}: the safetensors header cannot be read ({error}); download it again"
        ) from None


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file; empty if it has none."""
    return read_header(path).metadata


def read_spec(path: Path) -> StudentSpec | None:
    """The StudentSpec of a safetensors file, or None for a file that is no student of ours."""
    header = read_header(path)
    return spec_from(header.metadata, header.tensors, path)


def spec_from(metadata: Mapping[str, str], tensors: Mapping[str, Tensor], path: Path) -> StudentSpec | None:
    """The StudentSpec in a file's metadata, or among its tensors (:func:`spec_tensor`); an error names the
    file.
    """
    text = metadata.get(SPEC_KEY)
    if text is None and SAVED_SPEC in tensors:
        kept = tensors[SAVED_SPEC]
        text = spec_text(load_tensors(path, keys=[SAVED_SPEC])[SAVED_SPEC] if kept.is_meta else kept)
    if text is None:
        return None
    try:
        return StudentSpec.from_json(text)
    except BadInput as error:
        raise BadInput(f"{path}: {error}") from None


def spec_tensor(spec: StudentSpec) -> Tensor:
    """(length,) uint8, the spec's JSON: what a host saves among the weights, where it writes no foreign
    metadata.
    """
    return torch.tensor(list(spec.to_json().encode()), dtype=torch.uint8)


def spec_text(tensor: Tensor) -> str:
    """The JSON in a :func:`spec_tensor`, also one that was saved in another dtype."""
    return bytes(tensor.cpu().to(torch.uint8).tolist()).decode("utf-8", errors="replace")


def load_tensors(path: Path, *, prefix: str = "", keys: Iterable[str] | None = None) -> dict[str, Tensor]:
    """Tensors of a safetensors file, memory-mapped: all, those under a prefix, or those named by ``keys``.

    Raises BadInput for every kind of unreadable file, and for a key that is not there.
    """
    names = read_header(path).tensors
    wanted = [name for name in names if name.startswith(prefix)] if keys is None else list(keys)
    if missing := [name for name in wanted if name not in names]:
        raise BadInput(f"{path}: the key {missing[0]} is missing")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in wanted}
    except (SafetensorError, OSError) as error:
        raise BadInput(f"{path}: the tensors cannot be read ({error})") from None


def save_tensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], path: Path) -> Path:
    """Write a safetensors file, atomically and reproducibly, and answer where it is (:func:`free_path`);
    BadInput if the disk or the folder refuses.

    Tensors stand by descending element size, then by name, so that each is aligned; metadata by name.
    """
    names = _in_order(tensors)
    entries: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    end = 0
    for name in names:
        tensor = tensors[name]
        start, end = end, end + tensor.numel() * tensor.element_size()
        entries[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    header = _header_bytes(entries)
    with free_path(path, size=end + len(header)) as place, open(place.partial, "xb") as file:
        file.write(header)
        for name in names:
            if tensors[name].numel():
                file.write(tensor_bytes(tensors[name]))
        file.flush()
        os.fsync(file.fileno())
    return place.path


def _in_order(tensors: Mapping[str, Tensor]) -> list[str]:
    return sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))


def sha256_of_tensors(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 in hexadecimal of what :func:`save_tensors` writes behind the header."""
    digest = hashlib.sha256()
    for name in _in_order(tensors):
        digest.update(tensor_bytes(tensors[name]) if tensors[name].numel() else b"")
    return digest.hexdigest()


def write_metadata(path: Path, metadata: Mapping[str, str], *, markers: Iterable[str] = ()) -> None:
    """Replace a safetensors file's metadata, and add ``markers`` (empty tensors); the weights are copied as
    they are."""
    entries = _read_header_json(path)
    entries.pop("__metadata__", None)
    end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    for name in markers:
        entries.setdefault(name, {"dtype": "F32", "shape": [0], "data_offsets": [end, end]})
    header = _header_bytes({"__metadata__": dict(sorted(metadata.items())), **entries})
    with atomic_path(path, size=end + len(header)) as partial:
        with open(path, "rb") as source, open(partial, "xb") as file:
            source.seek(8 + int.from_bytes(source.read(8), "little"))
            file.write(header)
            shutil.copyfileobj(source, file, _READ)
            file.flush()
            os.fsync(file.fileno())


@dataclass
class Place:
    """``partial``: what to write; ``path``: where it is when the block of :func:`free_path` has ended."""

    partial: Path
    path: Path


@contextlib.contextmanager
def atomic_path(path: Path, *, size: int = 0) -> Generator[Path, None, None]:
    """A name beside ``path`` to write a file or a folder under; it becomes ``path`` when the block ends well.

    If the block fails nothing is left behind. A full disk (``size`` bytes are needed), a folder that cannot
    be written and a ``path`` that another program keeps open are BadInput. An existing ``path`` is replaced.
    """
    with _partial(path, size) as partial:
        yield partial
        _replace(partial, path)


@contextlib.contextmanager
def free_path(path: Path, *, size: int = 0) -> Generator[Place, None, None]:
    """As :func:`atomic_path`, for what people wait for: where Windows refuses to replace ``path``, because a
    program has it open (ComfyUI a loaded student), the file gets a new name beside it, and that is said.
    """
    with _partial(path, size) as partial:
        place = Place(partial, path)
        yield place
        try:
            _replace(partial, path)
        except PermissionError:
            if not path.exists():
                raise
            place.path = _unused(path)
            os.replace(partial, place.path)
            log.warning(
                "%s: another program has this file open (ComfyUI, say), so it was left as it is and the new "
                "one is %s beside it",
                path,
                place.path.name,
            )


@contextlib.contextmanager
def _partial(path: Path, size: int) -> Generator[Path, None, None]:
    partial = path.with_name(f".fewstep-{os.getpid()}-{secrets.token_hex(4)}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if (free := shutil.disk_usage(path.parent).free) < size:
            raise OSError(errno.ENOSPC, f"{size / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB are free")
        yield partial
    except OSError as error:
        raise BadInput(f"{path}: {_why_not_written(error, path)}") from error
    finally:
        if os.path.isdir(partial):  # pathlib's own raises where the name is too long
            shutil.rmtree(partial, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):  # what failed is said already
                partial.unlink()


def _replace(partial: Path, path: Path) -> None:
    """Move ``partial`` to ``path``, several times if need be (WAITS)."""
    for wait in (*WAITS, None):
        try:
            if partial.is_dir() and path.is_dir():
                old = partial.with_suffix(".old")  # whole, or not at all if a file in it is open
                os.replace(path, old)
                os.replace(partial, path)
                shutil.rmtree(old, ignore_errors=True)
            else:
                os.replace(partial, path)
            return
        except PermissionError:
            if wait is None:
                raise
            time.sleep(wait)


def _unused(path: Path) -> Path:
    """The first of name-2, name-3, ... that is not there."""
    numbers = itertools.count(2)
    return next(p for n in numbers if not (p := path.with_stem(f"{path.stem}-{n}")).exists())


def sha256_of(path: Path) -> str:
    """SHA-256 in hexadecimal of a file, or of the files in a diffusers folder's ``unet`` in name order."""
    files = [path]
    if path.is_dir():
        files = sorted(f for f in (path / "unet").iterdir() if f.is_file() and not f.name.startswith("."))
    digest = hashlib.sha256()
    for name in files:
        with open(name, "rb") as file:
            while chunk := file.read(_READ):
                digest.update(chunk)
    return digest.hexdigest()


def modelspec(
    *, title: str, architecture: str, prediction_type: str, resolution: tuple[int, int], **more: str
) -> dict[str, str]:
    """``modelspec.*`` metadata as other trainers write it (version 1.0.0; v-prediction is called "v").

    The date is written only when SOURCE_DATE_EPOCH says which, so that files are reproducible.
    """
    fields = {
        "sai_model_spec": "1.0.0",
        "implementation": "https://github.com/Stability-AI/generative-models",
        "title": title,
        "architecture": architecture,
        "prediction_type": "v" if prediction_type == "v_prediction" else prediction_type,
        "resolution": f"{resolution[0]}x{resolution[1]}",
        **more,
    }
    if epoch := os.environ.get("SOURCE_DATE_EPOCH"):
        when = datetime.datetime.fromtimestamp(int(epoch), tz=datetime.timezone.utc)
        fields["date"] = when.strftime("%Y-%m-%dT%H:%M:%SZ")
    return {f"modelspec.{name}": value for name, value in fields.items()}


def check_file(path: Path) -> int:
    """A file's length; BadInput for none, a folder, an empty file, a web page and text."""
    if not path.exists():
        raise BadInput(f"{path}: there is no such file")
    if path.is_dir():
        raise BadInput(f"{path}: this is a folder, and a file of weights was expected")
    try:
        with open(path, "rb") as file:
            start = file.read(512)
    except OSError as error:
        raise BadInput(f"{path}: the file cannot be read ({error.strerror})") from None
    if not start:
        raise BadInput(f"{path}: the file is empty; download it again")
    if start.startswith(b"version https://git-lfs"):
        raise BadInput(f"{path}: this is a Git LFS pointer, not the weights; fetch them with `git lfs pull`")
    if start.startswith(b"GGUF"):
        raise BadInput(f"{path}: this is a GGUF file, which is not read here; get the same as .safetensors")
    text = start.lstrip().lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        raise BadInput(f"{path}: this is a web page (HTML), not weights; download the file itself")
    if b"\0" not in start and all(byte >= 32 or byte in b"\t\n\r\f" for byte in start):
        raise BadInput(f"{path}: this is a text file, not weights")
    return path.stat().st_size


def _read_header_json(path: Path) -> dict[str, Any]:
    size = check_file(path)
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > _LONGEST_HEADER:
            raise BadInput(f"{path}: this is no safetensors file (it has no such header)")
        text = file.read(length)
    if len(text) < length:
        raise BadInput(f"{path}: the file is truncated within its header; download it again")
    try:
        found: Any = json.loads(text)
        ends = [entry["data_offsets"][1] for name, entry in found.items() if name != "__metadata__"]
    except (ValueError, TypeError, KeyError, AttributeError, IndexError):
        raise BadInput(f"{path}: the safetensors header cannot be read; download the file again") from None
    if (expected := 8 + length + max(ends, default=0)) != size:
        state = "truncated" if size < expected else "longer than its header says"
        raise BadInput(f"{path}: the file is {state} ({size:,} of {expected:,} bytes); download it again")
    return found


def _header_bytes(entries: Mapping[str, Any]) -> bytes:
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The values of a tensor as they stand in memory, row by row."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _why_not_written(error: OSError, path: Path) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"cannot be written: the disk is full ({error.strerror}); free some space or write elsewhere"
    length = len(os.path.abspath(path))
    if error.errno == errno.ENAMETOOLONG or (error.errno == errno.ENOENT and length > _WINDOWS_PATH):
        return f"cannot be written: its path has {length} characters, too many; choose a folder higher up"
    if isinstance(error, PermissionError) and path.exists():
        return f"cannot be replaced ({error.strerror}); close the program that has it open, and try again"
    return f"cannot be written ({error.strerror or error}); choose a folder that can be"
