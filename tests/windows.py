"""Windows' habits on other systems."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from toolkit.runtime import files


def in_use(path: Path) -> bool:
    """Whether this process has the file open, or a file in the folder, or mapped into its memory (Linux)."""
    whole = os.path.realpath(path)
    open_now = []
    for number in os.listdir("/proc/self/fd"):
        try:
            open_now.append(os.readlink(f"/proc/self/fd/{number}"))
        except OSError:
            continue
    maps = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    mapped = [line.split(maxsplit=5)[5].strip() for line in maps if "/" in line]
    return any(name == whole or name.startswith(whole + os.sep) for name in (*open_now, *mapped))


def keep_what_is_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """os.replace and os.unlink refuse where this process itself uses the file, at once."""
    monkeypatch.setattr(files, "WAITS", ())
    for name in ("replace", "unlink"):
        monkeypatch.setattr(os, name, _guarded(getattr(os, name)))


def _guarded(real: Callable[..., None]) -> Callable[..., None]:
    def call(*paths: Any, **options: Any) -> None:
        if options.get("dir_fd") is None and os.path.exists(paths[-1]) and in_use(Path(paths[-1])):
            raise PermissionError(errno.EACCES, "Access is denied", str(paths[-1]))
        real(*paths, **options)

    return call
