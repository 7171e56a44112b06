"""Chosen documents to tokens, in a folder of the cache whose files corpus.py lists."""

import errno
import io
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from hyperlm import tokenizer as tok
from hyperlm.config import Config
from hyperlm.data import cache
from hyperlm.data.documents import DataError, Document
from hyperlm.data.selection import Selection, chosen
from hyperlm.data.sources import Readings, Source
from hyperlm.env import progress

BPE_TEXT = 256 << 20  # characters of text that a tokenizer is trained on
AT_ONCE = 1 << 20  # characters that are tokenised at a time
MIB = 1 << 20


def build(folder: Path, config: Config, sources: list[Source], selections: list[Selection], readings: Readings) -> None:
    """Tokenise into `folder`, whole or not at all.

    Raises:
        DataError: if the cache cannot be written.
    """
    try:
        with cache.writing(folder) as part:
            write(part, config, sources, selections, readings)
    except OSError as e:
        why, remedy = e.strerror or str(e), "set --data.cache to a folder that can be written"
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            most = 4 * sum(int(s.size[s.use].sum()) for s in selections)  # a token has 4 bytes at most, and a byte of text or more
            free = shutil.disk_usage(folder.parent).free
            why += f": {free / MIB:,.1f} MiB are free, and the tokens of this text take {most / MIB:,.1f} at most"
            remedy = "make room, or set --data.cache to where there is more"
        raise DataError(f"cannot write the cache {folder.parent} ({why}); {remedy}") from e


def make_tokenizer(config: Config, sources: list[Source], selections: list[Selection], readings: Readings) -> Tokenizer:
    if config.data.tokenizer == "bytes":
        return tok.byte_tokenizer()
    if config.data.tokenizer != "bpe":
        return tok.load(config.data.tokenizer)

    def texts() -> Iterator[str]:
        for source, selection in zip(sources, selections, strict=True):
            left = BPE_TEXT // len(sources)
            for _, document, val in chosen(source, selection, readings):
                if not val and left > 0:
                    text = document.text or "\n".join(content for _, content in document.messages)
                    left -= len(text)
                    yield text

    used = sum(int(s.train.sum()) for s in selections)
    return tok.train_bpe(progress(texts(), "training the tokenizer", used, unit=" docs"), config.model.vocab_size)


