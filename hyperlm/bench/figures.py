"""The figures of a report: what `report` declares, drawn as PNG and PDF for a column of a paper (3.35 inches), or for two where many names want room.

Colour is the model, the same in every figure, and of a lightness of its own, so that grey tells the four kinds apart; marker and dash are the
setting. Axes are honest: bars begin at zero, no axis makes a difference of less than a tenth of the value fill it, and one that does not
begin at zero says so. Legends and titles stand outside the axes: the title is the caption of the report.
"""

import math
import re
from collections.abc import Callable, Sequence
from functools import cache
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure as Canvas
from matplotlib.font_manager import findfont, get_font
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from hyperlm.bench.result import Bars, Disk, Figure, Heatmap, Lines, Row, Table
from hyperlm.bench.tables import cell

WIDTH = 3.35  # inches: a column of a paper
DPI = 200
SMALL = 6.0  # points
STYLE = {
    "font.family": "DejaVu Sans", "font.size": 7, "axes.labelsize": 7, "xtick.labelsize": SMALL, "ytick.labelsize": SMALL, "legend.fontsize": SMALL,
    "axes.linewidth": 0.6, "xtick.major.width": 0.6, "ytick.major.width": 0.6, "xtick.minor.width": 0.4, "ytick.minor.width": 0.4,
    "xtick.major.size": 2.5, "ytick.major.size": 2.5, "xtick.minor.size": 1.5, "ytick.minor.size": 1.5, "lines.linewidth": 1.2, "lines.markersize": 3.5,
    "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True, "grid.linewidth": 0.4, "grid.color": "#dddddd",
    "legend.frameon": False, "legend.handlelength": 2.2, "legend.columnspacing": 1.2, "legend.labelspacing": 0.3, "legend.borderaxespad": 0.2,
    "figure.dpi": DPI, "savefig.dpi": DPI, "pdf.fonttype": 42, "ps.fonttype": 42, "text.parse_math": False, "axes.unicode_minus": True,
}  # fmt: skip
COLOURS = {  # by model; lightness in grey: 0, .29, .45, .68
    "softmax": "#000000", "phase7": "#1f4fa8", "phase8": "#1b9e77", "hybrid": "#f5a031", "nanogpt": "#8c6bb1", "nanogpt-muon": "#c51b7d",
    "chance": "#999999", "untrained": "#999999",
    "N0-cosine": "#000000", "N1-bias": "#a6761d", "N2-gain": "#56b4e9", "N3-first-order": "#c51b7d",
}  # fmt: skip
OTHERS = ("#56b4e9", "#c51b7d", "#a6761d", "#8c6bb1", "#1f4fa8", "#f5a031", "#1b9e77", "#000000")  # those of kinds last
NEUTRAL = "#6b7f99"  # of bars that are no models
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DASHES: tuple[Any, ...] = ("-", (0, (4, 1.5)), (0, (1, 1.2)), (0, (5, 1.5, 1, 1.5)), (0, (7, 2)), (0, (3, 1, 1, 1, 1, 1)))
FEW = 16  # points of a line that are marked
SHARE = 0.1  # of the largest value that an axis shows at least
HALO = [withStroke(linewidth=1.5, foreground="white")]


def number(value: Any) -> bool:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool) and math.isfinite(value)


def known(models: Sequence[Any]) -> dict[Any, str]:
    """Models that have a colour of their own, and by what: their name, or the kind that a run's folder speaks of, the first that does."""
    found = {model: model for model in models if model in COLOURS}
    for model in models:
        spoken = set(re.split("[^a-z0-9]+", str(model).rsplit("/", 1)[-1].lower())) & set(COLOURS)
        if model not in found and len(spoken) == 1 and not spoken & set(found.values()):
            found[model] = spoken.pop()
    return found


def places(models: Sequence[Any]) -> dict[Any, int]:
    """Of each model, which marker and dash it has where they tell models apart: the same in every figure, as its colour."""
    free, own = (i for i in range(len(COLOURS), 1000)), known(models)
    return {model: list(COLOURS).index(own[model]) if model in own else next(free) for model in models}


def in_order(values: Sequence[Any]) -> list[Any]:
    """Those that differ: numbers by size, anything else as it comes."""
    found = list(dict.fromkeys(values))
    return sorted(found) if all(map(number, found)) else found


