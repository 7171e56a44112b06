"""Conversations in sequences: each learnt token once an epoch, whole where they fit, the same for the same seed; and texts as they always were."""

import hashlib
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from hyperlm import data
from hyperlm.config import Config, DataConfig, TrainConfig
from hyperlm.data.corpus import Corpus, Shard
from hyperlm.data.packing import Talks, best_fit
from hyperlm.loss import IGNORE

N, END = 16, 0
NONE = np.zeros(0, np.uint32)
KNOWN = np.ones((1, 4), np.int64)  # of a document that is held out


def talks_of(lengths: list[int], first: int, seed: int = 0) -> Talks:
    """Conversations of these lengths, whose tokens are `first`, `first` + 1, ... and so tell their places; about a third is said."""
    said = np.random.default_rng(seed).random(1 + sum(lengths)) < 0.3
    tokens = np.arange(first - 1, first + sum(lengths), dtype=np.uint32)
    ends = np.cumsum([0, *lengths])
    tokens[ends], said[ends] = END, False
    return Talks(tokens, said.astype(np.uint8), np.array(lengths, np.uint32))


def shard_of(name: str, lengths: list[int] = (), texts: int = 0, first: int = 1000, weight: float | None = None) -> Shard:
    return Shard(
        name, weight, np.arange(texts, dtype=np.uint32) + 100, talks_of(list(lengths), first) if lengths else None, NONE, NONE, KNOWN
    )


def order_of(*shards: Shard, loss: str = "assistant", isolate: bool = False, seed: int = 0, say=lambda line: None) -> data.Batches:
    cfg = Config(data=DataConfig(seq_len=N, loss=loss, isolate=isolate), train=TrainConfig(batch_size=1, grad_accum=1, seed=seed))
    return data.batches(Corpus(list(shards), None, "print", True), cfg, say=say)


def epoch_of(order: data.Batches, epoch: int = 0) -> list[tuple[list[int], list[int]]]:
    """Tokens and targets of the sequences of an epoch."""
    steps = round(order.steps_per_epoch)
    found = [order.at(epoch * steps + i) for i in range(steps)]
    return [(b.tokens[0, 0].tolist(), b.targets[0, 0].tolist()) for b in found]


LENGTHS = {
    "short": [3, 5, 2, 9, 4, 4, 4, 16, 15, 1, 7],
    "longer than a sequence": [17, 16, 40, 3, 64, 33, 2],
    "one": [5],
    "many": np.random.default_rng(1).integers(1, 50, 300).tolist(),
}


@pytest.mark.parametrize("loss", ["assistant", "all"])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_each_learnt_token_is_a_target_once_an_epoch_after_the_token_before_it(lengths, loss):
    shard = shard_of("a", lengths)
    stream, said = shard.talks.tokens.tolist(), shard.talks.said
    before = {token: stream[place - 1] for place, token in enumerate(stream) if token != END}
    learnt = Counter(token for place, token in enumerate(stream) if place and (loss == "all" or said[place]))
    order = order_of(shard, loss=loss)
    for epoch in (0, 1, 5):
        sequences = epoch_of(order, epoch)
        assert Counter(y for _, targets in sequences for y in targets if y != IGNORE) == learnt
        assert all(before[y] == x for tokens, targets in sequences for x, y in zip(tokens, targets, strict=True) if y not in (IGNORE, END))
        assert all(any(y != IGNORE for y in targets) for _, targets in sequences)  # none is read for nothing
        assert all(x >= 0 for tokens, _ in sequences for x in tokens)


def test_a_conversation_that_fits_is_whole_and_begins_after_an_end_of_text():
    shard = shard_of("a", LENGTHS["many"])
    stream = shard.talks.tokens.tolist()
    starts = np.cumsum([0, *LENGTHS["many"]])
    whole = [stream[at : at + length] for at, length in zip(starts, LENGTHS["many"], strict=False) if length <= N]
    read = [tokens for tokens, _ in epoch_of(order_of(shard, loss="all"))]
    found = sum(any(tokens[i : i + len(talk)] == talk for tokens in read for i in range(N)) for talk in whole)
    assert found == len(whole) > 80


def test_what_is_left_of_a_sequence_is_ends_of_text_that_are_not_learnt():
    ((tokens, targets),) = epoch_of(order_of(shard_of("a", [5, 4]), loss="all"))
    assert tokens[9:] == [END] * 7 and targets[9:] == [IGNORE] * 7 and IGNORE not in targets[:9]