def with_vocabulary(config: Config) -> Config:
    """Set the model's vocabulary from a given tokenizer.json, rounded up for the matrix units; leave it alone otherwise."""
    if config.data.tokenizer in ("bpe", "bytes"):
        return config
    size = tok.vocabulary_size(tok.load(config.data.tokenizer))
    return replace(config, model=replace(config.model, vocab_size=-(-size // 64) * 64))


def write(folder: Path, config: Config, sources: list[Source], selections: list[Selection], readings: Readings) -> None:
    """Tokenise everything into `folder`."""
    tokenizer = make_tokenizer(config, sources, selections, readings)
    tok.save(tokenizer, folder / "tokenizer.json")
    given = config.data.tokenizer not in ("bpe", "bytes")
    loses, known = "", set[str]()  # what a given tokenizer does not keep, and the characters that it was tried on
    dtype = np.dtype(np.uint16 if tok.vocabulary_size(tokenizer) <= 1 << 16 else np.uint32)
    end = tok.end_of_text(tokenizer)

    chat = False
    bar = progress(desc="tokenising", total=sum(int(s.size[s.use].sum()) for s in selections), unit="B", unit_scale=True)
    for index, (source, selection) in enumerate(zip(sources, selections, strict=True)):
        held_out: list[HeldOut] = []
        with writing(folder, index) as (texts, talks):
            for number, batch in enumerate(batched(chosen(source, selection, readings))):
                if given:  # the beginning as it is, and then each character that is new
                    contents = [document.content for _, document, _ in batch]
                    new = set().union(*contents) - known
                    if (changed := tok.losses(tokenizer, contents if number == 0 else sorted(new))) and not loses:
                        loses = f"does not keep all of {source.name}: {changed}"
                    known |= new
                for (i, document, val), (ids, said) in zip(batch, encoded(tokenizer, [document for _, document, _ in batch]), strict=True):
                    tokens = np.array([*ids, end], dtype)
                    if val:
                        said = said + b"\0" if document.messages else bytes([1]) * len(tokens)
                        facts = len(document.raw), len(document.said.encode()), bool(document.messages)
                        held_out.append(HeldOut(int(selection.order[i]), tokens, said, facts))
                    elif document.messages:
                        write_talk(talks, tokens, said + b"\0")
                    else:
                        texts.write(tokens.tobytes())
                    chat |= bool(document.messages)
                    bar.update(len(document.raw))
        write_held_out(folder, index, sorted(held_out, key=lambda document: document.order))
    bar.close()
    cache.seal(folder, {"dtype": dtype.name, "chat": chat, "loses": loses})


class HeldOut(NamedTuple):
    order: int
    tokens: np.ndarray  # with its end-of-text
    said: bytes  # one a token
    facts: tuple[int, int, bool]  # bytes, bytes of a text or of what an assistant says, whether it is a conversation


Talking = tuple[BinaryIO, BinaryIO, BinaryIO]  # files of tokens, of what of these is said, and of lengths


@contextmanager
def writing(folder: Path, index: int) -> Iterator[tuple[BinaryIO, Talking]]:
    """Files of the texts and of the conversations of a source, the latter only left there if there are any."""
    paths = [folder / f"{what}_{index:02d}.bin" for what in ("talks", "said", "lengths")]
    with open(folder / f"train_{index:02d}.bin", "wb") as texts, ExitStack() as stack:
        yield texts, tuple(stack.enter_context(open(path, "wb")) for path in paths)
    for path in paths:
        if path.stat().st_size == 0:
            path.unlink()


def write_talk(files: Talking, tokens: np.ndarray, said: bytes) -> None:
    """Add a conversation, to the first an end of text before it."""
    first = not files[0].tell()
    added = tokens[-1:].tobytes() * first + tokens.tobytes(), b"\0" * first + said, np.uint32(len(tokens)).tobytes()
    for file, some in zip(files, added, strict=True):
        file.write(some)


def write_held_out(folder: Path, index: int, documents: list[HeldOut]) -> None:
    """The validation documents of a source, in this order, with an end of text before the first."""
    begin = documents[0].tokens[-1:].tobytes() if documents else b""
    (folder / f"val_{index:02d}.bin").write_bytes(b"".join([begin, *(d.tokens.tobytes() for d in documents)]))
    if any(is_talk for *_, is_talk in (d.facts for d in documents)):
        (folder / f"val_said_{index:02d}.bin").write_bytes(b"".join([b"\0", *(d.said for d in documents)]))
    table = io.BytesIO()  # numpy's own writing to files reports a full disk without its reason
    np.save(table, np.array([(len(d.tokens), *d.facts) for d in documents], np.int64).reshape(-1, 4))
    (folder / f"val_{index:02d}.npy").write_bytes(table.getvalue())


def batched(documents: Iterator[tuple[int, Document, bool]]) -> Iterator[list[tuple[int, Document, bool]]]:
    """Documents of about AT_ONCE characters together."""
    batch, size = [], 0
    for item in documents:
        batch.append(item)
        size += len(item[1].content)
        if size >= AT_ONCE:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def encoded(tokenizer: Tokenizer, documents: list[Document]) -> Iterator[tuple[list[int], bytes]]:
    """Ids of each document; and of conversations a byte for each, 1 for what the assistant says and the ends of its turns."""
    contents = [[content for _, content in d.messages] if d.messages else [d.text] for d in documents]
    ids = iter(tok.encode(tokenizer, list(chain.from_iterable(contents))))
    for d in documents:
        if not d.messages:
            yield next(ids), b""
            continue
        turns = [tok.turn_of(tokenizer, role, next(ids)) for role, _ in d.messages]
        said = (b"\0" + bytes([role == "assistant"]) * (len(turn) - 1) for (role, _), turn in zip(d.messages, turns, strict=True))
        yield list(chain.from_iterable(turns)), b"".join(said)
