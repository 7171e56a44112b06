"""Bars from zero, or marks where they would hide all: a mean, the values that it is of, and its null."""

import numpy as np
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D

from hyperlm.bench.figures.axes import legend, value_axis
from hyperlm.bench.figures.style import FEW, NEUTRAL, WIDTH, colours, exact, number, printable
from hyperlm.bench.result import Bars, Row

LONGEST = 22  # characters of a name beside a bar


def draw_bars(figure: Bars, rows: list[Row]) -> Canvas | None:
    rows = [row for row in rows if number(row.get(figure.y)) and figure.x in row]
    if not rows:
        return None
    names = list(dict.fromkeys(row[figure.x] for row in rows))
    each = [[float(row[figure.y]) for row in rows if row[figure.x] == name] for name in names]
    values, models = [value for repeats in each for value in repeats], {row[figure.x]: row.get("model") for row in rows}
    nulls = [[row[figure.null] for row in rows if row[figure.x] == name and figure.null and number(row.get(figure.null))] for name in names]
    colour_of_model = colours(list(dict.fromkeys(models.values())))
    colour = {name: colour_of_model[models[name]] if models[name] is not None else NEUTRAL for name in names}
    marks = min(values) > 0.5 * max(values) > 0
    canvas = Canvas(figsize=(WIDTH, 0.55 + 0.2 * len(names) + 0.15 * any(map(bool, nulls))), layout="constrained")
    axes = canvas.add_subplot()
    several, many = (any(len(repeats) > count for repeats in each) for count in (1, FEW))
    for i, repeats in enumerate(each):
        mean = float(np.mean(repeats))
        if marks:
            axes.plot([mean, mean], [i - 0.3, i + 0.3], color=colour[names[i]], linewidth=2)
        else:
            axes.barh(i, mean, height=0.62, color=colour[names[i]])
        if many:
            axes.plot(repeats, [i] * len(repeats), "|", markersize=5, markeredgecolor="#444444", markeredgewidth=0.4)
        elif marks or several:
            axes.plot(
                repeats,
                [i] * len(repeats),
                "o",
                markersize=3,
                markerfacecolor="white",
                markeredgecolor=colour[names[i]] if marks else "#333333",
                markeredgewidth=0.6,
            )
        if nulls[i]:
            axes.plot(np.mean(nulls[i]), i, "D", markersize=3.5, markerfacecolor="white", markeredgecolor="black", markeredgewidth=0.8)
    if any(nulls):
        shape = {"marker": "D", "markersize": 3.5, "markerfacecolor": "white", "markeredgecolor": "black"}
        legend(canvas, [Line2D([], [], linestyle="", label=printable(figure.null), **shape)])
    values += [value for repeats in nulls for value in repeats]
    bounds = values if marks else [0.0, *values]
    value_axis(axes, bounds, figure.y_label or figure.y, log=False, along="x")
    if not marks:
        axes.axvline(0, color="black", linewidth=0.6)
    axes.set_yticks(range(len(names)), [name if len(name) <= LONGEST else f"…{name[1 - LONGEST :]}" for name in map(exact, names)])
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    return canvas
