"""Bytes of a file to text, and text to pieces: encodings, line ends, and where prose may be cut. Nothing here knows of sources."""

import codecs
import io
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import NamedTuple

from charset_normalizer import from_bytes

PIECE = 8192  # characters after which prose is cut: one file is many documents
REACH = 8 * PIECE  # characters after which it is cut even where no empty line comes
HEAD = 8000  # bytes that tell text from what is none, as git does
SAMPLE = 1 << 17  # bytes that an encoding is told from
MARKS = {  # UTF-32's first: it begins as UTF-16's does
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
CONTROLS = bytes({*range(32), 127} - set(b"\t\n\v\f\r\b\x1b"))
# What text without a mark may be in, but for UTF-8: more choices make more mistakes.
LEGACY = ["cp1252", "cp1250", "cp1251", "cp1253", "cp1254", "cp1255", "cp1256", "koi8_r", "gb18030", "big5", "euc_jp", "cp932", "cp949"]
SINGLE = [name for name in LEGACY if name.startswith(("cp12", "koi8"))]  # one byte a character
CUTS = {  # where a piece may end, the best first
    "empty lines": re.compile(r"\n[ \t\f\v\n]*\n"),
    "line ends": re.compile(r"\n"),
    "sentence ends": re.compile(r"[.!?]['\")\]\u2019\u201d]*\s+|[\u3002\uff01\uff1f][\u2019\u201d\u300d\u300f]*\s*"),
    "spaces": re.compile(r"\s+"),
}
AROUND = re.compile(rb"[\x00-\x7f]{0,80}[\x80-\xff]+[\x00-\x7f]{0,80}")
BEYOND_ASCII = re.compile(r"[^\x00-\x7f]+")
NOT_SPACE = re.compile(r"\S")
REPLACED = "replaced by U+FFFD"


class NotText(ValueError):
    """A file that has no text to use; the message says why."""


class Encoding(NamedTuple):
    """How bytes are decoded, and in words what had to be assumed ("" for nothing)."""

    name: str
    errors: str = "strict"
    assumed: str = ""


def find_encoding(blocks: Callable[[], Iterable[bytes]]) -> Encoding:
    """Of a file, given as blocks that can be read again: by its byte order mark, else UTF-8, else by what its bytes look like.

    Raises:
        NotText: if it looks binary, or is in no encoding that could be told.
    """
    head = next(iter(blocks()), b"")[:HEAD]
    for mark, name in MARKS.items():
        if head.startswith(mark):
            return Encoding(name) if misfit(blocks(), name) is None else Encoding(name, "replace", f"damaged {name.upper()}, {REPLACED}")
    if b"\0" in head:
        raise NotText("it looks binary: it has NUL bytes")
    if 10 * (len(head) - len(head.translate(None, CONTROLS))) > len(head):
        raise NotText("it looks binary: it is full of control characters")
    if (sample := misfit(blocks(), "utf-8")) is None:
        return Encoding("utf-8")
    wrong, right = mistakes(blocks())
    if 10 * wrong <= right:  # any other encoding would spoil the rest
        return Encoding("utf-8", "replace", f"UTF-8 with {wrong} mistake{'s' * (wrong > 1)}, {REPLACED}")
    several = re.search(rb"[\x80-\xff]{2}", sample)  # bytes beyond ASCII that stand alone are letters with accents
    around = b" ".join(AROUND.findall(sample))  # few among many others would be overlooked
    matches = list(from_bytes(around, cp_isolation=LEGACY if several else SINGLE))
    if not matches:
        raise NotText("it is not UTF-8, and its encoding cannot be told: convert it to UTF-8")
    rank = matches[0].chaos, -matches[0].coherence
    western = any("cp1252" in match.could_be_from_charset and (match.chaos, -match.coherence) <= rank for match in matches)
    name = "cp1252" if western else matches[0].encoding
    if misfit(blocks(), name) is None:
        return Encoding(name, assumed=f"not UTF-8, read as {name}")
    return Encoding(name, "replace", f"not UTF-8, read as {name}, what does not fit {REPLACED}")


def misfit(blocks: Iterable[bytes], name: str) -> bytes | None:
    """None if all of it is in this encoding; else a sample from around the first bytes that are not."""
    decoder, block = codecs.getincrementaldecoder(name)(), b""
    try:
        for block in blocks:
            decoder.decode(block)
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as e:
        return block[max(0, e.start - SAMPLE // 2) :][:SAMPLE]
    return None


def mistakes(blocks: Iterable[bytes]) -> tuple[int, int]:
    """Sequences of bytes that are wrong in UTF-8, and characters beyond ASCII that are right."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    wrong = beyond = 0
    for block in chain(blocks, [b""]):
        text = decoder.decode(block, final=not block)
        wrong += text.count("\ufffd")
        beyond += sum(map(len, BEYOND_ASCII.findall(text)))
    return wrong, beyond - wrong


def decode(raw: bytes, encoding: Encoding) -> str:
    """Text with universal newlines."""
    return "".join(decoded([raw], encoding))


def decoded(blocks: Iterable[bytes], encoding: Encoding) -> Iterator[str]:
    """Text with universal newlines, block by block: joined, the same however the bytes are cut."""
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder(encoding.name)(encoding.errors), translate=True)
    for block in blocks:
        yield decoder.decode(block)
    yield decoder.decode(b"", final=True)


def longer(text: str, blocks: Iterator[str], size: int) -> tuple[str, bool]:
    """A text and as many of the blocks that follow it as make it `size` characters long; and whether there are no more."""
    parts, length = [text], len(text)
    while length < size:
        if (block := next(blocks, None)) is None:
            return "".join(parts), True
        parts.append(block)
        length += len(block)
    return "".join(parts), False


def pieces(blocks: Iterable[str], counts: Counter[str] | None = None) -> Iterator[str]:
    """Prose in pieces that join to it, PIECE characters long or a little more; the same ones however it is cut into blocks.

    Args:
        counts: is told at what it was cut: ends of CUTS, or "characters".
    """
    blocks = iter(blocks)
    text, start, ended = "", 0, False
    while True:
        if not ended and len(text) - start <= 2 * REACH:  # an end is told from REACH characters, and whether text follows from as many more
            text, ended = longer(text[start:], blocks, 2 * REACH + 1)
            start = 0
        if len(text) - start <= PIECE:
            break
        end, what = cut(text, start + PIECE, start + REACH)
        if ended and len(text) - end <= REACH and not NOT_SPACE.search(text, end):  # nothing but space is no piece
            break
        yield text[start:end]
        start = end
        if counts is not None:
            counts[what] += 1
    yield text[start:]


def cut(text: str, low: int, high: int) -> tuple[int, str]:
    """The best place to cut a text between `low` and `high`, and what is there."""
    for what, pattern in CUTS.items():
        if match := pattern.search(text, low, high):
            return match.end(), what
    return low, "characters"
