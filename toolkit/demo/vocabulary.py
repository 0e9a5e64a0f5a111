"""The demo's tokenizer files: a byte-level CLIP vocabulary learnt from the captions' words.

Byte-pair encoding on the word list until every word is one token; the 256 bytes, alone and at a word's end,
come first, so any other text tokenises too, byte by byte.
"""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

from .drawings import ATTRIBUTES

START, END = "<|startoftext|>", "<|endoftext|>"
LENGTH = 16
"""Tokens of a padded caption; the longest caption has 12."""


def caption_words() -> list[str]:
    """Every word of the captions, punctuation included, sorted."""
    return sorted({"a", "an", "on", "background", ","}.union(*ATTRIBUTES.values()))


def merges(words: list[str]) -> list[tuple[str, str]]:
    """Merge rules, in rank order, that make each of `words` one token; ties go to the first pair in order."""
    pieces = [[*word[:-1], word[-1] + "</w>"] for word in words]
    rules: list[tuple[str, str]] = []
    while any(len(piece) > 1 for piece in pieces):
        counts = Counter(pair for piece in pieces for pair in pairwise(piece))
        rule = min(counts, key=lambda pair: (-counts[pair], pair))
        pieces = [_merge(piece, rule) for piece in pieces]
        rules.append(rule)
    return rules


def write_tokenizer(folder: Path) -> None:
    """Write vocab.json, merges.txt and the two settings files that transformers' CLIPTokenizer reads."""
    rules = merges(caption_words())
    symbols = _byte_symbols()
    tokens = [
        *symbols,
        *(symbol + "</w>" for symbol in symbols),
        *("".join(rule) for rule in rules),
        START,
        END,
    ]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    lines = ["#version: 0.2", *(" ".join(rule) for rule in rules)]
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    settings = {
        **special,
        "model_max_length": LENGTH,
        "tokenizer_class": "CLIPTokenizer",
        "do_lower_case": True,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n", encoding="utf-8")


def _merge(piece: list[str], rule: tuple[str, str]) -> list[str]:
    """`piece` with every adjacent pair `rule` joined, from the left."""
    joined: list[str] = []
    for symbol in piece:
        if joined and (joined[-1], symbol) == rule:
            joined[-1] += symbol
        else:
            joined.append(symbol)
    return joined


def _byte_symbols() -> list[str]:
    """One printable character a byte, as CLIP maps them: printable Latin-1 as it is, the rest above 256."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + index) for index in range(len(hidden))]