def colours(models: Sequence[Any]) -> dict[Any, str]:
    """Of each model, the one that it has everywhere; others share the rest in order."""
    own = known(models)
    taken = [COLOURS[name] for name in own.values()]
    free = cycle([colour for colour in OTHERS if colour not in taken] or OTHERS)
    return {model: COLOURS[own[model]] if model in own else next(free) for model in models}


@cache
def letters() -> frozenset[int]:
    """Code points that the font has."""
    return frozenset(get_font(findfont(STYLE["font.family"])).get_charmap())


def printable(words: Any) -> str:
    """Text as far as the font has it: a box for a letter that it has not."""
    return "".join(c if ord(c) in letters() else "□" for c in " ".join(str(words).split()))


def short(value: float, _: Any = None) -> str:
    """A tick: 0.002, 1,024, 200k, 1.5M."""
    for one, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= max(one, 1e4):
            return f"{value / one:,.4g}{unit}".replace("-", "−")
    return f"{value:,.4g}".replace("-", "−")


def exact(value: Any) -> str:
    """A length in all its digits, another setting in three."""
    if not number(value):
        return printable(value)
    return f"{int(value):,}" if float(value).is_integer() else f"{value:.3g}"


# -- axes ------------------------------------------------------------------------------------------------------------------------------


def round_step(size: float) -> float:
    """The largest of 1, 2 or 5 times a power of ten that is no larger."""
    power = 10 ** math.floor(math.log10(size))
    return max(step * power for step in (1, 2, 5) if step * power <= size * (1 + 1e-9))


def limits(values: Sequence[float], low: float | None, high: float | None) -> tuple[float, float]:
    """Of a linear axis: from zero where that costs at most half of it, and at least SHARE of the largest value in any case."""
    least, most = (min(values) if low is None else low), (max(values) if high is None else high)
    if low is None and 0 <= least < 0.5 * most:
        least = 0.0
    missing = SHARE * max(abs(least), abs(most)) - (most - least)
    if missing > 0:
        least, most = (least if low is not None else least - missing / 2), (most if high is not None else most + missing / 2)
    margin = 0.05 * (most - least) or 0.5
    if low is None and least != 0:
        step = round_step((most - least or 1) / 8)  # a limit that reads well
        least = math.floor((least - margin) / step) * step
    return least, (most if high is not None else most + margin)


def value_axis(
    axes: Axes, values: Sequence[float], words: str, log: bool, low: float | None = None, high: float | None = None, along: str = "y"
) -> None:
    """Limits, ticks and label of an axis of values; the label says where it does not begin at zero."""
    axis = axes.yaxis if along == "y" else axes.xaxis
    set_limits = axes.set_ylim if along == "y" else axes.set_xlim
    if log:
        (axes.set_yscale if along == "y" else axes.set_xscale)("log")
        least, most = (min(values) if low is None else low), (max(values) if high is None else high)
        room = max((most / least) ** 0.05, ((1 - SHARE) * most / least) ** -0.5)  # SHARE is to be seen here too
        set_limits(least / room if low is None else low, most * room if high is None else high)
        decades = math.log10(most / least)
        if decades <= 0.5:
            axis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
        else:
            axis.set_major_locator(LogLocator(subs=(1,) if decades > 3 else (1, 3) if decades > 1.8 else (1, 2, 5)))
        axis.set_minor_locator(NullLocator() if decades <= 0.5 else LogLocator(subs=tuple(range(1, 10))))
        axis.set_minor_formatter(NullFormatter())
    else:
        bounds = limits(values, low, high)
        set_limits(*bounds)
        axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        beyond = f"; above {short(high)} not shown" if high is not None and max(values) > high else ""
        words += f"\n(axis from {short(bounds[0])}{beyond})" if bounds[0] > 0 else f"\n({beyond[2:]})" if beyond else ""
    axis.set_major_formatter(FuncFormatter(short))
    (axes.set_ylabel if along == "y" else axes.set_xlabel)(printable_lines(words))
    axes.grid(True, which="major", axis=along)


def printable_lines(words: str) -> str:
    return "\n".join(map(printable, words.split("\n")))


def power_of_two(value: Any) -> bool:
    return number(value) and value >= 1 and math.log2(value).is_integer()


def thinned(ticks: list[Any], place: Callable[[Any], float], gap: float) -> list[Any]:
    """Ticks that are at least `gap` apart, the last among them."""
    kept: list[Any] = []
    for tick in reversed(ticks):
        if not kept or abs(place(kept[-1]) - place(tick)) >= gap:
            kept.append(tick)
    return kept[::-1]


