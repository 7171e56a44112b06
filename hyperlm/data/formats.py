"""Files to texts and rows: a table of suffixes, and how each is read, a part at a time. What a row is as a document is for rows.py.

Prose is cut into documents; a page or a file of code is one, and held in memory whole; a row is one, and held alone.
"""

import csv
import io
import json
import lzma
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

from hyperlm.data.folders import Open, zstd
from hyperlm.data.hypertext import text_of
from hyperlm.data.text import Encoding, NotText, decode, decoded, longer, pieces

READ = 1 << 16  # bytes at a time; larger blocks leave gaps in the heap that add up to hundreds of MiB
MIB = 1 << 20
LARGEST = 64 * MIB  # bytes or characters of what is held in memory whole: a line, a row, a page, a file of code
ROWS = 256  # of a table at a time


class Damaged(ValueError):
    """A file that cannot be read to its end; the message says why."""


# What reading a file raises where it is damaged.
DAMAGE = (Damaged, EOFError, zlib.error, lzma.LZMAError, zstd.ZstdError)
Row = Any  # of a table or of JSON, or a ValueError that says why there is none


class Format(NamedTuple):
    """How a suffix is read: into texts, or into rows with their numbers from 1."""

    texts: Callable[[Open, Encoding, Counter[str]], Iterator[str]] | None = None  # the counter is told where prose is cut
    rows: Callable[[Open, Encoding | None], Iterator[tuple[int, Row]]] | None = None
    unit: str = "row"  # what numbers count
    binary: bool = False  # has no encoding to be found


def blocks(open_file: Open) -> Iterator[bytes]:
    with open_file() as file:
        while block := file.read(READ):
            yield block


# -- texts -----------------------------------------------------------------------------------------------------------------------------


def prose(open_file: Open, encoding: Encoding, counts: Counter[str]) -> Iterator[str]:
    return pieces(decoded(blocks(open_file), encoding), counts)


def code(open_file: Open, encoding: Encoding, counts: Counter[str]) -> Iterator[str]:
    yield whole(open_file, encoding)


def page(open_file: Open, encoding: Encoding, counts: Counter[str]) -> Iterator[str]:
    yield text_of(whole(open_file, encoding))


def whole(open_file: Open, encoding: Encoding) -> str:
    with open_file() as file:
        raw = file.read(LARGEST + 1)
    if len(raw) > LARGEST:
        raise NotText(f"it is longer than {LARGEST // MIB} MiB, and would be one document")
    return decode(raw, encoding)


# -- rows of text ------------------------------------------------------------------------------------------------------------------------


def lines(open_file: Open, encoding: Encoding, newline: str | None = None) -> Iterator[str]:
    """Lines with their ends, of which those longer than LARGEST are cut to one character more; `newline` is as in `open`."""
    with open_file() as file, io.TextIOWrapper(file, encoding.name, encoding.errors, newline) as text:
        while line := text.readline(LARGEST + 1):
            rest = line
            while len(rest) > LARGEST and not rest.endswith(("\n", "\r")):
                rest = text.readline(LARGEST + 1)
            yield line


def json_lines(open_file: Open, encoding: Encoding | None) -> Iterator[tuple[int, Row]]:
    for number, line in enumerate(lines(open_file, encoding), 1):
        if line := line.strip():
            yield number, json_row(line)


def json_row(line: str) -> Row:
    if len(line) > LARGEST:
        return ValueError(f"longer than {LARGEST // MIB} MiB")
    try:
        return json.loads(line)
    except RecursionError:
        return ValueError("nested too deeply")
    except json.JSONDecodeError as e:
        return ValueError(f"{e.msg} at character {e.pos + 1}")
    except ValueError as e:
        return e


SPACE = re.compile(r"[ \t\n\r]*")


