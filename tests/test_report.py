"""Pictures and the report: what people see, and what must not be in it."""

from __future__ import annotations

import base64
import io
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from PIL import Image

from toolkit.diffusion.errors import BadInput
from toolkit.evaluation.pictures import grid, save_png, stack, to_image
from toolkit.evaluation.report import command_line, write_report

ROW = {
    "model": "student", "name": "2-step student", "noise": "same", "sampler": "deterministic", "steps": 2,
    "evaluations": 2, "guidance": 4.0, "strength": 1.0, "samples": 256, "adherence": 0.8125,
    "frechet_real": 5.25, "frechet_teacher": None, "frechet_ratio": None, "psnr_teacher": 22.5,
    "seconds_per_image": 0.0123,
}  # fmt: skip


def log(phase: str, updates: int, *, pace: float = 0.5, start: float = 0.0) -> list[dict]:
    """run.jsonl of one phase, a line every 10 updates; ``pace`` in seconds an update."""
    return [
        {
            "time": start + pace * update, "phase": phase, "update": update, "loss": 1 / update, "lr": 1e-4,
            "images_per_second": 64.0, "eta_seconds": 1.0,
        }
        for update in range(10, updates + 1, 10)
    ]  # fmt: skip


class Checker(HTMLParser):
    """Every element that is opened is closed in order, and nothing is fetched."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def report(path: Path, **changes) -> tuple[str, Checker]:
    values = {
        "title": "A <2-step> student",
        "facts": {"teacher": "model.safetensors"},
        "pictures": [("Over guidance", Image.new("RGB", (40, 30), (10, 200, 30)))],
        "rows": [ROW],
        "curves": log("guided", 300) + log("fold-2", 100, start=150),
        "command": "python -m toolkit.distill --demo",
        "verdict": "At 2 steps & guidance 4 it does.",
    }
    write_report(path, **values | changes)
    text = path.read_text(encoding="utf-8")
    checker = Checker()
    checker.feed(text)
    assert not checker.open
    return text, checker


def test_the_report_is_one_well_formed_file_that_fetches_nothing(tmp_path):
    text, checker = report(tmp_path / "report.html")
    assert "script" not in checker.tags and "http" not in re.sub(r"data:image/png;base64,[^\"]*", "", text)
    assert [source.split(",")[0] for source in checker.sources] == ["data:image/png;base64"]
    image = Image.open(io.BytesIO(base64.b64decode(checker.sources[0].split(",")[1])))
    assert image.size == (40, 30) and image.getpixel((5, 5)) == (10, 200, 30)
    assert "A &lt;2-step&gt; student" in text and "2 steps &amp; guidance 4" in text


def test_the_report_shows_figures_losses_and_timings(tmp_path):
    text, checker = report(tmp_path / "report.html")
    assert "81.2%" in text and "22.5" in text and "0.0123" in text
    assert "FD real" in text and "FD teacher" not in text.split("</table>")[1]
    assert checker.tags.count("svg") == 2 and checker.tags.count("polyline") == 4
    assert "2.5 min" in text and "50 s" in text


def test_a_pause_between_two_runs_is_no_training_time(tmp_path):
    curves = log("guided", 150) + [{**line, "time": line["time"] + 86400} for line in log("guided", 300)[15:]]
    text, _ = report(tmp_path / "report.html", curves=curves)
    assert "2.5 min" in text


def test_an_empty_run_and_odd_losses_still_give_a_report(tmp_path):
    report(tmp_path / "a.html", pictures=[], rows=[], curves=[], verdict=None)
    odd = [{**line, "loss": math.nan if line["update"] < 50 else 0.0} for line in log("guided", 60)]
    report(tmp_path / "b.html", curves=odd)
    report(tmp_path / "c.html", curves=log("guided", 10))


def test_no_path_and_no_user_name_is_told(tmp_path):
    command = command_line(
        "toolkit.distill",
        [
            "--ckpt",
            "/home/bob/My Models/a b.safetensors",
            "--out=C:\\Users\\bob\\runs\\x",
            "--data",
            "bob/pics/",
        ],
    )
    assert command == 'python -m toolkit.distill --ckpt "a b.safetensors" --out=x --data pics'
    facts = {
        "teacher": "/home/bob/models/m.safetensors",
        "data": r"C:\Users\bob\pictures",
        "batch": "16, 3/4",
    }
    text, _ = report(tmp_path / "report.html", command=command, facts=facts)
    assert "bob" not in text and "m.safetensors" in text and "16, 3/4" in text


def test_a_report_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(BadInput, match="cannot be written"):
        report(tmp_path / "file" / "report.html")


def test_pictures_keep_their_values_and_small_ones_are_magnified_without_smoothing():
    picture = torch.zeros(3, 32, 32)
    picture[0, :, 16:] = 1.0
    picture[1, 0, 0] = 2.0
    image = to_image(picture)
    assert image.size == (32, 32)
    assert (image.getpixel((31, 5)), image.getpixel((0, 0))) == ((255, 0, 0), (0, 255, 0))
    made = grid([[picture]])
    colours = {colour for _, colour in made.crop((12, 12, 104, 104)).getcolors()}
    assert colours <= {(255, 0, 0), (0, 0, 0), (0, 255, 0)}


def test_a_grid_places_every_picture_in_its_row_and_column():
    colours = [[(255, 0, 0), (0, 255, 0), (0, 0, 255)], [(255, 255, 0), None, (0, 255, 255)]]
    cells = [
        [None if c is None else torch.tensor(c).float().reshape(3, 1, 1).expand(3, 96, 96) / 255 for c in row]
        for row in colours
    ]
    image = grid(cells, rows=["first row", "a longer second row"], columns=["a", "b", "c"])
    left, top = image.width - 10 - 300, image.height - 10 - 200
    for r, row in enumerate(colours):
        for c, colour in enumerate(row):
            found = image.getpixel((left + 100 * c + 48, top + 100 * r + 48))
            assert found == (colour or (255, 255, 255))
    assert stack([("one", image), ("two", image)]).height > 2 * image.height


def test_a_png_is_there_whole_with_its_texts_or_not_at_all(tmp_path):
    save_png(Image.new("RGB", (4, 4)), tmp_path / "new" / "a.png", {"parameters": "ein Füchslein\nSteps: 4"})
    assert Image.open(tmp_path / "new" / "a.png").text["parameters"] == "ein Füchslein\nSteps: 4"
    with pytest.raises(BadInput, match="cannot be written"):
        save_png(Image.new("RGB", (4, 4)), tmp_path / "new" / "a.png" / "b.png")
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["a.png"]
