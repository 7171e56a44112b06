"""Bytes to documents: encodings, line ends, cuts, lines of .jsonl; nothing is lost without a word, and no input ends in a traceback."""

import codecs
import json
import os
import random
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import write_prose
from test_data import config, prepare

from hyperlm import data
from hyperlm.data import formats, sources, text

PARAGRAPHS = "\n\n".join(f"Paragraph {i} goes on for a while, and says what {i * i} is. " * 40 for i in range(30)) + "\n"
FRENCH = "Le café était très bon, et l’été à la forêt « déjà vu ». Où est passée la clé ? Ça va, merci. " * 30
RUSSIAN = "Привет, как дела? Это проверка кодировки текста, в котором есть буквы. " * 30


def read(path: Path, **settings: str) -> tuple[list[str], list[str]]:
    """The documents of a file or folder, and what was said of them."""
    readings = sources.Readings(**settings)
    found = [d.text for d in sources.documents(sources.Source(path.name, path, None), readings)]
    assert found == [d.text for d in sources.documents(sources.Source(path.name, path, None), readings)]  # the second time as the first
    return found, list(sources.notes(readings))


# -- encodings and line ends ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be-mark", "utf-32"])
def test_line_ends_and_byte_order_marks_do_not_matter(tmp_path, encoding, end):
    (tmp_path / "plain.txt").write_bytes(PARAGRAPHS.encode())
    body = PARAGRAPHS.replace("\n", end)
    raw = codecs.BOM_UTF16_BE + body.encode("utf-16-be") if encoding == "utf-16-be-mark" else body.encode(encoding)
    (tmp_path / "other.txt").write_bytes(raw)
    documents, said = read(tmp_path / "other.txt")
    assert documents == read(tmp_path / "plain.txt")[0] and len(documents) > 5 and "".join(documents) == PARAGRAPHS and said == []


@pytest.mark.parametrize(
    ("content", "encoding"),
    [
        (FRENCH, "cp1252"),
        ("caf\xe9 au lait", "cp1252"),
        ("She was na\u00efve, they said. " * 5 + "Plain words of the harbour and the gate.\n\n" * 1000, "cp1252"),  # no Chinese characters
        ("It\u2019s \u201cplain\u201d English \u2014 but for quotes. " * 20, "cp1252"),
        (RUSSIAN, "cp1251"),
        (RUSSIAN, "koi8_r"),
        ("这是一个测试文件，用于检测编码。今天天气很好。" * 20, "gb18030"),
        ("これはテストです。日本語の文章を検出します。" * 20, "cp932"),
    ],
)
def test_other_encodings_are_told_and_said(tmp_path, content, encoding):
    (tmp_path / "t.txt").write_bytes(content.encode(encoding))
    documents, said = read(tmp_path / "t.txt")
    assert "".join(documents) == content
    assert said == [f"t.txt: not UTF-8, read as {encoding}"]


def test_damaged_utf8_stays_utf8(tmp_path):
    raw = bytearray((FRENCH).encode())
    raw[2:2] = b"\xff"
    (tmp_path / "t.txt").write_bytes(raw)
    documents, said = read(tmp_path / "t.txt")
    assert "".join(documents).count("é") > 50 and "".join(documents).count("\ufffd") == 1
    assert said == ["t.txt: UTF-8 with 1 mistake, replaced by U+FFFD"]


def test_a_mistake_far_into_a_file_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "READ", 1000)
    (tmp_path / "t.jsonl").write_bytes(b'{"text": "plain"}\n' * 5000 + '{"text": "café"}\n'.encode("cp1252"))
    documents, said = read(tmp_path / "t.jsonl")
    assert documents == ["plain"] * 5000 + ["café"] and said == ["t.jsonl: not UTF-8, read as cp1252"]


BINARY = {
    "an image": (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + bytes(range(256)) * 20, "NUL bytes"),
    "noise": (random.Random(1).randbytes(5000).replace(b"\0", b"\1"), "control characters"),
    "controls": (b"\1\2\3\4 text" * 100, "control characters"),
    "UTF-16 without a mark": ("hello world " * 50).encode("utf-16-le"),
}


@pytest.mark.parametrize("raw", BINARY.values(), ids=BINARY.keys())
def test_what_looks_binary_is_refused_by_name_and_left_out_of_a_folder(tmp_path, raw):
    raw, why = raw if isinstance(raw, tuple) else (raw, "NUL bytes")
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "good.txt").write_text("good")
    (tmp_path / "f" / "bad.txt").write_bytes(raw)
    with pytest.raises(data.DataError) as e:
        read(tmp_path / "f" / "bad.txt")
    assert str(e.value).startswith(f"{tmp_path / 'f' / 'bad.txt'}: it looks binary") and why in str(e.value) and "\n" not in str(e.value)
    documents, said = read(tmp_path / "f")
    assert documents == ["good"] and said[0] == "f: 2 .txt" and len(said) == 2 and said[1].startswith("bad.txt: left out, it looks binary")


