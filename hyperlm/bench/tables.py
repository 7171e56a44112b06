"""Tables as text, for a terminal and for Markdown."""

import math
import re
from typing import Any

from tabulate import tabulate

from hyperlm.bench.result import Result, Row, Table


def cell(value: Any, digits: int = 4) -> str:
    """A value as tables show it: so many digits of a float, thousands separated; nothing for None."""
    if isinstance(value, float):
        return f"{rounded(value):,.0f}" if abs(value) >= 1000 else f"{value:.{digits}g}"
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else " ".join(str(value).split())


def rounded(value: float) -> float:
    """A large measured number without digits that say nothing: 1,084,694 is 1,085,000."""
    return float(f"{value:.4g}") if 1e4 <= abs(value) < math.inf else value


def column(values: list[Any], digits: int = 4) -> list[str]:
    """Values of one column: floats with equally many decimals, so that the largest has `digits`, unless the smallest would have none."""
    sizes = [abs(x) for x in values if isinstance(x, float) and math.isfinite(x) and x]
    decimals = max(0, digits - 1 - math.floor(math.log10(max(sizes)))) if sizes else 0
    if not sizes or (max(sizes) > 1e3 * min(sizes) and (min(sizes) < 0.5 * 10**-decimals or not decimals)):
        return [cell(x, digits) for x in values]
    written = [f"{rounded(x):,.{decimals}f}" if isinstance(x, float) else "" for x in values]
    spare = min(len(x) - len(x.rstrip("0")) for x in written if "." in x) if decimals else 0
    shorter = [text[: len(text) - spare].rstrip(".") for text in written]
    return [text if isinstance(x, float) and math.isfinite(x) else cell(x) for x, text in zip(values, shorter, strict=True)]


def columns_of(rows: list[Row]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))


def alignment(rows: list[Row]) -> list[str]:
    """Numbers, and text that begins with one ("3.12 ± 0.01"), to the right; other columns to the left."""

    def of_numbers(name: str) -> bool:
        values = [row[name] for row in rows if row.get(name) not in ("", None)]
        return any((isinstance(x, int | float) and not isinstance(x, bool)) or re.match(r"[+−-]?\.?\d", str(x)) for x in values)

    return ["right" if of_numbers(name) else "left" for name in columns_of(rows)]


UNCERTAIN = re.compile(r"\b(error|spread)\b|± %")  # columns of how far others may be off


def values_of(rows: list[Row], name: str) -> list[Any]:
    """Of one column; an error that cannot be told, as of a single document, is left out."""
    values = [row.get(name) for row in rows]
    return [None if UNCERTAIN.search(name) and isinstance(x, float) and math.isnan(x) else x for x in values]


def laid_out(rows: list[Row], style: str, digits: int = 4) -> str:
    columns = columns_of(rows)
    of_each = [digits - bool(UNCERTAIN.search(name)) for name in columns]
    cells = list(zip(*(column(values_of(rows, name), precision) for name, precision in zip(columns, of_each, strict=True)), strict=True))
    if style == "pipe":
        columns, *cells = ([text.replace("|", "\\|") for text in line] for line in [columns, *cells])
    return tabulate(cells, columns, tablefmt=style, disable_numparse=True, colalign=alignment(rows))


def table(rows: list[Row], digits: int = 4) -> str:
    """Rows as a Markdown table that also reads well in a terminal; nothing for no rows."""
    return laid_out(rows, "pipe", digits) if rows else ""


def readable(shown: Table) -> tuple[list[Row], list[str]]:
    """Rows without quiet columns that are equal in all; and why some failed, in lines below the table, which would widen all of it."""
    equal = {name for name in shown.quiet if len({str(row[name]) for row in shown.rows if row.get(name) not in (None, "")}) < 2}
    rows = [{name: value for name, value in row.items() if name not in equal} for row in shown.rows]
    columns = [name for name in columns_of(rows) if name != "failed"]
    why: list[str] = []
    for i, row in enumerate(rows):
        free = [name for name in columns if row.get(name) in (None, "")]
        if row.get("failed") and free:
            labels = {name: row[name] for name in columns if name not in free}
            rows[i] = labels | {free[0]: "failed"}
            why.append(f"{', '.join([cell(value) for value in labels.values()])} failed: {cell(row['failed'])}")
    columns = columns_of(rows)
    return [{name: row.get(name) for name in columns} for row in rows], list(dict.fromkeys(why))


def text(result: Result) -> str:
    """A result as a terminal shows it: the tables that are shown, each under its name, and the notes."""
    parts = []
    for t in result.tables:
        if t.shown and t.rows:
            rows, why = readable(t)
            parts.append("\n".join([f"{result.suite}, {t.name}", table(rows, t.digits), *why]))
    return "\n\n".join(parts + ["\n".join(result.notes)] * bool(result.notes))


def sentence(name: str, caption: str) -> str:
    """A table's caption, or its name where it has none."""
    return caption or f"{name[:1].upper()}{name[1:]}."
