"""Documents to tokens: tokenised once into memory-mapped shards, in a folder of the cache that is named by what is read and how it is used.

Documents are separated by an end-of-text token. Of source 00 a folder has train_00.bin, the texts to train on as one stream; where it has
conversations, talks_00.bin, said_00.bin and lengths_00.bin (see `packing.Talks`); val_00.bin, all documents to validate on as one stream,
val_00.npy, what is known of each, and where some are conversations val_said_00.bin, which tokens are texts or what an assistant says.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import compress
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from hyperlm import tokenizer as tok
from hyperlm.config import Config, DataConfig
from hyperlm.data import cache
from hyperlm.data.documents import DataError, Document
from hyperlm.data.packing import Talks
from hyperlm.data.selection import Selection, drop_copies, hold_out, limited, select, without_near_copies
from hyperlm.data.sources import Readings, Source, documents, notes, parse_sources, summary, why_empty, with_names
from hyperlm.data.tokenise import build


@dataclass(frozen=True)
class Shard:
    """The tokens of one source. Validation shards begin with end-of-text and know where each document ends."""

    name: str
    weight: float | None
    train: np.ndarray  # texts
    talks: Talks | None  # conversations, if there are any
    val: np.ndarray
    val_said: np.ndarray  # like `val`, uint8: 0 for what of a conversation the assistant does not say
    val_documents: np.ndarray  # (documents, 4): tokens with their end-of-text, bytes, bytes of those in `val_said`, whether a conversation

    @property
    def train_tokens(self) -> int:
        """Of texts and conversations."""
        return len(self.train) + (len(self.talks.tokens) if self.talks else 0)


@dataclass(frozen=True)
class Corpus:
    shards: list[Shard]
    tokenizer: Tokenizer
    fingerprint: str
    chat: bool  # some documents were conversations


class NotTokenised(Exception):
    """What was to be found in the cache is not there; `size` is the bytes of text to train on."""

    def __init__(self, size: int) -> None:
        self.size = size


def prepare(config: Config, say: Callable[[str], None] = print, *, only_cached: bool = False) -> Corpus:
    """Tokenise the sources, or find them in the cache. Without `sources` there is nothing to train on, and `val_sources` to evaluate on.

    Args:
        say: is told in one line each what was found, assumed, left out or mended.
        only_cached: write nothing.

    Raises:
        NotTokenised: if nothing is to be written and there is nothing in the cache.
        DataError: on unusable text; TokenizerError on an unusable tokenizer.
    """
    cfg, readings = config.data, Readings(config.data.text_field, config.data.on_bad)
    training, validation = parse_sources(cfg.sources), parse_sources(cfg.val_sources, "--data.val-sources")
    named = with_names([*training, *(source._replace(weight=None) for source in validation)])
    training, validation = named[: len(training)], named[len(training) :]
    training, selections = with_text(training, [select(s, readings, cfg.dedup) for s in training], "--data.sources", readings, say)
    validation, held_out = with_text(validation, [select(s, readings, cfg.dedup) for s in validation], "--data.val-sources", readings, say)
    for line in notes(readings):
        say(f"reading    {line}")
    held_out = [limited(s, cfg.max_mib) for s in held_out]
    if cfg.dedup:
        selections, held_out = without_near_copies(selections, held_out, say)
    selections = [limited(s, cfg.max_mib) for s in selections]
    if not validation:
        selections = hold_out(selections, cfg.val_fraction, lambda k, i: nth(documents(training[k], readings), i), say)
    held_out = [s._replace(val=s.use) for s in held_out]
    selections = drop_copies(selections, held_out, say)
    if training and not any(s.train.any() for s in selections):
        raise DataError("all of the text is held out, none is left to train on: add text, or take it out of --data.val-sources")
    sources, selections = training + validation, selections + held_out

    folder = cache_folder(cfg) / fingerprint(config, sources, selections)
    if only_cached and cache.damage(folder):
        raise NotTokenised(sum(int(s.size[s.train].sum()) for s in selections))
    cache.sweep(folder.parent)
    cached = os.path.lexists(folder)
    if cached and cache.damage(folder):
        say(f"cache      {folder}: {'; '.join(summary(cache.damage(folder, whole=True)))}; made again")
        cached = False
    if not cached:
        build(folder, config, sources, selections, readings, say)
    corpus = load(folder, sources)
    if loses := (cache.read_meta(folder) or {}).get("loses"):
        say(f"tokenizer  {cfg.tokenizer} {loses}")
    if (size := tok.vocabulary_size(corpus.tokenizer)) > config.model.vocab_size:
        raise tok.TokenizerError(f"--model.vocab-size {config.model.vocab_size}: the tokenizer needs {size}, for ids up to {size - 1}")
    tokens = ", ".join(f"{s.name} {s.train_tokens:,} + {len(s.val):,}" for s in corpus.shards)
    say(f"data       {tokens} tokens to train + validate, vocabulary {size:,}{' (cached)' if cached else ''}")
    return corpus


def with_text(
    sources: list[Source], selections: list[Selection], flag: str, readings: Readings, say: Callable[[str], None]
) -> tuple[list[Source], list[Selection]]:
    """The sources that have text. A file without any is left out where others have some.

    Raises:
        DataError: on a folder without text, or if there is none at all.
    """
    full = [bool(selection.use.any()) for selection in selections]
    empty = [source for source, any_text in zip(sources, full, strict=True) if not any_text]
    for source in empty:
        if not any(full) or source.path is None or source.path.is_dir():
            raise DataError(f"{flag} {source.path or source.name}: {why_empty(source, readings)}")
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


def load(folder: Path, sources: list[Source]) -> Corpus:
    """Map the shards of a cache folder that was checked."""
    meta = cache.read_meta(folder) or {}

    def shard(index: int, source: Source) -> Shard:
        def mapped(what: str, dtype: str) -> np.ndarray:
            path = folder / f"{what}_{index:02d}.bin"
            return np.memmap(path, dtype, "r") if path.stat().st_size else np.zeros(0, dtype)

        tokens = meta["dtype"]
        has_talks = f"talks_{index:02d}.bin" in meta["entries"]
        talks = Talks(mapped("talks", tokens), mapped("said", "uint8"), mapped("lengths", "uint32")) if has_talks else None
        val = mapped("val", tokens)
        said = mapped("val_said", "uint8") if f"val_said_{index:02d}.bin" in meta["entries"] else np.broadcast_to(np.uint8(1), val.shape)
        return Shard(source.name, source.weight, mapped("train", tokens), talks, val, said, np.load(folder / f"val_{index:02d}.npy"))

    shards = [shard(i, source) for i, source in enumerate(sources)]
    return Corpus(shards, tok.load(folder / "tokenizer.json"), folder.name, meta["chat"])
