"""Documents to tokens: split into train and validation by a hash of their content, tokenised once into memory-mapped shards.

The shards lie in a cache keyed by content; documents are separated by an end-of-text token.
"""

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from configs import Config, DataConfig
from hyperlm import tokenizer as tok
from hyperlm.data.sources import SUFFIXES, DataError, Document, Source, documents, parse_sources
from hyperlm.env import progress

FORMAT = 1  # of the cache
BPE_TEXT = 256 << 20  # bytes of text that a tokenizer is trained on


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


# -- which documents, and on which side ------------------------------------------------------------------------------------------------


class Selection(NamedTuple):
    """Of one source: a digest of its documents, and for each whether it is used and whether for validation."""

    digest: bytes
    use: np.ndarray
    val: np.ndarray
    order: np.ndarray  # 64 hash bits a document; validation documents stand in this order, so that any prefix is a fair sample
    size: np.ndarray  # bytes


def select_documents(source: Source, cfg: DataConfig, val_fraction: float) -> Selection:
    """Hash every document; decide by hash alone which are used (`max_mib`) and which are held out."""
    whole, hashes, sizes = hashlib.blake2b(digest_size=16), [], []
    for document in progress(documents(source), f"reading {source.name}", unit=" docs"):
        raw = document.raw
        digest = hashlib.blake2b(repr(document.messages).encode() + raw, digest_size=16).digest()
        whole.update(digest)
        hashes.append(np.frombuffer(digest, np.uint64) if raw else np.zeros(2, np.uint64))
        sizes.append(len(raw))
    h, size = np.array(hashes, np.uint64).reshape(-1, 2), np.array(sizes, np.int64)
    use = size > 0
    if cfg.max_mib:
        ranked = np.argsort(h[:, 0], kind="stable")
        use[ranked] &= np.cumsum(size[ranked]) <= cfg.max_mib * (1 << 20)
    return Selection(whole.digest(), use, use & (h[:, 1] / 2.0**64 < val_fraction), h[:, 1], size)


def prepare(config: Config, say: Callable[[str], None] = print) -> Corpus:
    """Tokenise the sources, or find them in the cache.

    Raises:
        DataError: on unusable text; TokenizerError on an unusable tokenizer.
    """
    cfg = config.data
    sources = parse_sources(cfg.sources)
    selections = [select_documents(s, cfg, 0.0 if cfg.val_sources else cfg.val_fraction) for s in sources]
    for extra in parse_sources(cfg.val_sources):
        sources.append(extra._replace(weight=None))
        selections.append(select_documents(extra, cfg, 1.0))
    for source, selection in zip(sources, selections, strict=True):
        if not selection.use.any():
            raise DataError(f"--data.sources {source.path or source.name}: no text in it; it needs {' '.join(SUFFIXES)} files that are not empty")
    hold_out_one(selections)

    given = Path(cfg.tokenizer).read_bytes() if os.path.isfile(cfg.tokenizer) else b""
    settings = [FORMAT, cfg.tokenizer if not given else "file", config.model.vocab_size, cfg.val_fraction, cfg.max_mib, len(cfg.sources)]
    key = hashlib.blake2b(json.dumps([settings, [s.name for s in sources]]).encode() + given, digest_size=12)
    for selection in selections:
        key.update(selection.digest)
    fingerprint = key.hexdigest()

    folder = cache_folder(cfg) / fingerprint
    cached = (folder / "meta.json").is_file()
    if not cached:
        build(folder, config, sources, selections)
    corpus = load(folder, sources)
    say(f"data       {describe(corpus)}{' (cached)' if cached else ''}")
    return corpus


