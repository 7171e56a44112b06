"""Conversations to sequences: whole where they fit, several to a sequence, and the rest of it padded.

A conversation is learnt with the end-of-text before it as its first input and the one after it as its last target. One that is longer than a
sequence is cut into several, and its last piece is packed like a whole one. Pieces of which nothing is learnt are left out. Which lengths make up
a sequence is decided once (best fit, the longest first); which of the pieces of a length it gets, and in which order, differs by epoch.

Axes: T tokens, C conversations, P pieces, S sequences, N tokens of a sequence.
"""

from dataclasses import dataclass

import numpy as np

from hyperlm.loss import IGNORE


@dataclass(frozen=True)
class Talks:
    """Conversations as they lie on disk."""

    tokens: np.ndarray  # (T,): end-of-text, and then each conversation with one after it
    said: np.ndarray  # (T,) uint8: 1 for what the assistant says and the ends of its turns
    lengths: np.ndarray  # (C,): tokens of each, with the end-of-text after it


@dataclass(frozen=True)
class Packing:
    """Sequences of N tokens of conversations, of which what the assistant says is learnt, or everything."""

    talks: Talks
    n: int
    everything: bool
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
        own = pieces[self.members[self.bounds[number] : self.bounds[number + 1]]]
        tokens, targets = np.full(self.n, self.talks.tokens[0], np.int64), np.full(self.n, IGNORE, np.int64)
        at = 0
        for start, length in zip(*(x[own[np.argsort(keys[own])]].tolist() for x in (self.start, self.length)), strict=True):
            here, there = slice(at, at + length), slice(start, start + length)
            tokens[here] = self.talks.tokens[start - 1 : start + length - 1]
            targets[here] = self.talks.tokens[there] if self.everything else np.where(self.talks.said[there], self.talks.tokens[there].astype(np.int64), IGNORE)
            at += length
        return tokens, targets


def packing_of(talks: Talks, n: int, *, everything: bool) -> Packing:
    """Conversations in sequences of `n` tokens."""
    start, length = pieces_of(talks.lengths.astype(np.int64), n)
    if not everything and len(start):
        learnt = np.maximum.reduceat(talks.said, start) > 0
        start, length = start[learnt], length[learnt]
    longest_first = -np.sort(-length)
    sequence = best_fit(longest_first, n)
    members = np.argsort(sequence, kind="stable")
    bounds = np.searchsorted(sequence[members], np.arange(sequence.max(initial=-1) + 2))
    return Packing(talks, n, everything, start, length, members, bounds)


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
            if found := some >> length:
                room = length + (found & -found).bit_length() - 1
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