def test_many_files_of_one_kind_are_said_in_a_few_lines(tmp_path):
    (tmp_path / "f").mkdir()
    for i in range(10):
        (tmp_path / "f" / f"{i}.txt").write_bytes(b"caf\xe9 au lait")
        (tmp_path / "f" / f"{i}.md").write_bytes(b"\0\1\2")
    _, said = read(tmp_path / "f")
    assert said[0] == "f: 10 .md, 10 .txt" and len(said) == 9 and sum(line == "and 7 more files likewise" for line in said) == 2


def test_a_folder_reads_every_suffix_in_any_case_and_no_pipes(tmp_path):
    for name in ("a.txt", "b.TXT", "c.Md", "d.PY", "e.png", "f"):
        (tmp_path / name).write_text(name)
    (tmp_path / "g.jsonl").write_text('{"text": "g"}')
    os.mkfifo(tmp_path / "h.txt")
    assert read(tmp_path)[0] == ["a.txt", "b.TXT", "c.Md", "d.PY", "g"]


# -- cuts ----------------------------------------------------------------------------------------------------------------------------

UNCUT = {
    "lines": ("\n".join(f"example {i}: what is {i} + {i}? it is {2 * i}" for i in range(3000)), "line ends", "\n"),
    "sentences": ("This text has no lines at all, only sentences. " * 2000, "sentence ends", ". "),
    "CJK": ("这是一个没有空行的文本。" * 4000, "sentence ends", "。"),
    "words": ("word " * 20000, "spaces", " "),
    "one word": ("x" * 100_000, "characters", "x"),
}


@pytest.mark.parametrize(("content", "what", "end"), UNCUT.values(), ids=UNCUT.keys())
def test_text_without_empty_lines_is_cut_elsewhere_and_it_is_said(tmp_path, content, what, end):
    (tmp_path / "t.txt").write_text(content)
    documents, said = read(tmp_path / "t.txt")
    assert "".join(documents) == content and len(documents) > 3
    assert all(d.endswith(end) and text.PIECE <= len(d) < text.PIECE + 100 for d in documents[:-1])
    assert said == [f"t.txt: few empty lines, cut into {len(documents)} documents ({len(documents) - 1} at {what})"]


def test_lines_of_spaces_are_empty_and_no_piece_is_empty(tmp_path):
    content = ("a line\n" * 1300 + " \t \n") * 4 + "\n \n" * 5000
    parts = list(text.pieces([content]))
    assert "".join(parts) == content and len(parts) == 4 and all(part.strip() for part in parts)


@pytest.mark.parametrize("seed", range(20))
def test_pieces_join_to_any_text(seed):
    rng = random.Random(seed)
    parts = ["a", "word", " ", "\n", "\n\n", " \n \n", ". ", "。", "é", "x" * 3000, "\t"]
    content = "".join(rng.choices(parts, [rng.random() for _ in parts], k=20_000))
    pieces = list(text.pieces([content]))
    assert "".join(pieces) == content and all(piece.strip() for piece in pieces)
    assert all(text.PIECE <= len(piece) <= text.REACH for piece in pieces[:-1])


# -- .jsonl --------------------------------------------------------------------------------------------------------------------------

TURN = '{"messages": [{"role": "user", "content": %s}]}'
LINES = {
    "null content": (TURN % "null", "content of message 1 is not a string but null"),
    "a number": (TURN % "3", "content of message 1 is not a string but a number"),
    "a picture": (TURN % '[{"type": "image_url"}]', "content of message 1 has a part of type 'image_url': text alone can be read"),
    "an object": (TURN % "{}", "content of message 1 is not a string but an object"),
    "true": ('{"text": true}', "text is not a string but true or false"),
    "null text": ('{"text": null}', "text is not a string but null"),
    "half a pair": ('{"text": "a\\ud800b"}', "text has half of a surrogate pair"),
    "half a pair in a turn": (TURN % '"\\udc00"', "content of message 1 has half of a surrogate pair"),
    "deep": ('{"text": ' + "[" * 100_000, "nested too deeply"),
    "deep object": ('{"a":' * 100_000, "nested too deeply"),
    "a huge integer": ('{"text": ' + "9" * 10_000 + "}", "Exceeds the limit"),
    "a list": ('["text"]', "a list, not an object"),
    "a string": ('"text"', "a string, not an object"),
    "nothing": ("null", "null, not an object"),
    "messages null": ('{"messages": null}', "messages is null, not a list"),
    "messages an object": ('{"messages": {"role": "user"}}', "messages is an object, not a list"),
    "a message of text": ('{"messages": ["hi"]}', "message 1 is a string, not an object"),
    "a role of the wrong kind": ('{"messages": [{"role": [], "content": "x"}]}', "role [] is none of"),
    "no role": ('{"messages": [{"content": "x"}]}', "no 'role' field in message 1"),
    "cut off": ('{"text": "a', "Unterminated string"),
    "two on a line": ('{"text": "a"}{"text": "b"}', "Extra data"),
    "a control character": ('{"text": "a\x01"}', "Invalid control character"),
}


