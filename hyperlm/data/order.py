"""Tokens to batches: the order of training data, a pure function of (seed, step), and the windows of validation.

Axes: A micro-batches, B batch, N sequence, W windows.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch

from hyperlm.batch import Batch, next_tokens
from hyperlm.config import Config
from hyperlm.data.corpus import Corpus, Shard
from hyperlm.data.documents import DataError
from hyperlm.loss import IGNORE

BLOCK = 1024  # sequences in which a weighted mixture has exactly its proportions
NAMED = 3  # sources in a line about several


def stream_seed(*parts: object) -> int:
    """128 bits that depend on all `parts`."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=16).digest(), "little")


@dataclass(frozen=True)
class Batches:
    """The order of a run's data. `at(step)` is a pure function: the batch (A, B, N) of step 0, 1, ..."""

    at: Callable[[int], Batch]
    steps_per_epoch: float  # steps after which as many sequences were drawn as the corpus has
    shares: dict[str, float]  # of the sequences drawn, by source


def batches(corpus: Corpus, config: Config, say: Callable[[str], None] = print) -> Batches:
    """Order the training sequences of a corpus.

    Sequences are windows of N+1 tokens at stride N, so that every token is a target once. Without weights each epoch is a permutation of
    all of them. With weights each source is its own permutation, and each BLOCK of sequences has the exact proportions, but for sources
    whose weight asks for less than one sequence of a block: they get one.

    Args:
        say: is told in one line each of sources that are too short for a sequence, and of weights too small for a block.

    Raises:
        DataError: if all of the text is shorter than one sequence.
    """
    a, b, n, seed = config.train.grad_accum, config.train.batch_size, config.data.seq_len, config.train.seed
    shards = join_short([s for s in corpus.shards if len(s.train)], n, say)
    counts = np.array([(len(s.train) - 1) // n for s in shards])

    weighted = any(s.weight is not None for s in shards)
    groups = [[i] for i in range(len(shards))] if weighted else [list(range(len(shards)))]
    weights = np.array([s.weight or 1.0 for s in shards]) if weighted else np.ones(1)
    sizes = [int(sum(counts[i] for i in group)) for group in groups]
    quotas = quotas_of([s.name for s in shards], weights, say) if weighted else np.array([BLOCK])

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

    def at(step: int) -> Batch:
        slots = range(step * a * b, (step + 1) * a * b)
        return next_tokens(torch.from_numpy(np.stack([sequence(slot) for slot in slots])).view(a, b, n + 1))

    shares = quotas / BLOCK if weighted else counts / counts.sum()
    return Batches(at, int(counts.sum()) / (a * b), dict(zip((s.name for s in shards), shares.tolist(), strict=True)))


def join_short(shards: list[Shard], n: int, say: Callable[[str], None]) -> list[Shard]:
    """Sources that are shorter than a sequence of N+1 tokens become one, in place of the first; if that is too short as well, they go.

    Raises:
        DataError: if nothing is left.
    """
    short = [s for s in shards if len(s.train) <= n]
    if not short:
        return shards
    names = ", ".join(s.name for s in short[:NAMED]) + (f" and {len(short) - NAMED} more" if len(short) > NAMED else "")
    train = np.concatenate([s.train for s in short])
    if len(train) <= n:
        if len(short) == len(shards):
            raise DataError(f"{names}: {len(train)} training tokens, less than one sequence: set --data.seq-len below that or add text")
        say(f"left out   {names}: {len(train)} training tokens, less than one sequence of {n}")
        return [s for s in shards if len(s.train) > n]
    weight = sum(s.weight or 1.0 for s in short) if any(s.weight is not None for s in shards) else None
    together = replace(short[0], name=f"{short[0].name} and {len(short) - 1} more", train=train, weight=weight)
    say(f"mixture    {names}: each shorter than a sequence, read as one source")
    return [together if s is short[0] else s for s in shards if len(s.train) > n or s is short[0]]


def quotas_of(names: list[str], weights: np.ndarray, say: Callable[[str], None]) -> np.ndarray:
    """How many sequences of a BLOCK come from each source: in proportion to its weight, and at least one."""
    if len(names) > BLOCK:
        raise DataError(f"{len(names):,} sources with weights: at most {BLOCK:,} can be drawn from; put some into one folder")
    quotas = largest_remainder(weights, BLOCK)
    for i in np.flatnonzero(quotas == 0):
        quotas[i] = 1
        quotas[np.argmax(quotas)] -= 1
        say(f"mixture    {names[i]}: a weight of {weights[i]:g} is less than one sequence in {BLOCK:,}; it gets one")
    return quotas


def largest_remainder(weights: np.ndarray, total: int) -> np.ndarray:
    """Whole numbers in proportion to `weights` that add up to `total`."""
    exact = weights / weights.sum() * total
    whole = np.floor(exact).astype(np.int64)
    whole[np.argsort(whole - exact, kind="stable")[: total - int(whole.sum())]] += 1
    return whole


def validation_documents(shard: Shard, max_tokens: int) -> int:
    """How many of them, at least one, have about `max_tokens` tokens together; 0 for all."""
    ends = np.cumsum(shard.val_documents[:, 0])
    return len(ends) if max_tokens == 0 else max(1, int(np.searchsorted(ends, max_tokens, "right")))


def validation_windows(shard: Shard, n: int, max_tokens: int) -> tuple[Batch, int]:
    """Whole validation documents, up to about `max_tokens` tokens (0 for all): a batch (W, N), padded, and their bytes.

    Each token of the documents is a target once.
    """
    keep = validation_documents(shard, max_tokens)
    stream = shard.val[: 1 + int(shard.val_documents[:keep, 0].sum())].astype(np.int64)
    count = -(-(len(stream) - 1) // n)
    padded = np.full(count * n + 1, IGNORE, np.int64)
    padded[: len(stream)] = stream
    windows = torch.from_numpy(padded).unfold(0, n + 1, n)
    return replace(batch := next_tokens(windows), tokens=batch.tokens.clamp(min=0)), int(shard.val_documents[:keep, 1].sum())
