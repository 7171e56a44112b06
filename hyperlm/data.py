"""Text to batches: sources -> documents -> train and validation -> tokens in memory-mapped shards -> batch_at(step).

Sources are files (.txt, .md, .py, .jsonl), folders of them, `stdlib`, or a recipe (.toml). Documents are split by a hash of their content,
tokenised once into a cache keyed by content, and separated by an end-of-text token. Data order is a pure function of (seed, step).
Axes: A micro-batches, B batch, N sequence.
"""

import errno
import hashlib
import json
import os
import shutil
import sysconfig
import tempfile
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from configs import Config, DataConfig
from hyperlm import tokenizer as tok
from hyperlm.env import progress
from hyperlm.loss import IGNORE

FORMAT = 1  # of the cache
SUFFIXES = (".txt", ".md", ".py", ".jsonl")
NOT_STDLIB = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
PIECE = 8192  # characters after which prose is cut at the next empty line: one file is many documents
BPE_TEXT = 256 << 20  # bytes of text that a tokenizer is trained on
BLOCK = 1024  # sequences in which a weighted mixture has exactly its proportions


class DataError(ValueError):
    """Text that cannot be used; the message says what, why and what to do."""


class Source(NamedTuple):
    """A place that text comes from; weight None means by size."""

    name: str
    path: Path | None  # None for the standard library
    weight: float | None


class Document(NamedTuple):
    """A text, or a conversation as (role, content) pairs."""

    text: str
    messages: tuple[tuple[str, str], ...] = ()

    @property
    def raw(self) -> bytes:
        """The bytes that bits per byte are counted on."""
        return (self.text or "".join(content for _, content in self.messages)).encode("utf-8", "replace")


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


# -- sources and documents -------------------------------------------------------------------------------------------------------------


def parse_sources(texts: tuple[str, ...]) -> list[Source]:
    """Read `path`, `path:weight`, `stdlib` and recipes.

    Raises:
        DataError: on a missing path, a bad weight or a bad recipe.
    """
    sources = []
    for text in texts:
        path, weight = text, None
        if ":" in text and not Path(text).exists():
            head, _, tail = text.rpartition(":")
            try:
                path, weight = head, float(tail)
            except ValueError as e:
                raise DataError(f"--data.sources {text}: no such file, and {tail!r} is not a weight") from e
            if not 0 < weight < float("inf"):
                raise DataError(f"--data.sources {text}: a weight must be above 0")
        if path.endswith(".toml"):
            sources += read_recipe(Path(path))
        else:
            sources.append(source_at(path, weight))
    return sources


def source_at(path: str, weight: float | None, base: Path = Path()) -> Source:
    if path == "stdlib":
        return Source("stdlib", None, weight)
    full = base / Path(path).expanduser()
    if not full.exists():
        raise DataError(f"--data.sources {path}: no such file or folder")
    if full.is_file() and full.suffix not in SUFFIXES:
        raise DataError(f"--data.sources {path}: cannot read {full.suffix or 'a file without suffix'}; use {' '.join(SUFFIXES)} or a recipe .toml")
    return Source(full.name, full, weight)


def read_recipe(path: Path) -> list[Source]:
    """Sources of a recipe: [[sources]] tables with `path` and an optional `weight`; paths are relative to the recipe."""
    try:
        entries = tomllib.loads(path.read_text())["sources"]
        return [source_at(entry["path"], float(entry["weight"]) if "weight" in entry else None, path.parent) for entry in entries]
    except FileNotFoundError as e:
        raise DataError(f"--data.sources {path}: no such file") from e
    except (tomllib.TOMLDecodeError, KeyError, TypeError, ValueError) as e:
        if isinstance(e, DataError):
            raise
        raise DataError(f"{path}: not a recipe ({e}); it needs [[sources]] tables with path and weight") from e


def files(source: Source) -> list[Path]:
    if source.path is None:
        root = Path(sysconfig.get_paths()["stdlib"])
        return sorted(p for p in root.rglob("*.py") if not NOT_STDLIB & set(p.relative_to(root).parts[:-1]))
    if source.path.is_file():
        return [source.path]
    return sorted(p for p in source.path.rglob("*") if p.suffix in SUFFIXES and p.is_file())


def documents(source: Source) -> Iterator[Document]:
    """Every non-empty document of a source, always in the same order."""
    for path in files(source):
        text = path.read_bytes().decode("utf-8", "replace")
        if path.suffix == ".jsonl":
            yield from jsonl_documents(path, text)
        elif path.suffix == ".py":
            yield Document(text)
        else:
            yield from (Document(piece) for piece in pieces(text))


def pieces(text: str) -> Iterator[str]:
    """Cut prose at the first empty line after PIECE characters; the pieces join to the text."""
    start = 0
    while start < len(text):
        cut = text.find("\n\n", start + PIECE)
        end = len(text) if cut < 0 else cut + 2
        yield text[start:end]
        start = end


