"""What every command shares: one sentence for bad input, exit codes, logging, ``--json``."""

from __future__ import annotations

import io
import json
import logging
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from .diffusion.errors import BadInput

DONE, BAD_INPUT, INTERRUPTED = 0, 2, 130


def run(main: Callable[[], int | None]) -> NoReturn:
    """Run a command's main and exit: 0 done, 2 bad input (one sentence on stderr), 130 interrupted,
    resumable.
    """
    speak_any_console()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        sys.exit(main() or DONE)
    except BadInput as error:
        print(f"{error}", file=sys.stderr)
        sys.exit(BAD_INPUT)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)


def speak_any_console() -> None:
    """What the console's encoding lacks (Windows: cp1252, of a pipe or a file) is written as an escape."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def print_json(value: Any) -> None:
    """The machine-readable answer of a command, alone on stdout."""
    print(json.dumps(value, indent=2, sort_keys=True, default=str))
