"""What a benchmark leaves: results.json with every number, and written from it report.md, report.tex and the figures.

Suites declare tables and figures as data; nothing here knows what they measure. What is in results.json is enough to write all the rest again.
"""

import json
import math
import os
import re
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from tabulate import LATEX_ESCAPE_RULES, tabulate

from hyperlm import env
from hyperlm.files import finite, read_json
from hyperlm.runs import RunError

Row = dict[str, Any]


@dataclass(frozen=True)
class Table:
    """Rows of equal columns; a value that there is not is left out. One that is not shown is in results.json alone, for figures to be drawn from."""

    name: str  # in results.json and in the report: "loss by position"
    rows: list[Row]
    caption: str = ""  # in a sentence or two: what the numbers are, in which units, on what
    shown: bool = True
    digits: int = 4  # of the largest float of a column; errors and spreads have one less
    quiet: list[str] = field(default_factory=list)  # columns that are shown only where their values differ


@dataclass(frozen=True)
class Lines:
    """A line over `x` for each combination of the columns `series`; the first of them, if it is "model", decides the colour, others marker and dash.
    Rows that differ in the column `over` alone ("seed") are one line, their mean, in a band from the least to the largest; where their x differ
    ("seconds"), values between those measured are interpolated. Numbers or words along x; a y axis shows at least a tenth of its values."""

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
    """Points of the Poincare disk, by columns x and y (within the unit circle) and `label` (may be empty), a panel for each value of `panels`."""

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


# -- tables as text --------------------------------------------------------------------------------------------------------------------


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
    if not sizes or max(sizes) > 1e3 * min(sizes) and (min(sizes) < 0.5 * 10**-decimals or not decimals):
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
        return any(isinstance(x, int | float) and not isinstance(x, bool) or re.match(r"[+−-]?\.?\d", str(x)) for x in values)

    return ["right" if of_numbers(name) else "left" for name in columns_of(rows)]


UNCERTAIN = re.compile(r"\b(error|spread)\b|± %")  # columns of how far others may be off


def laid_out(rows: list[Row], style: str, digits: int = 4) -> str:
    columns = columns_of(rows)
    of_each = [digits - bool(UNCERTAIN.search(name)) for name in columns]
    cells = list(zip(*(column([row.get(name) for row in rows], own) for name, own in zip(columns, of_each, strict=True)), strict=True))
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
            own = {name: row[name] for name in columns if name not in free}
            rows[i] = own | {free[0]: "failed"}
            why.append(f"{', '.join([cell(value) for value in own.values()])} failed: {cell(row['failed'])}")
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


# -- LaTeX -----------------------------------------------------------------------------------------------------------------------------

PREAMBLE = r"""% Compiles alone; each table and figure can be lifted out of it. Needs booktabs and graphicx.
\documentclass{article}
\usepackage[T1]{fontenc}
\usepackage[margin=0.8in]{geometry}
\usepackage{booktabs,graphicx}
\begin{document}
"""
SYMBOLS = {
    "±": r"\ensuremath{\pm}", "×": r"\ensuremath{\times}", "−": r"\ensuremath{-}", "→": r"\ensuremath{\to}", "≤": r"\ensuremath{\leq}",
    "≥": r"\ensuremath{\geq}", "α": r"\ensuremath{\alpha}", "β": r"\ensuremath{\beta}", "λ": r"\ensuremath{\lambda}", "ρ": r"\ensuremath{\rho}",
    "σ": r"\ensuremath{\sigma}", "Δ": r"\ensuremath{\Delta}", "²": r"\ensuremath{^2}", "…": r"\ldots{}", "–": "--", "—": "---",
    "µ": r"\ensuremath{\mu}", "∞": r"\ensuremath{\infty}", "°": r"\ensuremath{^\circ}",
}  # fmt: skip
LATIN = 0x100  # characters below it every LaTeX knows
PAGE = 40  # rows of a table that fit on a page
WIDE = 85  # characters of a row that fit in the width of a page


def escape(words: str) -> str:
    """Text as LaTeX: two hyphens as two, and no bracket first, which would be an argument."""
    return re.sub(r"^\[", "{[}", re.sub("--", "-{}-", "".join(LATEX_ESCAPE_RULES.get(c, c) for c in words)))


def known(latex: str) -> str:
    """LaTeX with macros for symbols, and code points for letters that would end its compilation."""
    return "".join(SYMBOLS.get(c, c if ord(c) < LATIN else f"(U+{ord(c):04X})") for c in latex)


def label(*words: str) -> str:
    return re.sub("[^a-z0-9]+", "-", " ".join(words).lower()).strip("-")


