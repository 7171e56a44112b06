"""Axes and legends: honest limits, ticks where something was measured, labels that say what is not shown."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from hyperlm.bench.figures.style import exact, number, printable, short

SHARE = 0.1  # of the largest value that an axis shows at least


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
    spaced: list[Any] = []
    for tick in reversed(ticks):
        if not spaced or abs(place(spaced[-1]) - place(tick)) >= gap:
            spaced.append(tick)
    return spaced[::-1]


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
