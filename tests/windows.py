"""Windows' habits on other systems: files that are in use stay, new lines are two characters."""

import errno
import os
import sys
from pathlib import Path

import pytest


def in_use(path: Path) -> bool:
    """Whether this process has the file open, or a file in the folder, or mapped into its memory (Linux)."""
    whole = os.path.realpath(path)
    open_now = []
    for number in os.listdir("/proc/self/fd"):
        try:
            open_now.append(os.readlink(f"/proc/self/fd/{number}"))
        except OSError:
            continue
    mapped = [line.split(maxsplit=5)[5].strip() for line in open("/proc/self/maps") if line.count("/")]
    return any(name == whole or name.startswith(whole + os.sep) for name in (*open_now, *mapped))


def keep_what_is_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """os.replace and the removal of a file refuse, as on Windows, where this process itself uses the file."""
    if not sys.platform.startswith("linux"):
        pytest.skip("tells open files by /proc")

    def guarded(name: str) -> None:
        real = getattr(os, name)

        def call(path, *more, **options):
            last = more[0] if name == "replace" else path
            if options.get("dir_fd") is None and os.path.exists(last) and in_use(Path(last)):
                raise PermissionError(errno.EACCES, "Access is denied", str(last))
            return real(path, *more, **options)

        monkeypatch.setattr(os, name, call)

    for name in ("replace", "unlink", "remove"):
        guarded(name)