def json_values(open_file: Open, encoding: Encoding | None) -> Iterator[tuple[int, Row]]:
    """Of an array, or of values one after another."""
    source, scan = decoded(blocks(open_file), encoding), json.JSONDecoder().raw_decode
    text, at, ended, number = "", 0, False, 0
    array = comma = False  # within an array; where a comma or the end of the array comes next
    while True:
        at = SPACE.match(text, at).end()
        if at == len(text) and not ended:
            text, ended = longer("", source, 1)
            at = 0
        elif at == len(text):
            break
        elif not number and not array and text[at] == "[":
            array, at = True, at + 1
        elif array and text[at] == "]" and (comma or not number):
            if text[at + 1 :].strip() or any(block.strip() for block in source):
                raise Damaged(f"something follows the array, after row {number}")
            return
        elif comma:
            if text[at] != ",":
                raise Damaged(f"row {number} is not followed by a comma or the end of the array")
            comma, at = False, at + 1
        else:
            value, end = scanned(scan, text, at, ended, number + 1)
            if end is None:  # it goes on, as a number may
                text, ended = longer(text[at:], source, 2 * (len(text) - at) + 1)
                at = 0
            else:
                number, at, comma = number + 1, end, array
                yield number, value
    if array:
        raise Damaged(f"its array does not end, after row {number}")


def scanned(scan: Callable[[str, int], tuple[Any, int]], text: str, at: int, ended: bool, number: int) -> tuple[Row, int | None]:
    """A value of JSON and where it ends; None where more text is needed to tell."""
    too_long = f"row {number} is longer than {LARGEST // MIB} MiB"
    try:
        value, end = scan(text, at)
        if end - at > LARGEST:
            raise Damaged(too_long)
        return value, end if ended or end < len(text) else None
    except json.JSONDecodeError as e:
        within = e.pos < len(text) - 16 and not e.msg.startswith("Unterminated")  # 16: no name, number or escape of JSON is longer
        if ended or within:
            raise (Damaged if number > 1 else NotText)(f"row {number}: {e.msg}") from e
        if len(text) - at > LARGEST:
            raise Damaged(too_long) from e
        return None, None
    except RecursionError as e:
        raise Damaged(f"row {number}: nested too deeply") from e
    except Damaged:
        raise
    except ValueError as e:
        raise Damaged(f"row {number}: {e}") from e


def table(open_file: Open, encoding: Encoding | None, delimiter: str) -> Iterator[tuple[int, Row]]:
    """Rows under a line of names; a row's number is that of its first line."""
    csv.field_size_limit(LARGEST)
    reader = csv.reader(short(lines(open_file, encoding, newline="")), delimiter=delimiter, strict=True)
    names, first = None, 1
    try:
        for fields in reader:
            if names is None:
                names = fields or None
            elif len(fields) > len(names):
                yield first, ValueError(f"{len(fields)} fields under {len(names)} names")
            elif fields:
                yield first, dict(zip(names, fields, strict=False))
            first = reader.line_num + 1
    except csv.Error as e:
        why = "a quote is opened and never closed" if "unexpected end" in str(e) else str(e)
        raise Damaged(f"in the row at line {first}: {why}") from e


def short(lines: Iterable[str]) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        if len(line) > LARGEST:
            raise Damaged(f"line {number} is longer than {LARGEST // MIB} MiB")
        yield line


# -- rows of tables ----------------------------------------------------------------------------------------------------------------------


def parquet(open_file: Open, encoding: Encoding | None) -> Iterator[tuple[int, Row]]:
    import pyarrow.parquet

    parts = {"buffer_size": READ, "pre_buffer": False}  # else row groups are read whole
    with open_file() as file, pyarrow.parquet.ParquetFile(file, **parts) as table:
        columns = text_columns(table.schema_arrow)
        yield from numbered(table.iter_batches(ROWS, columns=columns))


