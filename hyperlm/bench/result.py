"""What suites measure, as data: tables, and figures that are drawn from them. What writes and draws them is in report.py and figures/."""

from dataclasses import dataclass, field
from typing import Any

Row = dict[str, Any]


@dataclass(frozen=True)
class Table:
    """Rows of equal columns; a value that there is not is left out. One that is not shown is in results.json alone, for figures to be drawn
    from."""

    name: str  # in results.json and in the report: "loss by position"
    rows: list[Row]
    caption: str = ""  # in a sentence or two: what the numbers are, in which units, on what
    shown: bool = True
    digits: int = 4  # of the largest float of a column; errors and spreads have one less
    quiet: list[str] = field(default_factory=list)  # columns that are shown only where their values differ


@dataclass(frozen=True)
class Lines:
    """A line over `x` for each combination of the columns `series`; the first of them, if it is "model", decides the colour, others marker
    and dash. Rows that differ in the column `over` alone ("seed") are one line, their mean, in a band from the least to the largest; where
    their x differ ("seconds"), values between those measured are interpolated. Numbers or words along x; a y axis shows at least a tenth of
    its values."""

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
    low: float | None = None  # of the y axis, where what is beyond is of no interest, as the first losses of a curve
    high: float | None = None
    within: float = 0.0  # farther than this above the least value nothing is shown: one arm near divergence would flatten the others


@dataclass(frozen=True)
class Bars:
    """The mean of `y` for each value of the column `x`, with a point for each row, in the colour of its "model" if it has one. Bars begin
    at zero; where all values are within a factor of two, marks take their place, on an axis that need not."""

    file: str
    title: str
    table: str
    x: str
    y: str
    y_label: str = ""
    null: str = ""  # column of what the null comes to: its mean is a mark beside


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
    """Points of the Poincare disk, by columns x and y (within the unit circle) and `label` (may be empty), a panel for each value of
    `panels`."""

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
