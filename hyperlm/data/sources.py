"""Sources to documents: files (.txt, .md, .py, .jsonl), folders of them, `stdlib`, and recipes (.toml) that name several."""

import difflib
import json
import os
import sysconfig
import tomllib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from hyperlm.data.documents import DataError, Document
from hyperlm.data.rows import document_of
from hyperlm.data.text import Encoding, NotText, decode, find_encoding, pieces
from hyperlm.tokenizer import clean

SUFFIXES = (".txt", ".md", ".py", ".jsonl")
NOT_STDLIB = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
HEAVIEST = 1e9  # a weight; sums of them stay numbers
READ = 1 << 20  # bytes of a .jsonl file at a time
SHOWN = 3  # files that are named in a line about several


# -- what was asked for ----------------------------------------------------------------------------------------------------------------


class Source(NamedTuple):
    """A place that text comes from; weight None means by size."""

    name: str
    path: Path | None  # None for the standard library
    weight: float | None


def parse_sources(texts: tuple[str, ...], flag: str = "--data.sources") -> list[Source]:
    """Read `path`, `path:weight`, `stdlib` and recipes.

    Raises:
        DataError: on a missing path, a bad weight or a bad recipe.
    """
    sources = []
    for text in texts:
        path, weight = text, None
        if ":" in text and not os.path.exists(text):
            path, _, tail = text.rpartition(":")
            try:
                weight = float(tail)
            except ValueError as e:
                raise DataError(f"{flag} {text}: no such file, and {tail!r} is not a weight") from e
        where = f"{flag} {text}"
        if weight is not None:
            check_weight(weight, where)
        if not path.endswith(".toml"):
            sources.append(source_at(path, weight, where))
        elif weight is not None:
            raise DataError(f"{where}: a recipe has weights of its own; set them there")
        else:
            sources += read_recipe(Path(path), where)
    return sources


def check_weight(weight: Any, where: str) -> float:
    """How often a source is drawn, in proportion to others."""
    if not isinstance(weight, int | float) or isinstance(weight, bool) or not 0 < weight <= HEAVIEST:  # false for nan
        raise DataError(f"{where}: a weight must be above 0, a number of at most {HEAVIEST:,.0f}")
    return float(weight)


def source_at(path: str, weight: float | None, where: str, base: Path = Path()) -> Source:
    if path == "stdlib":
        return Source("stdlib", None, weight)
    full = base / os.path.expanduser(path)
    if not path or not os.path.exists(full):
        raise DataError(f"{where}: no such file or folder")
    if not os.path.isdir(full):
        if not os.path.isfile(full):
            raise DataError(f"{where}: neither a file nor a folder")
        if full.suffix.lower() not in SUFFIXES:
            raise DataError(f"{where}: cannot read {full.suffix or 'a file without suffix'}; use {' '.join(SUFFIXES)} or a recipe .toml")
    return Source(os.path.basename(os.path.abspath(full)), full, weight)


def read_recipe(path: Path, where: str) -> list[Source]:
    """Sources of a recipe: [[sources]] tables with `path` and an optional `weight`; paths are relative to the recipe."""
    if not os.path.isfile(path):
        raise DataError(f"{where}: no such file")
    needs = "it needs [[sources]] tables with path and weight"
    try:
        recipe = tomllib.loads(path.read_text("utf-8-sig"))
    except OSError as e:
        raise unreadable(path, e) from e
    except (ValueError, RecursionError) as e:
        raise DataError(f"{path}: not a recipe ({str(e).splitlines()[0]}); {needs}") from e
    check_keys(recipe, ("sources",), f"{path}")
    tables = recipe.get("sources")
    if not isinstance(tables, list) or not tables or not all(isinstance(table, dict) for table in tables):
        raise DataError(f"{path}: not a recipe; {needs}")
    sources = []
    for number, table in enumerate(tables, 1):
        here = f"{path}, source {number}"
        check_keys(table, ("path", "weight"), here)
        if not isinstance(table.get("path"), str):
            raise DataError(f"{here}: not a recipe; path must be a text in quotes")
        weight = check_weight(table["weight"], here) if "weight" in table else None
        sources.append(source_at(table["path"], weight, f"{here}, {table['path']}", path.parent))
    return sources


def check_keys(table: dict[str, Any], known: tuple[str, ...], where: str) -> None:
    for key in table:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1, cutoff=0)
            raise DataError(f"{where}: not a recipe; {key!r} means nothing here, did you mean {near[0]!r}?")


def with_names(sources: list[Source]) -> list[Source]:
    """The same sources with names that differ: by as much of their paths as that takes, and where paths are the same by a number."""
    parts = [Path(os.path.abspath(s.path)).parts if s.path else (s.name,) for s in sources]
    names = {p: p[-1] for p in parts}
    for depth in range(2, max(map(len, parts), default=0) + 1):
        count = Counter(names.values())
        names = {p: "/".join(p[-depth:]).replace("//", "/") if count[name] > 1 else name for p, name in names.items()}
    seen = Counter[tuple[str, ...]]()
    unique = []
    for source, p in zip(sources, parts, strict=True):
        seen[p] += 1
        unique.append(source._replace(name=in_one_line(names[p]) if seen[p] == 1 else f"{in_one_line(names[p])}#{seen[p]}"))
    return unique