def arrow(open_file: Open, encoding: Encoding | None) -> Iterator[tuple[int, Row]]:
    import pyarrow.ipc

    with open_file() as file:
        marked = file.read(6) == b"ARROW1"
        file.seek(0)
        if marked:
            reader = pyarrow.ipc.open_file(file)
            batches: Iterable[Any] = map(reader.get_batch, range(reader.num_record_batches))
        else:
            batches = reader = pyarrow.ipc.open_stream(file)
        columns = text_columns(reader.schema)
        parts = (batch.select(columns).slice(at, ROWS) for batch in batches for at in range(0, batch.num_rows, ROWS))
        yield from numbered(parts)


def text_columns(schema: Any) -> list[str]:
    """The columns that have text; numbers, pictures and embeddings have none, and take long to read."""
    columns = [field.name for field in schema if "string" in str(field.type)]
    if not columns:
        raise NotText(f"none of its columns has text ({', '.join(f'{field.name}: {field.type}' for field in schema)[:100]})")
    return columns


def numbered(batches: Iterable[Any]) -> Iterator[tuple[int, Row]]:
    """What is null in a table is not there in its row."""
    rows = (
        dict(zip(batch.schema.names, values, strict=True)) for batch in batches for values in zip(*map(objects, batch.columns), strict=True)
    )
    for number, row in enumerate(rows, 1):
        yield number, {name: value for name, value in row.items() if value is not None}


def objects(column: Any) -> Iterable[Any]:
    """Values as Python has them; of strings numpy makes them faster than pyarrow."""
    return column.to_numpy(zero_copy_only=False) if str(column.type) in ("string", "large_string") else column.to_pylist()


def with_arrow(read: Callable[[Open, Encoding | None], Iterator[tuple[int, Row]]]) -> Callable[..., Iterator[tuple[int, Row]]]:
    """A reader that needs pyarrow, and tells its errors in our terms."""

    def rows(open_file: Open, encoding: Encoding | None) -> Iterator[tuple[int, Row]]:
        import pyarrow

        try:
            yield from read(open_file, encoding)
        except (pyarrow.ArrowException, OSError) as e:
            if isinstance(e, OSError) and e.errno:  # of the system, not of what was read
                raise
            raise Damaged(str(e).partition("\n")[0]) from e

    return rows


# -- suffixes ----------------------------------------------------------------------------------------------------------------------------

CODE = (
    ".py .pyi .pyx .c .h .cc .cpp .cxx .hh .hpp .hxx .cu .cuh .m .mm .rs .go .zig .d .nim .swift .java .kt .kts .scala .groovy .gradle "
    ".cs .fs .fsx .vb .js .mjs .cjs .jsx .ts .tsx .vue .svelte .css .scss .php .rb .pl .pm .lua .r .jl .sh .bash .zsh .fish .ps1 .bat "
    ".hs .ml .mli .elm .ex .exs .erl .hrl .clj .cljs .lisp .el .scm .rkt .dart .f .f90 .f95 .for .pas .asm .s .sql .proto .v .sv .vhd "
    ".vhdl .cmake .tcl .vim"
)
FORMATS = {
    **dict.fromkeys((".txt", ".md", ".markdown", ".rst", ".tex"), Format(texts=prose)),
    **dict.fromkeys((".html", ".htm"), Format(texts=page)),
    **dict.fromkeys(CODE.split(), Format(texts=code)),
    **dict.fromkeys((".jsonl", ".ndjson"), Format(rows=json_lines, unit="line")),
    ".json": Format(rows=json_values),
    ".csv": Format(rows=partial(table, delimiter=","), unit="line"),
    ".tsv": Format(rows=partial(table, delimiter="\t"), unit="line"),
    ".parquet": Format(rows=with_arrow(parquet), binary=True),
    ".arrow": Format(rows=with_arrow(arrow), binary=True),
}
READABLE = ".txt .md .rst .html, source code, .jsonl .json .csv .tsv .parquet .arrow, any of these in .gz .zst .zip"
