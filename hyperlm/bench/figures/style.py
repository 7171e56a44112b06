"""How figures look: sizes, colours, markers, and numbers and names as words."""

import math
import re
from collections.abc import Sequence
from functools import cache
from itertools import cycle
from typing import Any

import numpy as np
from matplotlib.font_manager import findfont, get_font

WIDTH = 3.35  # inches: a column of a paper
DPI = 200
SMALL = 6.0  # points
STYLE = {
    "font.family": "DejaVu Sans", "font.size": 7, "axes.labelsize": 7, "xtick.labelsize": SMALL, "ytick.labelsize": SMALL,
    "legend.fontsize": SMALL,
    "axes.linewidth": 0.6, "xtick.major.width": 0.6, "ytick.major.width": 0.6, "xtick.minor.width": 0.4, "ytick.minor.width": 0.4,
    "xtick.major.size": 2.5, "ytick.major.size": 2.5, "xtick.minor.size": 1.5, "ytick.minor.size": 1.5,
    "lines.linewidth": 1.2, "lines.markersize": 3.5,
    "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True, "grid.linewidth": 0.4, "grid.color": "#dddddd",
    "legend.frameon": False, "legend.handlelength": 2.2, "legend.columnspacing": 1.2, "legend.labelspacing": 0.3,
    "legend.borderaxespad": 0.2,
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


def number(value: Any) -> bool:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool) and math.isfinite(value)


def known(models: Sequence[Any]) -> dict[Any, str]:
    """Models that have a colour of their own, and by what: their name, or the kind that a run's folder speaks of, the first that does."""
    names = {model: model for model in models if model in COLOURS}
    for model in models:
        spoken = set(re.split("[^a-z0-9]+", str(model).rsplit("/", 1)[-1].lower())) & set(COLOURS)
        if model not in names and len(spoken) == 1 and not spoken & set(names.values()):
            names[model] = spoken.pop()
    return names


def places(models: Sequence[Any]) -> dict[Any, int]:
    """Of each model, which marker and dash it has where they tell models apart: the same in every figure, as its colour."""
    free, kinds = (i for i in range(len(COLOURS), 1000)), known(models)
    return {model: list(COLOURS).index(kinds[model]) if model in kinds else next(free) for model in models}


def in_order(values: Sequence[Any]) -> list[Any]:
    """Those that differ: numbers by size, anything else as it comes."""
    distinct = list(dict.fromkeys(values))
    return sorted(distinct) if all(map(number, distinct)) else distinct


def colours(models: Sequence[Any]) -> dict[Any, str]:
    """Of each model, the one that it has everywhere; others share the rest in order."""
    kinds = known(models)
    taken = [COLOURS[name] for name in kinds.values()]
    free = cycle([colour for colour in OTHERS if colour not in taken] or OTHERS)
    return {model: COLOURS[kinds[model]] if model in kinds else next(free) for model in models}


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
