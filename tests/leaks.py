"""Looks for a machine's paths and user names in what was written to be shared."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path


def leaks(files: Iterable[Path], *secrets: str) -> list[str]:
    """Each file that holds one of the words, as UTF-8, in JSON's or in Windows' spelling."""
    words = {
        spelling.lower()
        for secret in secrets
        for text in (secret, json.dumps(secret)[1:-1], secret.replace("/", "\\"))
        for spelling in (text.encode(), text.encode("utf-16-le"))
    }
    found: list[str] = []
    for file in files:
        content = file.read_bytes().lower()
        found += [f"{file.name}: {word!r}" for word in sorted(words) if word in content]
    return found