def setting_axis(axes: Axes, values: list[Any], words: str, log: bool) -> None:
    """Ticks and label of an x axis: at the settings measured where they are few, words where they are words."""
    axes.set_xlabel(printable(words))
    if not all(map(number, values)):
        longest = max(len(exact(v)) for v in values)
        turned = longest * len(values) > 46
        axes.set_xticks(range(len(values)), [exact(v) for v in values], rotation=35 if turned else 0, ha="right" if turned else "center")
        axes.set_xlim(-0.3, len(values) - 0.7)
        return
    if log and min(values) > 0:
        axes.set_xscale("log", base=2 if all(map(power_of_two, values)) else 10)
    place = math.log if log and min(values) > 0 else float
    span = place(values[-1]) - place(values[0]) or 1.0
    axes.xaxis.set_minor_locator(NullLocator())
    if len(values) <= 6 or (log and all(map(power_of_two, values))):
        labelled = thinned(values, place, span * 0.027 * max(4.5, *(len(exact(v)) for v in values)))
        axes.set_xticks(labelled, [exact(v) for v in labelled])
        axes.set_xticks([v for v in values if v not in labelled], minor=True)
        axes.xaxis.set_minor_formatter(NullFormatter())
        return
    axes.xaxis.set_major_locator(
        LogLocator(subs=(1, 2, 5) if span < 6 else (1,)) if place is math.log else MaxNLocator(5, steps=[1, 2, 2.5, 5, 10])
    )
    axes.xaxis.set_major_formatter(FuncFormatter(short))


def legend(canvas: Canvas, handles: Sequence[Line2D], where: str = "outside upper center") -> None:
    """Outside the axes, in as many columns as the width has room for."""
    longest = max(len(handle.get_label()) for handle in handles)
    columns = max(1, min(len(handles), int((canvas.get_figwidth() - 0.1) / (0.42 + 0.052 * longest))))
    room = 3.6 if "lower" in where else None  # for dashes beside a marker
    canvas.legend(handles=by_rows(handles, columns), loc=where, ncols=columns, handlelength=room)


def by_rows(handles: Sequence[Line2D], columns: int) -> list[Line2D]:
    """In the order in which a legend, which fills columns, reads along its rows."""
    return [handle for first in range(columns) for handle in handles[first::columns]]


# -- lines -----------------------------------------------------------------------------------------------------------------------------


def curve(rows: list[Row], figure: Lines) -> tuple[list[Any], np.ndarray]:
    """x, and the mean, least and largest y at each (3, points): of lines interpolated where their x differ and overlap, else of what each x has."""
    each: dict[Any, dict[Any, list[float]]] = {}
    for row in rows:
        each.setdefault(row.get(figure.over), {}).setdefault(row[figure.x], []).append(float(row[figure.y]))
    xs = {tuple(in_order(list(own))) for own in each.values()}
    if len(xs) > 1 and all(number(x) for own in each.values() for x in own):
        first, last = max(min(own) for own in each.values()), min(max(own) for own in each.values())
        grid = sorted({x for own in each.values() for x in own if first <= x <= last})
    else:
        grid = []
    if grid:
        lines = [(sorted(own), [np.mean(own[x]) for x in sorted(own)]) for own in each.values()]
        between = np.array([np.interp(grid, x, y) for x, y in lines])
        return grid, np.stack([between.mean(0), between.min(0), between.max(0)])
    points: dict[Any, list[float]] = {}
    for own in each.values():
        for x, ys in own.items():
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
    kept = [tuple(row[name] for name in settings) for row in rows]
    combined = in_order([key[0] for key in kept]) if len(settings) == 1 else list(dict.fromkeys(kept))
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
            own = [row for row, k in zip(rows, kept, strict=True) if row[main] == model and k == key]
            if not own:
                continue
            x, (mean, least, most) = curve(own, figure)
            at = [order.index(value) for value in x] if words else x
            look = appearance(j if several else place[model], few=len(x) <= FEW, setting=several)
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
    few = all(len(line.get_xdata()) <= FEW for line in axes.lines)
    if several:
        legend(canvas, [Line2D([], [], color=colour[m], linewidth=2.5, label=name[m]) for m in models])
        both = [list(zip(settings, key, strict=True)) for key in keys]
        named = [", ".join(f"{of} {exact(value)}" if number(value) else exact(value) for of, value in pairs) for pairs in both]
        legend(
            canvas,
            [Line2D([], [], color="#666666", label=n, **appearance(j, few, setting=True)) for j, n in enumerate(named)],
            "outside lower center",
        )
    else:
        legend(canvas, [Line2D([], [], color=colour[m], label=name[m], **appearance(place[m], few, setting=False)) for m in models])
    return canvas


