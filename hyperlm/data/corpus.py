"""Documents to tokens: tokenised once into memory-mapped shards, in a folder of the cache that is named by what is read and how it is used.

Documents are separated by an end-of-text token.
"""

import errno
import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import compress
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from hyperlm import tokenizer as tok
from hyperlm.config import Config, DataConfig
from hyperlm.data import cache
from hyperlm.data.selection import Selection, chosen, drop_copies, hold_out, select
from hyperlm.data.sources import SUFFIXES, DataError, Document, Readings, Source, documents, notes, parse_sources, summary, with_names
from hyperlm.env import progress

BPE_TEXT = 256 << 20  # characters of text that a tokenizer is trained on
AT_ONCE = 1 << 20  # characters that are tokenised at a time
MIB = 1 << 20


@dataclass(frozen=True)
class Shard:
    """The tokens of one source. Validation shards begin with end-of-text and know where each document ends."""

    name: str
    weight: float | None
    train: np.ndarray
    val: np.ndarray
    val_documents: np.ndarray  # (documents, 2): tokens with their end-of-text, bytes


@dataclass(frozen=True)
class Corpus:
    shards: list[Shard]
    tokenizer: Tokenizer
    fingerprint: str
    chat: bool  # some documents were conversations


def prepare(config: Config, say: Callable[[str], None] = print) -> Corpus:
    """Tokenise the sources, or find them in the cache.

    Args:
        say: is told in one line each what was found, assumed, left out or mended.

    Raises:
        DataError: on unusable text; TokenizerError on an unusable tokenizer.
    """
    cfg, readings = config.data, Readings()
    training, validation = parse_sources(cfg.sources), parse_sources(cfg.val_sources, "--data.val-sources")
    named = with_names([*training, *(source._replace(weight=None) for source in validation)])
    training, validation = named[: len(training)], named[len(training) :]
    training, selections = with_text(training, [select(s, cfg.max_mib, readings) for s in training], "--data.sources", say)
    validation, held_out = with_text(validation, [select(s, cfg.max_mib, readings) for s in validation], "--data.val-sources", say)
    for line in notes(readings):
        say(f"reading    {line}")
    if not validation:
        selections = hold_out(selections, cfg.val_fraction, lambda k, i: nth(documents(training[k], readings), i), say)
    held_out = [s._replace(val=s.use) for s in held_out]
    selections = drop_copies(selections, held_out, say)
    if not any(s.train.any() for s in selections):
        raise DataError("all of the text is held out, none is left to train on: add text, or take it out of --data.val-sources")
    sources, selections = training + validation, selections + held_out

    folder = cache_folder(cfg) / fingerprint(config, sources, selections)
    cache.sweep(folder.parent)
    cached = os.path.lexists(folder)
    if cached and cache.damage(folder):
        say(f"cache      {folder}: {'; '.join(summary(cache.damage(folder, whole=True)))}; made again")
        cached = False
    if not cached:
        build(folder, config, sources, selections, readings)
    corpus = load(folder, sources)
    if loses := (cache.read_meta(folder) or {}).get("loses"):
        say(f"tokenizer  {cfg.tokenizer} {loses}")
    if (size := tok.vocabulary_size(corpus.tokenizer)) > config.model.vocab_size:
        raise tok.TokenizerError(f"--model.vocab-size {config.model.vocab_size}: the tokenizer needs {size}, for ids up to {size - 1}")
    tokens = ", ".join(f"{s.name} {len(s.train):,} + {len(s.val):,}" for s in corpus.shards)
    say(f"data       {tokens} tokens to train + validate, vocabulary {size:,}{' (cached)' if cached else ''}")
    return corpus


def with_text(
    sources: list[Source], selections: list[Selection], flag: str, say: Callable[[str], None]
) -> tuple[list[Source], list[Selection]]:
    """The sources that have text. A file without any is left out where others have some.

    Raises:
        DataError: on a folder without text, or if there is none at all.
    """
    full = [bool(selection.use.any()) for selection in selections]
    empty = [source for source, any_text in zip(sources, full, strict=True) if not any_text]
    for source in empty:
        if not any(full) or source.path is None or source.path.is_dir():
            raise DataError(f"{flag} {source.path or source.name}: no text in it; it needs {' '.join(SUFFIXES)} files that are not empty")
    for line in summary(f"{source.name}: left out, no text in it" for source in empty):
        say(f"reading    {line}")
    return list(compress(sources, full)), list(compress(selections, full))


def nth(documents: Iterator[Document], index: int) -> Document:
    return next(document for i, document in enumerate(documents) if i == index)


def fingerprint(config: Config, sources: list[Source], selections: list[Selection]) -> str:
    """Of what is read and how it is used: documents and on which side each is, names, the tokenizer."""
    kind = config.data.tokenizer
    tokenizer = {"bpe": config.model.vocab_size, "bytes": 0}.get(kind, "file")
    key = hashlib.blake2b(json.dumps([cache.FORMAT, tokenizer, [s.name for s in sources]]).encode(), digest_size=12)
    if tokenizer == "file":
        key.update(tok.read(kind))
    for selection in selections:
        key.update(selection.digest())
    return key.hexdigest()


def cache_folder(cfg: DataConfig) -> Path:
    if cfg.cache:
        return Path(os.path.expanduser(cfg.cache))
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "hyperlm"


# -- tokens on disk --------------------------------------------------------------------------------------------------------------------


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


def load(folder: Path, sources: list[Source]) -> Corpus:
    """Map the shards of a cache folder that was checked."""
    meta = cache.read_meta(folder) or {}

    def shard(index: int, source: Source) -> Shard:
        def tokens(split: str) -> np.ndarray:
            path = folder / f"{split}_{index:02d}.bin"
            return np.memmap(path, meta["dtype"], "r") if path.stat().st_size else np.zeros(0, meta["dtype"])

        return Shard(source.name, source.weight, tokens("train"), tokens("val"), np.load(folder / f"val_{index:02d}.npy"))

    shards = [shard(i, source) for i, source in enumerate(sources)]
    return Corpus(shards, tok.load(folder / "tokenizer.json"), folder.name, meta["chat"])
