"""Files as people have them: every format gives the same documents, whatever it is packed in; what is damaged, empty or left out is said."""

import csv
import gzip
import io
import json
import random
import re
import sys
import tracemalloc
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
from test_data import config, prepare
from test_text import read

from hyperlm import data
from hyperlm.data import folders, formats, hypertext, sources, text
from hyperlm.data.folders import zstd

TEXTS = [
    "plain words",
    "zwei\nZeilen\n\n\tund \"Anführung\", 'mehr' \\ \\n",
    "ligne un\r\nligne deux",
    "日本語 🙂 a\u2028b\x85c",
    " spaces around ",
    "a,b;c\td",
    "x" * 70_000,
] + [f"row {i} says {i * i}" for i in range(700)]


# -- how each format is written, by other means than hyperlm's -----------------------------------------------------------------------------


def json_lines(texts: list[str], **options) -> bytes:
    return "".join(json.dumps({"text": t, "id": i}, **options) + "\n" for i, t in enumerate(texts)).encode()


def separated(delimiter: str, encoding: str, texts: list[str]) -> bytes:
    file = io.StringIO(newline="")
    writer = csv.writer(file, delimiter=delimiter)
    writer.writerows([["id", "text"], *enumerate(texts)])
    return file.getvalue().encode(encoding)


def table(texts: list[str]) -> pa.Table:
    numbers = [[float(i)] * 3 for i in range(len(texts))]
    return pa.table({"embedding": numbers, "text": texts, "other": pa.array([None] * len(texts), pa.string())})


def parquet(texts: list[str], **options) -> bytes:
    out = io.BytesIO()
    pyarrow.parquet.write_table(table(texts), out, **options)
    return out.getvalue()


def arrow(kind: Callable, texts: list[str]) -> bytes:
    out = io.BytesIO()
    with kind(out, table(texts).schema) as writer:
        writer.write_table(table(texts), max_chunksize=500)
    return out.getvalue()


WRITERS: dict[str, tuple[str, Callable[[list[str]], bytes]]] = {
    "jsonl": (".jsonl", json_lines),
    "jsonl with plain letters": (".ndjson", partial(json_lines, ensure_ascii=False)),
    "json array": (".json", lambda texts: json.dumps([{"text": t} for t in texts], indent=2).encode()),
    "json in one line": (
        ".json",
        lambda texts: json.dumps([{"text": t} for t in texts], ensure_ascii=False, separators=(",", ":")).encode(),
    ),
    "json without an array": (".json", json_lines),
    "json of UTF-16": (".json", lambda texts: json.dumps([{"text": t} for t in texts], ensure_ascii=False).encode("utf-16")),
    "csv": (".csv", partial(separated, ",", "utf-8-sig")),
    "tsv": (".tsv", partial(separated, "\t", "utf-16")),
    "parquet": (".parquet", partial(parquet, row_group_size=300)),
    "parquet of one group": (".parquet", partial(parquet, compression="zstd", data_page_size=1000)),
    "arrow stream": (".arrow", partial(arrow, pa.ipc.new_stream)),
    "arrow file": (".arrow", partial(arrow, pa.ipc.new_file)),
}
PACKERS: dict[str, Callable[[Path, str, bytes], Path]] = {
    "plain": lambda folder, name, raw: wrote(folder / name, raw),
    "capitals": lambda folder, name, raw: wrote(folder / name.upper(), raw),
    "gz": lambda folder, name, raw: wrote(folder / f"{name}.gz", gzip.compress(raw)),
    "GZ of parts": lambda folder, name, raw: wrote(folder / f"{name}.GZ", gzip.compress(raw[:999]) + gzip.compress(raw[999:])),
    "zst": lambda folder, name, raw: wrote(folder / f"{name}.zst", zstd.compress(raw)),
    "zip": lambda folder, name, raw: zipped(folder / "d.zip", {f"within/{name}": raw}),
    "gz in zip": lambda folder, name, raw: zipped(folder / "d.ZIP", {f"{name}.gz": gzip.compress(raw)}),
    "zip in a folder": lambda folder, name, raw: zipped(folder / "in" / "d.zip", {name: raw}).parent,
}