def test_packing_is_a_function_of_the_seed_and_the_epoch_and_differs_by_both():
    shard = shard_of("a", LENGTHS["many"])
    epochs = [epoch_of(order_of(shard, seed=seed), epoch) for seed, epoch in ((0, 0), (0, 0), (0, 1), (1, 0))]
    assert epochs[0] == epochs[1]
    mates = [sorted(tuple(sorted(y for y in targets if y > 0)) for _, targets in sequences) for sequences in epochs]
    assert mates[0] != mates[2] and mates[0] != mates[3]
    backward = order_of(shard)
    late = backward.at(50)
    assert torch.equal(late.tokens, order_of(shard).at(50).tokens) and backward.at(0).targets[0, 0].tolist() == epochs[0][0][1]


@pytest.mark.parametrize("weights", [(None, None), (1.0, 3.0)])
def test_texts_and_conversations_mix_in_one_source_and_in_several(weights):
    both, talks = shard_of("a", [9, 9, 30], texts=65, weight=weights[0]), shard_of("b", [4, 20], first=2000, weight=weights[1])
    order = order_of(both, talks)
    targets = Counter(y for i in range(600) for y in order.at(i).targets.flatten().tolist() if y > 0)
    texts, said = (
        range(101, 165),
        [t for s in (both, talks) for t, is_said in zip(s.talks.tokens.tolist(), s.talks.said, strict=True) if is_said],
    )
    assert set(targets) == {*texts, *said}
    if weights[1]:
        assert order.shares == {"a": 0.25, "b": 0.75}
    else:
        assert len({targets[t] // 10 for t in (*texts, *said)}) <= 2  # as often as each other, but for the last epoch


@pytest.mark.parametrize("loss", ["assistant", "all"])
def test_isolated_documents_have_sequences_of_their_own(loss):
    """Texts as conversations, whole or in pieces, each learnt token once an epoch."""
    lengths = [7, 1, 40, 16, 17, 5]
    texts, said = np.arange(100, 100 + sum(lengths), dtype=np.uint32), []
    texts[np.cumsum(lengths) - 1] = END
    both = replace(shard_of("a", [9, 30, 4]), train=texts)
    order = order_of(both, loss=loss, isolate=True, say=said.append)
    of = {
        token: number
        for stream, first in ((texts, 0), (both.talks.tokens[1:], 100))
        for number, token in enumerate(stream.tolist(), first * 1000)
    }
    ends = np.cumsum([0, *lengths, *(100_000 - sum(lengths), 9, 30, 4)])
    for epoch in (0, 1):
        sequences = epoch_of(order, epoch)
        assert all(len({int(np.searchsorted(ends, of[x], "right")) for x in tokens if x != END}) <= 1 for tokens, _ in sequences)
        learnt = [
            *texts[1:],
            *(t for t, is_said in zip(both.talks.tokens[1:], both.talks.said[1:], strict=True) if loss == "all" or is_said),
        ]
        assert Counter(y for _, targets in sequences for y in targets if y != IGNORE) == Counter(map(int, learnt))
    assert said[-1].startswith("sequences  9 documents apart in ") and said[-1].endswith(" padding (--data.isolate)")


@pytest.mark.parametrize("seed", range(8))
def test_pieces_fill_sequences_about_as_well_as_one_by_one(seed):
    """Against best fit of one piece after the other, by looking through all sequences."""
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 60))
    lengths = -np.sort(-rng.integers(1, n + 1, int(rng.integers(1, 200))))
    found, rooms = best_fit(lengths, n), []
    for length in lengths.tolist():
        fits = [(room, i) for i, room in enumerate(rooms) if room >= length]
        room, i = min(fits) if fits else (n, len(rooms))
        rooms[i:] = [room - length, *rooms[i + 1 :]]
    assert np.bincount(found, lengths).max() <= n and len(set(found.tolist())) == found.max() + 1 <= len(rooms)


def test_what_is_learnt_of_conversations_is_said():
    said = []
    which = np.array([0] + [0, 1, 1, 0, 0] + [0, 0, 1, 0] + [0] * 18 + [1, 0], np.uint8)
    order_of(replace(shard_of("a", [5]), talks=replace(talks_of([5, 4, 20], 1000), said=which)), say=said.append)
    # 16 of the long one's 20 are not learnt and left out; the other 4 and the short ones, 13 in all, share a sequence of 16
    assert said == [
        "loss       on what the assistant says, 13.8% of the tokens of conversations (--data.loss)",
        "sequences  3 conversations packed into 1 sequences, 18.8% padding",
    ]
    said.clear()
    order_of(shard_of("a", texts=100), say=said.append)
    assert said == []


