"""Passkey retrieval (Mohtashami & Jaggi 2023): a number is hidden in a long text, and asked for at its end.

A trial is the text CHOICES times, with another answer each time: the key, then other random numbers. Whether a model would
say the key (each digit is what it finds most probable after those before), and whether it finds the key more probable than the others, as
guessing does in one of CHOICES trials: both follow from a pass over these texts. No token is generated.
Axes: T trials, C choices, N tokens, of which the answer is the end.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from hyperlm import model
from hyperlm import tokenizer as tok
from hyperlm.config import Config, ConfigError
from hyperlm.data import Corpus
from hyperlm.tree import Tree

DIGITS = 5
CHOICES = 10
TEXTS = ("\n\nThe pass key is ", ". Remember it. ", " is the pass key.\n\n", "\n\nWhat is the pass key? The pass key is ")

Reader = Callable[[Tensor], Tensor]  # texts (B, N) int64 -> logits (B, DIGITS, V) of their last tokens, each found from those before it


@dataclass(frozen=True)
class Words:
    """The ids of what is said of a key."""

    before: list[int]
    between: list[int]  # the two times that it is said
    after: list[int]
    question: list[int]
    digits: np.ndarray  # (10,)
    end: int  # of a text, with which another begins

    @property
    def size(self) -> int:
        """Tokens of a trial that are not the text in which the key is hidden."""
        return 1 + len(self.before) + len(self.between) + len(self.after) + len(self.question) + 3 * DIGITS


class Grade(NamedTuple):
    """Of trials, (T,) fp64 each: 1 or 0, and if the key is as probable as others the share of a guess."""

    said: Tensor  # greedily
    chosen: Tensor  # among CHOICES


def words_of(tokenizer: Tokenizer) -> Words:
    """Raises TokenizerError if it has no token for each digit."""
    digits = [i for ids in tok.encode(tokenizer, list("0123456789")) for i in ids[-1:]]
    if len(set(digits)) < 10:
        raise tok.TokenizerError("the tokenizer has no token for each digit: a pass key cannot be said")
    return Words(*tok.encode(tokenizer, list(TEXTS)), np.array(digits), tok.end_of_text(tokenizer))


def check(trials: int, n: int, tokenizer: Tokenizer) -> None:
    """Raises ConfigError if a sequence of training is too short for a trial."""
    if trials and n < (size := words_of(tokenizer).size):
        why = f"key and question alone take {size} tokens, more than --data.seq-len {n}"
        raise ConfigError(f"--eval.passkey {trials}: {why}: set it to 0, or train on longer sequences")


def hay_of(corpus: Corpus) -> np.ndarray:
    """The ids of the longest validation text of a source, in which keys are hidden."""
    return max((shard.val for shard in corpus.shards), key=len)


def trials(words: Words, hay: np.ndarray, n: int, depths: Sequence[float], seed: int = 0) -> Tensor:
    """Trials of `n` tokens, one for each depth: (T, C, n) int64, the key first.

    Args:
        hay: (S,) ids of the text that keys are hidden in; where it is too short, it is repeated.
        depths: of the key in the text, from 0, the beginning, to 1.
        seed: what decides keys and places, and for each trial its number.
    """
    return torch.from_numpy(np.stack([trial(words, hay, n, depth, np.random.default_rng([seed, n, i])) for i, depth in enumerate(depths)]))


def trial(words: Words, hay: np.ndarray, n: int, depth: float, rng: np.random.Generator) -> np.ndarray:
    """(C, n) int64"""
    numbers = rng.choice(10**DIGITS, CHOICES, replace=False)
    answers = words.digits[numbers[:, None] // 10 ** np.arange(DIGITS)[::-1] % 10]  # (C, DIGITS)
    key, size = answers[0].tolist(), n - words.size
    text = hay if len(hay) >= size else np.resize(hay, size)
    start = int(rng.integers(len(text) - size + 1))
    text = text[start : start + size].tolist()
    at = round(depth * size)
    said = [*words.before, *key, *words.between, *key, *words.after]
    prompt = [words.end, *text[:at], *said, *text[at:], *words.question]
    return np.concatenate([np.tile(np.array(prompt, np.int64), (CHOICES, 1)), answers], 1)


def reader(params: Tree, config: Config, device: torch.device) -> Reader:
    """A model as such a function."""

    @torch.no_grad()
    def read(texts: Tensor) -> Tensor:
        features = model.hidden(params, texts[:, :-1].to(device), config.model, kernels=config.kernels)
        return F.linear(features[:, -DIGITS:], params["head"]["weight"])

    return read


def graded(read: Reader, texts: Tensor, batch: int) -> Grade:
    """Of trials (T, C, N), `batch` texts at a time."""
    nats, greedy = [], []
    for part in texts.flatten(0, 1).split(batch):
        log_p, answers = F.log_softmax(read(part).float(), -1), part[:, -DIGITS:]
        there = answers.to(log_p.device)
        nats.append(-log_p.gather(-1, there[..., None])[..., 0].sum(-1, dtype=torch.float64))
        greedy.append((log_p.argmax(-1) == there).all(-1))
    nats, greedy = (torch.cat(x).cpu().unflatten(0, texts.shape[:2]) for x in (nats, greedy))
    least = nats == nats.min(1, keepdim=True).values
    return Grade(greedy[:, 0].double(), least[:, 0] / least.sum(1, dtype=torch.float64))
