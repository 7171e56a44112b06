"""Heatmaps: a panel for each model, of one scale of colours, with numbers where they have room."""

import math
import re
from collections.abc import Callable

import numpy as np
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import FuncFormatter

from hyperlm.bench.figures.style import SMALL, WIDTH, exact, in_order, number, printable, short
from hyperlm.bench.result import Heatmap, Row
from hyperlm.bench.tables import cell


def in_cells(values: np.ndarray, room: float) -> list[str]:
    """The longest of several ways to write numbers that has room in a width of `room` inches: 0.51, .51, .5, or not at all."""
    most = np.nanmax(np.abs(values))
    ways: list[Callable[[float], str]] = [lambda x: cell(float(f"{x:.3g}")), lambda x: cell(float(f"{x:.2g}"))]
    if most < 10:
        ways = [lambda x: f"{x:.2f}", lambda x: f"{x:.2f}".replace("0.", "."), lambda x: f"{x:.1f}".replace("0.", ".")]
    for way in ways:
        words = ["–" if math.isnan(x) else way(x) for x in values]
        words = [re.sub(r"^-(?=[0.]*$)", "", word).replace("-", "−") for word in words]  # no sign of what is rounded to zero
        if max(map(len, words)) * 0.043 <= room:
            return words
    return [""] * len(values)


def draw_heatmap(figure: Heatmap, rows: list[Row]) -> Canvas | None:
    rows = [row for row in rows if number(row.get(figure.value)) and figure.x in row and figure.y in row]
    if not rows:
        return None
    panels = list(dict.fromkeys(row.get(figure.panels, "") for row in rows))
    xs, ys = in_order([row[figure.x] for row in rows]), in_order([row[figure.y] for row in rows])
    values = [float(row[figure.value]) for row in rows]
    least, most = (min(values) if figure.low is None else figure.low), (max(values) if figure.high is None else figure.high)
    signed = least < 0 < most  # two colours, zero between them
    if signed:
        least, most = -max(-least, most), max(-least, most)
    across = 2 if len(panels) > 1 and len(xs) <= 6 else 1
    down = math.ceil(len(panels) / across)
    canvas = Canvas(figsize=(WIDTH, 0.55 + down * (0.32 + 0.19 * len(ys))), layout="constrained")
    grid = canvas.subplots(down, across, squeeze=False, sharex=True, sharey=True)
    image = None
    for i, axes in enumerate(grid.flat):
        if i >= len(panels):
            axes.axis("off")
            grid.flat[i - across].tick_params(labelbottom=True)  # nothing stands below it
            continue
        table = np.full((len(ys), len(xs)), np.nan)
        for row in rows:
            if row.get(figure.panels, "") == panels[i]:
                table[ys.index(row[figure.y]), xs.index(row[figure.x])] = row[figure.value]
        cells = in_cells(table.ravel(), (WIDTH - 0.85 - 0.04 * max(len(exact(y)) for y in ys)) / across / len(xs))
        image = axes.imshow(
            table, cmap="RdBu_r" if signed else "Blues", vmin=least, vmax=most if most > least else least + 1, aspect="auto"
        )
        for ((y, x), value), words in zip(np.ndenumerate(table), cells, strict=True):
            dark = abs(value) > 0.6 * most if signed else (value - least) > 0.55 * (most - least)
            axes.text(x, y, words, ha="center", va="center", fontsize=5, color="white" if dark else "black")
        size = 5 if across == 2 else SMALL
        turned = sum(len(exact(x)) for x in xs) > (16 if across == 2 else 40)
        axes.set_xticks(
            range(len(xs)),
            [exact(x) for x in xs],
            fontsize=size,
            rotation=35 if turned else 0,
            ha="right" if turned else "center",
            rotation_mode="anchor",
        )
        axes.set_yticks(range(len(ys)), [exact(y) for y in ys], fontsize=size)
        axes.tick_params(length=0, pad=2)
        axes.spines[:].set_visible(False)
        if panels[i] != "":
            axes.set_title(printable(panels[i]), fontsize=7, pad=3)
    canvas.supxlabel(printable(figure.x_label or figure.x), fontsize=7)
    canvas.supylabel(printable(figure.y_label or figure.y), fontsize=7)
    bar = canvas.colorbar(image, ax=grid, fraction=0.03, pad=0.02, aspect=25)
    bar.set_label(printable(figure.value), fontsize=7)
    bar.ax.yaxis.set_major_formatter(FuncFormatter(short))
    bar.ax.tick_params(labelsize=5)
    bar.outline.set_visible(False)
    return canvas
