"""What a benchmark leaves: results.json with every number, report.md with the tables, and the plots."""

import json
import math
import os
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display needed
import matplotlib.pyplot as plt
from matplotlib.ticker import StrMethodFormatter

from hyperlm.files import finite

Row = dict[str, Any]


@dataclass(frozen=True)
class Table:
    """Rows of equal columns. One that is not shown is in results.json alone, for figures to be drawn from."""

    name: str  # in results.json and in the report: "loss by position"
    rows: list[Row]
    caption: str = ""  # in a sentence or two: what the numbers are, in which units, on what
    shown: bool = True


@dataclass(frozen=True)
class Lines:
    """A line over `x` for each combination of the columns `series`; the first of them, if it is "model", decides the colour, others marker and dash.
    Rows that differ in the column `over` alone ("seed") are one line, their mean, in a band from the least to the largest."""

    file: str  # without an extension: PNG and PDF are written
    title: str
    table: str
    x: str
    y: str
    series: tuple[str, ...] = ("model",)
    over: str = ""
    x_label: str = ""  # with units; by default the column's name
    y_label: str = ""
    log_x: bool = False
    log_y: bool = False
    levels: dict[str, float] = field(default_factory=dict)  # horizontal lines by name: chance, a published figure


@dataclass(frozen=True)
class Bars:
    """The mean of `y` for each value of the column `x`, with a point for each row."""

    file: str
    title: str
    table: str
    x: str
    y: str
    y_label: str = ""


@dataclass(frozen=True)
class Heatmap:
    """`value` as colour and number over `x` and `y`, a panel for each value of the column `panels`."""

    file: str
    title: str
    table: str
    x: str
    y: str
    value: str
    panels: str = "model"
    x_label: str = ""
    y_label: str = ""
    low: float | None = None  # of the colours
    high: float | None = None


@dataclass(frozen=True)
class Disk:
    """Points of the Poincare disk, by columns x and y (within the unit circle) and `label` (may be empty), a panel for each value of `panels`."""

    file: str
    title: str
    table: str
    group: str = "group"  # column that decides colour and marker
    panels: str = ""


Figure = Lines | Bars | Heatmap | Disk


@dataclass(frozen=True)
class Result:
    """What a suite measured: tables, notes in words, and the figures to draw from the tables."""

    suite: str
    tables: list[Table]
    notes: list[str] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)


def cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def table(rows: list[Row]) -> str:
    """Rows as a Markdown table that also reads well in a terminal."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [columns, *([cell(row.get(name, "")) for name in columns] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]

    def format_line(line: list[str]) -> str:
        return "| " + " | ".join(text.rjust(width) if line is not columns else text.ljust(width) for text, width in zip(line, widths, strict=True)) + " |"

    rule = "|" + "|".join("-" * (width + 1) + ":" for width in widths) + "|"
    return "\n".join([format_line(lines[0]), rule, *map(format_line, lines[1:])])


def draw(plot: Plot, rows: list[Row], folder: Path) -> None:
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for key in dict.fromkeys(tuple(row[column] for column in plot.series) for row in rows):
        own = [row for row in rows if tuple(row[column] for column in plot.series) == key]
        points = [(row[plot.x], row[plot.y]) for row in own if isinstance(row.get(plot.y), int | float)]
        label = ", ".join([str(key[0]), *(f"{column} {value}" for column, value in zip(plot.series[1:], key[1:], strict=True))])
        points = [(x, y) for x, y in points if math.isfinite(y) and (y > 0 or not plot.log)]
        if points:
            axes.plot(*zip(*sorted(points), strict=True), marker="o", label=label)
    if plot.log:
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
        axes.yaxis.set_minor_formatter(StrMethodFormatter("{x:,g}"))
        ticks = sorted({row[plot.x] for row in rows})
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.set(title=plot.title, xlabel=plot.x, ylabel=plot.y)
    axes.grid(True, which="major", alpha=0.3)
    if axes.lines:
        axes.legend()
    figure.savefig(folder / plot.file, dpi=150)
    plt.close(figure)


def write(folder: Path, results: list[Result], machine: dict[str, Any], command: str) -> None:
    """Write results.json, report.md and the plots into `folder`, which is new: all of it or nothing."""
    with tempfile.TemporaryDirectory(prefix=".", dir=folder.parent) as parts:
        part = Path(parts) / folder.name
        part.mkdir()
        record = {"command": command, "machine": machine, "results": [asdict(r) for r in results]}
        (part / "results.json").write_text(json.dumps(finite(record), indent=2, allow_nan=False) + "\n")
        texts = [f"# hyperlm benchmark\n\n`{command}`\n", "\n".join(f"- {name}: {value}" for name, value in machine.items())]
        for result in results:
            texts.append(f"## {result.suite}\n\n{table(result.rows)}\n\n" + "\n".join(f"- {note}" for note in result.notes))
            for plot in result.plots:
                draw(plot, result.rows, part)
                texts.append(f"![{plot.title}]({plot.file})")
        (part / "report.md").write_text("\n\n".join(texts) + "\n", encoding="utf-8", errors="backslashreplace")
        os.replace(part, folder)
