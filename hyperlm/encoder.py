"""Ids of much text: by fastokens where it is installed and gives the same ids as tokenizers, else by tokenizers.

fastokens reads the same tokenizer.json and is some forty times as fast. It is trusted no further than it is checked: on TORTURE before
anything else, on all of the first batch, and on a text of every few batches. A difference anywhere means that none of its ids are kept.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise
from typing import Any, NamedTuple, TypeVar

import numpy as np
from tokenizers import Tokenizer

from hyperlm import tokenizer as tok
from hyperlm.env import give_back_memory, readable

try:
    import fastokens
except ImportError:
    fastokens = None

T = TypeVar("T")
EVERY = 8  # batches, of one of which a text is checked
OFTEN = 64  # batches, after which gaps in the heap are given back: they would add up to hundreds of MiB
MUCH = 200 << 20  # bytes of text that tokenizers takes a minute for on two cores
LONGEST = 1 << 16  # characters of it
TORTURE = (
    *(
        "",
        " ",
        "\n",
        "\x00",
        "a" * 5000,
        " " * 5000,
        "\r\n" * 500,
        "0123456789" * 300,
        "日本語の文章" * 200,
        "ab \u3000\t\xa0\x85 \x1c c" * 99,
    ),
    "I'll we've 'S 's ’t don't DON'T it's'd 12.5 1,000 ٣٤٥ ⅷ² x_y __init__ a-b C++ (a)(b) {}\t\treturn  \n\n\n  if x:\r\n\f\v end   ",
    "ñ n\u0303 é e\u0301 ſ İ ß ﬁ Å 한국어 하 ไทย العربية हिन्दी עברית Ελλάδα Привет \u200d\ufeff\ufffd\U000e0001\U0010ffff 👩‍👩‍👧 🇫🇷 👍🏽 𝔘𝔫𝔦",
    "".join(map(chr, (*range(0x600), *range(0x1F00, 0x2200), *range(0x2FF0, 0x3200), *range(0xFE00, 0x10000), *range(0x1F300, 0x1F700)))),
    " ".join(f"{name}x {name.lower()}{name} {name[:-1]}" for name in (*tok.SPECIALS, *tok.FOREIGN_ENDS, "<|im_start|>", "[UNK]", "<unk>")),
)


class Differs(Exception):
    """fastokens gives other ids than tokenizers; the message says where."""


class Encoder(NamedTuple):
    tokenizer: Tokenizer
    fast: Any = None  # the same as a fastokens.Tokenizer


def encoder_of(tokenizer: Tokenizer, size: int, say: Callable[[str], None]) -> Encoder:
    """The faster encoder if it is installed and stands its test; `say` is told if it does not, or is missed for `size` bytes of text."""
    if fastokens is None:
        if size > MUCH:
            say(f"tokenizer  {readable(size)} take minutes to encode; fastokens is many times as fast: pip install fastokens")
        return Encoder(tokenizer)
    try:
        encoder = Encoder(tokenizer, fastokens.Tokenizer.from_json_str(tokenizer.to_str()))
        check(encoder, TORTURE)
        return encoder
    except BaseException as e:
        failure = tok.reported(e, "fastokens cannot take its place")
        if not isinstance(failure, tok.TokenizerError):
            raise
        say(f"tokenizer  encoded by tokenizers, slowly: {failure}")
        return Encoder(tokenizer)


def encode(encoder: Encoder, texts: Sequence[str]) -> list[np.ndarray]:
    """Ids of each text, uint32, without special tokens.

    Raises:
        Differs: if fastokens fails.
        TokenizerError: if tokenizers does.
    """
    if encoder.fast is None:
        return [np.array(ids, np.uint32) for ids in tok.encode(encoder.tokenizer, list(texts))]
    try:
        ids, offsets = encoder.fast.encode_batch_flat(list(texts), split_special_tokens=True)
    except BaseException as e:
        failure = tok.reported(e, "fastokens cannot encode this text")
        raise (Differs(str(failure)) if isinstance(failure, tok.TokenizerError) else failure) from e
    ids, ends = np.frombuffer(ids, "<u4"), np.frombuffer(offsets, "<u8").tolist()
    return [ids[a:b] for a, b in pairwise(ends)]


def check(encoder: Encoder, texts: Sequence[str]) -> None:
    """Encode texts both ways.

    Raises:
        Differs: if that makes a difference.
    """
    for text, fast, slow in zip(texts, encode(encoder, texts), tok.encode(encoder.tokenizer, list(texts)), strict=True):
        if fast.tolist() != slow:
            raise Differs(f"fastokens has other ids than tokenizers for {text[:40]!r}{'...' * (len(text) > 40)}")


def encoded(encoder: Encoder, batches: Iterable[tuple[T, list[str]]]) -> Iterator[tuple[T, list[np.ndarray]]]:
    """Ids of the texts of each batch, as of `encode`, with what comes with it; it is encoded while the next one is read.

    Raises:
        Differs: if fastokens fails or differs; nothing that was yielded is to be kept.
        TokenizerError: if tokenizers fails.
    """

    def work(number: int, texts: list[str]) -> list[np.ndarray]:
        if number % OFTEN == 0:
            give_back_memory()
        if encoder.fast is not None and number % EVERY == 0:
            check(encoder, texts if number == 0 else [text[:LONGEST] for text in texts[:1]])
        return encode(encoder, texts)

    with ThreadPoolExecutor(1) as pool:
        before: tuple[T, Future[list[np.ndarray]]] | None = None
        for number, (batch, texts) in enumerate(batches):
            now = batch, pool.submit(work, number, texts)
            if before:
                yield before[0], before[1].result()
            before = now
        if before:
            yield before[0], before[1].result()