@pytest.mark.parametrize(("line", "message"), LINES.values(), ids=LINES.keys())
def test_a_bad_line_is_named_by_file_and_number(tmp_path, line, message):
    (tmp_path / "d.jsonl").write_text('{"text": "good"}\n\n' + line + "\n")
    with pytest.raises(data.DataError) as e:
        read(tmp_path / "d.jsonl", on_bad="stop")
    assert str(e.value).startswith(f"{tmp_path / 'd.jsonl'}:3: {message}") and "\n" not in str(e.value) and len(str(e.value)) < 300


def test_characters_written_as_pairs_and_line_separators_inside_texts_are_kept(tmp_path):
    content = "🙂 a\u2028b\x85c\r\nd"
    (tmp_path / "d.jsonl").write_bytes(
        json.dumps({"text": content}).encode() + b"\r\n" + json.dumps({"text": content}, ensure_ascii=False).encode()
    )
    assert read(tmp_path / "d.jsonl")[0] == [content] * 2


def test_lines_are_read_one_by_one(tmp_path, monkeypatch):
    (tmp_path / "d.jsonl").write_text('{"text": "one"}\n' * 100_000 + "broken")
    monkeypatch.setattr(Path, "read_bytes", lambda path: pytest.fail("the whole file was read"))
    monkeypatch.setattr(Path, "read_text", lambda path: pytest.fail("the whole file was read"))
    found = sources.documents(sources.Source("d", tmp_path / "d.jsonl", None))
    assert next(found).text == "one"


# -- whole corpora that used to fail ---------------------------------------------------------------------------------------------------


def book(path: Path) -> Path:
    path.write_bytes(write_prose(path, 30_000).read_text().replace("\n", "\r\n").encode())
    return path


def jsonl(path: Path, *contents: str) -> Path:
    path.write_text("\n".join(json.dumps({"text": content}) for content in contents))
    return path


CORPORA = {
    "a book with Windows line ends": lambda f: book(f / "b.txt"),
    "a text without empty lines": lambda f: (f / "l.txt").write_text("\n".join(f"line {i}" for i in range(9000))) and f / "l.txt",
    "one example a line": lambda f: (f / "l.txt").write_text("\n".join(f"q: {i}? a: {i * i}" for i in range(3000))) and f / "l.txt",
    "one word": lambda f: (f / "w.txt").write_text("".join(random.Random(0).choices("abcdefgh", k=5000))) and f / "w.txt",
    "a single short text": lambda f: (f / "s.txt").write_text("A short text. It has a few sentences. " * 20) and f / "s.txt",
    "a single line of .jsonl": lambda f: jsonl(f / "d.jsonl", "some words and more of them " * 50),
    "one text many times": lambda f: jsonl(f / "d.jsonl", *["the same words each time, again and again " * 5] * 50),
    "two texts of two lengths": lambda f: jsonl(f / "d.jsonl", "long " * 5000, "short " * 10),
    "one talk": lambda f: (
        (f / "d.jsonl").write_text(
            json.dumps({"messages": [{"role": r, "content": f"{r} {i} says"} for i in range(20) for r in ("user", "assistant")]})
        )
        and f / "d.jsonl"
    ),
    "a module": lambda f: (f / "m.py").write_text("def f(x):\n    return x\n\n\n" * 100) and f / "m.py",
}


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
@pytest.mark.parametrize("write", CORPORA.values(), ids=CORPORA.keys())
def test_a_corpus_of_any_shape_trains_and_validates(tmp_path, write, tokenizer):
    cfg = config(write(tmp_path))
    corpus = prepare(replace(cfg, data=replace(cfg.data, tokenizer=tokenizer)))
    order = data.batches(corpus, cfg, say=lambda line: None)
    windows, size = data.validation_sequences(corpus.shards[0], cfg.data, 0)
    assert order.at(0).tokens.shape == (2, 4, 16) and len(windows.tokens) > 0 and size > 0
