"""The suite `recall`: every answer of its tasks against a plain reading of the sequence; what is learnt, tested, counted and chosen."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from hyperlm import cli, model, residence
from hyperlm.bench import answering, recall, synthetic
from hyperlm.bench.answering import Job, Outcome, Score, answers, logits_of, scores, state_bytes
from hyperlm.bench.recall import Sizes, config_of, tasks
from hyperlm.bench.synthetic import SMALLEST, TEST, Setting, Task
from hyperlm.config import ConfigError
from hyperlm.loss import IGNORE
from hyperlm.step import init_state, weights

CPU = torch.device("cpu")
TINY = Sizes(("recall", "scopes", "dyck", "parity", "modulo 5"), (32,), 32, (1e-2,), 2, 2, 256, ((16, 2), (32, 4)), SMALLEST, 64, 8)
Read = Iterator[tuple[int, int, int]]  # place, answer, group


# -- plain readers: one token after another, with a dictionary, a stack, a sum -------------------------------------------------------------


def read_recall(tokens: list[int]) -> Read:
    known = {}
    for n, (token, after) in enumerate(zip(tokens, [*tokens[1:], 0], strict=True)):
        if token and token < SMALLEST // 2:
            if after >= SMALLEST // 2:
                known[token] = after
            else:
                yield n, known[token], 0


def read_dyck(tokens: list[int]) -> Read:
    stack = []
    for n, token in enumerate(tokens):
        if token >= synthetic.CLOSING:
            opened, kind = stack.pop()
            assert kind == token - synthetic.CLOSING, "not properly nested"
            if opened < n - 1:
                yield n - 1, token, len(stack) + 1
        else:
            stack.append((n, token - synthetic.OPENING))


def read_scopes(tokens: list[int]) -> Read:
    scopes, newest, n = [{}], {}, 0
    while n < len(tokens) - 1:
        token, after = tokens[n : n + 2]
        if token == synthetic.OPEN:
            scopes.append({})
        elif token == synthetic.CLOSE:
            scopes.pop()
        elif token == synthetic.ASK:
            value = next(scope[after] for scope in reversed(scopes) if after in scope)
            yield n + 1, value, 2 * (len(scopes) - 1) + (value != newest[after])
            n += 1
        else:
            scopes[-1][token] = newest[token] = after
            n += 1
        n += 1


def read_counting(modulus: int) -> Callable[[list[int]], Read]:
    def read(tokens: list[int]) -> Read:
        ones = 0
        for n, token in enumerate(tokens):
            ones += token == synthetic.BIT + 1
            yield n, synthetic.COUNT + ones % modulus, n

    return read


READERS = {
    "recall": (synthetic.recall, Setting(64, 16), read_recall),
    "dyck": (synthetic.dyck, Setting(63, 5), read_dyck),
    "scopes": (synthetic.scopes, Setting(101, 4), read_scopes),
    "parity": (synthetic.counting, Setting(40, 2), read_counting(2)),
    "modulo 5": (synthetic.counting, Setting(40, 5), read_counting(5)),
}


@pytest.mark.parametrize(("draw", "setting", "read"), READERS.values(), ids=READERS)
def test_targets_are_what_a_plain_reader_answers_and_nothing_else(draw, setting, read):
    made = draw((0, 1, 2), 50, setting, SMALLEST)
    for tokens, targets, group in zip(made.batch.tokens.tolist(), made.batch.targets.tolist(), made.group.tolist(), strict=True):
        found = {n: (target, group[n]) for n, target in enumerate(targets) if target != IGNORE}
        expected = {n: (answer, kind) for n, answer, kind in read(tokens)}
        if draw is synthetic.dyck:
            found.pop(len(tokens) - 1, None)  # a bracket that comes after the sequence
        assert found == expected and expected
    assert made.batch.tokens.shape == (50, setting.length) and made.batch.tokens.min() >= 0 and made.batch.tokens.max() < SMALLEST


@pytest.mark.parametrize(("draw", "setting", "read"), READERS.values(), ids=READERS)
def test_a_batch_is_a_function_of_seed_and_step(draw, setting, read):
    def at(seed: int, step: int) -> Tensor:
        synthetic.block_of_batches.cache_clear()  # and not of what was asked for before
        return synthetic.at_step(Task("", draw, SMALLEST, (setting,), ()), seed, step, 3 * setting.length).batch.tokens

    first = at(0, 0)
    assert torch.equal(first, at(0, 0)) and first.shape == (3, setting.length)
    others = [at(0, 1), at(0, synthetic.AT_ONCE), at(1, 0), draw((0, TEST), 3, setting, SMALLEST).batch.tokens]
    assert not any(torch.equal(first, other) for other in others)


def test_settings_are_learnt_in_turn_the_first_half_of_the_time_and_no_sequence_comes_twice():
    a, b, c = (Setting(16, 1), Setting(32, 2), Setting(64, 4))
    assert recall.easy_first((a, b, c)) == (a, b, a, c) and recall.easy_first((a,)) == (a,)
    task = Task("recall", synthetic.recall, SMALLEST, recall.easy_first((a, b, c)), ())
    batches = [synthetic.at_step(task, 0, step, 64).batch.tokens for step in range(8)]
    assert [batch.shape for batch in batches] == [(4, 16), (2, 32), (4, 16), (1, 64)] * 2
    assert len({tuple(row) for batch in batches for row in batch.tolist()}) == 22


def test_depths_are_met_up_to_the_deepest_and_half_of_the_questions_are_for_shadowed_names():
    made = synthetic.dyck((0,), 300, Setting(128, 6), SMALLEST)
    depths = torch.bincount(made.group[made.batch.targets != IGNORE]).double()
    assert len(depths) == 7 and (depths[1:] / depths.sum() > 0.05).all()
    made = synthetic.scopes((0,), 300, Setting(256, 6), SMALLEST)
    groups = torch.bincount(made.group[made.batch.targets != IGNORE]).double().view(7, 2)
    assert (groups.sum(1) / groups.sum() > 0.04).all() and 0.4 < groups[:, 1].sum() / groups.sum() < 0.6


def test_gaps_of_recall_follow_a_power_law():
    made = synthetic.recall((0,), 20000, Setting(16, 2), 64).batch
    first = (made.tokens[:, 4:] == made.tokens[:, :1]).int().argmax(1) // 2  # the gap of the first key
    law = np.arange(1, 7) ** (synthetic.POWER - 1)
    assert torch.bincount(first, minlength=6).numpy() / 20000 == pytest.approx(law / law.sum(), abs=0.015)


def test_choices_without_repetition_are_equally_likely():
    made = synthetic.distinct(np.random.default_rng(0), 30000, 3, 5, 9)  # 4 values, 24 ordered choices
    assert all(len(set(row)) == 3 for row in made.tolist())
    _, counts = np.unique(made, axis=0, return_counts=True)
    assert len(counts) == 24 and counts / 30000 == pytest.approx(np.full(24, 1 / 24), abs=0.005)


# -- who answers ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("draw", "setting", "read"), READERS.values(), ids=READERS)
def test_a_reader_is_always_right_and_an_untrained_model_never_beyond_chance(draw, setting, read):
    made = draw((0, TEST), 20, setting, SMALLEST)

    def oracle(tokens: Tensor, where: Tensor) -> Tensor:
        logits = torch.zeros(*tokens.shape, SMALLEST)
        for row, sequence in enumerate(tokens.tolist()):
            for n, answer, _ in read(sequence):
                logits[row, n, answer] = 1.0
        return logits[where]

    if draw is synthetic.dyck:
        made.batch.targets[:, -1] = IGNORE  # a bracket that comes after the sequence
    right, nats, groups = answers(oracle, made, 256)
    assert right.all() and len(right) == (made.batch.targets != IGNORE).sum()
    assert nats.numpy() == pytest.approx(-1 + np.log(SMALLEST - 1 + np.e), rel=1e-5)
    assert groups.tolist() == made.group[made.batch.targets != IGNORE].tolist()

    config = config_of(tasks(TINY)[0], "phase8", 32, 1e-2, 0, TINY)
    at = residence.make(config, CPU)
    right, _, _ = answers(logits_of(weights(at, init_state(at)), config, CPU), made, 256)
    chance = recall.CHANCE.get(next(name for name, own in READERS.items() if own[2] is read), 1 / setting.size)
    assert right.float().mean() < chance + 4 * (chance / len(right)) ** 0.5


def test_scores_count_by_group():
    assert scores(torch.tensor([True, False, True, True]), torch.tensor([0, 0, 3, 0])) == {0: Score(2, 3), 3: Score(1, 1)}


def test_one_layer_learns_the_parity_of_three_bits(monkeypatch):
    monkeypatch.setattr(recall, "LAYERS", 1)
    task = Task("parity", synthetic.counting, SMALLEST, (Setting(3, 2),), (Setting(3, 2),))
    config = config_of(task, "phase8", 32, 1e-2, 0, replace(TINY, other_steps=150, tokens=64))
    outcome = answering.measure(Job(task, "phase8", config, 200), CPU)
    assert all(score.right > 0.9 * score.total for score in outcome.tests[Setting(3, 2)].values())


def test_the_state_is_what_decoding_keeps(cfg):
    tokens = torch.zeros(1, 128, dtype=torch.int64)  # buffers grow by doubling: now they are full
    _, cache = model.extend(model.init(cfg, 0), tokens, model.init_cache(cfg, 1), cfg)
    assert state_bytes(cfg, 128, torch.float32) == sum(x.nbytes for layer in cache.layers for x in layer.values())


# -- the suite -----------------------------------------------------------------------------------------------------------------------------


def test_every_task_is_measured_and_results_grow():
    kinds = ["phase8", "hybrid"]
    recall.check(kinds, TINY)
    found = list(recall.run(kinds, [CPU], TINY))
    assert len(found) == 10
    tables = {table.name: table.rows for table in found[-1].tables}
    assert [row["model"] for row in tables["recall"]] == ["phase8", "hybrid", "chance"]
    assert tables["recall"][-1] == {"model": "chance", "2 in 16": 1 / 2, "4 in 32": 1 / 4}
    assert {row["model"] for row in tables["scopes by depth"]} == {"phase8", "hybrid", "newest value", "chance"}
    assert [row["task"] for row in tables["parity and counting"]] == ["parity"] * 3 + ["modulo 5"] * 3
    assert "position 33-64" in tables["parity and counting"][0] and "depth 15-16" in tables["dyck by depth"][0]
    for figure in found[-1].figures:
        for row in tables[figure.table]:
            assert {figure.x, figure.y, figure.over, *figure.series} <= row.keys()


def outcome_of(nats: float, right: int) -> Outcome:
    return Outcome(nats, {Setting(16, 2): {0: Score(right, 10)}, Setting(32, 4): {0: Score(0, 10)}})


def test_the_first_seed_chooses_the_rate_and_others_repeat_it(monkeypatch):
    told = {(1e-3, 0): (2.0, 10), (1e-2, 0): (0.5, 6), (1e-2, 1): (9.0, 8), (1e-1, 0): (float("nan"), 10)}
    monkeypatch.setattr(recall, "measure", lambda job, device: outcome_of(*told[job.config.optim.lr, job.config.train.seed]))
    sizes = replace(TINY, tasks=("recall",), rates=(1e-3, 1e-2, 1e-1), seeds=(0, 1))
    rows, points = (table.rows for table in list(recall.run(["phase8"], [CPU], sizes))[-1].tables[:2])
    assert rows[0]["rate"] == 1e-2 and rows[0]["2 in 16"] == "0.700 ± 0.100" and rows[0]["4 in 32"] == "0.000 ± 0.000"
    assert [(point["pairs"], point["seed"], point["accuracy"]) for point in points] == [(2, 0, 0.6), (2, 1, 0.8), (4, 0, 0.0), (4, 1, 0.0)]


def test_a_kind_that_fails_is_a_row_that_says_why(monkeypatch):
    learnt = answering.learnt

    def failing(job: Job, device: torch.device):
        if job.label == "phase7":
            raise RuntimeError("no phase7 here")
        return learnt(job, device)

    monkeypatch.setattr(answering, "learnt", failing)
    (*_, last) = recall.run(["phase7", "phase8"], [CPU], replace(TINY, tasks=("recall", "parity")))
    assert last.tables[0].rows[0] == {"model": "phase7", "width": 32, "failed": "RuntimeError: no phase7 here"}
    assert [row["model"] for row in last.tables[0].rows] == ["phase7", "phase8", "chance"]
    counts = next(table.rows for table in last.tables if table.name == "parity and counting")
    assert counts[0] == {"model": "phase7", "task": "parity", "width": 32, "failed": "RuntimeError: no phase7 here"}
    assert last.notes[-1] == "parity, phase7, width 32, rate 0.01: RuntimeError: no phase7 here"


def test_columns_take_depths_and_positions_together():
    scopes, dyck, parity, _ = tasks(TINY)[1:]
    assert recall.bins_of(scopes)[:2] == [(0, 2), (3, 4)] and recall.bins_of(dyck)[0] == (1, 2)
    assert recall.bins_of(parity) == [(1, 8), (9, 16), (17, 32), (33, 64)]
    job = recall.grid_of(["phase8"], replace(TINY, tasks=("scopes",)))[0]
    test = {0: Score(4, 4), 1: Score(1, 2), 4: Score(2, 4), 5: Score(0, 2), 7: Score(3, 4)}  # depth 0, also shadowed, 2, also shadowed, 3
    rows, points = recall.line_rows([(job, Outcome(1.0, dict.fromkeys(scopes.tested, test)))], scopes)
    told = {(row["model"], row["answers"]): (row["depth 0-2"], row["depth 3-4"]) for row in rows}
    assert told["phase8", "all"] == (7 / 12, 3 / 4) and told["phase8", "shadowed"] == (1 / 4, 3 / 4)
    assert told["newest value", "all"] == (8 / 12, 0) and told["newest value", "shadowed"] == (0, 0)
    assert [(p["depth"], p["accuracy"]) for p in points if p["answers"] == "all"] == [(0, 5 / 6), (2, 2 / 6), (3, 3 / 4)]


@pytest.mark.parametrize(
    ("labels", "change", "message"),
    [
        (["nanogpt"], {}, "nanogpt is none of"),
        (["phase8"], {"tasks": ("recall", "chess")}, "no task is called chess; choose from recall, scopes"),
        (["phase8"], {"pairs": ((16, 5),)}, "5 pairs: needs an even length of at least 20, and not 16"),
        (["phase8"], {"pairs": ((1024, 200),)}, "200 pairs: needs a vocabulary above 401"),
        (["phase8"], {"widths": (30,)}, "--model.d-model 30"),
        (["phase8"], {"rates": (1e-3, 1e-3)}, "must be different rates"),
    ],
)
def test_what_cannot_be_measured_is_found_before_anything_is(labels, change, message):
    with pytest.raises((ConfigError, cli.UsageError), match=message):
        recall.check(labels, replace(TINY, **change))
