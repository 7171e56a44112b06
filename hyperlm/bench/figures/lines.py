"""Curves: a mean in its band for each model and setting."""

import math
from typing import Any

import numpy as np
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D

from hyperlm.bench.figures.axes import legend, printable_lines, round_step, setting_axis, value_axis
from hyperlm.bench.figures.style import DASHES, FEW, MARKERS, SMALL, WIDTH, colours, exact, in_order, number, places, printable
from hyperlm.bench.result import Lines, Row


def curve(rows: list[Row], figure: Lines) -> tuple[list[Any], np.ndarray]:
    """x, and the mean, least and largest y at each (3, points).

    They are those of lines interpolated where their x differ and overlap, else of what each x has.
    """
    each: dict[Any, dict[Any, list[float]]] = {}
    for row in rows:
        each.setdefault(row.get(figure.over), {}).setdefault(row[figure.x], []).append(float(row[figure.y]))
    xs = {tuple(in_order(list(line))) for line in each.values()}
    if len(xs) > 1 and all(number(x) for line in each.values() for x in line):
        first, last = max(min(line) for line in each.values()), min(max(line) for line in each.values())
        grid = sorted({x for line in each.values() for x in line if first <= x <= last})
    else:
        grid = []
    if grid:
        lines = [(sorted(line), [np.mean(line[x]) for x in sorted(line)]) for line in each.values()]
        between = np.array([np.interp(grid, x, y) for x, y in lines])
        return grid, np.stack([between.mean(0), between.min(0), between.max(0)])
    points: dict[Any, list[float]] = {}
    for line in each.values():
        for x, ys in line.items():
            points.setdefault(x, []).extend(ys)
    order = in_order(list(points))
    return order, np.array([[f(points[x]) for x in order] for f in (np.mean, np.min, np.max)])


def draw_lines(figure: Lines, rows: list[Row]) -> Canvas | None:
    rows = [row for row in rows if number(row.get(figure.y)) and row.get(figure.x) not in (None, "")]
    rows = [row for row in rows if (row[figure.y] > 0 or not figure.log_y) and all(name in row for name in figure.series)]
    if not rows:
        return None
    main, *settings = figure.series
    models = list(dict.fromkeys(row[main] for row in rows))
    row_keys = [tuple(row[name] for name in settings) for row in rows]
    combined = in_order([key[0] for key in row_keys]) if len(settings) == 1 else list(dict.fromkeys(row_keys))
    keys = [(value,) for value in combined] if len(settings) == 1 else combined
    colour, place, several = colours(models), places(models), len(keys) > 1
    words = any(not number(row[figure.x]) for row in rows)
    order = in_order([row[figure.x] for row in rows])

    canvas = Canvas(figsize=(WIDTH, 2.3), layout="constrained")
    axes = canvas.add_subplot()
    shown: list[float] = []
    lowest: dict[Any, float] = dict.fromkeys(models, math.inf)
    for model in models:
        for j, key in enumerate(keys):
            selected = [row for row, k in zip(rows, row_keys, strict=True) if row[main] == model and k == key]
            if not selected:
                continue
            x, (mean, least, most) = curve(selected, figure)
            at = [order.index(value) for value in x] if words else x
            look = appearance(j if several else place[model], sparse=len(x) <= FEW, setting=several)
            axes.plot(at, mean, color=colour[model], markeredgecolor="white", markeredgewidth=0.4, **look)
            if (most > least).any():
                axes.fill_between(at, least, most, color=colour[model], alpha=0.15, linewidth=0)
            shown += [*least, *most]
            lowest[model] = min(lowest[model], *mean)
    high = figure.high
    if figure.within and max(shown) > (top := min(shown) + figure.within):
        step = round_step(figure.within / 5)
        high = math.ceil(top / step) * step
    name = {m: printable(m) + (f" (from {lowest[m]:.3g})" if high is not None and lowest[m] > high else "") for m in models}
    value_axis(axes, [*shown, *figure.levels.values()], figure.y_label or figure.y, figure.log_y, figure.low, high)
    setting_axis(axes, order, figure.x_label or figure.x, figure.log_x)
    beside = {"xycoords": ("axes fraction", "data"), "xytext": (2, 0), "textcoords": "offset points", "annotation_clip": True}
    for words_of_level, level in figure.levels.items():
        axes.axhline(level, color="#777777", linewidth=0.7, linestyle=(0, (2, 2)), zorder=1)
        words_of_level = printable_lines(words_of_level.replace(", ", ",\n"))
        axes.annotate(words_of_level, (1, level), va="center", fontsize=SMALL, color="#555555", **beside)
    sparse = all(len(line.get_xdata()) <= FEW for line in axes.lines)
    if several:
        legend(canvas, [Line2D([], [], color=colour[m], linewidth=2.5, label=name[m]) for m in models])
        both = [list(zip(settings, key, strict=True)) for key in keys]
        named = [", ".join(f"{of} {exact(value)}" if number(value) else exact(value) for of, value in pairs) for pairs in both]
        legend(
            canvas,
            [Line2D([], [], color="#666666", label=n, **appearance(j, sparse, setting=True)) for j, n in enumerate(named)],
            "outside lower center",
        )
    else:
        legend(canvas, [Line2D([], [], color=colour[m], label=name[m], **appearance(place[m], sparse, setting=False)) for m in models])
    return canvas


def appearance(i: int, sparse: bool, setting: bool) -> dict[str, Any]:
    """Marker and dash of the i-th model or setting: both for a setting; for a model one, the dash where points are too many for markers."""
    return {"marker": MARKERS[i % len(MARKERS)] if sparse else "", "linestyle": DASHES[i % len(DASHES)] if setting or not sparse else "-"}