def in_one_line(name: str) -> str:
    """A name that can be printed, whatever the file system allows."""
    return "".join(c if c.isprintable() else "\ufffd" for c in clean(name))


# -- documents -------------------------------------------------------------------------------------------------------------------------


class Reading(NamedTuple):
    """How a file is read, found out the first time."""

    encoding: Encoding | None  # None: it is left out
    notes: tuple[tuple[str, str], ...] = ()  # (what about, in words)


Readings = dict[Path, Reading]


def files(source: Source) -> list[Path]:
    """Every file of a source, in order.

    Raises:
        DataError: on a folder that cannot be read.
    """
    if source.path is not None and not os.path.isdir(source.path):
        return [source.path]
    suffixes = (".py",) if source.path is None else SUFFIXES
    root = Path(sysconfig.get_paths()["stdlib"]) if source.path is None else source.path

    def fail(e: OSError) -> None:
        raise e

    found = []
    try:
        for folder, below, names in os.walk(root, onerror=fail):
            if source.path is None:
                below[:] = [name for name in below if name not in NOT_STDLIB]
            found += [path for name in names if (path := Path(folder, name)).suffix.lower() in suffixes and path.is_file()]
    except OSError as e:
        raise unreadable(e.filename or root, e) from e
    return sorted(found)


def documents(source: Source, readings: Readings | None = None) -> Iterator[Document]:
    """Every document of a source that has text, always in the same order.

    Args:
        readings: how files are read; what is not there is found out and added.

    Raises:
        DataError: naming the file, and of .jsonl the line.
    """
    readings = {} if readings is None else readings
    for path in files(source):
        try:
            yield from (d for d in file_documents(path, readings, named=path == source.path) if d.content and not d.content.isspace())
        except OSError as e:
            raise unreadable(path, e) from e
        except UnicodeError as e:
            raise DataError(f"{path}: changed while it was read; start again when nothing writes it") from e


def file_documents(path: Path, readings: Readings, named: bool) -> Iterator[Document]:
    lines = path.suffix.lower() == ".jsonl"
    raw = b"" if lines else path.read_bytes()
    first = path not in readings
    if first:
        try:
            encoding = find_encoding(lambda: blocks(path) if lines else [raw])
            readings[path] = Reading(encoding, (("encoding", encoding.assumed),) if encoding.assumed else ())
        except NotText as e:
            if named:
                raise DataError(f"{path}: {e}") from e
            readings[path] = Reading(None, (("skipped", f"left out, {e}"),))
    reading = readings[path]
    if reading.encoding is None:
        return
    if lines:
        yield from jsonl_documents(path, reading.encoding)
    elif path.suffix.lower() == ".py":
        yield Document(decode(raw, reading.encoding))
    else:
        where = Counter[str]()
        yield from (Document(piece) for piece in pieces(decode(raw, reading.encoding), where))
        if first and where.total() > where["empty lines"]:
            places = ", ".join(f"{n} at {what}" for what, n in where.most_common())
            note = "cut", f"few empty lines, cut into {where.total() + 1} documents ({places})"
            readings[path] = reading._replace(notes=(*reading.notes, note))


def blocks(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while block := file.read(READ):
            yield block


def jsonl_documents(path: Path, encoding: Encoding) -> Iterator[Document]:
    """Lines with a `text` field, or `messages` of {"role", "content"}; one line in memory at a time."""
    with open(path, encoding=encoding.name, errors=encoding.errors) as file:
        for number, line in enumerate(file, 1):
            if line := line.strip():
                try:
                    yield document_of(json.loads(line))
                except RecursionError as e:
                    raise DataError(f"{path}:{number}: nested too deeply") from e
                except json.JSONDecodeError as e:
                    raise DataError(f"{path}:{number}: {e.msg} at character {e.pos + 1}") from e
                except ValueError as e:
                    raise DataError(f"{path}:{number}: {e}") from e


def unreadable(path: str | Path, e: OSError) -> DataError:
    return DataError(f"{path}: cannot be read ({e.strerror or e})")


def notes(readings: Readings) -> Iterator[str]:
    """What had to be assumed while files were read, in a line or two for each kind of assumption."""
    by_kind: dict[str, list[str]] = {}
    for path, reading in readings.items():
        for what, words in reading.notes:
            by_kind.setdefault(what, []).append(f"{in_one_line(path.name)}: {words}")
    for lines in by_kind.values():
        yield from summary(lines)


def summary(lines: Iterable[str]) -> list[str]:
    """The first few of many lines, and how many more there are."""
    lines = list(lines)
    return lines[:SHOWN] + ([f"and {len(lines) - SHOWN} more files likewise"] if len(lines) > SHOWN else [])
