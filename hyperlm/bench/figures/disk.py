"""Points in the Poincare disk, with names where they cover nothing."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke

from hyperlm.bench.figures.axes import legend
from hyperlm.bench.figures.style import MARKERS, WIDTH, colours, number, printable
from hyperlm.bench.result import Disk, Row

RINGS = (1, 2, 3)  # radii of faint circles
SPARSE = 25  # points whose names have room in half a column
AROUND = [(math.cos(a), math.sin(a)) for a in np.linspace(0, 2 * math.pi, 16, endpoint=False)]
HALO = [withStroke(linewidth=1.5, foreground="white")]


def draw_disk(figure: Disk, rows: list[Row]) -> Canvas | None:
    rows = [row for row in rows if number(row.get("x")) and number(row.get("y"))]
    if not rows:
        return None
    panels = list(dict.fromkeys(row.get(figure.panels, "") for row in rows))
    groups = list(dict.fromkeys(row.get(figure.group, "") for row in rows))
    colour = colours(groups)
    across = min(2, len(panels))
    width = WIDTH * across if len(rows) / len(panels) > SPARSE else WIDTH  # both columns of a paper where names need the room
    down = math.ceil(len(panels) / across)
    canvas = Canvas(figsize=(width, down * (width / across + (0.1 if panels != [""] else -0.05)) + 0.2), layout="constrained")
    grid = canvas.subplots(down, across, squeeze=False)
    for i, axes in enumerate(grid.flat):
        axes.axis("off")
        if i >= len(panels):
            continue
        circle = np.linspace(0, 2 * math.pi, 200)
        axes.plot(np.cos(circle), np.sin(circle), color="black", linewidth=0.8)
        axes.plot(0, 0, "+", color="#999999", markersize=4, markeredgewidth=0.6)
        for radius in RINGS:
            at = math.tanh(radius / 2)
            axes.plot(at * np.cos(circle), at * np.sin(circle), color="#cccccc", linewidth=0.4)
            axes.text(
                0,
                -at,
                f"r {radius}",
                fontsize=4.5,
                color="#999999",
                ha="center",
                va="center",
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6},
            )
        axes.set(xlim=(-1.02, 1.02), ylim=(-1.02, 1.02), aspect="equal")
        if panels[i] != "":
            axes.set_title(printable(panels[i]), fontsize=7, pad=2)
        in_panel = [row for row in rows if row.get(figure.panels, "") == panels[i]]
        for j, group in enumerate(groups):
            points = [(row["x"], row["y"]) for row in in_panel if row.get(figure.group, "") == group]
            axes.plot(
                *np.reshape(points, (-1, 2)).T,
                MARKERS[j % len(MARKERS)],
                color=colour[group],
                markersize=3.2,
                markeredgecolor="white",
                markeredgewidth=0.3,
            )
    if len(groups) > 1:
        legend(
            canvas,
            [
                Line2D([], [], linestyle="", marker=MARKERS[j % len(MARKERS)], color=colour[g], label=printable(g))
                for j, g in enumerate(groups)
            ],
        )
    canvas.draw_without_rendering()  # places are known from here on
    canvas.set_layout_engine("none")
    for i, axes in enumerate(grid.flat[: len(panels)]):
        name_points(axes, [row for row in rows if row.get(figure.panels, "") == panels[i]], lambda row: colour[row.get(figure.group, "")])
    return canvas


def name_points(axes: Axes, rows: list[Row], colour: Callable[[Row], str]) -> None:
    """Labels beside points, in order, where they cover no point or label; what has no place has no label."""
    scale = axes.figure.dpi / 72  # of a point in pixels
    inside = axes.get_window_extent()
    centres = axes.transData.transform([(row["x"], row["y"]) for row in rows])
    taken = [(x - 1.8 * scale, y - 1.8 * scale, x + 1.8 * scale, y + 1.8 * scale) for x, y in centres]
    for k, row in enumerate(rows):
        words = printable(row.get("label", ""))
        if not words:
            continue
        text = axes.text(0, 0, words, fontsize=5, color=darker(colour(row)), ha="center", va="center", path_effects=HALO)
        box = text.get_window_extent()
        width, height = box.width + 0.6 * scale, box.height
        for away in (3.5, 6.0, 9.0):
            places = [(centres[k][0] + c * (away * scale + width / 2), centres[k][1] + s * (away * scale + height / 2)) for c, s in AROUND]
            boxes = [(x - width / 2, y - height / 2, x + width / 2, y + height / 2) for x, y in places]
            free = [
                n
                for n, b in enumerate(boxes)
                if within(b, inside) and not any(overlap(b, other) for m, other in enumerate(taken) if m != k)
            ]
            if free:
                break
        else:
            text.remove()
            continue
        taken.append(boxes[free[0]])
        text.set_position(axes.transData.inverted().transform(places[free[0]]))
        if away > 3.5:
            axes.plot(*axes.transData.inverted().transform([centres[k], places[free[0]]]).T, color="#bbbbbb", linewidth=0.3, zorder=1)


def darker(colour: str) -> tuple[float, ...]:
    """For letters, which a light colour would make illegible."""
    return tuple(0.65 * x for x in to_rgb(colour))


def overlap(a: tuple, b: tuple) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def within(box: tuple, extent: Any) -> bool:
    return box[0] >= extent.x0 and box[1] >= extent.y0 and box[2] <= extent.x1 and box[3] <= extent.y1
