"""Tensors as pictures: labelled grids for people, PNG files that are there whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from ..diffusion.errors import BadInput
from ..runtime.files import free_path

_PAPER, _INK, _FAINT = (255, 255, 255), (28, 30, 34), (110, 114, 122)
_TEXT, _GAP, _MARGIN = 13, 4, 10
_ROW_LABEL = 150
_SMALLEST, _LARGEST = 96, 256


def to_image(picture: Tensor) -> Image.Image:
    """A picture (3, H, W) in [0, 1], values outside cut off, as 8-bit RGB."""
    values = (picture.detach().float().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).contiguous().cpu()
    return Image.frombytes("RGB", (values.shape[1], values.shape[0]), bytes(values.flatten().tolist()))


def require_png(path: Path) -> None:
    """BadInput for a name that promises another format."""
    if path.suffix.lower() != ".png":
        raise BadInput(f"{path.name}: pictures are written as PNG; give -o a name that ends in .png")


def save_png(image: Image.Image, path: Path, texts: Mapping[str, str] | None = None) -> None:
    """Write a PNG, with ``texts`` as its text chunks; whole or not at all, beside one that is in use."""
    chunks = PngInfo()
    for name, text in (texts or {}).items():
        chunks.add_itxt(name, text)
    with free_path(path) as place:
        image.save(place.partial, format="PNG", pnginfo=chunks)


def grid(
    cells: Sequence[Sequence[Tensor | None]], *, rows: Sequence[str] = (), columns: Sequence[str] = ()
) -> Image.Image:
    """Pictures (3, H, W) in rows and columns, with a label beside each row and above each column.

    Small pictures are magnified by whole numbers without smoothing, large ones reduced. None leaves a cell
    empty.
    """
    images = [[None if cell is None else fitted(to_image(cell)) for cell in row] for row in cells]
    present = [image for row in images for image in row if image is not None]
    width = max(image.width for image in present) + _GAP
    height = max(image.height for image in present) + _GAP
    font = _font()
    beside = [_wrapped(label, font, _ROW_LABEL) for label in rows]
    above = [_wrapped(label, font, width - _GAP) for label in columns]
    line = _line_height(font)
    left = _MARGIN + (max(_widest(lines, font) for lines in beside) + 8 if beside else 0)
    top = _MARGIN + (max(map(len, above)) * line + 6 if above else 0)
    canvas = Image.new(
        "RGB", (left + width * max(map(len, images)) + _MARGIN, top + height * len(images) + _MARGIN), _PAPER
    )
    draw = ImageDraw.Draw(canvas)
    for column, lines in enumerate(above):
        _write(draw, lines, font, x=left + column * width, bottom=top - 6, fill=_INK)
    for r, row in enumerate(images):
        y = top + r * height
        if r < len(beside):
            middle = y + (height - _GAP + len(beside[r]) * line) // 2
            _write(draw, beside[r], font, x=_MARGIN, bottom=middle, fill=_FAINT)
        for c, image in enumerate(row):
            if image is not None:
                canvas.paste(image, (left + c * width, y))
    return canvas


def stack(grids: Sequence[tuple[str, Image.Image]]) -> Image.Image:
    """Grids one below the other, each under its title."""
    font = _font()
    head = _line_height(font) + 8
    canvas = Image.new(
        "RGB",
        (max(image.width for _, image in grids), sum(image.height + head for _, image in grids)),
        _PAPER,
    )
    y = 0
    for title, image in grids:
        ImageDraw.Draw(canvas).text((_MARGIN, y + 8), title, font=font, fill=_INK)
        canvas.paste(image, (0, y + head))
        y += image.height + head
    return canvas


def fitted(image: Image.Image) -> Image.Image:
    """At least _SMALLEST wide by nearest neighbour, or at most _LARGEST on the longer side."""
    times = -(-_SMALLEST // image.width)
    if times > 1:
        return image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)
    if max(image.size) > _LARGEST:
        scale = _LARGEST / max(image.size)
        return image.resize(
            (round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS
        )
    return image


def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(_TEXT)


def _line_height(font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> int:
    return round(font.getbbox("Ág")[3]) + 3


def _widest(lines: Sequence[str], font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> int:
    return max((round(font.getlength(line)) for line in lines), default=0)


def _wrapped(label: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """The label's words in lines of at most ``width`` pixels, four lines at most."""
    lines: list[str] = []
    for word in label.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines if len(lines) <= 4 else [*lines[:3], lines[3] + " ..."]


def _write(
    draw: ImageDraw.ImageDraw,
    lines: Sequence[str],
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    *,
    x: int,
    bottom: int,
    fill: tuple[int, int, int],
) -> None:
    line = _line_height(font)
    for number, text in enumerate(lines):
        draw.text((x, bottom - (len(lines) - number) * line), text, font=font, fill=fill)
