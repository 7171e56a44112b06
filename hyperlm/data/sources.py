"""Sources to documents: files, folders, archives, data sets of a hub, `stdlib`, and recipes (.toml) that name several."""

import difflib
import os
import tomllib
from collections import Counter
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from gzip import BadGzipFile
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile

from hyperlm.data import hub
from hyperlm.data.documents import DataError, Document
from hyperlm.data.folders import File, Listing, Open, listed, opening, standard_library, suffix_of
from hyperlm.data.formats import DAMAGE, FORMATS, MIB, READ, READABLE, Row, blocks
from hyperlm.data.rows import document_of
from hyperlm.data.text import Encoding, NotText, find_encoding
from hyperlm.env import progress
from hyperlm.tokenizer import clean

HEAVIEST = 1e9  # a weight; sums of them stay numbers
SHOWN = 3  # files that are named in a line about several


# -- what was asked for ----------------------------------------------------------------------------------------------------------------


class Source(NamedTuple):
    """A place that text comes from; weight None means by size."""

    name: str
    path: Path | None  # None for the standard library
    weight: float | None
    hub: bool = False  # a data set of the hub


def parse_sources(texts: tuple[str, ...], flag: str = "--data.sources") -> list[Source]:
    """Read `path`, `path:weight`, `stdlib` and recipes.

    Raises:
        DataError: on a missing path, a bad weight or a bad recipe.
    """
    sources = []
    for text in texts:
        path, weight = text, None
        if ":" in text.removeprefix(hub.SCHEME) and not os.path.exists(text):
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
    if path.startswith(hub.SCHEME):
        name, full = hub.snapshot(path, where)
    else:
        full = base / os.path.expanduser(path)
        name = os.path.basename(os.path.abspath(full))
    if not path or not os.path.exists(full):
        raise DataError(f"{where}: no such file or folder")
    if not os.path.isdir(full):
        if not os.path.isfile(full):
            raise DataError(f"{where}: neither a file nor a folder")
        if suffix_of(full.name) not in {*FORMATS, ".zip"}:
            raise DataError(f"{where}: cannot read {full.suffix or 'a file without a suffix'}; use {READABLE}, or a recipe .toml")
    return Source(name, full, weight, hub=path.startswith(hub.SCHEME))


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
        entry = f"{path}, source {number}"
        check_keys(table, ("path", "weight"), entry)
        if not isinstance(table.get("path"), str):
            raise DataError(f"{entry}: not a recipe; path must be a text in quotes")
        weight = check_weight(table["weight"], entry) if "weight" in table else None
        sources.append(source_at(table["path"], weight, f"{entry}, {table['path']}", path.parent))
    return sources


def check_keys(table: dict[str, Any], known: tuple[str, ...], where: str) -> None:
    for key in table:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1, cutoff=0)
            raise DataError(f"{where}: not a recipe; {key!r} means nothing here, did you mean {near[0]!r}?")


def with_names(sources: list[Source]) -> list[Source]:
    """The same sources with names that differ: by as much of their paths as that takes, and where paths are the same by a number."""
    parts = [Path(os.path.abspath(s.path)).parts if s.path and not s.hub else (s.name,) for s in sources]
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

MODULE = 64 << 10  # characters of a file of the standard library that are used: none is more than a few per cent of a small corpus


class Reading(NamedTuple):
    """How a file is read, found out the first time."""

    encoding: Encoding | None  # None where its format has none
    left_out: bool = False
    notes: tuple[tuple[str, str], ...] = ()  # (what about, in words)


@dataclass(frozen=True)
class Readings:
    """How a corpus is read: settings, and what is found out the first time."""

    text_field: str = "text"  # of a row
    on_bad: str = "skip"  # a row that cannot be used; or "stop"
    listings: dict[Source, Listing] = field(default_factory=dict)
    files: dict[File, Reading] = field(default_factory=dict)


def files(source: Source) -> Listing:
    """Every file of a source, in order, and what is left out.

    Raises:
        DataError: on a folder that cannot be read or a damaged archive.
    """
    if source.path is None:
        return Listing(standard_library(), Counter(), Counter())
    try:
        return listed(source.path, hub.DATA if source.hub else FORMATS)
    except OSError as e:
        raise unreadable(e.filename or source.path, e) from e


