"""Textual inversions: vectors that stand for words, read from the files that trainers and hosts write."""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from ..diffusion.errors import BadInput
from ..runtime.files import load_tensors, sha256_of
from .checkpoint import Checkpoint
from .families import TextPart
from .prompting import Embedding, is_plain

COMFYUI_NAMES: Mapping[TextPart, str] = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}
"""By which a file for several text encoders tells them apart."""


def with_prompting(
    checkpoint: Checkpoint,
    *,
    embeddings: Iterable[str | Path] = (),
    clip_skip: int | None = None,
    cfg_rescale: float | None = None,
) -> Checkpoint:
    """The checkpoint used as its owner says; BadInput for what does not fit it. None: as it stands."""
    changes: dict[str, Any] = {}
    if clip_skip is not None:
        layers = min(
            int(checkpoint.config(of.part)["num_hidden_layers"]) + of.unused_layers
            for of in checkpoint.of.text_encoders
        )
        if not 1 <= clip_skip <= layers:
            raise BadInput(
                f"--clip-skip {clip_skip}: this model's text encoders have {layers} layers; expected 1 (the "
                f"last) to {layers}"
            )
        changes["clip_skip"] = clip_skip
    if cfg_rescale is not None:
        if not 0 <= cfg_rescale <= 1:
            raise BadInput(f"--cfg-rescale {cfg_rescale:g}: expected 0 (off) to 1, such as 0.7")
        changes["cfg_rescale"] = cfg_rescale
    read = [read_embedding(Path(file), checkpoint) for file in embeddings]
    names = [embedding.name.lower() for embedding in read]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise BadInput(
            f"--embedding: two files are called {twice}; rename one, for prompts know the name alone"
        )
    if read:
        changes["embeddings"] = tuple(read)
    return dataclasses.replace(checkpoint, **changes) if changes else checkpoint


def content_of_prompts(checkpoint: Checkpoint, prompts: Sequence[str]) -> dict[str, Any]:
    """What conditionings of these prompts depend on beside the prompts and the weights; nothing where all of
    them mean their words alone and the usual layer is read.
    """
    found: dict[str, Any] = {}
    usual = max(of.usual_clip_skip for of in checkpoint.of.text_encoders)
    if checkpoint.clip_skip > usual:
        found["clip_skip"] = checkpoint.clip_skip
    names = [embedding.name for embedding in checkpoint.embeddings]
    tokenizer = checkpoint.tokenizer()
    if not all(is_plain(prompt, tokenizer, room=checkpoint.room, names=names) for prompt in set(prompts)):
        found["prompting"] = 1
        found["embeddings"] = sorted((each.name, each.sha256) for each in checkpoint.embeddings)
    return found


def read_embedding(path: Path, checkpoint: Checkpoint) -> Embedding:
    """A textual inversion for a model's text encoders; BadInput for one of another family."""
    if not path.is_file():
        raise BadInput(f"{path}: no such file; --embedding expects a .safetensors or .pt file")
    if path.suffix.lower() not in (".safetensors", ".pt", ".bin"):
        raise BadInput(f"{path}: a textual inversion is a .safetensors or .pt file; take that one")
    content: Any = load_tensors(path) if path.suffix.lower() == ".safetensors" else _unpickled(path)
    found = [(name, value) for name, value in _tensors(content) if value.ndim in (1, 2) and value.numel()]
    vectors: dict[TextPart, Tensor] = {}
    for encoder in checkpoint.of.text_encoders:
        width = int(checkpoint.config(encoder.part)["hidden_size"])
        named = [value for name, value in found if name == COMFYUI_NAMES[encoder.part]]
        fitting = [value for value in named or [v for _, v in found] if value.shape[-1] == width]
        if not fitting:
            widths = " and ".join(sorted({str(value.shape[-1]) for _, value in found}, key=int))
            has = f"its vectors have {widths} numbers" if widths else "it holds no vectors"
            needs = " and ".join(
                str(checkpoint.config(of.part)["hidden_size"]) for of in checkpoint.of.text_encoders
            )
            raise BadInput(
                f"{path}: {has}, and the text encoders of this {checkpoint.of.name} model take {needs}; give "
                "a textual inversion that was made for this family"
            )
        taken = fitting if isinstance(content, list) else fitting[:1]
        vectors[encoder.part] = torch.cat([value.reshape(-1, width) for value in taken]).float()
    if not all(bool(value.isfinite().all()) for value in vectors.values()):
        raise BadInput(f"{path}: the vectors hold NaN or infinity; get the file anew")
    return Embedding(path.stem, sha256_of(path), vectors)


def _unpickled(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError):
        raise BadInput(
            f"{path}: damaged, or a pickle that wants to run code, which is refused; get the textual "
            "inversion as .safetensors"
        ) from None


def _tensors(content: Any) -> Iterable[tuple[str, Tensor]]:
    """The vectors' names and tensors: A1111 keeps them in string_to_param, others at the top or in a list."""
    if isinstance(content, list):
        for each in cast("list[Any]", content):
            yield from _tensors(each)
    elif isinstance(content, Mapping):
        values = cast("Mapping[Any, Any]", content)
        inner: Any = values.get("string_to_param", values)
        if isinstance(inner, Mapping):
            for name, value in cast("Mapping[Any, Any]", inner).items():
                if isinstance(value, Tensor) and value.is_floating_point():
                    yield str(name), value.detach()
