"""Picture files as tensors: turned as their EXIF says, transparency on white, scaled to cover and cropped."""

from __future__ import annotations

import struct
import zlib
from io import BytesIO
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..diffusion.errors import BadInput
from .sizes import Size

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
"""Of the files that are taken for pictures."""

DAMAGED = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)
"""What Pillow raises at files that are no pictures, or not whole."""

_ORIENTATION, _LYING = 0x0112, (5, 6, 7, 8)
"""EXIF's tag of the orientation, and its values that exchange width and height."""


def load_picture(path: Path, width: int, height: int) -> Tensor:
    """(3, height, width) in [0, 1], scaled to cover and cropped at the centre; BadInput if it cannot be
    read.
    """
    return fitted(decoded(_bytes(path), path.name), (width, height))


def load_grey(path: Path) -> Tensor:
    """(1, H, W) in [0, 1], a picture's lightness as it is; BadInput if it cannot be read, or hides some."""
    image = _upright(_bytes(path), path.name)
    if image.convert("RGBA").getchannel("A").getextrema() != (255, 255):
        raise BadInput(f"{path.name}: parts of it are transparent; give a mask in black and white")
    return _tensor(image.convert("L"))


def picture_size(path: Path) -> Size:
    """(width, height) of a file, turned as :func:`load_picture` turns it; BadInput if it cannot be read."""
    return seen_size(_bytes(path), path.name)


def size_in_cells(path: Path, cell: int) -> Size:
    """:func:`picture_size`, rounded down to whole latent cells of ``cell`` pixels, one at least."""
    width, height = picture_size(path)
    return max(width // cell, 1) * cell, max(height // cell, 1) * cell


def decoded(data: bytes, name: str) -> Image.Image:
    """In RGB; BadInput for what is no picture, or a damaged one."""
    image = _upright(data, name)
    if "transparency" in image.info or image.mode in ("RGBA", "RGBa", "LA", "La", "PA"):
        clear = image.convert("RGBA")
        image = Image.new("RGBA", clear.size, "white")
        image.alpha_composite(clear)
    return image.convert("RGB")


def seen_size(data: bytes, name: str) -> Size:
    """(width, height) of :func:`decoded`, from the header alone; BadInput for what has none."""
    try:
        with Image.open(BytesIO(data)) as opened:
            # Not getexif(), which decodes the whole of a PNG that has none.
            exif = Image.Exif()
            exif.load(opened.info.get("exif") or b"")
            lying = exif.get(_ORIENTATION) in _LYING
            return (opened.height, opened.width) if lying else opened.size
    except DAMAGED:
        raise _no_picture(name) from None


def fitted(image: Image.Image, size: Size) -> Tensor:
    """(3, height, width) in [0, 1], scaled to cover ``size`` and cropped at the centre."""
    image = image.resize(_covering(image.size, size), Image.Resampling.LANCZOS)
    left, top = (image.width - size[0]) // 2, (image.height - size[1]) // 2
    return _tensor(image.crop((left, top, left + size[0], top + size[1])))


def told_ids(own: Size, size: Size) -> tuple[int, ...]:
    """What SDXL is told of a picture of size ``own`` that :func:`fitted` cuts: its own size, the crop's
    corner in the scaled picture, the target; each (height, width)."""
    covering = _covering(own, size)
    return (
        *(own[1], own[0]),
        *((covering[1] - size[1]) // 2, (covering[0] - size[0]) // 2),
        *(size[1], size[0]),
    )


def _upright(data: bytes, name: str) -> Image.Image:
    try:
        with Image.open(BytesIO(data)) as opened:
            opened.load()
            return ImageOps.exif_transpose(opened)
    except DAMAGED:
        raise _no_picture(name) from None


def _covering(own: Size, size: Size) -> Size:
    """The size of a picture of size ``own`` scaled to cover the wanted one."""
    scale = max(size[0] / own[0], size[1] / own[1])
    return max(size[0], round(own[0] * scale)), max(size[1], round(own[1] * scale))


def _tensor(image: Image.Image) -> Tensor:
    values = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return values.reshape(image.height, image.width, -1).permute(2, 0, 1).float() / 255


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        raise _no_picture(path.name) from None


def _no_picture(name: str) -> BadInput:
    return BadInput(f"{name}: not a picture that can be read; give a PNG, JPEG or WebP file")