def documents(source: Source, readings: Readings | None = None) -> Iterator[Document]:
    """Every document of a source that has text, always in the same order.

    Args:
        readings: how files are read; what is not there is found out and added.

    Raises:
        DataError: naming the file, and of a row its number.
    """
    readings = readings or Readings()
    if source not in readings.listings:
        readings.listings[source] = files(source)
    for path, members in groupby(readings.listings[source].files, key=lambda file: file.path):
        file = File(path)
        try:
            with opening(path) as open_file:
                for file in members:
                    for document in file_documents(file, partial(open_file, file), readings, named=file == File(source.path or Path())):
                        if source.path is None:
                            document = Document(beginning(document.text))
                        if document.content and not document.content.isspace():
                            yield document
        except (*DAMAGE, BadZipFile, BadGzipFile, NotImplementedError) as e:
            raise DataError(f"{file}: damaged, or not what its name says ({e})") from e
        except ModuleNotFoundError as e:
            raise DataError(f"{file}: reading it takes {e.name}, which is not installed: pip install 'hyperlm-torch[parquet]'") from e
        except OSError as e:
            raise unreadable(file, e) from e
        except UnicodeError as e:
            raise DataError(f"{file}: changed while it was read; start again when nothing writes it") from e


def beginning(module: str) -> str:
    """Its first MODULE characters or less, up to where something new begins."""
    if len(module) <= MODULE:
        return module
    end = module.rfind("\n\n\n", 0, MODULE)
    return module[: end + 1 if end > MODULE // 2 else MODULE]


def file_documents(file: File, open_file: Open, readings: Readings, named: bool) -> Iterator[Document]:
    form = FORMATS[file.suffix]
    reading = readings.files.get(file)
    if reading and reading.left_out:
        return
    try:
        encoding = reading.encoding if reading else None if form.binary else find_encoding(lambda: watched(blocks(open_file), file))
        notes = [("encoding", encoding.assumed)] if encoding and encoding.assumed else []
        if form.rows:
            rows = form.rows(open_file, encoding)
            if left_out := (yield from row_documents(file, rows, form.unit, readings)):
                notes.append(("rows", left_out))
        else:
            where = Counter[str]()
            yield from map(Document, form.texts(open_file, encoding, where))
            if where.total() > where["empty lines"]:
                places = ", ".join(f"{n} at {what}" for what, n in where.most_common())
                notes.append(("cut", f"few empty lines, cut into {where.total() + 1} documents ({places})"))
    except NotText as e:
        if named:
            raise DataError(f"{file}: {e}") from e
        readings.files[file] = Reading(None, True, (("skipped", f"left out, {e}"),))
    else:
        readings.files.setdefault(file, Reading(encoding, False, tuple(notes)))


def watched(blocks: Iterable[bytes], file: File) -> Iterable[bytes]:
    return progress(blocks, f"looking through {in_one_line(file.name)}", unit=" MiB", unit_scale=READ / MIB)


def row_documents(file: File, rows: Iterable[tuple[int, Row]], unit: str, readings: Readings) -> Generator[Document, None, str]:
    """Documents of rows; returns how many rows were left out and why, "" if none was.

    Raises:
        DataError: on a row that cannot be used, if that is to stop; NotText if none can be used.
    """
    used = bad = 0
    first = ""
    for number, row in rows:
        try:
            if isinstance(row, ValueError):
                raise row
            document = document_of(row, readings.text_field)
        except ValueError as e:
            if readings.on_bad == "stop":
                raise DataError(f"{file}:{number}: {e}") from e
            first = first or f"the first at {unit} {number}: {e}"
            bad += 1
        else:
            used += 1
            yield document
    if bad and not used:
        raise NotText(f"none of its rows can be used, {first}")
    return f"{bad:,} row{'s' * (bad > 1)} left out, {first}" if bad else ""


def unreadable(path: str | Path, e: OSError) -> DataError:
    return DataError(f"{path}: cannot be read ({e.strerror or e})")


def notes(readings: Readings) -> Iterator[str]:
    """What folders hold, and what had to be assumed while files were read, in a line or two for each kind of assumption."""
    for source, listing in readings.listings.items():
        if words := str(listing):
            yield f"{source.name}: {words}"
    by_kind: dict[str, list[str]] = {}
    for file, reading in readings.files.items():
        for what, words in reading.notes:
            by_kind.setdefault(what, []).append(f"{in_one_line(file.name)}: {words}")
    for lines in by_kind.values():
        yield from summary(lines)


def why_empty(source: Source, readings: Readings) -> str:
    """What to say of a source without text."""
    words = str(readings.listings[source])
    return f"no text in it{f' ({words})' if words else ''}; it needs files that are not empty: {READABLE}"


def summary(lines: Iterable[str]) -> list[str]:
    """The first few of many lines, and how many more there are."""
    lines = list(lines)
    return lines[:SHOWN] + ([f"and {len(lines) - SHOWN} more files likewise"] if len(lines) > SHOWN else [])
