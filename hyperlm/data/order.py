"""Tokens to batches: the order of training data, a pure function of (seed, step), and the sequences of validation.

Axes: A micro-batches, B batch, N sequence, W sequences of validation.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view

from hyperlm.batch import Batch
from hyperlm.config import Config, DataConfig
from hyperlm.data.corpus import Corpus, Shard
from hyperlm.data.documents import DataError
from hyperlm.data.packing import Packing, Talks, of_texts, packing_of
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


class Part(NamedTuple):
    """The texts or the conversations of a source, as sequences."""

    count: int
    sequence: Callable[[int, int], tuple[np.ndarray, np.ndarray]]  # (epoch, number) -> tokens and targets, (N,) int64 each


def batches(corpus: Corpus, config: Config, say: Callable[[str], None] = print) -> Batches:
    """Order the training sequences of a corpus.

    Texts are read in windows of N+1 tokens at stride N, so that every token is a target once; conversations are packed (see `packing`), so
    that every token that is learnt is a target once; where documents are isolated, each has sequences of its own. Without weights each
    epoch is a permutation of all sequences. With weights each source is its own permutation, and each BLOCK of sequences has the exact
    proportions, but for sources whose weight asks for less than one sequence of a block: they get one.

    Args:
        say: is told in one line each of sources that are too short for a sequence, of weights too small for a block, and what is learnt of
            conversations.

    Raises:
        DataError: if all of the text is shorter than one sequence, or there is nothing to learn, or nothing to validate on.
    """
    a, b, n, seed = config.train.grad_accum, config.train.batch_size, config.data.seq_len, config.train.seed
    everything = config.data.loss == "all"
    if not everything and not any(int(first_documents(shard, config.eval.max_tokens)[:, 2].sum()) for shard in corpus.shards):
        raise DataError("nothing that an assistant says is held out to validate on: add conversations, or set --data.loss all")
    alone = config.data.isolate
    packings: list[Packing] = []

    def windows(shard: Shard) -> Part:
        def sequence(_: int, number: int) -> tuple[np.ndarray, np.ndarray]:
            window = shard.train[number * n : (number + 1) * n + 1].astype(np.int64)
            return window[:-1], window[1:]

        return Part((len(shard.train) - 1) // n, sequence)

    def packed(talks: Talks, *name: object) -> Part:
        packing = packing_of(talks, n, everything=everything, alone=alone)
        if len(packing):
            packings.append(packing)
        drawn = lru_cache(maxsize=2)(lambda epoch: packing.draw(stream_seed(seed, corpus.fingerprint, *name, epoch)))
        return Part(len(packing), lambda epoch, number: packing.sequence(number, drawn(epoch)))

    shards, parts = [], []
    nonempty = [s for s in corpus.shards if len(s.train) or s.talks]
    for shard in nonempty if alone else join_short(nonempty, n, say):
        texts = [packed(of_texts(shard.train), "texts", len(parts)) if alone else windows(shard)] if len(shard.train) else []
        talks = [packed(shard.talks, "talks", len(parts))] if shard.talks else []
        if not any(part.count for part in texts + talks):
            say(f"left out   {shard.name}: an assistant says nothing in its training text")
            continue
        shards.append(shard)
        parts.append(texts + talks)
    if not shards:
        raise DataError("an assistant says nothing in the training text: add conversations, or set --data.loss all")
    report_packing(packings, n, alone, say)
    counts = np.array([sum(part.count for part in of_source) for of_source in parts])
    weighted = any(s.weight is not None for s in shards)
    groups = parts if weighted else [list(chain.from_iterable(parts))]
    weights = np.array([s.weight or 1.0 for s in shards]) if weighted else np.ones(1)
    sizes = [sum(part.count for part in group) for group in groups]
    quotas = quotas_of([s.name for s in shards], weights, say) if weighted else np.array([BLOCK])

    @lru_cache(maxsize=2)
    def block(index: int) -> np.ndarray:
        """Group of each sequence in a block."""
        slots = np.repeat(np.arange(len(groups)), quotas)
        return np.random.Generator(np.random.Philox(stream_seed(seed, corpus.fingerprint, "block", index))).permutation(slots)

    @lru_cache(maxsize=2 * len(groups))
    def permutation(group: int, epoch: int) -> np.ndarray:
        return np.random.Generator(np.random.Philox(stream_seed(seed, corpus.fingerprint, group, epoch))).permutation(sizes[group])

    def sequence(slot: int) -> tuple[np.ndarray, np.ndarray]:
        index, within = divmod(slot, BLOCK)
        group = int(block(index)[within])
        epoch, place = divmod(index * int(quotas[group]) + int((block(index)[:within] == group).sum()), sizes[group])
        number = int(permutation(group, epoch)[place])
        for part in groups[group]:
            if number < part.count:
                return part.sequence(epoch, number)
            number -= part.count
        raise AssertionError("sequence outside its group")

    def at(step: int) -> Batch:
        return stacked([sequence(slot) for slot in range(step * a * b, (step + 1) * a * b)], n).map(lambda x: x.unflatten(0, (a, b)))

    shares = quotas / BLOCK if weighted else counts / counts.sum()
    return Batches(at, int(counts.sum()) / (a * b), dict(zip((s.name for s in shards), shares.tolist(), strict=True)))


def stacked(sequences: list[tuple[np.ndarray, np.ndarray]], n: int) -> Batch:
    """Tokens and targets of sequences, as a batch (W, N)."""
    both = torch.from_numpy(np.array(sequences, np.int64).reshape(-1, 2, n))
    return Batch(*(x.contiguous() for x in both.unbind(1)))


def report_packing(packings: list[Packing], n: int, alone: bool, say: Callable[[str], None]) -> None:
    """Say what is learnt of conversations, and what padding costs."""
    if not packings:
        return
    documents, sequences = sum(len(p.talks.lengths) for p in packings), sum(map(len, packings))
    padding = 1 - sum(int(p.length.sum()) for p in packings) / (sequences * n)
    packed = f"{documents:,} documents apart in" if alone else f"{documents:,} conversations packed into"
    talks = [p.talks for p in packings if p.learnt is not None]
    if talks:
        share = sum(int(t.said.sum(dtype=np.int64)) for t in talks) / sum(len(t.tokens) - 1 for t in talks)
        say(f"loss       on what the assistant says, {share:.1%} of the tokens of conversations (--data.loss)")
    say(f"sequences  {packed} {sequences:,} sequences, {padding:.1%} padding{' (--data.isolate)' if alone else ''}")


def join_short(shards: list[Shard], n: int, say: Callable[[str], None]) -> list[Shard]:
    """Sources whose texts are shorter than a sequence of N+1 tokens become one, in place of the first; if it is too short as well, they go.

    Of those with conversations, which can always be packed, the texts go alone.

    Raises:
        DataError: if nothing is left.
    """
    for i, s in enumerate(shards):
        if s.talks and 0 < len(s.train) <= n:
            say(f"left out   {s.name}: its texts beside conversations, {len(s.train)} training tokens, less than one sequence of {n}")
            shards[i] = replace(s, train=s.train[:0])
    short, long = ([s for s in shards if (len(s.train) <= n and not s.talks) == it_is] for it_is in (True, False))
    if not short:
        return shards
    names = ", ".join(s.name for s in short[:NAMED]) + (f" and {len(short) - NAMED} more" if len(short) > NAMED else "")
    train = np.concatenate([s.train for s in short])
    if len(train) <= n:
        if not long:
            raise DataError(f"{names}: {len(train)} training tokens, less than one sequence: set --data.seq-len below that or add text")
        say(f"left out   {names}: {len(train)} training tokens, less than one sequence of {n}")
        return long
    weight = sum(s.weight or 1.0 for s in short) if any(s.weight is not None for s in shards) else None
    joined = replace(short[0], name=f"{short[0].name} and {len(short) - 1} more", train=train, weight=weight)
    say(f"mixture    {names}: each shorter than a sequence, read as one source")
    at = next(i for i, s in enumerate(shards) if s is short[0])
    return [*long[:at], joined, *long[at:]]


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


def first_documents(shard: Shard, max_tokens: int) -> np.ndarray:
    """What is known of these, as `Shard.val_documents` has it."""
    return shard.val_documents[: validation_documents(shard, max_tokens)] if len(shard.val_documents) else shard.val_documents


def validation_sequences(shard: Shard, cfg: DataConfig, max_tokens: int, stride: int = 0) -> tuple[Batch, int]:
    """Whole validation documents, up to about `max_tokens` tokens (0 for all), in sequences (W, N) like those that are trained on: texts in
    windows one after the other, conversations packed, or each apart; and the bytes of what is learnt.

    Each token that is learnt is a target once. Where windows of texts are `stride` tokens apart, fewer than N, it is one in the window in
    which the most stands before it: more than N - stride tokens, but at the beginning.
    """
    n, everything = cfg.seq_len, cfg.loss == "all"
    size, raw, said, talk = first_documents(shard, max_tokens).T
    end, ends = int(shard.val[0]), 1 + np.cumsum(size)

    def subset(those: np.ndarray) -> Talks:
        """These documents alone."""
        places = [slice(0, 1), *(slice(to - count, to) for to, count in zip(ends[those].tolist(), size[those].tolist(), strict=True))]
        return Talks(*(np.concatenate([x[place] for place in places]) for x in (shard.val, shard.val_said)), size[those])

    def packed(talks: Talks) -> list[tuple[np.ndarray, np.ndarray]]:
        packing = packing_of(talks, n, everything=everything, alone=cfg.isolate)
        drawn = packing.draw(None)
        return [packing.sequence(number, drawn) for number in range(len(packing))]

    texts = subset(talk == 0)
    if cfg.isolate:
        sequences = packed(texts)
    else:
        stream = texts.tokens.astype(np.int64)
        learnt, stride = len(stream) - 1, stride or n
        count = (learnt > 0) + -(-max(0, learnt - n) // stride)
        inputs, targets = np.full(n + count * stride, end), np.full(n + count * stride, IGNORE)
        inputs[:learnt], targets[:learnt] = stream[:-1], stream[1:]
        inputs, targets = (sliding_window_view(x, n)[: count * stride : stride].copy() for x in (inputs, targets))
        targets[1:, : n - stride] = IGNORE
        sequences = list(zip(inputs, targets, strict=True))
    return stacked(sequences + packed(subset(talk == 1)), n), int((raw if everything else said).sum())
