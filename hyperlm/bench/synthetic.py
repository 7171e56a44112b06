"""Synthetic tasks: sequences whose answers are known, as many as wanted, each batch a pure function of its seed.

Targets are IGNORE but at answers, and an answer is never read before it was due. `group` says what accuracy is told by. Which token means
what is at the head of each task. Axes: B sequences, N tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from hyperlm.batch import Batch
from hyperlm.loss import IGNORE

SMALLEST = 320  # vocabulary of the tasks that need few tokens: `config.resolve` wants 300
TRAINING, VALIDATION, TEST = range(3)  # streams of one seed that share nothing
AT_ONCE = 64  # batches that are made together: making 64 takes little longer than making one

Seed = tuple[int, ...]


@dataclass(frozen=True)
class Setting:
    """What sequences are like."""

    length: int  # N, in tokens
    size: int  # pairs to recall, the deepest nesting, or the modulus that is counted by


@dataclass(frozen=True, eq=False)
class Sample:
    batch: Batch  # (B, N)
    group: Tensor  # (B, N) int64, what accuracy is told by: read where there is an answer

    def __getitem__(self, rows: slice) -> "Sample":
        return Sample(self.batch.map(lambda x: x[rows]), self.group[rows])


Draw = Callable[[Seed, int, Setting, int], Sample]  # (seed, B, setting, vocabulary) -> sample


def sample(tokens: np.ndarray, targets: np.ndarray, group: np.ndarray) -> Sample:
    tokens, targets, group = (torch.from_numpy(np.ascontiguousarray(x, np.int64)) for x in (tokens, targets, group))
    return Sample(Batch(tokens, targets), group)


# -- multi-query associative recall ----------------------------------------------------------------------------------------------------

POWER = 0.01  # of the law that gaps follow: p(gap) ~ gap^(POWER - 1)


def distinct(rng: np.random.Generator, rows: int, count: int, low: int, high: int) -> np.ndarray:
    """(rows, count) integers of [low, high), those of a row distinct, all choices equally likely: rows with repetitions are drawn again."""
    drawn, again = np.empty((rows, count), np.int64), np.arange(rows)
    while len(again):
        drawn[again] = rng.integers(low, high, (len(again), count))
        ordered = np.sort(drawn[again], axis=1)
        again = again[(ordered[:, 1:] == ordered[:, :-1]).any(axis=1)]
    return drawn


def recall(seed: Seed, count: int, setting: Setting, vocabulary: int) -> Sample:
    """Pairs of a key and its value, then every key once more, at whose place its value is the answer. Group: 0.

    Keys are of the lower half of the vocabulary, values of the upper; 0 fills the rest. Queries stand at even places after the pairs, by a
    power law without replacement, so that most come soon. Reference: Arora et al. 2023, "Zoology", figure 2.
    """
    rng, pairs, half = np.random.default_rng(seed), setting.size, vocabulary // 2
    keys, values = distinct(rng, count, pairs, 1, half), distinct(rng, count, pairs, half, vocabulary)
    tokens, targets = np.zeros((count, setting.length), np.int64), np.full((count, setting.length), IGNORE)
    tokens[:, 0 : 2 * pairs : 2], tokens[:, 1 : 2 * pairs : 2] = keys, values
    places = (setting.length - 2 * pairs) // 2
    # The first of a draw without replacement are the largest of log p + Gumbel noise, in order.
    chances = (POWER - 1) * np.log(np.arange(1, places + 1)) + rng.gumbel(size=(count, places))
    at = 2 * pairs + 2 * np.argsort(-chances, axis=1)[:, :pairs]
    np.put_along_axis(tokens, at, keys, axis=1)
    np.put_along_axis(targets, at, values, axis=1)
    return sample(tokens, targets, np.zeros_like(tokens))


# -- hierarchies: a walk from depth to depth ---------------------------------------------------------------------------------------------


class Walk:
    """Depths (B,) that go one step at a time to a depth drawn from 0 .. deepest, and from there to another: all depths are met often."""

    def __init__(self, rng: np.random.Generator, count: int, deepest: int) -> None:
        self.rng, self.deepest = rng, deepest
        self.depth, self.to = np.zeros(count, np.int64), np.zeros(count, np.int64)

    def step(self, moving: np.ndarray) -> np.ndarray:
        """Move where `moving` (B,): +1 where a bracket opens, -1 where one closes, and 0."""
        another = (self.depth + 1 + self.rng.integers(0, self.deepest, len(self.depth))) % (self.deepest + 1)
        self.to = np.where(self.depth == self.to, another, self.to)
        move = np.where(moving, np.sign(self.to - self.depth), 0)
        self.depth = self.depth + move
        return move


TYPES = 8  # of brackets
OPENING, CLOSING = 16, 32  # + type


def dyck(seed: Seed, count: int, setting: Setting, vocabulary: int = SMALLEST) -> Sample:
    """Brackets of TYPES types, properly nested; before each that closes, it is the answer. Group: its depth, 1 for an outermost one.

    One that closes what the token before it opened is no answer, as that takes no memory: brackets of depth `setting.size` hold such.
    """
    rng, rows = np.random.default_rng(seed), np.arange(count)
    walk = Walk(rng, count, setting.size + 1)
    tokens, targets, group = (np.full((count, setting.length + 1), x, np.int64) for x in (0, IGNORE, 0))
    stack, opened = np.zeros((count, setting.size + 2), np.int64), np.zeros(count, bool)
    for n in range(setting.length + 1):
        move = walk.step(np.ones(count, bool))
        depth = walk.depth + (move < 0)  # of the bracket
        new = move > 0
        stack[rows[new], depth[new]] = rng.integers(0, TYPES, int(new.sum()))
        kind = stack[rows, depth]
        tokens[:, n] = np.where(new, OPENING, CLOSING) + kind
        if n:
            targets[:, n - 1] = np.where(new | opened, IGNORE, tokens[:, n])
            group[:, n - 1] = depth
        opened = new
    return sample(tokens[:, :-1], targets[:, :-1], group[:, :-1])


NAMES, VALUES = 16, 64
OPEN, CLOSE, ASK, NAME, VALUE = 1, 2, 3, 16, 64  # NAME + which, VALUE + which
MOVE, BIND = 0.35, 0.7  # a bracket comes where a random number is below MOVE, else a binding below BIND, else a question


def scopes(seed: Seed, count: int, setting: Setting, vocabulary: int = SMALLEST) -> Sample:
    """Brackets open and close scopes, in which names are bound (name, value); a question (ASK, name) is answered at the name, by its value
    in the nearest enclosing scope that binds it.

    About half of the questions are for a shadowed name: a scope that has closed since bound it too, and its newest value is not the answer.
    Group: 2 depth + (whether shadowed), depth 0 outside all brackets.
    """
    rng, rows, n = np.random.default_rng(seed), np.arange(count), setting.length
    walk = Walk(rng, count, setting.size)
    tokens, targets, group = (np.full((count, n + 2), x, np.int64) for x in (0, IGNORE, 0))  # what is written beyond n is cut off
    visible = np.zeros((count, setting.size + 1, NAMES), np.int16)  # the value of each name at each depth; 0 where nothing binds it
    newest = np.zeros((count, NAMES), np.int16)
    end = np.zeros(count, np.int64)  # of each sequence so far
    while (end < n).any():
        chance, coin = rng.random((2, count))
        now = visible[rows, walk.depth]
        move = walk.step(chance < MOVE)
        bound = now > 0
        asks = (chance >= BIND) & bound.any(axis=1)
        binds = (move == 0) & ~asks
        at = np.minimum(end, n)

        opens, deeper = move > 0, walk.depth
        visible[rows[opens], deeper[opens]] = now[opens]
        tokens[rows, at] = np.where(opens, OPEN, CLOSE)

        shadowed = bound & (now != newest)
        wish = rng.random((count, NAMES), np.float32) + (shadowed & (coin < 0.5)[:, None])
        name = np.where(asks, np.where(bound, wish, -1).argmax(axis=1), rng.integers(0, NAMES, count))
        value = np.where(asks, now[rows, name], rng.integers(VALUE, VALUE + VALUES, count))
        tokens[rows[asks], at[asks]], tokens[rows[asks], at[asks] + 1] = ASK, NAME + name[asks]
        targets[rows[asks], at[asks] + 1] = value[asks]
        group[rows, np.minimum(at + 1, n)] = 2 * walk.depth + shadowed[rows, name]

        binding = rows[binds], at[binds]
        tokens[binding], tokens[binding[0], binding[1] + 1] = NAME + name[binds], value[binds]
        visible[binding[0], walk.depth[binds], name[binds]] = newest[binding[0], name[binds]] = value[binds]
        end += np.where(move == 0, 2, 1)
    return sample(tokens[:, :n], targets[:, :n], group[:, :n])


# -- running answers ---------------------------------------------------------------------------------------------------------------------

BIT, COUNT = 16, 32  # BIT + 0 or 1, COUNT + the answer


def counting(seed: Seed, count: int, setting: Setting, vocabulary: int = SMALLEST) -> Sample:
    """Random bits; at each, how many ones there were up to it, modulo `setting.size`: parity, if that is 2. Group: the position."""
    bits = np.random.default_rng(seed).integers(0, 2, (count, setting.length))
    group = np.broadcast_to(np.arange(setting.length), bits.shape)
    return sample(BIT + bits, COUNT + bits.cumsum(axis=1) % setting.size, group)


# -- batches -----------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    name: str
    draw: Draw
    vocabulary: int
    learnt: tuple[Setting, ...]  # a batch of each in turn, over and over; a setting may come more than once
    tested: tuple[Setting, ...]


@lru_cache(maxsize=8)
def block_of_batches(draw: Draw, seed: Seed, count: int, setting: Setting, vocabulary: int) -> Sample:
    return draw(seed, count, setting, vocabulary)


def at_step(task: Task, seed: int, step: int, tokens: int) -> Sample:
    """What is learnt at a step: sequences of one setting, of about so many tokens."""
    number, turn = divmod(step, len(task.learnt))
    setting = task.learnt[turn]
    count = max(1, tokens // setting.length)
    block, index = divmod(number, AT_ONCE)
    made = block_of_batches(task.draw, (seed, TRAINING, block, turn), AT_ONCE * count, setting, task.vocabulary)
    return made[index * count : (index + 1) * count]