def jsonl_documents(path: Path, text: str) -> Iterator[Document]:
    """Lines with a `text` field, or `messages` of {"role", "content"}."""
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            if "messages" in record:
                messages = tuple((m["role"], m["content"]) for m in record["messages"])
                if wrong := {role for role, _ in messages} - set(tok.ROLES):
                    raise ValueError(f"role {wrong.pop()!r} is none of {', '.join(tok.ROLES)}")
                yield Document("", messages)
            elif not isinstance(record["text"], str):
                raise ValueError("text is not a string")
            else:
                yield Document(record["text"])
        except KeyError as e:
            raise DataError(f"{path}:{number}: no {e} field; a line needs text, or messages with role and content") from e
        except (ValueError, TypeError) as e:
            raise DataError(f"{path}:{number}: {e}") from e


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


# -- batches ---------------------------------------------------------------------------------------------------------------------------


def stream_seed(*parts: object) -> int:
    """128 bits that depend on all `parts`."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=16).digest(), "little")


@dataclass(frozen=True)
class Batches:
    """The order of a run's data. `at(step)` is a pure function: batch (A, B, N+1) int64 of step 0, 1, ..."""

    at: Callable[[int], Tensor]
    steps_per_epoch: float  # steps after which as many sequences were drawn as the corpus has
    shares: dict[str, float]  # of the sequences drawn, by source


def batches(corpus: Corpus, config: Config) -> Batches:
    """Order the training sequences of a corpus.

    Sequences are windows of N+1 tokens at stride N, so that every token is a target once. Without weights each epoch is a permutation of
    all of them. With weights each source is its own permutation, and each BLOCK of sequences has the exact proportions.

    Raises:
        DataError: if a source is shorter than one sequence.
    """
    a, b, n, seed = config.train.grad_accum, config.train.batch_size, config.data.seq_len, config.train.seed
    shards = [s for s in corpus.shards if len(s.train)]
    counts = np.array([(len(s.train) - 1) // n for s in shards])
    for shard, count in zip(shards, counts, strict=True):
        if count == 0:
            raise DataError(f"{shard.name} has {len(shard.train)} training tokens, less than one sequence: set --data.seq-len below that or add text")

    weighted = any(s.weight is not None for s in shards)
    groups = [[i] for i in range(len(shards))] if weighted else [list(range(len(shards)))]
    weights = np.array([s.weight or 1.0 for s in shards]) if weighted else np.ones(1)
    sizes = [int(sum(counts[i] for i in group)) for group in groups]
    quotas = largest_remainder(weights, BLOCK)

    @lru_cache(maxsize=2)
    def block(index: int) -> np.ndarray:
        """Group of each sequence in a block."""
        slots = np.repeat(np.arange(len(groups)), quotas)
        return np.random.Generator(np.random.Philox(stream_seed(seed, corpus.fingerprint, "block", index))).permutation(slots)

    @lru_cache(maxsize=2 * len(groups))
    def permutation(group: int, epoch: int) -> np.ndarray:
        return np.random.Generator(np.random.Philox(stream_seed(seed, corpus.fingerprint, group, epoch))).permutation(sizes[group])

    def sequence(slot: int) -> np.ndarray:
        index, within = divmod(slot, BLOCK)
        group = int(block(index)[within])
        drawn = index * int(quotas[group]) + int((block(index)[:within] == group).sum())
        window = int(permutation(group, drawn // sizes[group])[drawn % sizes[group]])
        for i in groups[group]:
            if window < counts[i]:
                return shards[i].train[window * n : (window + 1) * n + 1].astype(np.int64)
            window -= int(counts[i])
        raise AssertionError("window outside its group")

    def at(step: int) -> Tensor:
        slots = range(step * a * b, (step + 1) * a * b)
        return torch.from_numpy(np.stack([sequence(slot) for slot in slots])).view(a, b, n + 1)

    shares = quotas / BLOCK if weighted else counts / counts.sum()
    return Batches(at, int(counts.sum()) / (a * b), dict(zip((s.name for s in shards), shares.tolist(), strict=True)))


def largest_remainder(weights: np.ndarray, total: int) -> np.ndarray:
    """Whole numbers in proportion to `weights` that add up to `total`."""
    exact = weights / weights.sum() * total
    whole = np.floor(exact).astype(np.int64)
    whole[np.argsort(whole - exact, kind="stable")[: total - int(whole.sum())]] += 1
    return whole


def validation_windows(shard: Shard, n: int, max_tokens: int) -> tuple[Tensor, int]:
    """Whole validation documents, up to about `max_tokens` tokens (0 for all): windows (W, N+1) int64, padded with IGNORE, and their bytes.

    Each token of the documents is a target once.
    """
    ends = np.cumsum(shard.val_documents[:, 0])
    keep = len(ends) if max_tokens == 0 else max(1, int(np.searchsorted(ends, max_tokens, "right")))
    stream = shard.val[: 1 + int(ends[keep - 1])].astype(np.int64)
    count = -(-(len(stream) - 1) // n)
    padded = np.full(count * n + 1, IGNORE, np.int64)
    padded[: len(stream)] = stream
    windows = np.lib.stride_tricks.sliding_window_view(padded, n + 1)[::n]
    return torch.from_numpy(windows.copy()), int(shard.val_documents[:keep, 1].sum())
