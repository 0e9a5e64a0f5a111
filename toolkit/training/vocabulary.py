"""CLIP's vocabulary, found without a network: 49,408 tokens that checkpoint files do not carry.

In order: the path that was given; the checkpoint folder's own, or the copy of the host around it; those of
the teacher, for a student in its run's folder; the host's, when this repository sits in ComfyUI's
``custom_nodes``; a package that carries OpenAI's BPE file, installed here or in that host's environment; the
hub, only when asked for.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..diffusion.errors import BadInput
from .settings import trained_on

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

HUB = "openai/clip-vit-large-patch14"
MERGES = 49_152 - 256 - 2
"""Merge rules of CLIP's that are used, of the more that OpenAI's file lists."""

_HOSTS = (
    "comfy/sd1_tokenizer",
    "backend/huggingface/runwayml/stable-diffusion-v1-5/tokenizer",  # Forge
    "ldm_patched/modules/sd1_tokenizer",  # reForge
)
_ENVIRONMENTS = (
    "venv/Lib/site-packages",
    "venv/lib/python3.*/site-packages",
    "system/python/Lib/site-packages",  # of A1111's package for Windows
)

_START, _END = "<|startoftext|>", "<|endoftext|>"
_BPE_NAME = "bpe_simple_vocab_16e6.txt.gz"
_HOW = (
    "no CLIP vocabulary was found on this machine; `pip install --no-deps open_clip_torch` brings one "
    "(1.5 MB), or give the folder with vocab.json and merges.txt as --tokenizer, or --tokenizer hub to "
    "download it"
)


def load_tokenizer(
    given: Path | Literal["hub"] | None,
    *,
    beside: Path | None = None,
    length: int = 77,
    folder: str = "tokenizer",
) -> CLIPTokenizer:
    """The tokenizer for a text encoder of ``length`` positions; ``beside``: the checkpoint's path, with the
    tokenizer in a ``folder`` of that name.

    BadInput if there is none, or if the one that was given cannot be read.
    """
    if given == "hub":
        return _from_hub(length)
    if given is not None:
        return _from_path(given, folder, length)
    for found in _folders(beside, folder):
        if _is_tokenizer(found):
            return _from_folder(found, length)
    for text in _installed_bpe(beside):
        return _from_bpe(text, length)
    raise BadInput(_HOW)


def save_tokenizer(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Write a tokenizer folder for transformers 4 and 5: tokenizer.json, vocab.json and merges.txt."""
    tokenizer.save_pretrained(str(folder))
    if not _is_tokenizer(folder):
        model: dict[str, Any] = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
        rules = [rule if isinstance(rule, str) else " ".join(rule) for rule in model["merges"]]
        _write_tokenizer(folder, model["vocab"], rules)


def _folders(beside: Path | None, folder: str) -> Iterator[Path]:
    """Where a tokenizer folder may stand: within or next to the checkpoint or its teacher, and in the host
    around them or around us."""
    for checkpoint in _checkpoints(beside):
        for name in dict.fromkeys((folder, "tokenizer")):
            yield (checkpoint if checkpoint.is_dir() else checkpoint.parent) / name
        for parent in checkpoint.absolute().parents:
            yield from (parent / place for place in _HOSTS)
    for parent in Path(__file__).parents:
        if parent.name == "custom_nodes":
            yield parent.parent / "comfy" / "sd1_tokenizer"


def _checkpoints(beside: Path | None) -> list[Path]:
    """A checkpoint, and of a student its teacher."""
    return [path for path in (beside, beside and trained_on(beside)) if path is not None]


def _installed_bpe(beside: Path | None) -> Iterator[str]:
    """OpenAI's BPE file from installed packages, which are located but not imported.

    instant_clip_tokenizer holds it as plain text inside its compiled module.
    """
    parents = [parent for checkpoint in _checkpoints(beside) for parent in checkpoint.absolute().parents]
    of_host = (
        found
        for parent in parents
        for place in _ENVIRONMENTS
        for found in sorted(parent.glob(f"{place}/open_clip"))
    )
    for folder in (*_package_folders("open_clip", "clip"), *of_host):
        if (file := folder / _BPE_NAME).is_file():
            yield gzip.decompress(file.read_bytes()).decode()
    for folder in _package_folders("instant_clip_tokenizer"):
        for file in (*folder.glob("*.so"), *folder.glob("*.pyd")):
            _, start, rest = file.read_bytes().partition(b"#version: 0.2\n")
            if start:
                yield "\n" + b"\n".join(rest.split(b"\n", MERGES)[:MERGES]).decode()


