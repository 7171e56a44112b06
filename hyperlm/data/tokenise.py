"""Chosen documents to tokens, in a folder of the cache: a stream to train on and one to validate on for each source, with end-of-text between documents."""

import errno
import io
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

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
        held_out: list[tuple[int, np.ndarray, int]] = []
        with open(folder / f"train_{index:02d}.bin", "wb") as file:
            for number, batch in enumerate(batched(chosen(source, selection, readings))):
                texts = [document.content for _, document, _ in batch]
                if given:  # the beginning as it is, and then each character that is new
                    new = set().union(*texts) - known
                    if (changed := tok.losses(tokenizer, texts if number == 0 else sorted(new))) and not loses:
                        loses = f"does not keep all of {source.name}: {changed}"
                    known |= new
                for (i, document, val), ids in zip(batch, encoded(tokenizer, [document for _, document, _ in batch]), strict=True):
                    tokens = np.array([*ids, end], dtype)
                    if val:
                        held_out.append((int(selection.order[i]), tokens, len(document.raw)))
                    else:
                        file.write(tokens.tobytes())
                    chat |= bool(document.messages)
                    bar.update(len(document.raw))
        held_out.sort(key=lambda document: document[0])
        stream = np.concatenate([np.array([end], dtype), *(tokens for _, tokens, _ in held_out)]) if held_out else np.zeros(0, dtype)
        (folder / f"val_{index:02d}.bin").write_bytes(stream.tobytes())
        table = io.BytesIO()  # numpy's own writing to files reports a full disk without its reason
        np.save(table, np.array([(len(tokens), size) for _, tokens, size in held_out], np.int64).reshape(-1, 2))
        (folder / f"val_{index:02d}.npy").write_bytes(table.getvalue())
    bar.close()
    cache.seal(folder, {"dtype": dtype.name, "chat": chat, "loses": loses})


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


def encoded(tokenizer: Tokenizer, documents: list[Document]) -> Iterator[list[int]]:
    """Ids of each document: texts together, conversations turn by turn."""
    plain = iter(tok.encode(tokenizer, [d.text for d in documents if not d.messages]))
    for d in documents:
        yield [i for role, content in d.messages for i in tok.turn(tokenizer, role, content)] if d.messages else next(plain)
