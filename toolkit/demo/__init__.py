"""The embedded demo: a small teacher in Stable Diffusion's own file layout, and its programmatic judge.

Importing this package needs the standard library only; it holds the paths of the stored files.
"""

from __future__ import annotations

from pathlib import Path

_HERE = Path(__file__).resolve().parent

TEACHER = _HERE / "teacher.safetensors"
"""Autoencoder, text encoder and U-Net, fp16, in SD1's single-file key layout."""

INPAINT_TEACHER = _HERE / "inpaint-teacher.safetensors"
"""The same with a U-Net of nine input channels, for inpainting; whole, so that any program opens it alone."""

TOKENIZER = _HERE / "tokenizer"
"""Folder of vocab.json and merges.txt, as transformers' CLIPTokenizer reads them."""

JUDGE = _HERE / "judge.safetensors"
"""Weights of `judge.Judge`."""
