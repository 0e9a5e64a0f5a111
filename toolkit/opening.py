"""How commands open a model for people: the demo's words found by themselves, the device and the precision
chosen."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch

from . import cards
from .demo import INPAINT_TEACHER, TEACHER, TOKENIZER
from .diffusion.errors import BadInput
from .runtime.files import sha256_of
from .training.checkpoint import Checkpoint, open_checkpoint
from .training.embeddings import with_prompting
from .training.families import Override
from .training.networks import DTYPES
from .training.settings import SMALL_PARAMETERS

log = logging.getLogger("fewstep")


def open_for_people(
    path: Path,
    *,
    tokenizer: Path | str | None = None,
    text_encoder: Path | None = None,
    text_encoder_2: Path | None = None,
    vae: Path | None = None,
    override: Override | None = None,
) -> Checkpoint:
    """Open a teacher or student; the demo's own gets the demo's tokenizer unless another is given.

    Arguments as of :func:`.training.checkpoint.open_checkpoint`. For a small network torch is told to use one
    thread: on 2 cores the demo trained at 5 updates a second with one thread and at 2 with two.
    """
    opened = open_checkpoint(
        path,
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        text_encoder_2=text_encoder_2,
        vae=vae,
        override=override,
    )
    if opened.unet_parameters < SMALL_PARAMETERS:
        torch.set_num_threads(1)
    if tokenizer is None and is_demo(opened):
        return dataclasses.replace(opened, tokenizer_from=TOKENIZER)
    return opened


def add_parts(parser: argparse.ArgumentParser) -> None:
    """The options of every command that opens a checkpoint; :func:`parts_of` reads them."""
    add = parser.add_argument
    add("--tokenizer", metavar="DIR", help="folder with vocab.json and merges.txt, or hub to download it")
    add("--text-encoder", type=Path, metavar="FILE", help="for files without one")
    add("--text-encoder-2", type=Path, metavar="FILE", help="SDXL's second, for files without one")
    add("--vae", type=Path, metavar="FILE", help="another autoencoder")
    add("--override", metavar="NAME=VALUE,...", help=OVERRIDE_HELP)


def parts_of(asked: argparse.Namespace) -> dict[str, Any]:
    """Arguments for :func:`open_for_people`."""
    return {
        "tokenizer": asked.tokenizer,
        "text_encoder": asked.text_encoder,
        "text_encoder_2": asked.text_encoder_2,
        "vae": asked.vae,
        "override": Override.parse(asked.override),
    }


def add_prompting(parser: argparse.ArgumentParser) -> None:
    """The options of how prompts are read; :func:`prompted` takes them."""
    add = parser.add_argument
    add(
        "--embedding",
        action="append",
        default=[],
        metavar="FILE",
        help="a textual inversion, which prompts name as embedding:NAME or NAME; repeatable",
    )
    add("--clip-skip", type=int, metavar="K", help="CLIP layer from the end; default: the model's own")
    add("--cfg-rescale", type=float, metavar="PHI", help="rescaled guidance of a teacher, 0 to 1")


def prompted(checkpoint: Checkpoint, asked: argparse.Namespace) -> Checkpoint:
    """The model with the options of :func:`add_prompting`; what goes against a student's own is refused, or
    warned of.
    """
    spec = checkpoint.spec
    if spec is not None and asked.cfg_rescale not in (None, spec.cfg_rescale):
        raise BadInput(
            f"{checkpoint.path.name}: --cfg-rescale {asked.cfg_rescale:g} was asked for, but a student's is "
            f"distilled in, and this one's is {spec.cfg_rescale:g}; leave it out"
        )
    used = with_prompting(
        checkpoint,
        embeddings=asked.embedding,
        clip_skip=asked.clip_skip,
        cfg_rescale=asked.cfg_rescale if spec is None else None,
    )
    if spec is not None and used.clip_skip != spec.clip_skip:
        log.warning("%s was trained with clip skip %d", checkpoint.path.name, spec.clip_skip)
    return used


OVERRIDE_HELP = (
    "what no key of the checkpoint tells, or tells wrongly: family=sd1|sd2|sdxl, "
    "prediction_type=epsilon|v_prediction, ztsnr=true|false"
)


def is_demo(checkpoint: Checkpoint) -> bool:
    """Whether this is a teacher of the demo's, by content, or a student of one, by its spec."""
    stored = [file for file in (TEACHER, INPAINT_TEACHER) if file.exists()]
    if checkpoint.spec is not None:
        return any(checkpoint.spec.teacher_sha256 == _sha256(file) for file in stored)
    path = checkpoint.path
    return path.is_file() and any(
        path.stat().st_size == file.stat().st_size and sha256_of(path) == _sha256(file) for file in stored
    )


def choose_device(name: str | None) -> torch.device:
    """The device of that name, or the best one that is there; BadInput if it cannot be used."""
    if name is None:
        if torch.cuda.is_available():
            return torch.device("cuda")
        say_unused_card()
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError):
        raise BadInput(f"device {name!r} cannot be used here; try --device cpu") from None


@cache
def say_unused_card() -> None:
    """Warn, once, of an NVIDIA card beside a torch that was built for none."""
    built_for = torch.version.cuda or torch.version.hip or getattr(torch.version, "xpu", None)
    told = "" if built_for else cards.ask()
    sentence = cards.mending(told, torch=torch.__version__, computes=bool(built_for), python=sys.executable)
    if sentence:
        log.warning("%s", sentence)


def choose_dtype(precision: str | None, device: torch.device) -> torch.dtype:
    """The dtype of a precision's name; where none is given, fp16 on a GPU and fp32 elsewhere."""
    return DTYPES[precision or ("fp16" if device.type == "cuda" else "fp32")]


@cache
def _sha256(path: Path) -> str:
    return sha256_of(path)
