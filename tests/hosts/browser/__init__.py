"""A real browser for the tests: Debian's Chromium, driven by playwright-core from npm, locked here."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from hosts.comfyui import Unavailable

HERE = Path(__file__).parent
_LOCK = ("package.json", "package-lock.json")


class Missing(Unavailable):
    """A program that nobody promised is not here."""


class Browser:
    """One page, as a context manager. JavaScript is given as the source of a function of one argument."""

    def __enter__(self) -> Browser:
        self._process = subprocess.Popen(
            [_program("node"), str(HERE / "bridge.mjs"), str(_playwright()), _program("chromium")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
        )
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)

    def goto(self, url: str) -> None:
        self._do("goto", url)

    def evaluate(self, function: str, argument: Any = None) -> Any:
        return self._do("evaluate", function, argument)

    def wait(self, function: str, argument: Any = None) -> None:
        """Until the function's answer is true."""
        self._do("wait", function, argument)

    def click(self, selector: str) -> None:
        self._do("click", selector)

    def click_at(self, x: float, y: float) -> None:
        self._do("clickAt", x, y)

    def screenshot(self, path: Path, clip: dict[str, float] | None = None) -> None:
        self._do("screenshot", str(path), clip)

    def errors(self) -> list[str]:
        """What the page's scripts threw since the last call."""
        return self._do("errors")

    def _do(self, command: str, *args: Any) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps({"command": command, "args": args}), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the browser ended while it was asked to {command} {args}")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(f"{command}: {answer['error']}")
        return answer["value"]


def _program(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        raise Missing(f"there is no {name} on the PATH, which the browser tests need")
    return found


def _playwright() -> Path:
    """The folder that has playwright-core in its node_modules; fetched once, outside the repository."""
    cache = Path(os.environ.get("FEWSTEP_TEST_CACHE") or Path.home() / ".cache" / "fewstep")
    wanted = b"".join((HERE / name).read_bytes() for name in _LOCK)
    folder = cache / f"browser-{hashlib.sha256(wanted).hexdigest()[:8]}"
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".partial-") as name:
        partial = Path(name) / "done"
        partial.mkdir()
        for file in _LOCK:
            shutil.copy(HERE / file, partial)
        command = [_program("npm"), "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
        done = subprocess.run(command, cwd=partial, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise Unavailable(f"playwright-core could not be fetched: {done.stderr[-500:]}")
        try:
            os.rename(partial, folder)
        except OSError:
            if not folder.is_dir():  # else another test run was quicker
                raise
    return folder
