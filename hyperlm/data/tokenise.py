"""Chosen documents to tokens, in a folder of the cache whose files corpus.py lists."""

import errno
import io
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from tokenizers import Tokenizer

from hyperlm import tokenizer as tok
from hyperlm.config import Config
from hyperlm.data import cache
from hyperlm.data.documents import DataError, Document
from hyperlm.data.selection import Selection, batched, chosen, limit
from hyperlm.data.sources import Readings, Source
from hyperlm.encoder import Differs, Encoder, encoded, encoder_of
from hyperlm.env import give_back_memory, progress

BPE_TEXT = 32 << 20  # bytes of text that a tokenizer is trained on: its memory, 0.3 GiB; four times as much saves 0.8 % of the tokens
MIB = 1 << 20

Say = Callable[[str], None]


def build(folder: Path, config: Config, sources: list[Source], selections: list[Selection], readings: Readings, say: Say) -> None:
    """Tokenise into `folder`, whole or not at all.

    Raises:
        DataError: if the cache cannot be written.
    """
    try:
        with cache.writing(folder) as part:
            write(part, config, sources, selections, readings, say)
    except OSError as e:
        why, remedy = e.strerror or str(e), "set --data.cache to a folder that can be written"
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            most = 4 * sum(s.used for s in selections)  # a token has 4 bytes at most, and a byte of text or more
            free = shutil.disk_usage(folder.parent).free
            why += f": {free / MIB:,.1f} MiB are free, and the tokens of this text take {most / MIB:,.1f} at most"
            remedy = "make room, or set --data.cache to where there is more"
        raise DataError(f"cannot write the cache {folder.parent} ({why}); {remedy}") from e


def make_tokenizer(config: Config, sources: list[Source], selections: list[Selection], readings: Readings) -> Tokenizer:
    if config.data.tokenizer == "bytes":
        return tok.byte_tokenizer()
    if config.data.tokenizer != "bpe":
        return tok.load(config.data.tokenizer)

    parts = samples([s.size[s.train] for s in selections], [s.hashes[s.train, 0] for s in selections])
    bar = progress(desc="reading for the tokenizer", total=sum(int(size.sum()) for size in parts), unit="B", unit_scale=True)

    def texts() -> Iterator[str]:
        for source, selection, size in zip(sources, selections, parts, strict=True):
            left = iter(size.tolist())
            for _, document, val in chosen(source, selection, readings):
                if not val and (most := next(left)):
                    part = document.head(most)
                    bar.update(len(part.raw))
                    yield part.text or "\n".join(content for _, content in part.messages)
        bar.close()

    return tok.train_bpe(texts(), config.model.vocab_size)