def test_conversations_in_which_nothing_is_learnt_are_an_error_and_not_read():
    silent = replace(shard_of("a", [5]), talks=replace(talks_of([5], 1000), said=np.zeros(6, np.uint8)))
    with pytest.raises(data.DataError, match="an assistant says nothing in the training text: .*--data.loss all"):
        order_of(silent)
    said = []
    assert order_of(silent, shard_of("b", texts=100), say=said.append).shares == {"b": 1.0}
    assert said[0] == "left out   a: an assistant says nothing in its training text"
    with pytest.raises(data.DataError, match="nothing that an assistant says is held out"):
        order_of(replace(shard_of("a", [5, 6]), val_documents=np.array([[5, 3, 0, 1]])))


def test_short_texts_beside_conversations_are_left_out_with_a_word():
    said = []
    order = order_of(shard_of("a", [5, 4], texts=9), say=said.append)
    assert (
        said[0] == "left out   a: its texts beside conversations, 9 training tokens, less than one sequence of 16"
        and order.steps_per_epoch == 1
    )


@pytest.mark.parametrize(
    ("weights", "digest"), [((None, None, None), "b84ccedc65cc0638"), ((1.0, 3.0, None), "ac218bb9b2690706")], ids=["by size", "weighted"]
)
def test_texts_are_read_as_version_0_2_read_them(weights, digest):
    """Digests of the windows (A, B, N+1) of 40 steps, taken from that version."""
    rng = np.random.default_rng(7)
    texts = [rng.integers(0, 300, size).astype(np.uint16) for size in (2000, 333, 9)]
    shards = [Shard(name, weight, train, None, NONE, NONE, KNOWN) for name, weight, train in zip("abc", weights, texts, strict=True)]
    cfg = Config(data=DataConfig(seq_len=16), train=TrainConfig(batch_size=4, grad_accum=2, seed=5))
    order, found = data.batches(Corpus(shards, None, "0123456789ab", False), cfg, say=lambda line: None), hashlib.blake2b(digest_size=8)
    for step in range(40):
        batch = order.at(step)
        assert torch.equal(batch.tokens[..., 1:], batch.targets[..., :-1])
        found.update(torch.cat([batch.tokens[..., :1], batch.targets], -1).numpy().tobytes())
    assert found.hexdigest() == digest


# -- validation ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("isolate", [False, True])
@pytest.mark.parametrize("loss", ["assistant", "all"])
@pytest.mark.parametrize("limit", [0, 60, 1])
def test_validation_reads_each_learnt_token_of_its_first_documents_once(loss, limit, isolate):
    """Texts and conversations in any order; with the bytes of what is learnt, here three a token, and five of what is said."""
    lengths, talking = [7, 20, 5, 3, 40, 9], np.array([1, 0, 1, 0, 1, 0])
    talks = talks_of(lengths, 1000)
    said, begin = talks.said.copy(), np.cumsum([1, *lengths])
    for at, length, talk in zip(begin, lengths, talking, strict=False):
        said[at : at + length] = 1 if not talk else said[at : at + length]
    shard = Shard(
        "a",
        None,
        NONE,
        None,
        talks.tokens,
        said,
        np.array([(length, 3 * length, 5, talk) for length, talk in zip(lengths, talking, strict=True)]),
    )
    kept = {0: 6, 60: 4, 1: 1}[limit]
    batch, size = data.validation_sequences(shard, DataConfig(seq_len=N, loss=loss, isolate=isolate), limit)
    stream = talks.tokens[1 : begin[kept]].tolist()
    learnt = [token for token, is_said in zip(stream, said[1:], strict=False) if loss == "all" or is_said]
    assert Counter(batch.targets[batch.targets != IGNORE].tolist()) == Counter(learnt)
    assert batch.tokens.shape == batch.targets.shape and batch.tokens.shape[1] == N and batch.tokens.min() >= 0
    if isolate:  # nothing of another document is in any sequence
        of = dict(zip(talks.tokens[1:].tolist(), np.repeat(np.arange(6), lengths).tolist(), strict=True))
        assert all(len({of[x] for x in sequence if x != END}) <= 1 for sequence in batch.tokens.tolist())
    assert size == (3 * sum(lengths[:kept]) if loss == "all" else 5 * kept)
    before = {token: talks.tokens[place - 1] for place, token in enumerate(talks.tokens.tolist()) if token != END}
    assert all(before[y] == x for x, y in zip(batch.tokens.flatten().tolist(), batch.targets.flatten().tolist(), strict=True) if y > 0)
