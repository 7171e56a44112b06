"""Conversations to sequences: whole where they fit, several to a sequence, and the rest of it padded.

A conversation is learnt with the end-of-text before it as its first input and the one after it as its last target. One that is longer than
a sequence is cut into several, and its last piece is packed like a whole one. Pieces of which nothing is learnt are left out. Which lengths
make up a sequence is decided once (best fit, the longest first); which of the pieces of a length it gets, and in which order, differs by
epoch. Where documents are isolated, each piece is a sequence, of texts as well.

Axes: T tokens, C documents, P pieces, S sequences, N tokens of a sequence.
"""

from dataclasses import dataclass

import numpy as np

from hyperlm.loss import IGNORE

AT_ONCE = 1 << 24  # tokens that are searched for ends of texts at a time


@dataclass(frozen=True)
class Talks:
    """Conversations as they lie on disk, or texts like them."""

    tokens: np.ndarray  # (T,): one that is no target, before conversations an end-of-text; and each document with an end-of-text after it
    said: np.ndarray | None  # (T,) uint8: 1 for what the assistant says and the ends of its turns; None for texts, of which all is learnt
    lengths: np.ndarray  # (C,): tokens of each, with the end-of-text after it


def of_texts(tokens: np.ndarray) -> Talks:
    """A stream of texts, each with end-of-text after it; the first token of all is not learnt, as in windows."""
    starts = range(0, len(tokens), AT_ONCE)
    ends = np.concatenate([start + np.flatnonzero(tokens[start : start + AT_ONCE] == tokens[-1]) for start in starts])
    return Talks(tokens, None, np.diff(ends, prepend=0))


@dataclass(frozen=True)
class Packing:
    """Sequences of N tokens."""

    talks: Talks
    learnt: np.ndarray | None  # (T,) which tokens; None for all
    n: int
    start: np.ndarray  # (P,) of a piece's first target among the tokens; its first input is the token before
    length: np.ndarray  # (P,)
    members: np.ndarray  # (P,) ranks of pieces, the longest first, of one sequence after the other
    bounds: np.ndarray  # (S + 1,) where among these each sequence begins

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def draw(self, seed: int | None) -> tuple[np.ndarray, np.ndarray]:
        """Which piece has which rank, (P,), and the order in which those of a sequence come, (P,): that of the text without a seed."""
        keys = np.arange(len(self.length)) if seed is None else np.random.Generator(np.random.Philox(seed)).permutation(len(self.length))
        return np.lexsort((keys, -self.length)), keys

    def sequence(self, number: int, drawn: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and targets, (N,) int64 each."""
        pieces, keys = drawn
        members = pieces[self.members[self.bounds[number] : self.bounds[number + 1]]]
        members = members[np.argsort(keys[members])]
        stream = self.talks.tokens  # which ends with an end of text
        tokens, targets = np.full(self.n, stream[-1], np.int64), np.full(self.n, IGNORE, np.int64)
        at = 0
        for start, length in zip(self.start[members].tolist(), self.length[members].tolist(), strict=True):
            to, source = slice(at, at + length), slice(start, start + length)
            tokens[to] = stream[start - 1 : start + length - 1]
            targets[to] = stream[source] if self.learnt is None else np.where(self.learnt[source], stream[source].astype(np.int64), IGNORE)
            at += length
        return tokens, targets


def packing_of(talks: Talks, n: int, *, everything: bool, alone: bool) -> Packing:
    """Documents in sequences of `n` tokens, of which everything is learnt, or what is said; each `alone`, or as many together as fit."""
    start, length = pieces_of(talks.lengths.astype(np.int64), n)
    learnt = None if everything else talks.said
    if learnt is not None and len(start):
        some = np.maximum.reduceat(learnt, start) > 0
        start, length = start[some], length[some]
    longest_first = -np.sort(-length)
    sequence = np.arange(len(start)) if alone else best_fit(longest_first, n)
    members = np.argsort(sequence, kind="stable")
    bounds = np.searchsorted(sequence[members], np.arange(sequence.max(initial=-1) + 2))
    return Packing(talks, learnt, n, start, length, members, bounds)


def pieces_of(lengths: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Of texts of these lengths, one after the other from place 1 on: where each piece of at most `n` tokens begins, and its length."""
    count = -(-lengths // n)
    number = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)  # of a piece within its text
    start = np.repeat(1 + np.cumsum(lengths) - lengths, count) + number * n
    return start, np.minimum(n, np.repeat(lengths, count) - number * n)


def best_fit(lengths: np.ndarray, n: int) -> np.ndarray:
    """The sequence of `n` tokens that each piece goes to, (P,): the one with the least room that suffices.

    Args:
        lengths: of pieces, the longest first. As many of one length as there are go together.
    """
    sequence = np.zeros(len(lengths), np.int64)
    waiting: list[list[np.ndarray]] = [[] for _ in range(n + 1)]  # sequences by the room that they have
    some, count = 0, 0  # bit r of `some`: there are any with room r
    ends = np.append(np.flatnonzero(np.diff(lengths)) + 1, len(lengths)).tolist() if len(lengths) else []
    at = 0
    for end in ends:
        length = int(lengths[at])
        while at < end:
            if fitting := some >> length:
                room = length + (fitting & -fitting).bit_length() - 1
                those = waiting[room].pop()
                if not waiting[room]:
                    some ^= 1 << room
            else:
                room = n
                those = np.arange(count, count + -(-(end - at) // (n // length)))
                count += len(those)
            each = room // length  # go into each of them
            used = -(-(end - at) // each)
            if used < len(those):
                waiting[room].append(those[used:])
                some |= 1 << room
                those = those[:used]
            take = min(end - at, each * len(those))
            sequence[at : at + take] = np.repeat(those, each)[:take]
            at += take
            in_last = take - each * (len(those) - 1)
            for left, changed in ((room - each * length, those[:-1]), (room - in_last * length, those[-1:])):
                if left and len(changed):
                    waiting[left].append(changed)
                    some |= 1 << left
    return sequence