def latex_table(suite: str, shown: Table) -> str:
    """A table as floats of at most PAGE rows, each smaller where it is too wide."""
    floats = []
    every, why = readable(shown)
    below = "".join(f"\n\\par\\smallskip{{\\footnotesize {escape(line)}}}" for line in why)
    for first in range(0, len(every), PAGE):
        rows = every[first : first + PAGE]
        body = laid_out(rows, "latex_booktabs", shown.digits)
        body = re.sub("--", "-{}-", re.sub(r"(?m)^( *)\[", r"\1{[}", body))  # a bracket first would be an argument
        if max(map(len, table(rows).splitlines())) > WIDE:
            body = "\\resizebox{\\linewidth}{!}{%\n" + body + "}"
        caption = escape(sentence(shown.name, shown.caption)) + (" (continued)" if first else "")
        key = label(suite, shown.name, str(first // PAGE + 1) if first else "")
        head = f"\\begin{{table}}[t]\n\\centering\\small\n\\caption{{{caption}}}\n\\label{{tab:{key}}}"
        floats.append(f"{head}\n{body}{below}\n\\end{{table}}")
    return "\n\n".join(floats)


def latex_figure(suite: str, figure: Figure) -> str:
    included = f"\\includegraphics{{{figure.file}.pdf}}\n\\caption{{{escape(figure.title)}}}\n\\label{{fig:{label(suite, figure.file)}}}"
    return f"\\begin{{figure}}[t]\n\\centering\n{included}\n\\end{{figure}}"


def latex_items(items: list[str]) -> str:
    return "\\begin{itemize}\n" + "\n".join(f"\\item {escape(item)}" for item in items) + "\n\\end{itemize}" if items else ""


# -- the report ------------------------------------------------------------------------------------------------------------------------


def sentence(name: str, caption: str) -> str:
    """A table's caption, or its name where it has none."""
    return caption or f"{name[:1].upper()}{name[1:]}."


def markdown(record: dict[str, Any], results: list[Result], drawn: set[str]) -> str:
    facts = {"commit": record["commit"], "date": record["date"], **record["machine"]}
    parts = ["# hyperlm benchmark", f"`{record['command']}`", "\n".join(f"- {name}: {value}" for name, value in facts.items() if value != "")]
    for result in results:
        parts.append(f"## {result.suite}")
        for shown in result.tables:
            if shown.shown and shown.rows:
                rows, why = readable(shown)
                parts += [f"### {shown.name}", *[shown.caption] * bool(shown.caption), table(rows, shown.digits)]
                parts += ["\n".join(f"- {line}" for line in why)] * bool(why)
        parts += ["\n".join(f"- {note}" for note in result.notes)] * bool(result.notes)
        parts += [f"![{f.title}]({f.file}.png)\n\n*{f.title}* ([PDF]({f.file}.pdf))" for f in result.figures if f.file in drawn]
    return "\n\n".join(parts) + "\n"


def latex(record: dict[str, Any], results: list[Result], drawn: set[str]) -> str:
    facts = {"commit": record["commit"], "date": record["date"], **record["machine"]}
    parts = [PREAMBLE, f"\\begin{{quote}}\\raggedright\\ttfamily\n{escape(record['command'])}\n\\end{{quote}}"]
    parts.append(latex_items([f"{name}: {value}" for name, value in facts.items() if value != ""]))
    for result in results:
        parts.append(f"\\section*{{{escape(result.suite)}}}")
        parts += [latex_table(result.suite, shown) for shown in result.tables if shown.shown and shown.rows]
        parts += [latex_items(result.notes), *(latex_figure(result.suite, f) for f in result.figures if f.file in drawn), "\\clearpage"]
    return known("\n\n".join(part for part in parts if part) + "\n\n\\end{document}\n")


def commit() -> str:
    """Of the code that runs, "+changes" if it has some; empty where it is no git checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return ""
    found = []
    for arguments in (("rev-parse", "--short=12", "HEAD"), ("status", "--porcelain")):
        try:
            asked = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=20, check=True)
        except (OSError, subprocess.SubprocessError):  # no git, or not ours
            return ""
        found.append(asked.stdout.strip())
    return found[0] + ("+changes" if found[1] else "")


def plain(value: Any) -> Any:
    """A number of numpy or torch as one of Python."""
    return finite(value.item())


def write(folder: Path, results: Sequence[Result], machine: dict[str, Any], command: str) -> None:
    """Write results.json, report.md, report.tex and the figures into `folder`: all of it or nothing.

    What an earlier call wrote there is replaced, file by file and each at once, results.json first; other files, models among them, stay.
    A figure that cannot be drawn is a note in the report: what was measured is worth more.

    Raises:
        OSError: if it cannot be written; its strerror says what and where.
    """
    try:
        write_all(folder, results, machine, command)
    except OSError as e:
        kept = "what is there is an earlier report" if (folder / "results.json").exists() else "none is there"
        raise OSError(e.errno, f"the report could not be written to {folder}, and {kept} ({e.strerror or e})") from e


def write_all(folder: Path, results: Sequence[Result], machine: dict[str, Any], command: str) -> None:
    """The work of `write`."""
    from hyperlm.bench import figures  # matplotlib takes a second

    record = {"command": command, "commit": commit(), "date": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()), "machine": machine}
    stored = [asdict(r) | {"figures": [{"kind": type(f).__name__, **asdict(f)} for f in r.figures]} for r in results]
    with tempfile.TemporaryDirectory(prefix=".", dir=folder.parent) as parts:
        part = Path(parts) / folder.name
        part.mkdir()
        content = json.dumps(finite({**record, "results": stored}), indent=2, allow_nan=False, default=plain)
        (part / "results.json").write_text(content + "\n", encoding="utf-8")
        drawn, told = set(), []
        for result in results:
            notes = list(result.notes)
            for figure in result.figures:
                try:
                    if figures.draw(figure, result.tables, part):
                        drawn.add(figure.file)
                except (ValueError, TypeError, KeyError, RuntimeError) as e:
                    notes.append(f"{figure.file} is not drawn: {type(e).__name__}: {e}")
                    env.say(notes[-1])
            told.append(replace(result, notes=notes))
        (part / "report.md").write_text(markdown(record, told, drawn), encoding="utf-8", errors="backslashreplace")
        (part / "report.tex").write_text(latex(record, told, drawn), encoding="utf-8", errors="backslashreplace")
        if not folder.exists():
            os.replace(part, folder)
            return
        for path in sorted(part.iterdir(), key=lambda path: path.name != "results.json"):
            os.replace(path, folder / path.name)


# -- reports read back -----------------------------------------------------------------------------------------------------------------

LARGEST = 1 << 28  # bytes of a results.json
FIGURES = {kind.__name__: kind for kind in (Lines, Bars, Heatmap, Disk)}


def read(folder: Path) -> dict[str, Any]:
    """results.json as it is.

    Raises:
        RunError: if there is none, or it is none of this version.
    """
    path = folder / "results.json"
    try:
        record = read_json(path, LARGEST)
    except FileNotFoundError as e:
        raise RunError(f"{folder}: no results.json in it; name the folder of a benchmark") from e
    except (ValueError, OSError) as e:
        raise RunError(f"{path} cannot be read: {e}") from e
    if not isinstance(record, dict) or not isinstance(record.get("command"), str) or not isinstance(record.get("results"), list):
        raise RunError(f"{path} holds no results")
    return record


def restored(values: dict[str, Any]) -> Any:
    """A figure from its fields; tuples are lists in JSON."""
    kind = FIGURES[values["kind"]]
    return kind(**{name: tuple(x) if isinstance(x, list) else x for name, x in values.items() if name != "kind"})


def load(folder: Path) -> list[Result]:
    """The results that `write` left in a folder. Numbers that JSON lacks come back as nan.

    Raises:
        RunError: if there are none, or they are of another version.
    """
    results = []
    try:
        for found in read(folder)["results"]:
            tables = [Table(**t | {"rows": [{k: math.nan if x is None else x for k, x in row.items()} for row in t["rows"]]}) for t in found["tables"]]
            results.append(Result(found["suite"], tables, found["notes"], [restored(f) for f in found["figures"]]))
    except (KeyError, TypeError, AttributeError) as e:
        raise RunError(f"{folder / 'results.json'} is damaged, or of another version of hyperlm: measure again") from e
    return results


def labels(result: Result) -> set[str]:
    """The models of a result."""
    return {row["model"] for t in result.tables for row in t.rows if "model" in row}


def relabelled(result: Result, names: dict[str, str]) -> Result:
    def renamed(row: Row) -> Row:
        return row | {"model": names.get(row["model"], row["model"])} if "model" in row else row

    return replace(result, tables=[replace(t, rows=[renamed(row) for row in t.rows]) for t in result.tables])


def join(folders: Sequence[Path]) -> list[Result]:
    """The results of several benchmarks as one: those of a suite together, the rows of tables of one name one after another, and a note on each.
    Models that several have are told apart by the names of their folders.

    Raises:
        RunError: where `load` does.
    """
    joined: dict[str, Result] = {}
    loaded = {folder: load(folder) for folder in folders}
    often = Counter((result.suite, label) for results in loaded.values() for result in results for label in labels(result))
    for folder, results in loaded.items():
        record = read(folder)
        origin = ", ".join(str(record.get(name)) for name in ("commit", "date") if record.get(name))
        for result in results:
            result = relabelled(result, {label: f"{label} ({folder.name})" for label in labels(result) if often[result.suite, label] > 1})
            former = joined.get(result.suite, Result(result.suite, []))
            tables = {t.name: t for t in former.tables}
            for t in result.tables:
                tables[t.name] = replace(t, rows=[*tables[t.name].rows, *t.rows] if t.name in tables else t.rows)
            notes = dict.fromkeys([*former.notes, f"{folder}: {record['command']} ({origin})", *result.notes])
            figures = {f.file: f for f in [*former.figures, *result.figures]}
            joined[result.suite] = Result(result.suite, list(tables.values()), list(notes), list(figures.values()))
    return list(joined.values())
