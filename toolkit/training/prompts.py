"""Prompts for runs without data: a person's own file, or such as are put together here, in the style that the
checkpoint was trained on: sentences, or the tags of anime checkpoints.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

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

_PEOPLE = ("1girl, solo", "1boy, solo", "2girls", "1girl, 1boy", "1girl, solo", "multiple girls", "no humans")
_TAGS = (
    (
        *("long hair", "short hair", "black hair", "blonde hair", "brown hair", "silver hair", "pink hair"),
        *("blue hair", "twintails", "ponytail", "braid", "ahoge", "blue eyes", "red eyes", "green eyes"),
        *("purple eyes", "hair ribbon", "glasses", "hat", "animal ears", "freckles"),
    ),
    (
        *("school uniform", "kimono", "white dress", "hoodie", "armor", "maid", "suit", "jacket", "sweater"),
        *("scarf", "apron", "yukata", "cape", "overalls", "witch hat", "military uniform"),
    ),
    (
        *("smile", "open mouth", "closed eyes", "looking at viewer", "looking back", "sitting", "standing"),
        *("walking", "running", "reading", "holding sword", "holding umbrella", "playing guitar", "eating"),
        *("upper body", "full body", "portrait", "from side", "from above", "wide shot"),
    ),
)
_SCENERY = (
    *(
        "scenery, mountain, lake",
        "scenery, city, skyline",
        "cat, window",
        "dragon, flying, sky",
        "still life",
    ),
    *("forest, river", "spaceship, space, stars", "castle, cliff", "bird, branch", "mecha, ruins", "train"),
)
_PLACES = (
    *("outdoors, blue sky, cloud", "night, starry sky", "indoors, window, sunlight", "simple background"),
    *("white background", "cherry blossoms, petals", "beach, ocean", "city lights, rain", "snow, winter"),
    *("classroom", "library, bookshelf", "cafe, table, cup", "flower field", "sunset, backlighting"),
    *("street, lamppost", "kitchen", "train interior", "shrine, torii", "autumn leaves", "fireworks, night"),
)
_QUALITIES = ("masterpiece, best quality, ", "best quality, ", "", "")

Style = Literal["sentences", "tags"]
STYLES: tuple[Style, ...] = ("sentences", "tags")

_ANIME = (
    *("anime", "animagine", "anything", "noob", "illustrious", "pony", "waifu", "novelai", "niji"),
    *("counterfeit", "abyssorange", "meinamix", "kohaku", "autismmix", "hassaku", "wai"),
)
"""Words in the names of checkpoints that were trained on tags."""


def style_of(name: str) -> Style:
    """The style of prompts that a checkpoint of this name was trained on, as far as the name tells."""
    words = re.findall("[a-z]+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower())
    known = any(word == anime or (len(anime) > 3 and anime in word) for word in words for anime in _ANIME)
    return "tags" if known else "sentences"


def built_in_prompts(count: int, *, seed: int, style: Style = "sentences") -> list[str]:
    """``count`` prompts in a style, drawn with the seed."""
    generator = torch.Generator().manual_seed(seed)

    def pick(words: tuple[str, ...]) -> str:
        return words[int(torch.randint(len(words), (1,), generator=generator))]

    make = _sentence if style == "sentences" else _tags
    return [make(pick) for _ in range(count)]


def _sentence(pick: Callable[[tuple[str, ...]], str]) -> str:
    """A style, a subject and a setting."""
    return pick(_STYLES).format(f"{pick(_SUBJECTS)} {pick(_SETTINGS)}")


def _tags(pick: Callable[[tuple[str, ...]], str]) -> str:
    """Who, what they look like, wear and do, and where; or a scene without people. Half begin with praise."""
    praise, people, place = pick(_QUALITIES), pick(_PEOPLE), pick(_PLACES)
    if people == "no humans":
        return f"{praise}{people}, {pick(_SCENERY)}, {place}"
    return praise + ", ".join([people, *(pick(tags) for tags in _TAGS), place])


def with_triggers(prompts: Sequence[str], triggers: Sequence[str]) -> list[str]:
    """The prompts, every second one with the trigger words before it: a LoRA is used with and without."""
    words = ", ".join(triggers)
    return [f"{words}, {prompt}" if words and row % 2 == 0 else prompt for row, prompt in enumerate(prompts)]


def with_long_ones(
    prompts: Sequence[str], share: float, *, tokens: Callable[[str], int], room: int, seed: int
) -> list[str]:
    """The prompts, about a ``share`` of them joined with others until they fill one or two chunks of ``room``
    tokens and begin another.
    """
    generator = torch.Generator().manual_seed(seed)
    made: list[str] = []
    for prompt in prompts:
        if float(torch.rand((), generator=generator)) < share:
            filled = room * int(torch.randint(1, 3, (), generator=generator))
            while tokens(prompt) <= filled:
                prompt += f", {prompts[int(torch.randint(len(prompts), (), generator=generator))]}"
        made.append(prompt)
    return made


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
    return decode_text(data, str(path))


def encoding_of(data: bytes) -> str:
    """UTF-16 with a byte order mark, as PowerShell writes; else UTF-8, with or without one."""
    return "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"


def decode_text(data: bytes, name: str) -> str:
    """Of a file's content; an error calls it ``name``."""
    try:
        return data.decode(encoding_of(data))
    except UnicodeDecodeError:
        raise BadInput(f"{name}: not text in UTF-8 or UTF-16; save it as UTF-8") from None
