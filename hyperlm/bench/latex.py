"""A report as one LaTeX file, out of which each table and figure can be lifted."""

import re
from typing import Any

from tabulate import LATEX_ESCAPE_RULES

from hyperlm.bench.result import Figure, Result, Table
from hyperlm.bench.tables import laid_out, readable, sentence, table

PREAMBLE = r"""% Compiles alone; each table and figure can be lifted out of it. Needs booktabs and graphicx.
\documentclass{article}
\usepackage[T1]{fontenc}
\usepackage[margin=0.8in]{geometry}
\usepackage{booktabs,graphicx}
\begin{document}
"""
SYMBOLS = {
    "±": r"\ensuremath{\pm}", "×": r"\ensuremath{\times}", "−": r"\ensuremath{-}", "→": r"\ensuremath{\to}", "≤": r"\ensuremath{\leq}",
    "≥": r"\ensuremath{\geq}", "α": r"\ensuremath{\alpha}", "β": r"\ensuremath{\beta}", "λ": r"\ensuremath{\lambda}",
    "ρ": r"\ensuremath{\rho}", "σ": r"\ensuremath{\sigma}", "Δ": r"\ensuremath{\Delta}", "²": r"\ensuremath{^2}", "…": r"\ldots{}",
    "–": "--", "—": "---", "µ": r"\ensuremath{\mu}", "∞": r"\ensuremath{\infty}", "°": r"\ensuremath{^\circ}",
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


def document(record: dict[str, Any], results: list[Result], drawn: set[str]) -> str:
    facts = {"commit": record["commit"], "date": record["date"], **record["machine"]}
    parts = [PREAMBLE, f"\\begin{{quote}}\\raggedright\\ttfamily\n{escape(record['command'])}\n\\end{{quote}}"]
    parts.append(latex_items([f"{name}: {value}" for name, value in facts.items() if value != ""]))
    for result in results:
        parts.append(f"\\section*{{{escape(result.suite)}}}")
        parts += [latex_table(result.suite, shown) for shown in result.tables if shown.shown and shown.rows]
        parts += [latex_items(result.notes), *(latex_figure(result.suite, f) for f in result.figures if f.file in drawn), "\\clearpage"]
    return known("\n\n".join(part for part in parts if part) + "\n\n\\end{document}\n")
