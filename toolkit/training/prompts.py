"""Prompts for runs without data: a person's own file, or sentences put together here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from ..diffusion.errors import BadInput

_SUBJECTS = (
    "an old fisherman",
    "a young woman with freckles",
    "a child reading a book",
    "a street musician",
    "a dancer",
    "a tabby cat",
    "a border collie",
    "a red fox",
    "an owl",
    "a horse",
    "a humpback whale",
    "a bouquet of peonies",
    "a bowl of ramen",
    "a stack of pancakes",
    "a vintage motorcycle",
    "a sailing ship",
    "a steam locomotive",
    "a wooden cabin",
    "a gothic cathedral",
    "a lighthouse",
    "a mountain lake",
    "a winding forest path",
    "a desert",
    "a rainy city street",
    "a harbour town",
    "a market square",
    "a robot",
    "a knight in armour",
    "an astronaut",
    "a dragon",
    "a castle on a cliff",
    "a glass teapot",
    "a mechanical watch",
    "a library",
    "a greenhouse",
)
_SETTINGS = (
    "at sunrise",
    "in the fog",
    "in heavy rain",
    "under a starry sky",
    "in autumn",
    "in deep snow",
    "by the sea",
    "in a sunlit room",
    "by candlelight",
    "in front of a plain grey wall",
    "in a busy crowd",
    "seen from above",
    "close up",
    "in the distance",
    "at noon",
    "at night under neon lights",
)
_STYLES = (
    "a photograph of {}",
    "a 35mm film photograph of {}",
    "an oil painting of {}",
    "a watercolour of {}",
    "a detailed pencil drawing of {}",
    "a digital illustration of {}",
    "an anime key visual of {}",
    "a 3d render of {}",
    "a black and white photograph of {}",
    "a woodcut print of {}",
)


def built_in_prompts(count: int, *, seed: int) -> list[str]:
    """``count`` sentences: a style, a subject and a setting each, drawn with the seed."""
    generator = torch.Generator().manual_seed(seed)

    def pick(words: tuple[str, ...]) -> str:
        return words[int(torch.randint(len(words), (1,), generator=generator))]

    return [pick(_STYLES).format(f"{pick(_SUBJECTS)} {pick(_SETTINGS)}") for _ in range(count)]


def with_triggers(prompts: Sequence[str], triggers: Sequence[str]) -> list[str]:
    """The prompts, every second one with the trigger words before it: a LoRA is used with and without."""
    words = ", ".join(triggers)
    return [f"{words}, {prompt}" if words and row % 2 == 0 else prompt for row, prompt in enumerate(prompts)]


def read_prompts(path: Path) -> list[str]:
    """The non-empty lines of a text file (UTF-8 or UTF-16 with a byte order mark, else UTF-8)."""
    prompts = [line.strip() for line in read_text(path).splitlines() if line.strip()]
    if not prompts:
        raise BadInput(f"{path}: no prompts found; expected a text file with one prompt a line")
    return prompts


def read_text(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror}); give a readable text file") from None
    encoding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        return data.decode(encoding)
    except UnicodeDecodeError:
        raise BadInput(f"{path}: not text in UTF-8 or UTF-16; save it as UTF-8") from None