def build(folder: Path, config: Config, sources: list[Source], selections: list[Selection]) -> None:
    """Tokenise into `folder`, whole or not at all."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
        try:
            write(part, config, sources, selections)
            os.replace(part, folder)
        except OSError as e:
            if e.errno not in (errno.ENOTEMPTY, errno.EEXIST):  # another process was faster: its result is the same
                raise
        finally:
            shutil.rmtree(part, ignore_errors=True)
    except OSError as e:
        raise DataError(f"cannot write the cache {folder.parent} ({e.strerror}); free some space or set --data.cache") from e


def hold_out_one(selections: list[Selection]) -> None:
    """Where the hash holds out nothing at all, hold out the document with the smallest one."""
    if any(s.val.any() for s in selections):
        return
    used = sum(int(s.use.sum()) for s in selections)
    if used < 2:
        raise DataError("the text is one document, and validation needs another: add text or set --data.val-sources")
    candidates = [(int(s.order[i]), s, i) for s in selections for i in np.flatnonzero(s.use)]
    _, selection, index = min(candidates, key=lambda c: c[0])
    selection.val[index] = True


def cache_folder(cfg: DataConfig) -> Path:
    if cfg.cache:
        return Path(cfg.cache).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hyperlm"


# -- tokens on disk --------------------------------------------------------------------------------------------------------------------


def make_tokenizer(config: Config, sources: list[Source], selections: list[Selection]) -> Tokenizer:
    if config.data.tokenizer == "bytes":
        return tok.byte_tokenizer()
    if config.data.tokenizer != "bpe":
        return tok.load(config.data.tokenizer)

    def texts() -> Iterator[str]:
        for source, selection in zip(sources, selections, strict=True):
            left = BPE_TEXT // len(sources)
            for document, use, val in zip(documents(source), selection.use, selection.val, strict=True):
                if use and not val and left > 0:
                    left -= len(document.text)
                    yield document.text or "\n".join(content for _, content in document.messages)

    used = sum(int((s.use & ~s.val).sum()) for s in selections)
    return tok.train_bpe(progress(texts(), "training the tokenizer", used, unit=" docs"), config.model.vocab_size)


def with_vocabulary(config: Config) -> Config:
    """Set the model's vocabulary from a given tokenizer.json, rounded up for the matrix units; leave it alone otherwise."""
    if config.data.tokenizer in ("bpe", "bytes"):
        return config
    size = tok.load(config.data.tokenizer).get_vocab_size()
    return replace(config, model=replace(config.model, vocab_size=-(-size // 64) * 64))


def write(folder: Path, config: Config, sources: list[Source], selections: list[Selection]) -> None:
    """Tokenise everything into `folder`."""
    tokenizer = make_tokenizer(config, sources, selections)
    tokenizer.save(str(folder / "tokenizer.json"))
    dtype = np.dtype(np.uint16 if tokenizer.get_vocab_size() <= 1 << 16 else np.uint32)
    end = tok.end_of_text(tokenizer)

    def ids(batch: list[Document]) -> list[list[int]]:
        plain = iter(tokenizer.encode_batch([d.text for d in batch if not d.messages], add_special_tokens=False))
        return [
            [i for role, content in d.messages for i in tok.turn(tokenizer, role, content)] if d.messages else next(plain).ids for d in batch
        ]

    chat = False
    bar = progress(desc="tokenising", total=sum(int(s.size[s.use].sum()) for s in selections), unit="B", unit_scale=True)
    for index, (source, selection) in enumerate(zip(sources, selections, strict=True)):
        held_out: list[tuple[int, list[int], int]] = []
        with open(folder / f"train_{index:02d}.bin", "wb") as file:
            pending: list[tuple[int, Document]] = []

            def flush() -> None:
                for (i, document), tokens in zip(pending, ids([d for _, d in pending]), strict=True):
                    tokens.append(end)
                    if selection.val[i]:
                        held_out.append((int(selection.order[i]), tokens, int(selection.size[i])))
                    else:
                        file.write(np.array(tokens, dtype).tobytes())
                    bar.update(int(selection.size[i]))
                pending.clear()

            for i, document in enumerate(documents(source)):
                if selection.use[i]:
                    pending.append((i, document))
                    chat |= bool(document.messages)
                if len(pending) == 256:
                    flush()
            flush()
        held_out.sort()
        stream = [end] + [t for _, tokens, _ in held_out for t in tokens] if held_out else []
        np.array(stream, dtype).tofile(folder / f"val_{index:02d}.bin")
        np.save(folder / f"val_{index:02d}.npy", np.array([(len(tokens), size) for _, tokens, size in held_out], np.int64).reshape(-1, 2))
    bar.close()
    (folder / "meta.json").write_text(json.dumps({"format": FORMAT, "dtype": dtype.name, "chat": chat, "shards": len(sources)}))


def load(folder: Path, sources: list[Source]) -> Corpus:
    """Map the shards of a cache folder."""
    meta = json.loads((folder / "meta.json").read_text())

    def shard(index: int, source: Source) -> Shard:
        def tokens(split: str) -> np.ndarray:
            path = folder / f"{split}_{index:02d}.bin"
            return np.memmap(path, meta["dtype"], "r") if path.stat().st_size else np.zeros(0, meta["dtype"])

        return Shard(source.name, source.weight, tokens("train"), tokens("val"), np.load(folder / f"val_{index:02d}.npy"))

    shards = [shard(i, source) for i, source in enumerate(sources)]
    return Corpus(shards, tok.load(folder / "tokenizer.json"), folder.name, meta["chat"])


def describe(corpus: Corpus) -> str:
    parts = [f"{s.name} {len(s.train):,} + {len(s.val):,}" for s in corpus.shards]
    return f"{', '.join(parts)} tokens to train + validate, vocabulary {corpus.tokenizer.get_vocab_size():,}"
