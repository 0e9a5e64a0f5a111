"""Prompts as ComfyUI reads them: weights, chunks of a text encoder's length, textual inversions.

``(words)`` weigh 1.1, ``((words))`` 1.1 squared, ``(words:1.3)`` exactly 1.3 wherever they stand; ``\\(`` and
``\\)`` are plain parentheses. A textual inversion is ``embedding:name`` at the start of a text or after a
space, as in ComfyUI, or the bare name as a word, as in A1111.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeAlias

from torch import Tensor

from ..diffusion.errors import BadInput
from ..diffusion.spec import AppliedEmbedding
from .families import TextPart

Token: TypeAlias = tuple[int | Tensor, float]
"""A word piece's number, or a vector (C,) in its place; and its weight."""

Chunk: TypeAlias = list[Token]
"""What stands between the start and the end mark of one run of a text encoder."""

KEPT_TOGETHER = 7
"""Tokens of a part, at most, that is rather moved to the next chunk than cut."""

_ESCAPES = {r"\(": "\0", r"\)": "\1"}
_UNESCAPED = str.maketrans({"\0": "(", "\1": ")"})


@dataclass(frozen=True, eq=False)
class Embedding:
    """A textual inversion: ``vectors`` (n, C) for each text encoder; the name is what prompts call it."""

    name: str
    sha256: str
    vectors: Mapping[TextPart, Tensor]

    @property
    def applied(self) -> AppliedEmbedding:
        return AppliedEmbedding(self.name, self.sha256)


def weighted(prompt: str) -> list[tuple[str, float]]:
    """The parts of a prompt in their order, each with its weight; BadInput for a weight that is no number."""
    hidden = re.sub(r"\\[()]", lambda match: _ESCAPES[match[0]], prompt)
    return [(text.translate(_UNESCAPED), weight) for text, weight in _weighted(hidden, 1.0)]


def _weighted(text: str, weight: float) -> Iterator[tuple[str, float]]:
    for part in _parts(text):
        if len(part) < 2 or part[0] != "(" or part[-1] != ")":
            yield part, weight
            continue
        words, colon, number = part[1:-1].rpartition(":")
        said = _number(number) if colon and words else None
        if said is None:
            yield from _weighted(part[1:-1], weight * 1.1)
        elif not math.isfinite(said):
            raise BadInput(f"prompt {part.translate(_UNESCAPED)!r}: expected a finite weight, such as 1.2")
        else:
            yield from _weighted(words, said)


def _parts(text: str) -> Iterator[str]:
    """The text cut before each parenthesis that opens the outermost level, and after each that closes it."""
    depth = start = 0
    for place, character in enumerate(text):
        cut = place
        if character == "(":
            depth += 1
            if depth != 1:
                continue
        elif character == ")":
            depth -= 1
            if depth != 0:
                continue
            cut = place + 1
        else:
            continue
        if cut > start:
            yield text[start:cut]
        start = cut
    if start < len(text):
        yield text[start:]


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def is_plain(prompt: str, tokenizer: Any, *, room: int, names: Sequence[str] = ()) -> bool:
    """Whether a prompt means its words alone: no weights, no textual inversions, no second chunk."""
    return (
        weighted(prompt) in ([], [(prompt, 1.0)])
        and all(name is None for _, name in _words(prompt, tuple(names)))
        and len(_numbers(prompt, tokenizer)) <= room
    )


def chunks_of(prompt: str, tokenizer: Any, *, room: int, vectors: Mapping[str, Tensor]) -> list[Chunk]:
    """A prompt's chunks of at most ``room`` tokens; ``vectors``: (n, C) by the names of textual inversions.

    BadInput for one that is named and not there.
    """
    chunks: list[Chunk] = [[]]
    for text, weight in weighted(prompt):
        for words, name in _words(text, tuple(vectors)):
            found = _numbers(words, tokenizer) if name is None else vectors[name]
            _append(chunks, [(token, weight) for token in found], room)
    return chunks


def _append(chunks: list[Chunk], part: Chunk, room: int) -> None:
    """Fill up the last chunk with a long part; a short one that does not fit begins a new chunk."""
    may_be_cut = len(part) > min(KEPT_TOGETHER, room)
    while part:
        free = room - len(chunks[-1])
        if len(part) <= free:
            chunks[-1].extend(part)
            return
        if may_be_cut:
            chunks[-1].extend(part[:free])
            part = part[free:]
        chunks.append([])


def _words(text: str, names: tuple[str, ...]) -> Iterator[tuple[str, str | None]]:
    """The text in pieces: words, and textual inversions with their name as ``names`` have it."""
    pattern, known = _references(names)
    place = 0
    while match := pattern.search(text, place):
        if match["asked"] is None:
            name, end = known[match[0].lower()], match.end()
        else:
            asked = match["asked"]
            asked = asked if asked.lower() in known else asked.rstrip(",")
            if asked.lower() not in known:
                have = f"those there are: {', '.join(names)}" if names else "there are none"
                raise BadInput(
                    f"the prompt names embedding:{asked}, and {have}; give its file as --embedding, or take "
                    "it out"
                )
            name, end = known[asked.lower()], match.start("asked") + len(asked)
        if match.start() > place:
            yield text[place : match.start()], None
        yield text[match.start() : end], name
        place = end
    if place < len(text):
        yield text[place:], None


@cache
def _references(names: tuple[str, ...]) -> tuple[re.Pattern[str], dict[str, str]]:
    """What finds textual inversions in a text, and their names by what may be written."""
    endings = ("", ".safetensors", ".pt", ".bin")
    known = {name.lower() + ending: name for name in names for ending in endings}
    bare = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))
    pattern = r"(?:\A|(?<=[ \n]))embedding:(?P<asked>\S+)"
    return re.compile(pattern + (rf"|(?<!\w)(?i:{bare})(?!\w)" if names else "")), known


def _numbers(text: str, tokenizer: Any) -> list[int]:
    """Of the text's word pieces, without start and end mark."""
    return list(tokenizer(text, verbose=False).input_ids)[1:-1]
