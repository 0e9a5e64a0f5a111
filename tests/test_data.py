"""Pictures and captions as people keep them: folders, metadata.jsonl, tar shards, sizes, damage."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from toolkit.training.samples import load_picture


def ramp(path: Path, width: int, height: int) -> Path:
    """A picture whose red grows from left to right, and whose green grows from top to bottom."""
    red = Image.linear_gradient("L").rotate(90).resize((width, height))
    green = Image.linear_gradient("L").resize((width, height))
    Image.merge("RGB", (red, green, Image.new("L", (width, height)))).save(path)
    return path


@pytest.mark.parametrize(
    ("size", "across", "down"),
    [((256, 128), (0, 1), (0, 1)), ((32, 16), (0, 1), (0, 1)), ((128, 128), (0, 1), (0.25, 0.75)),
     ((256, 64), (0.25, 0.75), (0, 1))],
)  # fmt: skip
def test_a_picture_is_scaled_to_cover_and_cropped_at_the_centre(tmp_path, size, across, down):
    picture = load_picture(ramp(tmp_path / "a.png", *size), 64, 32)
    assert picture.shape == (3, 32, 64)
    red, green = picture[0].mean(0), picture[1].mean(1)
    torch.testing.assert_close(red, torch.linspace(*across, 64), atol=0.03, rtol=0)
    torch.testing.assert_close(green, torch.linspace(*down, 32), atol=0.03, rtol=0)