def _package_folders(*packages: str) -> Iterator[Path]:
    for package in packages:
        found = importlib.util.find_spec(package)
        for folder in (found.submodule_search_locations or ()) if found else ():
            yield Path(folder)


def _is_tokenizer(folder: Path) -> bool:
    return (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file()


def _from_path(given: Path, folder: str, length: int) -> CLIPTokenizer:
    if given.is_file() and given.name.endswith(".txt.gz"):
        try:
            return _from_bpe(gzip.decompress(given.read_bytes()).decode(), length)
        except (OSError, EOFError, UnicodeDecodeError):
            raise BadInput(f"{given}: this is no BPE vocabulary such as {_BPE_NAME}") from None
    for place in (given, given / folder, given / "tokenizer"):
        if _is_tokenizer(place):
            return _from_folder(place, length)
    raise BadInput(f"{given}: a tokenizer folder with vocab.json and merges.txt was expected")


def _from_folder(folder: Path, length: int) -> CLIPTokenizer:
    _check_folder(folder)
    from transformers import CLIPTokenizer

    try:
        return CLIPTokenizer.from_pretrained(str(folder), local_files_only=True, model_max_length=length)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{folder}: the tokenizer cannot be read ({error})") from None


def _check_folder(folder: Path) -> None:
    """BadInput for damaged files, about which the tokenizers library raises bare exceptions."""
    try:
        vocabulary: Any = json.loads((folder / "vocab.json").read_text(encoding="utf-8-sig"))
        lines = (folder / "merges.txt").read_text(encoding="utf-8-sig").split("\n")
    except (OSError, ValueError) as error:
        raise BadInput(f"{folder}: the tokenizer's files cannot be read ({error})") from None
    rules = [line for line in lines if line and not line.startswith("#version")]
    if not isinstance(vocabulary, dict):
        raise BadInput(f"{folder / 'vocab.json'}: a JSON object was expected")
    for rule in rules:
        if rule.count(" ") != 1 or rule.replace(" ", "") not in vocabulary:
            raise BadInput(f"{folder / 'vocab.json'}: the vocabulary lacks the merged pair {rule!r}")


def _from_hub(length: int) -> CLIPTokenizer:
    from transformers import CLIPTokenizer

    try:
        return CLIPTokenizer.from_pretrained(HUB, model_max_length=length)
    except (OSError, ValueError) as error:
        raise BadInput(f"{HUB} could not be downloaded ({type(error).__name__}); {_HOW}") from None


def _from_bpe(text: str, length: int) -> CLIPTokenizer:
    """From OpenAI's file: bytes, bytes that end a word, merged pairs by rank, start, end."""
    rules = [line for line in text.split("\n")[1 : MERGES + 1] if line]
    symbols = byte_symbols()
    tokens = [*symbols, *(symbol + "</w>" for symbol in symbols), *(rule.replace(" ", "") for rule in rules)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write_tokenizer(folder, {token: index for index, token in enumerate([*tokens, _START, _END])}, rules)
        settings = {"bos_token": _START, "eos_token": _END, "unk_token": _END, "pad_token": _END}
        _write(folder / "tokenizer_config.json", json.dumps(settings))
        return _from_folder(folder, length)


def _write_tokenizer(folder: Path, vocabulary: Mapping[str, int], rules: Sequence[str]) -> None:
    _write(folder / "vocab.json", json.dumps(vocabulary, ensure_ascii=False))
    _write(folder / "merges.txt", "\n".join(["#version: 0.2", *rules, ""]))


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")  # the same bytes on Windows


def byte_symbols() -> list[str]:
    """One visible character for each byte, in the vocabulary's order: printable ones first, as themselves."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(byte) for byte in visible] + [chr(256 + n) for n in range(256 - len(visible))]
