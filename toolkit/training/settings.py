"""The settings of a run: from flags, a TOML file and the family's defaults, each with the reason for its
value.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ..diffusion.errors import BadInput
from .prompts import read_text

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SMALL_PARAMETERS = 20_000_000
"""Below this many parameters the rates of the demo hold; above it those of real checkpoints."""
OWN = "dpmpp_2m:25"
"""The sampler and steps that many people use."""


@dataclass(frozen=True)
class Settings:
    """A resolved run; every field but the last is an option of ``toolkit.distill`` with the same name.

    Guidance in guidance_scale; ``resolution`` in pixels is "WIDTHxHEIGHT", or one side for several sizes of
    as many pixels; ``updates`` one number a phase.
    """

    ckpt: str | None
    init: str | None
    demo: bool
    out: str
    method: str
    steps: int
    sampler: str
    student: str
    rank: int | None
    guidance: tuple[float, float]
    guidance_default: float
    negative: str
    embedding: tuple[str, ...]
    clip_skip: int | None
    cfg_rescale: float
    lora: tuple[str, ...]
    with_lora: tuple[str, ...]
    data: str | None
    flip: bool
    prompts: str | None
    prompt_style: str | None
    long_prompts: float
    pictures: int
    resolution: str
    batch_size: int
    micro_batch: int
    updates: tuple[int, ...]
    lr: float
    warmup: int
    clip: float
    ema: float
    optimizer: str
    averages: str
    memory_format: str
    compile: bool
    trajectory_share: float
    caption_dropout: float | None
    seed: int
    precision: str
    device: str
    dtype: str
    report_prompts: int
    own: str
    cache_dir: str
    cache_gb: float | None
    tokenizer: str | None
    text_encoder: str | None
    text_encoder_2: str | None
    vae: str | None
    override: str | None
    method_config: dict[str, Any]

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels of the pictures that are shown, and of most that are learned from."""
        return parse_resolution(self.resolution)


@dataclass(frozen=True)
class Defaults:
    """What a run takes where nothing was said, and where the values come from."""

    values: Mapping[str, Any]
    source: str


EVERYWHERE = Defaults(
    dict(
        method="progressive",
        steps=4,
        sampler="deterministic",
        guidance=(1.0, 15.0),
        negative="",
        embedding=(),
        cfg_rescale=0.0,
        long_prompts=0.0,
        lora=(),
        with_lora=(),
        flip=False,
        trajectory_share=0.5,
        seed=0,
        cache_dir="runs/cache",
        warmup=100,
        clip=1.0,
        optimizer="adamw",
        memory_format="contiguous",
        compile=False,
        own=OWN,
    ),
    "the house",
)
LARGE = Defaults(
    dict(lr=1e-5, batch_size=16, micro_batch=1, ema=0.999, pictures=2048, dtype="fp16"),
    "a start for Stable Diffusion, not measured on real weights",
)
SMALL = Defaults(
    dict(lr=4e-4, batch_size=32, micro_batch=32, ema=0.99, pictures=4096, dtype="fp32"),
    f"measured on the demo teacher, for networks under {SMALL_PARAMETERS // 1_000_000} M parameters",
)
LORA_LARGE = Defaults(
    dict(lr=1e-4, rank=64), "a start for LoRAs of Stable Diffusion, not measured on real weights"
)
LORA_SMALL = Defaults(
    dict(lr=2e-3, rank=32), "tried on the demo teacher, where ranks were compared and rates were not"
)
DEMO = Defaults(
    dict(
        steps=2,
        guidance=(1.0, 8.0),
        guidance_default=4.0,
        origin="pair",
        pictures=1536,
        updates=(700,),
        trajectory_share=0.8,
    ),
    "the demo",
)


@dataclass(frozen=True)
class Resolved:
    """``values`` by option name, and for each the reason of its value ("you", or a default's source)."""

    values: dict[str, Any]
    reasons: dict[str, str]


def resolve(
    given: Mapping[str, Any],
    config: Mapping[str, Any],
    *,
    parameters: int,
    demo: bool,
    student: str,
    earlier: Mapping[str, Any] | None = None,
    preset: Defaults | None = None,
) -> Resolved:
    """Flags over the config file, over what an ``earlier`` student did, over the ``preset``, over the
    defaults of the demo, of LoRAs, of the network's size, and of the house.
    """
    small = parameters < SMALL_PARAMETERS
    layers = [
        Defaults(given, "you"),
        Defaults(config, "the config file"),
        Defaults(earlier or {}, "the student of --init"),
        *([preset] if preset else []),
        *([DEMO] if demo else []),
        *([LORA_SMALL if small else LORA_LARGE] if student == "lora" else []),
        SMALL if small else LARGE,
        EVERYWHERE,
    ]
    values: dict[str, Any] = {}
    reasons: dict[str, str] = {}
    for layer in layers:
        for name, value in layer.values.items():
            if name not in values:
                values[name], reasons[name] = value, layer.source
    return Resolved(values, reasons)


