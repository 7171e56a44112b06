"""What a benchmark leaves: results.json with every number, and written from it report.md, report.tex and the figures.

Suites declare tables and figures as data; nothing here knows what they measure. What is in results.json is enough to write all the rest
again.
"""

import json
import math
import os
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from hyperlm import env
from hyperlm.bench.latex import document
from hyperlm.bench.result import Bars, Disk, Heatmap, Lines, Result, Row, Table
from hyperlm.bench.tables import readable, table
from hyperlm.files import finite, read_json
from hyperlm.runs import RunError


def markdown(record: dict[str, Any], results: list[Result], drawn: set[str]) -> str:
    facts = {"commit": record["commit"], "date": record["date"], **record["machine"]}
    parts = [
        "# hyperlm benchmark",
        f"`{record['command']}`",
        "\n".join(f"- {name}: {value}" for name, value in facts.items() if value != ""),
    ]
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


def commit() -> str:
    """Of the code that runs, "+changes" if it has some; empty where it is no git checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return ""
    outputs = []
    for arguments in (("rev-parse", "--short=12", "HEAD"), ("status", "--porcelain")):
        try:
            done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=20, check=True)
        except (OSError, subprocess.SubprocessError):  # no git, or not ours
            return ""
        outputs.append(done.stdout.strip())
    return outputs[0] + ("+changes" if outputs[1] else "")


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
        remains = "what is there is an earlier report" if (folder / "results.json").exists() else "none is there"
        raise OSError(e.errno, f"the report could not be written to {folder}, and {remains} ({e.strerror or e})") from e


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
        drawn, annotated = set(), []
        for result in results:
            notes = list(result.notes)
            for figure in result.figures:
                try:
                    if figures.draw(figure, result.tables, part):
                        drawn.add(figure.file)
                except (ValueError, TypeError, KeyError, RuntimeError) as e:
                    notes.append(f"{figure.file} is not drawn: {type(e).__name__}: {e}")
                    env.say(notes[-1])
            annotated.append(replace(result, notes=notes))
        (part / "report.md").write_text(markdown(record, annotated, drawn), encoding="utf-8", errors="backslashreplace")
        (part / "report.tex").write_text(document(record, annotated, drawn), encoding="utf-8", errors="backslashreplace")
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
        for stored in read(folder)["results"]:
            tables = [
                Table(**t | {"rows": [{k: math.nan if x is None else x for k, x in row.items()} for row in t["rows"]]})
                for t in stored["tables"]
            ]
            results.append(Result(stored["suite"], tables, stored["notes"], [restored(f) for f in stored["figures"]]))
    except (KeyError, TypeError, AttributeError) as e:
        raise RunError(f"{folder / 'results.json'} is damaged, or of another version of hyperlm: measure again") from e
    return results


def where(record: dict[str, Any]) -> str:
    """The machine of a benchmark, in words: its cards, or else its processor."""
    machine = record.get("machine") or {}
    cards = machine.get("gpus", 1)
    return f"{cards} x {machine['gpu']}" if machine.get("gpu") and cards > 1 else machine.get("gpu") or machine.get("cpu", "")


def labels(result: Result) -> set[str]:
    """The models of a result."""
    return {row["model"] for t in result.tables for row in t.rows if "model" in row}


def relabelled(result: Result, names: dict[str, str]) -> Result:
    def renamed(row: Row) -> Row:
        return row | {"model": names.get(row["model"], row["model"])} if "model" in row else row

    return replace(result, tables=[replace(t, rows=[renamed(row) for row in t.rows]) for t in result.tables])


def join(folders: Sequence[Path]) -> list[Result]:
    """The results of several benchmarks as one: those of a suite together, the rows of tables of one name one after another, and a note on
    each. Models that several have are told apart by the names of their folders.

    Raises:
        RunError: where `load` does.
    """
    joined: dict[str, Result] = {}
    loaded = {folder: load(folder) for folder in folders}
    often = Counter((result.suite, label) for results in loaded.values() for result in results for label in labels(result))
    for folder, results in loaded.items():
        record = read(folder)
        origin = ", ".join(str(fact) for fact in (record.get("commit"), record.get("date"), where(record)) if fact)
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
