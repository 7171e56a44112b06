"""The figures of a report: what suites declare, drawn as PNG and PDF for a column of a paper (3.35 inches), or for two where many names
want room.

Colour is the model, the same in every figure, and of a lightness of its own, so that grey tells the four kinds apart; marker and dash are
the setting. Axes are honest: bars begin at zero, no axis makes a difference of less than a tenth of the value fill it, and one that does
not begin at zero says so. Legends and titles stand outside the axes: the title is the caption of the report.

style.py: colours, sizes, words; axes.py: limits, ticks, legends; lines.py, bars.py, heatmap.py, disk.py: a kind of figure each.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure as Canvas

from hyperlm.bench.figures.bars import draw_bars
from hyperlm.bench.figures.disk import draw_disk
from hyperlm.bench.figures.heatmap import draw_heatmap
from hyperlm.bench.figures.lines import draw_lines
from hyperlm.bench.figures.style import STYLE
from hyperlm.bench.result import Bars, Disk, Figure, Heatmap, Lines, Table

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