def phase_updates(given: Sequence[int] | None, names: Sequence[str], *, small: bool) -> tuple[int, ...]:
    """Updates of each phase: one number for all, one a phase, or by the phases and the network's size."""
    if given:
        if len(given) not in (1, len(names)):
            raise BadInput(
                f"--updates has {len(given)} numbers, but this run has {len(names)} phases "
                f"({', '.join(names)}); give one number for all, or one a phase"
            )
        if min(given) < 1:
            raise BadInput(f"--updates {min(given)}: every phase needs at least 1 update")
        return tuple(given) * (len(names) // len(given))
    return tuple(_default_updates(name, small=small) for name in names)


def _default_updates(name: str, *, small: bool) -> int:
    if name == "guided":
        return 1500 if small else 3000
    if name.startswith("sharpen"):
        return 600 if small else 2000
    last_folds = name.endswith(("fold-2", "fold-1"))
    return (800 if last_folds else 600) if small else (4000 if last_folds else 2000)


def parse_resolution(text: str) -> tuple[int, int]:
    """ "512" or "512x768" -> (width, height)."""
    try:
        numbers = [int(part) for part in str(text).lower().split("x")]
    except ValueError:
        numbers = []
    if len(numbers) not in (1, 2) or min(numbers) < 1:
        raise BadInput(f"--resolution {text}: expected one number or WIDTHxHEIGHT in pixels, such as 512x768")
    return numbers[0], numbers[-1]


def read_config(path: Path, known: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a TOML file; ``known``: the type of each option, named as on the command line, with -
    or _.
    """
    try:
        values = tomllib.loads(read_text(path))
    except tomllib.TOMLDecodeError as error:
        raise BadInput(f"{path}: not a TOML file ({error}); see --help for the keys") from None
    named = {key.replace("-", "_"): value for key, value in values.items()}
    if unknown := sorted(set(named) - set(known)):
        raise BadInput(f"{path}: unknown key {', '.join(unknown)}; known are {', '.join(sorted(known))}")
    for name, value in named.items():
        if not _is_of_kind(value, known[name]):
            raise BadInput(
                f"{path}: {name} = {json.dumps(value)}; expected {_KIND_WORDS.get(known[name], 'text')}"
            )
    return named


_KIND_WORDS: dict[Any, str] = {
    int: "a whole number",
    int | None: "a whole number",
    float: "a number",
    float | None: "a number",
    bool: "true or false",
    tuple[int, ...]: "a list of whole numbers",
    tuple[str, ...]: "a list of texts",
    tuple[float, float]: "a list of two numbers",
}


def _is_of_kind(value: Any, kind: Any) -> bool:
    """Whether a TOML value can stand for an option of this type; everything but numbers and lists is text."""
    if kind is bool:
        return isinstance(value, bool)
    if kind in (int, int | None):
        return isinstance(value, int) and not isinstance(value, bool)
    if kind in (float, float | None):
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind == tuple[int, ...]:
        return isinstance(value, list) and all(_is_of_kind(item, int) for item in value)
    if kind == tuple[str, ...]:
        return isinstance(value, list) and all(isinstance(item, str) for item in value)
    if kind == tuple[float, float]:
        return isinstance(value, list) and len(value) == 2 and all(_is_of_kind(item, float) for item in value)
    return isinstance(value, str)


def trained_on(student: Path) -> Path | None:
    """The checkpoint that the run named in whose folder a student lies; None where it lies elsewhere."""
    for folder in student.absolute().parents[:2]:
        with suppress(OSError, BadInput, tomllib.TOMLDecodeError):
            named = tomllib.loads(read_text(folder / "config.toml")).get("ckpt")
            return Path(named) if isinstance(named, str) else None
    return None


def to_toml(settings: Settings) -> str:
    """The resolved run as flat TOML, as ``--config`` reads it; None is left out."""
    values = {f.name: getattr(settings, f.name) for f in fields(settings) if f.name != "method_config"}
    values.update(settings.method_config)
    return "".join(f"{name} = {json.dumps(value)}\n" for name, value in values.items() if value is not None)
