"""What a person shares does not tell where it lay: paths are cut to their last name, homes to ``~``."""

from __future__ import annotations

import re

_ROOT = r"(?:file:|[A-Za-z]:|~[\w.-]*|\.{1,2})?[/\\]{1,3}"
_NAME = r"[^/\\\n,;\"'<>|]"
_PATH = re.compile(rf"(?<![\w.:/\\~]){_ROOT}(?:{_NAME}+[/\\]+)+[^\s/\\,;\"'<>|)]*")
_HOME = re.compile(r"[/\\](?:home|users)[/\\]+[^/\\]+$", re.IGNORECASE)


def without_paths(text: str) -> str:
    """Running text with every absolute or climbing path cut; URLs and fractions stay.

    A folder's name may hold spaces, so that what follows a path up to a slash is taken for part of it.
    """
    return _PATH.sub(lambda found: _last_name(found[0]), text)


def file_name(word: str) -> str:
    """One word of a command line, its value without folders: ``--out=C:\\runs\\a`` -> ``--out=a``."""
    option, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
    is_rooted = re.match(_ROOT, value) is not None
    is_prose = re.search(r"\s[/\\]|[/\\]\s", value) is not None
    return option + equals + (_last_name(value) if is_rooted or not is_prose else value)


def _last_name(path: str) -> str:
    path = path.rstrip("/\\")
    return "~" if _HOME.search(path) else re.split(r"[/\\]", path)[-1]
