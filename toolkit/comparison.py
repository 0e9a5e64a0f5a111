"""Tables and a plot of what toolkit.compare measured."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .contenders import ABLATIONS, Contender
from .diffusion.errors import BadInput
from .runtime.files import atomic_path

Row = dict[str, Any]
"""A row of toolkit.evaluate's results, and its contender, run and seed."""
TITLES = {
    "adherence": "adherence, %",
    "frechet_ratio": "k",
}


def tables(rows: Sequence[Row], contenders: Sequence[Contender]) -> str:
    """Markdown: for each group a table of its students, by step count; the teacher's first."""
    parts = ["The teacher, without a student:\n\n" + _table(_teachers(rows), _guidances(rows))]
    for group in dict.fromkeys(contender.group for contender in contenders):
        members = [contender for contender in contenders if contender.group == group]
        lines = [line for contender in members for line in _students(rows, contender)]
        guidances = sorted({g for contender in members for g in contender.guidances})
        strengths = any(contender.strengths for contender in members)
        table = _strengths(rows, members) if strengths else _table(lines, guidances)
        parts.append(f"{group[0].upper()}{group[1:]}:\n\n" + table)
    return "\n\n".join(parts) + "\n"


def _guidances(rows: Sequence[Row]) -> list[float]:
    return sorted({row["guidance"] for row in rows})


@dataclass(frozen=True)
class Line:
    """A line of a table: its first cells, and the rows of all its seeds."""

    what: str
    steps: int
    rows: Sequence[Row]

    @property
    def seeds(self) -> int:
        return len({row["seed"] for row in self.rows})


def _teachers(rows: Sequence[Row]) -> list[Line]:
    own = [row for row in rows if row["contender"] == "teacher" and row["strength"] == 1]
    kinds = dict.fromkeys((row["sampler"], row["noise"], row["steps"]) for row in own)
    order = sorted(kinds, key=lambda kind: (kind[0], -kind[2], kind[1] == "other"))
    names = {"ddim": "DDIM", "dpmpp_2m": "DPM++ 2M"}
    return [
        Line(
            f"{names[sampler]}" + (", other noise" if noise == "other" else ""),
            steps,
            [row for row in own if (row["sampler"], row["noise"], row["steps"]) == (sampler, noise, steps)],
        )
        for sampler, noise, steps in order
    ]


def _students(rows: Sequence[Row], contender: Contender) -> list[Line]:
    own = [row for row in rows if row["contender"] == contender.name and row["strength"] == 1]
    return [
        Line(contender.says, steps, [row for row in own if row["steps"] == steps])
        for steps in sorted({row["steps"] for row in own}, reverse=True)
    ]


def _table(lines: Sequence[Line], guidances: Sequence[float]) -> str:
    heads = ["", "steps", "seeds"]
    heads += [f"{title} at {g:g}" for title in TITLES.values() for g in guidances] + ["PSNR"]
    text = [heads]
    for line in lines:
        cells = [line.what, str(line.steps), str(line.seeds)]
        cells += [
            _cell(line.rows, name, g, scale=100 if name == "adherence" else 1, digits=form)
            for name, form in (("adherence", 1), ("frechet_ratio", 2))
            for g in guidances
        ]
        middle = sorted(guidances)[len(guidances) // 2]
        text.append([*cells, _cell(line.rows, "psnr_teacher", middle, scale=1, digits=1)])
    return _markdown(text)


def _strengths(rows: Sequence[Row], members: Sequence[Contender]) -> str:
    strengths = sorted({strength for member in members for strength in member.strengths})
    names = {member.name for member in members}
    own = [row for row in rows if row["contender"] in names]
    text = [["steps", *(f"k at strength {s:g}" for s in strengths)]]
    for steps in sorted({row["steps"] for row in own}, reverse=True):
        of = [row for row in own if row["steps"] == steps]
        cells = [
            _cell([row for row in of if row["strength"] == s], "frechet_ratio", 4, scale=1, digits=2)
            for s in strengths
        ]
        text.append([str(steps), *cells])
    return _markdown(text)


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    """A table; the first line is its head."""
    head, *rest = lines
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rest))


def _cell(rows: Sequence[Row], name: str, guidance: float, *, scale: float, digits: int) -> str:
    """Mean over seeds, and of several their largest distance from it."""
    found = [scale * row[name] for row in rows if row["guidance"] == guidance and row[name] is not None]
    if not found:
        return ""
    mean = statistics.fmean(found)
    if len(found) == 1:
        return f"{mean:.{digits}f}"
    return f"{mean:.{digits}f} ± {max(abs(value - mean) for value in found):.{digits}f}"


def plot(rows: Sequence[Row], contenders: Sequence[Contender], path: Path) -> None:
    """Adherence and k against evaluations at guidance 4, one line a contender with several step counts."""
    figure_class, canvas_class = matplotlib()
    figure = figure_class(figsize=(12, 5), layout="constrained")
    canvas_class(figure)
    axes = figure.subplots(1, 2)
    samplers = {"ddim": "teacher, DDIM", "dpmpp_2m": "teacher, DPM++ 2M"}
    curves = {
        label: [
            row
            for row in rows
            if row["contender"] == "teacher"
            and row["sampler"] == sampler
            and row["noise"] == "same"
            and row["steps"] <= 16
        ]
        for sampler, label in samplers.items()
    }
    for contender in contenders:
        # k of another number of pictures is another scale
        if contender.group != ABLATIONS and contender.samples is None:
            curves[contender.name] = [row for row in rows if row["contender"] == contender.name]
    for axis, (name, title) in zip(axes, TITLES.items(), strict=True):
        for label, own in curves.items():
            points = _points(own, name)
            if len(points) < 2:
                continue
            style = "--" if label in samplers.values() else "-"
            axis.plot(*zip(*points, strict=True), style, marker="o", markersize=3, label=label)
        axis.set_xscale("log", base=2)
        axis.set_xticks(ticks := [1, 2, 4, 8, 16, 32], [str(tick) for tick in ticks])
        axis.set_xlabel("evaluations of the network a picture")
        axis.set_ylabel(title)
        axis.grid(alpha=0.3)
    axes[0].set_ylim(bottom=50)
    axes[1].set_yscale("log")
    axes[1].axhline(1, color="grey", linewidth=0.8)
    axes[1].legend(fontsize=7)
    with atomic_path(path) as partial:
        figure.savefig(partial, format="png", dpi=110)


def _points(rows: Sequence[Row], name: str) -> list[tuple[int, float]]:
    """(evaluations, mean over seeds of what is named), ascending, at guidance 4; shares in percent."""
    found: dict[int, list[float]] = {}
    for row in rows:
        if row["guidance"] == 4 and row["strength"] == 1 and row[name] is not None:
            found.setdefault(row["evaluations"], []).append(row[name])
    scale = 100 if name == "adherence" else 1
    return [(evaluations, scale * statistics.fmean(found[evaluations])) for evaluations in sorted(found)]


def matplotlib() -> Any:
    """Its classes Figure and FigureCanvasAgg; BadInput where it is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # pyright: ignore[reportMissingImports]
        from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise BadInput(
            "the plot is drawn by matplotlib, which is not installed; python -m pip install matplotlib"
        ) from None
    return Figure, FigureCanvasAgg
