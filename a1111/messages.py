"""What a person is told: in the comments under the picture, and in the log."""

from __future__ import annotations

import logging
from typing import Any

_log = logging.getLogger("fewstep")
_said: set[str] = set()


def tell(p: Any, text: str) -> None:
    """A warning, under the picture that it is about."""
    if f"FewStep: {text}" not in p.comments:
        _log.warning("FewStep: %s", text)
        p.comment(f"FewStep: {text}")


def tell_once(p: Any, text: str) -> None:
    """What is as it should be, and worth knowing: under the first picture only."""
    if text not in _said:
        _said.add(text)
        tell(p, text)