def appearance(i: int, few: bool, setting: bool) -> dict[str, Any]:
    """Marker and dash of the i-th model or setting: both for a setting; for a model the marker, or the dash where points are too many for markers."""
    return {"marker": MARKERS[i % len(MARKERS)] if few else "", "linestyle": DASHES[i % len(DASHES)] if setting or not few else "-"}


# -- bars ------------------------------------------------------------------------------------------------------------------------------


LONGEST = 22  # characters of a name beside a bar


def draw_bars(figure: Bars, rows: list[Row]) -> Canvas | None:
    rows = [row for row in rows if number(row.get(figure.y)) and figure.x in row]
    if not rows:
        return None
    names = list(dict.fromkeys(row[figure.x] for row in rows))
    each = [[float(row[figure.y]) for row in rows if row[figure.x] == name] for name in names]
    values, models = [value for own in each for value in own], {row[figure.x]: row.get("model") for row in rows}
    nulls = [[row[figure.null] for row in rows if row[figure.x] == name and figure.null and number(row.get(figure.null))] for name in names]
    own_colours = colours(list(dict.fromkeys(models.values())))
    colour = {name: own_colours[models[name]] if models[name] is not None else NEUTRAL for name in names}
    marks = min(values) > 0.5 * max(values) > 0
    canvas = Canvas(figsize=(WIDTH, 0.55 + 0.2 * len(names) + 0.15 * any(map(bool, nulls))), layout="constrained")
    axes = canvas.add_subplot()
    several, many = (any(len(own) > count for own in each) for count in (1, FEW))
    for i, own in enumerate(each):
        mean = float(np.mean(own))
        if marks:
            axes.plot([mean, mean], [i - 0.3, i + 0.3], color=colour[names[i]], linewidth=2)
        else:
            axes.barh(i, mean, height=0.62, color=colour[names[i]])
        if many:
            axes.plot(own, [i] * len(own), "|", markersize=5, markeredgecolor="#444444", markeredgewidth=0.4)
        elif marks or several:
            axes.plot(
                own,
                [i] * len(own),
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
    values += [value for own in nulls for value in own]
    bounds = values if marks else [0.0, *values]
    value_axis(axes, bounds, figure.y_label or figure.y, log=False, along="x")
    if not marks:
        axes.axvline(0, color="black", linewidth=0.6)
    axes.set_yticks(range(len(names)), [name if len(name) <= LONGEST else f"…{name[1 - LONGEST :]}" for name in map(exact, names)])
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    return canvas


# -- heatmaps --------------------------------------------------------------------------------------------------------------------------


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


# -- the Poincare disk -----------------------------------------------------------------------------------------------------------------

RINGS = (1, 2, 3)  # radii of faint circles
SPARSE = 25  # points whose names have room in half a column
AROUND = [(math.cos(a), math.sin(a)) for a in np.linspace(0, 2 * math.pi, 16, endpoint=False)]


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
        own = [row for row in rows if row.get(figure.panels, "") == panels[i]]
        for j, group in enumerate(groups):
            points = [(row["x"], row["y"]) for row in own if row.get(figure.group, "") == group]
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


# -- files -----------------------------------------------------------------------------------------------------------------------------

DRAW: dict[type, Callable[..., Canvas | None]] = {Lines: draw_lines, Bars: draw_bars, Heatmap: draw_heatmap, Disk: draw_disk}


def draw(figure: Figure, tables: Sequence[Table], folder: Path) -> bool:
    """Write the PNG and the PDF of a figure into a folder; False where there is nothing yet to draw.

    Raises:
        KeyError: if it names no table.
    """
    rows = {table.name: table.rows for table in tables}[figure.table]
    with matplotlib.rc_context(STYLE):
        canvas = DRAW[type(figure)](figure, rows)
        if canvas is None:
            return False
        canvas.savefig(folder / f"{figure.file}.png")
        canvas.set_layout_engine("none")  # all has its place
        canvas.savefig(folder / f"{figure.file}.pdf", metadata={"CreationDate": None})  # the same bytes for the same numbers
    return True