def wrote(path: Path, raw: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(raw)
    return path


def zipped(path: Path, members: dict[str, bytes], kind: int = zipfile.ZIP_DEFLATED) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", kind) as archive:
        for name, raw in members.items():
            archive.writestr(name, raw)
    return path


def error(path: Path, **settings: str) -> str:
    """What reading ends with, a line that names the file."""
    with pytest.raises(data.DataError) as e:
        read(path, **settings)
    assert str(e.value).startswith(str(path)) and "\n" not in str(e.value) and len(str(e.value)) < 400
    return str(e.value)[len(str(path)) :]


# -- good, damaged, empty --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pack", PACKERS.values(), ids=PACKERS.keys())
@pytest.mark.parametrize(("suffix", "write"), WRITERS.values(), ids=WRITERS.keys())
def test_rows_are_the_same_documents_in_every_format(tmp_path, suffix, write, pack):
    documents, said = read(pack(tmp_path, f"rows{suffix}", write(TEXTS)))
    assert documents == TEXTS and len(said) <= 1


HALVES = {  # what is said of a file of which half is missing
    ".jsonl": "1 row left out, the first at line",
    ".ndjson": "1 row left out, the first at line",
    ".json": "damaged",
    ".csv": "damaged",
    ".tsv": "damaged",
    ".parquet": "damaged",
    ".arrow": "damaged",
}


@pytest.mark.parametrize(("suffix", "write"), WRITERS.values(), ids=WRITERS.keys())
def test_half_a_file_is_damaged_or_lacks_a_row(tmp_path, suffix, write):
    raw = write([*TEXTS[7:300], "word,\n" * 20_000])  # the middle is within the last row
    path = wrote(tmp_path / f"rows{suffix}", raw[: len(raw) // 4 * 2])
    if "row" in HALVES[suffix]:
        assert HALVES[suffix] in read(path)[1][0] and len(read(path)[0]) == 293
    else:
        assert HALVES[suffix] in error(path)


@pytest.mark.parametrize(
    ("name", "raw"),
    {
        "rows.jsonl.gz": gzip.compress(json_lines(TEXTS))[:-1000],
        "rows.csv.gz": b"not packed at all",
        "prose.txt.gz": gzip.compress(b"words " * 9000)[:-9] + b"123456789",
        "prose.txt.zst": zstd.compress(random.Random(0).randbytes(30_000).hex().encode())[:-1000],
        "prose.md.zst": b"not packed at all",
        "rows.parquet": b"PAR1 and nothing of a table",
        "rows.parquet.gz": gzip.compress(parquet(TEXTS)[:-100]),
        "rows.arrow": b"ARROW1 and nothing of a table",
        "d.zip": b"PK\3\4 and no archive",
        "none.zip": b"",
        "none.parquet": b"",
        "none.arrow": b"",
        "a.json": b'[{"text": "a"} {"text": "b"}]',
        "b.json": b'[{"text": "a"},]',
        "c.json": b'[{"text": "a"}',
        "d.json": b'[{"text": "a"}] {"text": "b"}',
        "e.json": b'{"text": "a"}' + b'{"a":' * 100_000,
        "f.json": b'{"text": "a"} {"text": ' + b"9" * 10_000 + b"}",
        "a.csv": b'text\ngood\n"a quote" and more\n',
        "b.csv": b'text\n"a quote and no end\n' + b"line\n" * 100,
    }.items(),
)
def test_what_is_damaged_as_a_whole_is_an_error_in_one_line(tmp_path, name, raw):
    assert ": damaged" in error(wrote(tmp_path / name, raw))
    (tmp_path / "other.txt").write_text("good")
    with pytest.raises(data.DataError, match=f"{re.escape(str(tmp_path / name))}: damaged"):  # in a folder as well
        read(tmp_path)


@pytest.mark.parametrize("suffix", [s for s in formats.FORMATS if s not in (".parquet", ".arrow")])
@pytest.mark.parametrize("raw", [b"", b" \n\n", b"\xef\xbb\xbf"])
def test_empty_files_have_no_documents(tmp_path, suffix, raw):
    for pack in PACKERS.values():
        assert read(pack(tmp_path, f"empty{suffix}", raw))[0] == []


@pytest.mark.parametrize(
    ("suffix", "raw"),
    [
        (".json", b"[]"),
        (".csv", b"id,text\r\n"),
        (".parquet", parquet([])),
        (".arrow", arrow(pa.ipc.new_stream, [])),
        (".arrow", arrow(pa.ipc.new_file, [])),
        (".jsonl", json_lines(["", " "])),
        (".html", b"<html><head><style>p {}</style></head><body><script>x = 1</script></body></html>"),
        (".zip", b"PK\5\6" + bytes(18)),
    ],
)
def test_a_file_without_text_is_an_error_that_says_so(tmp_path, suffix, raw):
    with pytest.raises(data.DataError, match="no text in it.*; it needs files that are not empty"):
        prepare(config(wrote(tmp_path / f"d{suffix}", raw)))


@pytest.mark.parametrize(("suffix", "write"), [(suffix, write) for suffix, write in WRITERS.values() if suffix in (".parquet", ".arrow")])
def test_a_table_without_a_column_of_text_is_an_error_that_says_so(tmp_path, monkeypatch, suffix, write):
    monkeypatch.setattr(sys.modules[__name__], "table", lambda texts: pa.table({"text": [b"a"], "n": [1]}))  # bytes are no text
    assert "none of its columns has text (text: binary, n: int64)" in error(wrote(tmp_path / f"d{suffix}", write([])))


def test_the_same_rows_in_every_format_are_the_same_tokens(tmp_path):
    ways = [(*writer, PACKERS["plain"]) for writer in WRITERS.values()] + [(*WRITERS["jsonl"], pack) for pack in PACKERS.values()]
    streams = set()
    for number, (suffix, write, pack) in enumerate(ways):
        corpus = prepare(config(pack(tmp_path / f"{number}", f"rows{suffix}", write(TEXTS)), max_mib=0.06))
        shard = corpus.shards[0]
        streams.add((shard.train.tobytes(), shard.val.tobytes(), shard.val_documents.tobytes()))
    assert len(streams) == 1 and min(map(len, streams.pop())) > 0


# -- a dataset that Hugging Face's library saved ---------------------------------------------------------------------------------------------


def test_a_saved_dataset_is_read_without_what_describes_it(tmp_path):
    for split, part in (("test", TEXTS[:9]), ("train", TEXTS[9:])):
        for i, texts in enumerate((part[:4], part[4:])):
            wrote(tmp_path / "saved" / split / f"data-0000{i}-of-00002.arrow", arrow(pa.ipc.new_stream, texts))
        wrote(tmp_path / "saved" / split / "cache-0123456789abcdef.arrow", arrow(pa.ipc.new_stream, ["computed from it"]))
        for name in ("dataset_info.json", "state.json"):
            wrote(tmp_path / "saved" / split / name, b'{"text": "about it"}')
    wrote(tmp_path / "saved" / "dataset_dict.json", b'{"splits": ["train", "test"]}')
    assert read(tmp_path / "saved") == (TEXTS, ["saved: 4 .arrow"])
    assert read(tmp_path / "saved" / "train")[0] == TEXTS[9:]


def test_it_is_what_the_library_itself_writes(tmp_path):
    datasets = pytest.importorskip("datasets", reason="checked where Hugging Face's library is")
    datasets.disable_progress_bars()
    datasets.Dataset.from_dict({"text": TEXTS, "n": list(range(len(TEXTS)))}).save_to_disk(str(tmp_path / "saved"), num_shards=3)
    assert read(tmp_path / "saved")[0] == TEXTS


# -- rows that cannot be used ------------------------------------------------------------------------------------------------------------------

BAD = {  # a file of three rows of which the second cannot be used, where that is and why
    "d.jsonl": ('{"text": "a"}\n\n{"txt": "b"}\n{"text": "c"}', "line 3: no 'text' field"),
    "e.jsonl": ('{"text": "a"}\nbroken\n{"text": "c"}', "line 2: Expecting value at character 1"),
    "d.json": ('[{"text": "a"}, {"txt": "b"}, {"text": "c"}]', "row 2: no 'text' field"),
    "e.json": ('[{"text": "a"}, 3, {"text": "c"}]', "row 2: a number, not an object"),
    "d.csv": ('text\n"a"\nan, unquoted comma\nc', "line 3: 2 fields under 1 names"),
    "e.csv": ("id,text\n1,a\n2\n3,c", "line 3: no 'text' field"),
    "d.parquet": (parquet(["a", None, "c"]), "row 2: no 'text' field"),
    "d.arrow": (arrow(pa.ipc.new_stream, ["a", None, "c"]), "row 2: no 'text' field"),
}


@pytest.mark.parametrize(("name", "raw", "where"), [(name, *case) for name, case in BAD.items()])
def test_a_row_that_cannot_be_used_is_left_out_and_said_or_stops(tmp_path, name, raw, where):
    path = wrote(tmp_path / name, raw if isinstance(raw, bytes) else raw.encode())
    documents, said = read(path)
    assert documents == ["a", "c"] and len(said) == 1 and said[0].startswith(f"{name}: 1 row left out, the first at {where}")
    assert error(path, on_bad="stop").startswith(":" + where.split(" ", 1)[1])


def test_rows_left_out_are_counted_and_the_run_is_told(tmp_path):
    rows = [{"text": f"row {i} has words"} if i % 3 else {"txt": "none"} for i in range(300)]
    path, said = wrote(tmp_path / "d.jsonl", "\n".join(map(json.dumps, rows)).encode()), []
    data.prepare(config(path), said.append)
    assert said[0].startswith("reading    d.jsonl: 100 rows left out, the first at line 1: no 'text' field")


@pytest.mark.parametrize(("suffix", "write"), WRITERS.values(), ids=WRITERS.keys())
def test_a_file_without_a_row_to_use_is_an_error_and_left_out_of_a_folder(tmp_path, suffix, write):
    path = wrote(tmp_path / f"d{suffix}", write(["a", "b"]))
    assert ": none of its rows can be used, the first at " in error(path, text_field="body")
    (tmp_path / "good.md").write_text("good")
    documents, said = read(tmp_path, text_field="body")
    assert documents == ["good"] and said[1].startswith(f"d{suffix}: left out, none of its rows can be used, the first at ")


@pytest.mark.parametrize("name", ["d.jsonl", "d.json", "d.csv", "d.tsv"])
def test_the_text_is_in_the_field_that_is_named(tmp_path, name):
    raw = {
        ".jsonl": '{"text": "no", "body": "yes"}',
        ".json": '[{"text": "no", "body": "yes"}]',
        ".csv": "text,body\nno,yes",
        ".tsv": "text\tbody\nno\tyes",
    }
    assert read(wrote(tmp_path / name, raw[Path(name).suffix].encode()), text_field="body") == (["yes"], [])


def test_settings_of_code_in_a_folder_are_no_rows_and_do_no_harm(tmp_path):
    wrote(tmp_path / "package.json", b'{"name": "x", "version": 1}')
    wrote(tmp_path / "tsconfig.json", b'{\n  // a comment\n  "compilerOptions": {}\n}')
    wrote(tmp_path / "index.ts", b"export const x = 1\n")
    documents, said = read(tmp_path)
    assert documents == ["export const x = 1\n"] and len(said) == 3 and sum("left out" in line for line in said) == 2


# -- what would not fit into memory --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "raw", "why"),
    [
        ("d.jsonl", json_lines(["short", "x" * 3000, "short"]), "the first at line 2: longer than"),
        ("d.json", json.dumps([{"text": "x" * 3000}]).encode(), "row 1 is longer than"),
        ("d.csv", b"text\n" + b"x" * 3000, "line 2 is longer than"),
        ("e.csv", b'text\n"' + b"word\n" * 600 + b'"', "in the row at line 2: field larger than field limit"),
        ("d.py", b"x = 1\n" * 500, "it is longer than"),
        ("d.html", b"<p>words" * 500, "it is longer than"),
    ],
)
def test_what_is_held_whole_has_a_largest_size(tmp_path, monkeypatch, name, raw, why):
    monkeypatch.setattr(formats, "LARGEST", 2000)
    monkeypatch.setattr(formats, "READ", 100)
    path = wrote(tmp_path / name, raw)
    if name == "d.jsonl":
        documents, said = read(path)
        assert documents == ["short"] * 2 and why in said[0]
    else:
        assert why in error(path)


def peak(path: Path) -> int:
    """Bytes of memory that reading a file takes."""
    tracemalloc.start()
    try:
        for _ in sources.documents(sources.Source(path.name, path, None)):
            pass
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


LONG = 16 << 20  # bytes


@pytest.mark.parametrize(
    "write",
    {
        "prose": lambda f: wrote(f / "t.txt", b"Words of a sentence. \n\n" * (LONG // 23)),
        "empty lines": lambda f: wrote(f / "t.md", b"\n" * LONG),
        "empty lines in an archive": lambda f: zipped(f / "d.zip", {"t.txt": b" \n" * (LONG // 2)}),
        "prose in gz": lambda f: wrote(f / "t.txt.gz", gzip.compress(b"Words of a sentence.\n\n" * (LONG // 22))),
        "prose in zst": lambda f: wrote(f / "t.txt.zst", zstd.compress(b"Words of a sentence.\n\n" * (LONG // 22))),
        "an array": lambda f: wrote(f / "d.json", json.dumps([{"text": "words " * 1000}] * (LONG // 6000)).encode()),
        "rows": lambda f: wrote(f / "d.csv", separated(",", "utf-8", ["words " * 1000] * (LONG // 6000))),
    }.values(),
)
def test_nothing_is_read_whole(tmp_path, write):
    assert peak(write(tmp_path)) < LONG / 2


# -- prose in blocks -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000, 1 << 20])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "gb18030"])
def test_text_is_the_same_however_its_bytes_are_cut(size, encoding):
    raw = "a\r\nb\rc\n\r\n日本語 🙂\u2028é\r".encode(encoding) + b"\xff" * (encoding == "utf-8")
    found = "".join(text.decoded([raw[i : i + size] for i in range(0, len(raw), size)], text.Encoding(encoding, "replace")))
    assert found == raw.decode(encoding, "replace").replace("\r\n", "\n").replace("\r", "\n")


@pytest.mark.parametrize("seed", range(20))
def test_pieces_are_the_same_however_prose_is_cut_into_blocks(seed):
    rng = random.Random(seed)
    parts = ["a", "word", " ", "\n", "\n\n", " \n \n", ". ", "。", "é", "x" * 3000, "\n" * 90_000]
    content = "".join(rng.choices(parts, [rng.random() ** 2 for _ in parts[:-1]] + [0.0002], k=9000))
    sizes = [rng.randint(1, 10 ** rng.randint(1, 5)) for _ in range(2000)]
    ends = [sum(sizes[:i]) for i in range(len(sizes))]
    assert list(text.pieces(content[i:j] for i, j in zip(ends, [*ends[1:], None], strict=True))) == list(text.pieces([content]))


@pytest.mark.parametrize("size", [100, 20_000, 1 << 20])
def test_empty_lines_at_the_end_belong_to_the_last_piece_however_long_blocks_are(size):
    content = "a line\n" * 1300 + "\n \n" * 20_000
    assert list(text.pieces(content[i : i + size] for i in range(0, len(content), size))) == [content]


@pytest.mark.parametrize("size", [1, 2, 5, 1 << 20])
def test_json_is_the_same_however_its_bytes_are_cut(tmp_path, monkeypatch, size):
    monkeypatch.setattr(formats, "READ", size)
    path = wrote(tmp_path / "d.json", b'[{"text": "\\ud83d\\ude42 \\n"},\n 12345.5e1, true, {"n": -1.5, "text": "b"} ]\n')
    documents, said = read(path)
    assert documents == ["🙂 \n", "b"] and said[0].startswith("d.json: 2 rows left out, the first at row 2: a number, not an object")


def test_prose_is_the_same_documents_whatever_it_is_packed_in(tmp_path, prose):
    raw = prose.read_bytes()
    found = [read(pack(tmp_path / str(i), "prose.txt", raw))[0] for i, pack in enumerate(PACKERS.values())]
    assert all(documents == read(prose)[0] for documents in found) and len(found[0]) > 3


# -- folders and archives ------------------------------------------------------------------------------------------------------------------------

TREE = {  # what is in it, and whether it is read
    "a.md": True,
    "B.TXT": True,
    "below/deep/c.rst": True,
    "code/d.rs": True,
    "code/e.Cpp": True,
    "page.HTM": True,
    "f.txt.gz": True,
    "picture.png": False,
    "letter.docx": False,
    "LICENSE": False,
    "site.tar.gz": False,
    "again.zip.gz": False,
    ".hidden.txt": False,
    ".git/config.txt": False,
    "code/node_modules/x/y.js": False,
    "code/__pycache__/x.py": False,
    "venv/pyvenv.cfg": False,
    "venv/lib/x.py": False,
    "built/CACHEDIR.TAG": False,
    "built/x.txt": False,
    ".zst": False,
}
FOUND = "1 .cpp, 1 .htm, 1 .md, 1 .rs, 1 .rst, 1 .txt and 1 more; left out 3 hidden, 1 .docx, 1 .gz, 1 .png, 1 .tar.gz, 1 __pycache__"


def content(name: str) -> bytes:
    return gzip.compress(name.encode()) if name.endswith(".gz") else name.encode()


@pytest.mark.parametrize("suffix", ["", ".zip"])
def test_a_folder_and_an_archive_say_what_they_use_and_what_they_leave_out(tmp_path, suffix):
    if suffix:
        zipped(tmp_path / "tree.zip", {name: content(name) for name in TREE})
    else:
        for name in TREE:
            wrote(tmp_path / "tree" / name, content(name))
        (tmp_path / "tree" / "around").symlink_to(tmp_path / "tree")
    documents, said = read(tmp_path / f"tree{suffix}")
    assert sorted(d.strip() for d in documents) == sorted(name for name, used in TREE.items() if used)
    assert said == [f"tree{suffix}: {FOUND} and {4 if suffix else 5} more"]  # a linked folder


def test_a_folder_of_which_nothing_can_be_read_says_what_there_is(tmp_path):
    wrote(tmp_path / "f" / "a.png", b"x"), wrote(tmp_path / "f" / ".b.txt", b"x")
    with pytest.raises(data.DataError, match=r"^--data.sources .*f: no text in it \(left out 1 .png, 1 hidden\); it needs files .* \.md"):
        prepare(config(tmp_path / "f"))


def test_members_of_an_archive_are_as_good_as_files(tmp_path):
    path = zipped(
        tmp_path / "d.zip", {"good.txt": b"good", "bad.txt": b"\0\1", "in.zip": b"PK", "rows.jsonl": b'{"txt": 1}\n{"text": "row"}'}
    )
    documents, said = read(path)
    assert documents == ["good", "row"] and said[0] == "d.zip: 2 .txt, 1 .jsonl; left out 1 .zip"
    assert [line.split(",")[0] for line in said[1:]] == ["bad.txt: left out", "rows.jsonl: 1 row left out"]


def test_a_damaged_or_encrypted_member_is_named(tmp_path):
    path = zipped(tmp_path / "d.zip", {"t.txt": b"words of a text"}, zipfile.ZIP_STORED)
    raw = path.read_bytes()
    wrote(path, raw.replace(b"words", b"sword"))
    assert error(path) == "/t.txt: damaged, or not what its name says (Bad CRC-32 for file 't.txt')"
    locked = bytearray(raw)
    for mark, offset in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        locked[raw.index(mark) + offset] |= 1
    wrote(path, locked)
    assert error(path) == "/t.txt: it is encrypted; unpack the archive first"


# -- pages -----------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("page", "expected"),
    [
        ("<h1>A  title</h1>\n<p>One\n two <b>bold</b> word.</p><p>Two &amp; &eacute;&#33;", "A title\n\nOne two bold word.\n\nTwo & é!\n"),
        ("<script>var x = '<p>no</p>'</script>yes<style>p {no}</style><!-- no --><svg><text>no</text></svg>", "yes\n"),
        ("<ul><li>a</li><li>b</li></ul>end<br>of it<hr/>more", "a\nb\n\nend\nof it\n\nmore\n"),
        ("<pre>def f():\n    return  1</pre>", "def f():\n    return  1\n"),
        ("<table><tr><td>a</td><td>b</td></tr><tr><td>c</td></tr></table>", "a\tb\nc\n"),
        ("a < b &lt; c & d", "a < b < c & d\n"),
        ("<div>" * 100_000 + "deep", "deep\n"),
        ("seen<!-- no end" + "<a href='" * 100_000, "seen\n"),  # would take minutes, looked through from each "<"
        ("cut off &amp; <a title=", "cut off &\n"),
        ("ends in & or <", "ends in & or <\n"),
    ],
)
def test_the_text_of_a_page_is_what_a_reader_sees(page, expected):
    assert hypertext.text_of(page) == expected


# -- what is fetched, and packages that are not there --------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """A cache of the hub that holds one data set, and no network."""
    import huggingface_hub.constants

    cache, revision = tmp_path / "hub", "0" * 40
    root = cache / "datasets--someone--some-rows" / "snapshots" / revision
    for name, raw in {
        "data/a.parquet": parquet(TEXTS[:5]),
        "data/b.parquet": parquet(TEXTS[5:9]),
        "c.jsonl": json_lines(TEXTS[9:12]),
    }.items():
        wrote(root / name, raw)
    wrote(root / "README.md", b"a card"), wrote(root / "model.bin", b"weights")
    for name in ("main", "v1"):
        wrote(root.parents[1] / "refs" / name, revision.encode())
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return cache


@pytest.mark.parametrize(
    ("address", "name", "texts"),
    [
        ("hf://datasets/someone/some-rows/data", "someone/some-rows/data", TEXTS[:9]),
        ("hf://datasets/someone/some-rows/c.jsonl", "someone/some-rows/c.jsonl", TEXTS[9:12]),
        ("hf://datasets/someone/some-rows/c.jsonl@v1", "someone/some-rows/c.jsonl", TEXTS[9:12]),
        ("hf://datasets/someone/some-rows@v1/c.jsonl", "someone/some-rows/c.jsonl", TEXTS[9:12]),
    ],
)
def test_a_data_set_of_the_hub_is_read_from_its_cache(hub, address, name, texts):
    for weight, given in ((None, address), (0.5, f"{address}:0.5")):
        (source,) = sources.with_names(sources.parse_sources((given,)))
        assert (source.name, source.weight) == (name, weight) and [d.text for d in sources.documents(source)] == texts


def test_of_a_whole_data_set_the_card_is_no_text(hub, tmp_path):
    wrote(tmp_path / "r.toml", b'[[sources]]\npath = "hf://datasets/someone/some-rows"\nweight = 2')
    (source,) = sources.parse_sources((str(tmp_path / "r.toml"),))
    assert sorted(d.text for d in sources.documents(source)) == sorted(TEXTS[:12])


@pytest.mark.parametrize(
    ("address", "why"),
    [
        ("hf://datasets/someone/other", "cannot be fetched"),
        ("hf://datasets/someone/some-rows@v2", "cannot be fetched"),
        ("hf://datasets/some--one/..bad", "cannot be fetched"),
        ("hf://datasets/someone/some-rows/none.parquet", "no such file or folder"),
        ("hf://datasets/someone/some-rows/model.bin", "cannot read .bin"),
        ("hf://someone/some-rows", "not an address of a data set"),
        ("hf://datasets/someone", "not an address of a data set"),
        ("hf:datasets", "not an address of a data set"),
    ],
)
def test_what_is_not_on_the_hub_is_an_error_in_one_line(hub, address, why):
    with pytest.raises(data.DataError) as e:
        sources.parse_sources((address,))
    assert str(e.value).startswith(f"--data.sources {address}: {why}") and "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("package", "source", "extra"), [("pyarrow", "d.parquet", "parquet"), ("huggingface_hub", "hf://datasets/a/b", "hub")]
)
def test_a_package_that_is_not_there_is_named_with_the_command_that_brings_it(tmp_path, monkeypatch, package, source, extra):
    wrote(tmp_path / "d.parquet", parquet(TEXTS))
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(data.DataError) as e:
        prepare(config(source))
    assert f"takes {package}, which is not installed: pip install 'hyperlm-torch[{extra}]'" in str(e.value) and "\n" not in str(e.value)


# -- the standard library ------------------------------------------------------------------------------------------------------------------------

ITEM = re.compile(r"""[\s({[]*(?:[bruf]*["']|[-\d]|0x).*[,\])}]\s*(?:\#.*)?""")  # a line of a table


def test_the_standard_library_is_code_and_no_file_is_much_of_a_small_corpus():
    code = [d.text for d in sources.documents(sources.Source("stdlib", None, None))]
    assert sum(map(len, code)) > 4 << 20 and max(map(len, code)) < 0.05 * 1.5 * 2**20
    for module in code:
        lines = module.splitlines()
        assert len(lines) < 100 or sum(bool(ITEM.fullmatch(line)) for line in lines) < len(lines) / 2, module[:300]


def test_tables_of_the_standard_library_are_left_out(tmp_path):
    tables = ["encodings/cp037.py", "html/entities.py", "pydoc_data/topics.py", "locale.py", "_sysconfigdata__linux.py", "idlelib/run.py"]
    tables += ["lib2to3/main.py", "turtledemo/tree.py", "distutils/core.py", "test/test_x.py", "config-3.13-x/python-config.py"]
    for name in [*tables, "argparse.py", "html/parser.py", "email/encoders.py"]:
        wrote(tmp_path / name, b"x = 1")
    found = [file.path.relative_to(tmp_path).as_posix() for file in folders.standard_library(tmp_path)]
    assert found == ["argparse.py", "email/encoders.py", "html/parser.py"]
