"""The report of a run: one HTML file with everything in it, readable without a network and without
JavaScript.

It holds no local paths: what a person shares should not tell their user name.
"""

from __future__ import annotations

import base64
import html
import io
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from PIL import Image

from ..runtime.files import free_path
from ..runtime.privacy import file_name, without_paths
from .evaluate import TASKS, Row

_CHART_WIDTH, _CHART_HEIGHT = 420, 190
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 10, 26
_MOST_POINTS = 400
_STROKES = {"faint": "#9cc4bf", "mean": "#2f6f68"}
"""Where the page's style does not reach a chart, as in some previews."""

STYLE = """
:root {
  color-scheme: light dark;
  --paper: #fbfaf8; --card: #fff; --ink: #1d1f24; --soft: #666b75; --line: #e2dfd9; --accent: #2f6f68;
  --faint: #9cc4bf;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #16181c; --card: #1e2126; --ink: #e8e6e1; --soft: #9aa0aa; --line: #33373f; --accent: #7cc4ba;
    --faint: #3f6b66;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); }
body { font: 16px/1.55 system-ui, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1060px; margin: 0 auto; padding: 48px 24px 72px; }
h1 { font-size: 2rem; line-height: 1.2; margin: 0 0 8px; letter-spacing: -0.01em; }
h2 { font-size: 1.2rem; margin: 44px 0 12px; }
p { margin: 0 0 12px; max-width: 76ch; }
.verdict { font-size: 1.1rem; border-left: 4px solid var(--accent); padding: 4px 0 4px 16px; margin: 20px 0; }
figure { margin: 0 0 28px; }
figure .paper { background: #fff; padding: 8px; }
figure img { display: block; max-width: 100%; height: auto; }
figcaption, .note { color: var(--soft); font-size: 0.9rem; margin-top: 8px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.92rem; font-variant-numeric: tabular-nums; }
th, td { padding: 5px 14px 5px 0; text-align: right; white-space: nowrap; }
th, td { border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 600; }
th:first-child, td:first-child { text-align: left; }
tr.student td { color: var(--accent); font-weight: 600; }
table.facts td { text-align: left; white-space: normal; vertical-align: top; }
table.facts td:first-child { color: var(--soft); padding-right: 24px; white-space: nowrap; }
.charts { display: flex; flex-wrap: wrap; gap: 20px; }
.charts figure { margin: 0; }
svg, pre, figure .paper { border: 1px solid var(--line); border-radius: 8px; }
svg, pre { background: var(--card); }
svg polyline { fill: none; stroke: var(--accent); stroke-width: 2; }
svg polyline.faint { stroke: var(--faint); stroke-width: 1; }
svg line { stroke: var(--line); }
svg text { fill: var(--soft); font: 11px system-ui, sans-serif; }
pre { padding: 12px 14px; overflow-x: auto; font-size: 0.88rem; }
"""


def write_report(
    path: Path,
    *,
    title: str,
    facts: Mapping[str, str],
    pictures: Sequence[tuple[str, Image.Image]],
    rows: Sequence[Row],
    curves: Sequence[Mapping[str, Any]],
    command: str,
    verdict: str | None,
    sentences: Sequence[str] = (),
) -> None:
    """Write the report; BadInput if it cannot be written. ``sentences`` go below the verdict.

    ``facts``: name -> value, in the order to be shown. ``pictures``: (caption, image). ``rows`` as of an
    evaluation. ``curves``: the objects of run.jsonl. ``command``: as :func:`command_line` writes it.
    """
    parts = [f"<h1>{_text(title)}</h1>"]
    if verdict:
        parts.append(f'<p class="verdict">{_text(verdict)}</p>')
    if more := [sentence for sentence in sentences if sentence != verdict]:
        parts.append("<ul>" + "".join(f"<li>{_text(sentence)}</li>" for sentence in more) + "</ul>")
    parts.append(_facts(facts))
    if pictures:
        parts += ["<h2>Side by side</h2>", *(_figure(caption, image) for caption, image in pictures)]
    if rows:
        parts += ["<h2>Measured</h2>", _measured(rows)]
    if curves:
        parts += ["<h2>Training</h2>", timings(curves), charts(curves)]
    parts += ["<h2>Made by</h2>", f"<pre>{_text(command)}</pre>"]
    page = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(parts)
        + "\n</main>\n</body>\n</html>\n"
    )
    with free_path(path) as place:
        place.partial.write_text(page, encoding="utf-8")