def samples(sizes: list[np.ndarray], orders: list[np.ndarray]) -> list[np.ndarray]:
    """Bytes of each document of each source that a tokenizer is trained on: all, or about BPE_TEXT.

    Every source has the same share, or all that it has, and the rest is for the others; the documents are those whose hashes come first.
    """
    parts: list[np.ndarray] = [np.zeros(0, np.int64)] * len(sizes)
    room = BPE_TEXT
    ranked = sorted(range(len(sizes)), key=lambda k: sizes[k].sum())
    for rank, k in enumerate(ranked):
        use, size = limit(orders[k], sizes[k], room // (len(sizes) - rank))
        parts[k] = np.where(use, size, 0)
        room -= int(parts[k].sum())
    return parts


def with_vocabulary(config: Config) -> Config:
    """Set the model's vocabulary from a given tokenizer.json, rounded up for the matrix units; leave it alone otherwise."""
    if config.data.tokenizer in ("bpe", "bytes"):
        return config
    size = tok.vocabulary_size(tok.load(config.data.tokenizer))
    return replace(config, model=replace(config.model, vocab_size=-(-size // 64) * 64))


def write(folder: Path, config: Config, sources: list[Source], selections: list[Selection], readings: Readings, say: Say) -> None:
    """Tokenise everything into `folder`."""
    tokenizer = make_tokenizer(config, sources, selections, readings)
    tok.save(tokenizer, folder / "tokenizer.json")
    give_back_memory()  # of the training
    given = config.data.tokenizer not in ("bpe", "bytes")
    encoder = encoder_of(tokenizer, sum(s.used for s in selections), say)
    try:
        meta = write_tokens(folder, encoder, sources, selections, readings, given)
    except Differs as e:
        say(f"tokenizer  {e}: all of the text is encoded by tokenizers, slowly")
        meta = write_tokens(folder, encoder._replace(fast=None), sources, selections, readings, given)
    cache.seal(folder, meta)


def write_tokens(
    folder: Path, encoder: Encoder, sources: list[Source], selections: list[Selection], readings: Readings, given: bool
) -> dict[str, Any]:
    """Encode and write all documents; returns what the cache says of them."""
    tokenizer = encoder.tokenizer
    loses, known = "", set[str]()  # what a given tokenizer does not keep, and the characters that it was tried on
    dtype = np.dtype(np.uint16 if tok.vocabulary_size(tokenizer) <= 1 << 16 else np.uint32)
    end = tok.end_of_text(tokenizer)

    chat = False
    bar = progress(desc="tokenising", total=sum(s.used for s in selections), unit="B", unit_scale=True)
    for index, (source, selection) in enumerate(zip(sources, selections, strict=True)):
        facts: list[tuple[int, ...]] = []  # of what is held out: its place in order, then as in val_00.npy
        with writing(folder, index) as (texts, talks, held_out):
            batches = batched(chosen(source, selection, readings), lambda item: len(item[1].content))
            for number, (batch, token_ids) in enumerate(encoded(encoder, ((batch, contents(batch)) for batch in batches))):
                if given:  # the beginning as it is, and then each character that is new
                    whole = [document.content for _, document, _ in batch]
                    new = characters(whole, known)
                    if (changed := tok.losses(tokenizer, whole if number == 0 else sorted(new))) and not loses:
                        loses = f"does not keep all of {source.name}: {changed}"
                    known |= new
                ids = iter(token_ids)
                for i, document, val in batch:
                    ids_of, said = document_ids(tokenizer, document, ids)
                    tokens = np.append(ids_of, end).astype(dtype)
                    if val:
                        held_out[0].write(tokens.tobytes())
                        held_out[1].write(said + b"\0" if document.messages else b"\1" * len(tokens))
                        size, learnt = len(document.raw), len(document.said.encode())
                        facts.append((int(selection.order[i]), len(tokens), size, learnt, bool(document.messages)))
                    elif document.messages:
                        write_talk(talks, tokens, said + b"\0")
                    else:
                        texts.write(tokens.tobytes())
                    chat |= bool(document.messages)
                    bar.update(len(document.raw))
        finish_held_out(folder, index, facts, np.array([end], dtype).tobytes())
    bar.close()
    return {"dtype": dtype.name, "chat": chat, "loses": loses}


def contents(batch: list[tuple[int, Document, bool]]) -> list[str]:
    """Texts, and what is said in each turn of conversations, in order."""
    return [text for _, document, _ in batch for text in ([content for _, content in document.messages] or [document.text])]


def document_ids(tokenizer: Tokenizer, document: Document, ids: Iterator[np.ndarray]) -> tuple[np.ndarray, bytes]:
    """Ids of a document; and of a conversation a byte for each, 1 for what the assistant says and the ends of its turns.

    Args:
        ids: of its contents, which are taken from it.
    """
    if not document.messages:
        return next(ids), b""
    turns = [tok.turn_of(tokenizer, role, next(ids).tolist()) for role, _ in document.messages]
    said = (b"\0" + bytes([role == "assistant"]) * (len(turn) - 1) for (role, _), turn in zip(document.messages, turns, strict=True))
    return np.array(list(chain.from_iterable(turns)), np.uint32), b"".join(said)


def characters(texts: list[str], known: set[str]) -> set[str]:
    """Those of `texts` that are not known."""
    seen = "".join(c for c in known if c.isascii()).encode()  # most of most texts: gone before each character is looked at
    return set[str]().union(*(text.encode().translate(None, seen).decode() for text in texts)) - known


Talking = tuple[BinaryIO, BinaryIO, BinaryIO]  # files of tokens, of what of these is said, and of lengths


@contextmanager
def writing(folder: Path, index: int) -> Iterator[tuple[BinaryIO, Talking, tuple[BinaryIO, BinaryIO]]]:
    """Files of a source: of texts, of conversations (gone if there are none), and of what is held out (tokens, and which are said)."""
    paths = [folder / f"{what}_{index:02d}.bin" for what in ("train", "talks", "said", "lengths", "val", "val_said")]
    with ExitStack() as stack:
        texts, *talks, val, val_said = (stack.enter_context(open(path, "wb")) for path in paths)
        yield texts, tuple(talks), (val, val_said)
    for path in paths[1:4]:
        if path.stat().st_size == 0:
            path.unlink()


def write_talk(files: Talking, tokens: np.ndarray, said: bytes) -> None:
    """Add a conversation, to the first an end of text before it."""
    first = not files[0].tell()
    added = tokens[-1:].tobytes() * first + tokens.tobytes(), b"\0" * first + said, np.uint32(len(tokens)).tobytes()
    for file, some in zip(files, added, strict=True):
        file.write(some)


def finish_held_out(folder: Path, index: int, facts: list[tuple[int, ...]], end: bytes) -> None:
    """Bring the validation documents of a source into order, with an end of text before the first, and write what is known of each."""
    ranked = sorted(range(len(facts)), key=lambda i: facts[i][0])
    table = np.array([row[1:] for row in facts], np.int64).reshape(-1, 4)
    rearrange(folder / f"val_{index:02d}.bin", table[:, 0] * len(end), ranked, end if ranked else b"")
    if table[:, 3].any():
        rearrange(folder / f"val_said_{index:02d}.bin", table[:, 0], ranked, b"\0")
    else:
        (folder / f"val_said_{index:02d}.bin").unlink()
    file = io.BytesIO()  # numpy's own writing to files reports a full disk without its reason
    np.save(file, table[ranked])
    (folder / f"val_{index:02d}.npy").write_bytes(file.getvalue())


def rearrange(path: Path, sizes: np.ndarray, order: list[int], first: bytes) -> None:
    """Put the pieces of a file, so many bytes each, into another order, behind `first`; one is in memory at a time."""
    starts = np.cumsum(sizes) - sizes
    part = path.with_suffix(".part")
    with open(path, "rb") as old, open(part, "wb") as new:
        new.write(first)
        for i in order:
            old.seek(starts[i])
            new.write(old.read(sizes[i]))
    os.replace(part, path)