def command_line(module: str, arguments: Sequence[str]) -> str:
    """The command as a person would type it, with file names in place of paths."""
    words = [_quoted(file_name(word)) for word in arguments]
    return " ".join(["python", "-m", module, *words])


def _quoted(word: str) -> str:
    return f'"{word}"' if re.search(r"\s", word) or not word else word


def _text(value: str) -> str:
    """Escaped, and without paths."""
    return html.escape(without_paths(value))


def _facts(facts: Mapping[str, str]) -> str:
    lines = [f"<tr><td>{_text(name)}</td><td>{_text(value)}</td></tr>" for name, value in facts.items()]
    return f'<table class="facts">{"".join(lines)}</table>'


def _figure(caption: str, image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return (
        f'<figure><div class="paper"><img src="data:image/png;base64,{data}" width="{image.width}" '
        f'height="{image.height}" alt="{_text(caption)}"></div>'
        f"<figcaption>{_text(caption)}</figcaption></figure>"
    )


def _measured(rows: Sequence[Row]) -> str:
    """The rows as a table; columns that nothing fills are left out."""
    columns = {
        "guidance": "g",
        "strength": "g",
        "width": "d",
        "height": "d",
        "steps": "d",
        "evaluations": "d",
        "adherence": ".1%",
        "frechet_real": ".2f",
        "frechet_teacher": ".3f",
        "frechet_ratio": ".2f",
        "paired_ratio": ".0%",
        "psnr_teacher": ".1f",
        "colour": "+.0%",
        "contrast": "+.0%",
        "sharpness": "+.0%",
        "seconds_per_image": ".4f",
    }
    heads = {
        "frechet_real": "FD real",
        "frechet_teacher": "FD teacher",
        "frechet_ratio": "FD ratio",
        "paired_ratio": "paired",
        "psnr_teacher": "PSNR, dB",
        "seconds_per_image": "s / picture",
    }
    used = [name for name in columns if any(row.get(name) is not None for row in rows)]
    for name in ("strength", "width", "height"):
        if name in used and len({row[name] for row in rows}) == 1:
            used.remove(name)
    head = "".join(f"<th>{heads.get(name, name)}</th>" for name in used)
    lines = [
        f'<tr class="{row["model"]}"><td>{_text(_row_name(row))}</td>'
        + "".join(
            f"<td>{'' if row.get(name) is None else format(row[name], columns[name])}</td>" for name in used
        )
        + "</tr>"
        for row in rows
    ]
    table = f"<table><tr><th>model</th>{head}</tr>{''.join(lines)}</table>"
    return f'<div class="scroll">{table}</div>{_legend(rows)}'


def _row_name(row: Row) -> str:
    task = f", {TASKS[row['task']]}" if row.get("task") in TASKS else ""
    if row["model"] == "student":
        return f"{row['name']}{task}"
    sampler = {"ddim": "DDIM", "dpmpp_2m": "DPM++ 2M"}.get(row["sampler"], row["sampler"])
    return f"teacher, {sampler}{task}" + (", other noise" if row["noise"] == "other" else "")


def _legend(rows: Sequence[Row]) -> str:
    said = [
        f"{rows[0]['samples']} pictures a row. PSNR is to the teacher's own picture from the same noise "
        "(first row); colour, contrast and sharpness are the shares by which they exceed that one's; seconds "
        "are sampling alone."
    ]
    if any(row["adherence"] is not None for row in rows):
        said.append(
            "Adherence: share of the pictures in which a judge trained on real ones finds all that the "
            "prompt says."
        )
    if any(row.get("paired_ratio") is not None for row in rows):
        eyes = "the judge's features" if rows[0]["adherence"] is not None else "what the teacher's UNet sees"
        said.append(
            f"FD: Fréchet distance by {eyes}, to real pictures and to the teacher's. FD ratio: to that "
            "between two sets of the teacher's own from different noise. Paired: how far a picture is from "
            "the teacher's from the same noise, as a share of how far one from another noise is."
        )
    return f'<p class="note">{" ".join(said)}</p>'


def _phases(curves: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    phases: dict[str, list[Mapping[str, Any]]] = {}
    for line in curves:
        if "phase" in line and "loss" in line:
            phases.setdefault(str(line["phase"]), []).append(line)
    return phases


def timings(curves: Sequence[Mapping[str, Any]]) -> str:
    lines: list[str] = []
    for name, points in _phases(curves).items():
        updates = int(points[-1]["update"])
        rate = statistics.median(float(p["images_per_second"]) for p in points)
        lines.append(
            f"<tr><td>{_text(name)}</td><td>{updates:,}</td><td>{_duration(_seconds(points))}</td>"
            f"<td>{rate:,.1f}</td><td>{_mean_loss(points):.4g}</td></tr>"
        )
    head = "<tr><th>phase</th><th>updates</th><th>time</th><th>pictures / s</th><th>loss at the end</th></tr>"
    return f'<div class="scroll"><table>{head}{"".join(lines)}</table></div>'


def _seconds(points: Sequence[Mapping[str, Any]]) -> float:
    """A phase's time from the median time of an update, so that pauses between runs do not count."""
    paces = [
        (float(b["time"]) - float(a["time"])) / (b["update"] - a["update"])
        for a, b in pairwise(points)
        if b["update"] > a["update"]
    ]
    return statistics.median(paces) * int(points[-1]["update"]) if paces else 0.0


def _mean_loss(points: Sequence[Mapping[str, Any]]) -> float:
    """Mean of the last tenth: single losses are noisy."""
    return statistics.fmean(float(p["loss"]) for p in points[-max(1, len(points) // 10) :])


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"


def charts(curves: Sequence[Mapping[str, Any]]) -> str:
    charts = [
        f"<figure>{_chart(points)}<figcaption>{_text(name)}: loss by update</figcaption></figure>"
        for name, points in _phases(curves).items()
    ]
    return f'<h2>Loss</h2><div class="charts">{"".join(charts)}</div>'


def _chart(points: Sequence[Mapping[str, Any]]) -> str:
    """One phase's loss as an SVG, logarithmic: each line of run.jsonl faint, their running mean strong."""
    stride = -(-len(points) // _MOST_POINTS)
    kept = [p for p in points if math.isfinite(float(p["loss"])) and float(p["loss"]) > 0][::stride]
    if not kept:
        return f'<svg width="{_CHART_WIDTH}" height="{_CHART_HEIGHT}"></svg>'
    updates = [int(p["update"]) for p in kept]
    losses = [math.log10(float(p["loss"])) for p in kept]
    low, high = min(losses), max(losses)
    low, high = (low - 0.05, high + 0.05) if high - low < 0.1 else (low, high)
    last = max(updates)

    def place(update: float, loss: float) -> str:
        x = _LEFT + (_CHART_WIDTH - _LEFT - _RIGHT) * update / last
        y = _TOP + (_CHART_HEIGHT - _TOP - _BOTTOM) * (high - loss) / (high - low)
        return f"{x:.1f},{y:.1f}"

    def line(values: Sequence[float], kind: str) -> str:
        where = " ".join(place(u, v) for u, v in zip(updates, values, strict=True))
        return f'<polyline class="{kind}" points="{where}" fill="none" stroke="{_STROKES[kind]}"/>'

    marks = "".join(_mark(10**value, *place(0, value).split(",")) for value in (high, (low + high) / 2, low))
    foot = _CHART_HEIGHT - 8
    return (
        f'<svg width="{_CHART_WIDTH}" height="{_CHART_HEIGHT}" role="img" font-size="11">'
        f"{marks}{line(losses, 'faint')}{line(_smoothed(losses), 'mean')}"
        f'<text x="{_LEFT}" y="{foot}">0</text>'
        f'<text x="{_CHART_WIDTH - _RIGHT}" y="{foot}" text-anchor="end">{last:,}</text></svg>'
    )


def _mark(loss: float, x: str, y: str) -> str:
    """A horizontal line with its value."""
    return (
        f'<line x1="{x}" x2="{_CHART_WIDTH - _RIGHT}" y1="{y}" y2="{y}" stroke="#e2dfd9"/>'
        f'<text x="{float(x) - 6}" y="{float(y) + 4}" text-anchor="end">{loss:.3g}</text>'
    )


def _smoothed(values: Sequence[float]) -> list[float]:
    """Running mean over a twentieth of the values, with those before and after."""
    reach = max(1, len(values) // 40)
    return [statistics.fmean(values[max(0, i - reach) : i + reach + 1]) for i in range(len(values))]
