"""The training step: accumulation, labels, skipping, and that it learns what there is to learn and nothing more."""

import gc
import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import lru_cache
from typing import Any

import pytest
import torch
from conftest import CASES, TINY, generator, normal

from hyperlm import model, residence, tree
from hyperlm.batch import Batch, next_tokens
from hyperlm.config import Config, ModelConfig, OptimConfig, TrainConfig
from hyperlm.cuda_graph import cuda_graphed
from hyperlm.kernels.reference.optimizer import QUANT_BLOCK, UpdatePart, squared
from hyperlm.loss import IGNORE
from hyperlm.optim import new_schedule
from hyperlm.residence import Residence, host
from hyperlm.residence.host import buffers
from hyperlm.residence.host.policy import WIDE
from hyperlm.residence.host.search import WORKSPACE
from hyperlm.state import StaleState, State
from hyperlm.step import init_state, make_flush, make_step, weights
from hyperlm.tree import Tree

CPU = torch.device("cpu")


def config(cfg: ModelConfig = TINY, **optim) -> Config:
    return Config(model=cfg, train=TrainConfig(seed=3), optim=OptimConfig(**{"lr": 1e-3, "warmup_steps": 1, **optim}))


def tokens_of(*shape: int, seed: int = 0, vocabulary: int = 64) -> torch.Tensor:
    return torch.randint(vocabulary, shape, generator=generator(seed))


def batch_of(*shape: int, seed: int = 0, vocabulary: int = 64) -> Batch:
    """Of windows of this shape, (A, B, N+1)."""
    return next_tokens(tokens_of(*shape, seed=seed, vocabulary=vocabulary))


def residing_in(cfg: Config, device: torch.device = CPU, **policy) -> Residence:
    """The residence of a run, with some of what the host residence would decide decided here."""
    chosen = residence.make(cfg, device)
    return host.make(cfg, device, replace(chosen.plan, policy=replace(chosen.plan.policy, **policy))) if policy else chosen


def run_of(cfg: Config, device: torch.device = CPU, **policy):
    """The state of a run before its first step, its step, and what makes a pending update."""
    chosen, schedule = residing_in(cfg, device, **policy), new_schedule(cfg.optim, 100)
    return init_state(chosen), make_step(chosen, schedule), make_flush(chosen, schedule)


def after(cfg: Config, batches: Iterable[Batch], **policy):
    state, step, flush = run_of(cfg, **policy)
    metrics = None
    for batch in batches:
        state, metrics = step(state, batch)
    return flush(state), metrics


def test_loss_is_that_of_the_next_token(cfg):
    windows = tokens_of(2, 3, 21)
    params = model.init(cfg, 3)
    logits = model.apply(params, windows.flatten(0, 1)[:, :-1], cfg)
    expected = -logits.log_softmax(-1).gather(-1, windows.flatten(0, 1)[:, 1:, None]).mean()
    _, metrics = after(config(cfg), [next_tokens(windows)])
    assert metrics["loss"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert metrics["tokens"] == metrics["positions"] == 2 * 3 * 20


def test_micro_batches_equal_one_large_batch(cfg):
    whole = tokens_of(1, 8, 17)
    split, first = after(config(cfg), [next_tokens(whole.view(4, 2, 17))])
    together, second = after(config(cfg), [next_tokens(whole)])
    assert first["loss"].item() == pytest.approx(second["loss"].item(), rel=1e-6)
    assert first["grad_norm"].item() == pytest.approx(second["grad_norm"].item(), rel=1e-5)
    # compare first moments: a tenth of the clipped gradient, where parameters would hide it behind Adam's normalisation
    for path, m in tree.by_path(split.opt_state["m"]).items():
        torch.testing.assert_close(m, tree.by_path(together.opt_state["m"])[path], rtol=1e-3, atol=1e-7)


RESIDENCES = (
    ("device", "fp32", "global"),
    ("device", "int8", "layer"),
    ("host", "fp32", "global"),
    ("host", "fp32", "layer"),
    ("host", "int8", "global"),
)


@pytest.fixture(params=RESIDENCES, ids="-".join)
def residing(request) -> Callable[[ModelConfig], Config]:
    """Settings of a model in each residence, kind of state and scope of clipping, without decay: what has no gradient does not move."""
    name, state, scope = request.param

    def of(cfg: ModelConfig) -> Config:
        settings = config(cfg, clip=1e3, weight_decay=0.0, state=state, clip_scope=scope)
        return replace(settings, train=replace(settings.train, residence=name))

    return of


def masked(batch: Batch, *unlearnt: tuple) -> Batch:
    """The same, without the targets at these places."""
    targets = batch.targets.clone()
    for place in unlearnt:
        targets[place] = IGNORE
    return replace(batch, targets=targets)


PARTLY = (1, slice(None), slice(4, None)), (0, 0, slice(3)), (0, 1, 11)  # places of 2 x 2 x 16: micro-batches have 28 and 8 left


@pytest.mark.parametrize("case", ["phase8", "hybrid-ssm"])
def test_the_gradient_is_that_of_learnt_tokens_alone_each_weighing_the_same(case, residing):
    """Against the loss of one sequence after the other in float64, summed over the learnt tokens and divided by their number once."""
    cfg = CASES[case]
    batch = masked(batch_of(2, 2, 17), *PARTLY)
    params = tree.map(lambda p: p.double().requires_grad_(), model.init(cfg, 3))
    nats, count = torch.zeros((), dtype=torch.float64), 0
    for tokens, targets in zip(batch.tokens.flatten(0, 1), batch.targets.flatten(0, 1), strict=True):
        log_p = model.apply(params, tokens[None], cfg)[0].log_softmax(-1)
        for place in range(16):
            if targets[place] != IGNORE:
                nats, count = nats - log_p[place, targets[place]], count + 1
    truth = torch.autograd.grad(nats / count, tree.leaves(params))

    settings = residing(cfg)
    state, metrics = after(settings, [batch])
    assert (metrics["tokens"], metrics["positions"]) == (count, 64) == (36, 64)
    assert metrics["loss"].item() == pytest.approx((nats / count).item(), rel=1e-5 if settings.optim.state == "fp32" else 1e-3)
    if settings.optim.state == "fp32":
        assert metrics["grad_norm"].item() == pytest.approx(torch.cat([g.flatten() for g in truth]).norm().item(), rel=1e-4)
        for m, g in zip(tree.leaves(state.opt_state["m"]), truth, strict=True):  # a tenth of the gradient, after one step
            torch.testing.assert_close(m.double(), 0.1 * g, rtol=1e-3, atol=1e-8)


def test_what_is_not_learnt_changes_nothing_to_the_bit_and_what_is_learnt_does(residing):
    """Targets of which a mask leaves as much as it does; and tokens that nothing learnt is predicted from."""
    batch, settings = batch_of(2, 2, 17), residing(CASES["hybrid-ssm"])
    tail = (1, slice(None), slice(4, None))
    other = Batch(batch.tokens.clone(), batch.targets.clone())
    for place in PARTLY:
        other.targets[place] = 63 - other.targets[place]
    other.tokens[tail] = 63 - other.tokens[tail]
    (a, first), (b, second) = (after(settings, [masked(x, *PARTLY)] * 2) for x in (batch, other))
    assert torch.equal(first["loss"], second["loss"]) and torch.equal(first["grad_norm"], second["grad_norm"])
    assert same((a.params, a.opt_state), (b.params, b.opt_state))
    c, _ = after(settings, [masked(other, *PARTLY[1:])] * 2)
    assert not same(a.params, c.params)


def test_a_micro_batch_without_a_learnt_token_adds_nothing(residing):
    batch, settings = batch_of(3, 2, 17), residing(CASES["phase8"])
    (_, found), (_, expected) = (after(settings, [x]) for x in (masked(batch, (1,)), batch.map(lambda x: x[[0, 2]])))
    assert found["tokens"] == expected["tokens"] == 64 and not found["skipped"]
    for name in ("loss", "grad_norm"):
        assert found[name].item() == pytest.approx(expected[name].item(), rel=1e-6)


def test_a_step_without_a_learnt_token_is_finite_and_learns_nothing(residing):
    settings = residing(CASES["phase8"])
    state, metrics = after(settings, [masked(batch_of(2, 2, 17), (slice(None),))])
    assert (metrics["tokens"], metrics["loss"].item(), metrics["grad_norm"].item(), metrics["skipped"]) == (0, 0.0, 0.0, False)
    assert same(state.params, init_state(residing_in(settings)).params)


@pytest.mark.parametrize("name", ["device", "host"])
def test_a_non_finite_step_changes_no_parameter_and_is_counted(name):
    cfg = config()
    cfg = replace(cfg, train=replace(cfg.train, residence=name))
    state, step, flush = run_of(cfg)
    state, _ = step(state, batch_of(1, 2, 9))
    state = flush(state)
    kept = tree.map(torch.clone, state.params), tree.map(torch.clone, state.opt_state)
    state.params["head"]["norm.weight"][0] = math.inf
    state, metrics = step(state, batch_of(1, 2, 9, seed=1))
    state = flush(state)
    assert metrics["skipped"] and (state.step, state.updates) == (2, 1)
    state.params["head"]["norm.weight"][0] = kept[0]["head"]["norm.weight"][0]
    for before, now in zip(kept, (state.params, state.opt_state), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(tree.leaves(before), tree.leaves(now), strict=True))
    state, metrics = step(state, batch_of(1, 2, 9, seed=2))
    assert not metrics["skipped"] and (state.step, state.updates) == (3, 2)


def test_on_random_tokens_the_loss_stays_at_chance(cfg):
    """Fresh random tokens every step hold nothing to learn; a loss below ln V would mean that the model sees its targets."""
    cfg = config(cfg, lr=3e-3)
    (state, step, _), losses = run_of(cfg), []
    for i in range(60):
        state, metrics = step(state, batch_of(1, 8, 49, seed=i))
        losses.append(metrics["loss"].item())
    late = sum(losses[-20:]) / 20
    assert late == pytest.approx(math.log(64), abs=0.06) and late > math.log(64) - 0.01


def test_what_can_be_learned_is_learned(cfg):
    """Each token is three more than the last: what comes first is the same for all, and what follows costs nothing."""
    cfg = config(cfg, lr=5e-3)
    state, step, _ = run_of(cfg)
    for i in range(60):
        start = tokens_of(1, 8, 1, seed=i)
        state, metrics = step(state, next_tokens((start + 3 * torch.arange(25)) % 64))
    assert metrics["loss"].item() < 0.05 * math.log(64)  # 0.09 to 0.12


def test_steps_with_dropout_repeat_exactly():
    cfg = config(replace(CASES["hybrid-ssm"], dropout=0.2))
    batches = [batch_of(2, 2, 17, seed=i) for i in range(3)]
    a, b = after(cfg, batches)[0], after(cfg, batches)[0]
    assert all(torch.equal(x, y) for x, y in zip(tree.leaves(a.params), tree.leaves(b.params), strict=True))


def same(a: Tree, b: Tree) -> bool:
    return all(torch.equal(x, y) for x, y in zip(tree.leaves(a), tree.leaves(b), strict=True))


def in_host(cfg: Config) -> Config:
    return replace(cfg, train=replace(cfg.train, residence="host"))


def with_all(cfg: ModelConfig, resident: int, aliases: bool = False, in_head: int = 0) -> dict[str, Any]:
    """A policy of everything that the host residence can do."""
    blocks = min(resident, cfg.n_layers)
    return {"resident_blocks": blocks, "head_aliases_slots": aliases, "residuals": WIDE, "resident_gradients": 2, "in_head": in_head}


UNLEARNT = (slice(None), slice(None), 3), (0, 1, slice(5)), (2,)  # a place of each sequence, part of one, and a whole micro-batch


def partly_learnt(steps: int) -> Iterable[Batch]:
    """Batches of which more and more is not learnt, and everything again."""
    return (masked(batch_of(3, 2, 17, seed=i), *UNLEARNT[: i % 4]) for i in range(steps))


@lru_cache(maxsize=8)
def on_the_device(cfg: Config, steps: int):
    """The state and the metrics that policies of the host residence are compared with, one after the other: only to be read."""
    return after(cfg, partly_learnt(steps))


@pytest.mark.parametrize(
    ("case", "resident", "aliases"),
    [*((case, 1, False) for case in CASES), ("phase7", 0, True), ("hybrid-ssm", 0, False), ("hybrid-ssm", 99, True)],
)
@pytest.mark.parametrize("state", ["fp32", "int8"])
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_the_host_residence_gives_the_same_bits(case, scope, state, resident, aliases, monkeypatch):
    """Updates in pieces and left pending, inputs and products sent away and brought back, gradients that stay: nothing of it shows in a loss, a
    parameter or a moment; whichever targets are learnt."""
    # small, as in each stage there are to be more pieces than buffers for them
    monkeypatch.setattr(buffers, "CHUNK", 1 << (14 if state == "fp32" else 13 if scope == "global" else 12))
    cfg = config(
        replace(CASES[case], dropout=0.1, vocab_size=2048), clip=0.5, clip_scope=scope, state=state
    )  # a head that takes a block's gradient
    steps = 20 if case == "hybrid-ssm" and resident == 1 and state == "fp32" else 4
    policy = with_all(cfg.model, resident, aliases, in_head=int(not aliases))
    in_pieces = buffers.chunks_of(cfg, residing_in(in_host(cfg), **policy).plan.policy, torch.float32)
    assert all(len(pieces) > buffers.CHUNKS for pieces in in_pieces)
    (a, last), (b, last_again) = on_the_device(cfg, steps), after(in_host(cfg), partly_learnt(steps), **policy)
    assert all(torch.equal(last[name], last_again[name]) for name in ("loss", "grad_norm"))
    assert same((a.params, a.opt_state), (b.params, b.opt_state))


def test_several_micro_batches_at_a_time_give_the_same_gradient(cfg):
    batch = masked(batch_of(4, 2, 17), (1,), (2, 0))
    (a, first), (b, second) = after(config(cfg), [batch]), after(in_host(config(cfg)), [batch], group=2)
    assert first["loss"].item() == pytest.approx(second["loss"].item(), rel=1e-6)
    for x, y in zip(tree.leaves(a.opt_state["m"]), tree.leaves(b.opt_state["m"]), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-7)


CODED = {"quantised": True, "update": "speculative"}  # as on a GPU


def test_gradients_that_go_home_in_8_bits_are_clipped_by_their_exact_norm_and_learn_alike():
    settings, batches = config(CASES["hybrid-ssm"], state="int8", clip=0.5), [batch_of(2, 2, 17, seed=i % 2) for i in range(20)]
    (a, first), (_, exact) = after(settings, batches), after(in_host(settings), batches[:1])
    (b, last), (_, coded) = after(in_host(settings), batches, **CODED), after(in_host(settings), batches[:1], **CODED)
    assert torch.equal(exact["grad_norm"], coded["grad_norm"])
    assert last["loss"].item() == pytest.approx(first["loss"].item(), rel=2e-2) and not same(a.params, b.params)
    again, _ = after(in_host(settings), batches, **CODED)
    assert same((b.params, b.opt_state), (again.params, again.opt_state))


def coded(ahead: bool) -> dict[str, Any]:
    """Gradients go home in 8 bits; ahead: and weights move before the norm is known."""
    return {"quantised": True, "update": "speculative" if ahead else "deferred"}


@pytest.fixture
def small_chunks(monkeypatch) -> None:
    monkeypatch.setattr(buffers, "CHUNK", 1 << 12)


def test_weights_that_move_ahead_end_where_they_would_have_if_nothing_is_clipped(cfg, small_chunks):
    """And beside them products that are remembered, which otherwise are not; and gradients that stay, which otherwise do."""
    settings, batches, ends = in_host(config(cfg, state="int8", clip=1e3)), [batch_of(2, 2, 17, seed=i) for i in range(5)], []
    for ahead in (False, True):
        state, metrics = after(settings, batches, **with_all(cfg, 1), **coded(ahead))
        ends.append((state.params, state.opt_state, metrics["loss"]))
    assert same(*ends)


def first_moments(state: State) -> list[torch.Tensor]:
    def first(x: torch.Tensor) -> torch.Tensor:
        return (
            squared(x[:, :QUANT_BLOCK], x.view(torch.float32)[:, QUANT_BLOCK // 2 : QUANT_BLOCK // 2 + 1])
            if x.dtype == torch.uint8
            else x[0]
        )

    return [first(x) for x in tree.leaves(state.opt_state["moments"])]


def test_weights_that_moved_too_far_are_corrected(small_chunks):
    """Clipped hard: uncorrected, first moments would be several times as large. What remains are roundings of bf16."""
    settings, batches, ends = (
        in_host(config(CASES["hybrid-ssm"], state="int8", clip=0.2)),
        [batch_of(2, 2, 17, seed=i % 2) for i in range(20)],
        [],
    )
    for ahead in (False, True):
        state, step, flush = run_of(settings, **coded(ahead))
        losses = []
        for i, batch in enumerate(batches):
            state, metrics = step(replace(state, clipped=False), batch)  # as after a step that was not: so weights move ahead
            assert state.clipped and state.pending.part == (UpdatePart.CORRECT if ahead else UpdatePart.FULL)
            state = flush(state) if i % 5 == 4 else state
            losses.append(metrics["loss"].item())
        ends.append((losses, flush(state)))
    (exact, a), (found, b) = ends
    assert found == pytest.approx(exact, rel=1e-2)
    for part, most in ((lambda state: tree.leaves(state.params), 0.005), (first_moments, 0.1)):  # over five seeds 0.002, and 0.041 to 0.050
        x, y = (torch.cat([leaf.flatten().float() for leaf in part(state)]) for state in (a, b))
        assert float((x - y).norm() / x.norm()) < most


def test_weights_that_moved_by_a_step_without_a_finite_norm_move_back(small_chunks):
    """The embedding's gradient alone has no finite norm, and it is found last: by then all other weights have moved."""
    state, step, flush = run_of(in_host(config(state="int8", clip=0.2)), **coded(True))
    state, _ = step(state, batch_of(1, 2, 9))
    state = flush(state)
    embed = state.params["embed"]
    embed["low"] *= 2.0**83  # the same function, but for the gradients
    embed["high"] *= 2.0**-83
    kept = tree.map(torch.clone, state.params), tree.map(torch.clone, state.opt_state)
    state, metrics = step(replace(state, clipped=False), batch_of(1, 2, 9, seed=1))
    assert metrics["skipped"] and (state.step, state.updates) == (2, 1)
    assert state.pending.part == UpdatePart.ROLLBACK and state.pending.moved == (False, True, True, True)
    assert not same(kept[0]["blocks"], state.params["blocks"])
    state = flush(state)
    assert same((kept[0]["embed"], kept[1]), (embed, state.opt_state))
    for x, y in zip(tree.leaves(kept[0]), tree.leaves(state.params), strict=True):
        # a weight near zero was rounded where an update, of the size of lr 1e-3, had taken it
        torch.testing.assert_close(x.float(), y.float(), rtol=2**-6, atol=2**-7 * 1e-3)
    embed["low"] *= 2.0**-83
    embed["high"] *= 2.0**83
    state, metrics = step(state, batch_of(1, 2, 9, seed=2))
    assert not metrics["skipped"] and (state.step, state.updates) == (3, 2)


def test_a_pending_update_is_lost_neither_by_a_flush_nor_by_going_on():
    cfg, batches = in_host(config()), [batch_of(2, 2, 17, seed=i) for i in range(4)]
    state, step, flush = run_of(cfg)
    for batch in batches:
        state, _ = step(state, batch)
        assert state.pending is not None
        state = flush(state)
        assert state.pending is None
    assert same(state.params, after(cfg, batches)[0].params)


def test_an_update_that_another_step_left_pending_is_made_by_its_own_gradient():
    cfg, batches = in_host(config(lr=1e-2)), [batch_of(2, 2, 17, seed=i) for i in range(4)]
    state, first, flush = run_of(cfg)
    _, second, _ = run_of(cfg)
    for i, batch in enumerate(batches):
        state, _ = (first, second)[i % 2](state, batch)
    assert same(flush(state).params, after(cfg, batches)[0].params)


def test_before_a_state_is_read_its_residence_is_waited_for_even_if_nothing_is_pending():
    """Updated at once, a stage may still be on its way home when a step returns."""
    chosen, waited = residing_in(in_host(config(clip_scope="layer"))), []
    schedule = new_schedule(chosen.config.optim, 10)
    flush = make_flush(chosen._replace(flush=lambda schedule: lambda state: waited.append(state.step) or state), schedule)
    state, _ = make_step(chosen, schedule)(init_state(chosen), batch_of(1, 2, 9))
    assert state.pending is None and flush(state) is state and waited == [1]


def test_weights_that_visit_compute_what_weights_at_hand_do(cfg):
    chosen, tokens = residing_in(in_host(config(cfg))), tokens_of(2, 9)
    state = init_state(chosen)
    params = weights(chosen, state)
    for _ in range(2):
        assert torch.equal(model.apply(params, tokens, cfg), model.apply(state.params, tokens, cfg))


@pytest.mark.gpu
def test_weights_that_visit_are_not_overwritten_while_they_are_used(cfg):
    """Pass after pass without waiting for the device."""
    device = torch.device("cuda", 0)
    chosen, tokens = residing_in(in_host(config(cfg)), device), tokens_of(64, 257).to(device)
    params = weights(chosen, init_state(chosen))
    with torch.no_grad():
        found = [model.apply(params, tokens, cfg) for _ in range(8)]
    at_hand = {"embed": params["embed"], "blocks": [tree.map(torch.clone, block) for block in params["blocks"]], "head": params["head"]}
    assert all(torch.equal(x, model.apply(at_hand, tokens, cfg)) for x in found)


def losses_on(device: torch.device, settings: Config) -> list[float]:
    (state, step, _), out = run_of(settings, device), []
    for i in range(10):
        state, metrics = step(state, masked(batch_of(2, 4, 65, seed=i % 2), (1, slice(None), slice(20))))
        out.append(metrics["loss"].item())
    return out


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"recompute": True}, {"residence": "host"}, {"residence": "host", "device_memory": 0.95}])
@pytest.mark.parametrize(
    "optim", [{}, {"state": "int8"}, {"state": "int8", "clip": 0.0}, {"clip_scope": "layer"}, {"state": "int8", "clip_scope": "layer"}]
)
def test_a_gpu_step_in_bf16_follows_the_cpu_in_fp32(cfg, options, optim, monkeypatch):
    """Whatever else works at the same time: nothing is read before it is there, or overwritten while it is read."""
    monkeypatch.setattr(buffers, "CHUNK", 1 << 12)
    settings = config(cfg, **optim)
    on_gpu = losses_on(torch.device("cuda", 0), replace(settings, train=replace(settings.train, **options)))
    for found, truth in zip(on_gpu, losses_on(CPU, settings), strict=True):
        assert found == pytest.approx(truth, rel=1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("budget", [1.7, 2.0], ids=["some micro-batches at a time", "all"])
@pytest.mark.parametrize("optim", [{}, {"state": "int8"}, {"clip_scope": "layer"}, {"state": "int8", "clip_scope": "layer"}])
def test_a_step_allocates_what_is_planned(optim, budget):
    cfg = ModelConfig(d_model=1024, n_layers=4, vocab_size=16384)
    train = TrainConfig(residence="host", batch_size=2, grad_accum=8, device_memory=budget)
    settings, device = Config(model=cfg, train=train, optim=OptimConfig(lr=1e-3, **optim)), torch.device("cuda", 0)
    chosen = residence.make(settings, device)
    planned = chosen.plan
    assert (planned.group == 8) == (budget == 2)
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    state, step = init_state(chosen), make_step(chosen, new_schedule(settings.optim, 10))
    for i in range(4):
        state, _ = step(state, batch_of(8, 2, 513, seed=i, vocabulary=cfg.vocab_size))
        if i == 0:  # which takes all at once
            torch.cuda.reset_peak_memory_stats()
    needed = torch.cuda.max_memory_allocated() - before
    assert 0.9 * (planned.device - WORKSPACE) < needed < planned.device + (16 << 20)  # cuBLAS may have its memory from before


@pytest.mark.gpu
@pytest.mark.parametrize("optim", ({}, {"state": "int8"}, {"state": "int8", "clip_scope": "layer"}))
def test_steps_allocate_at_the_same_addresses(optim):
    cfg = Config(
        model=ModelConfig(d_model=1024, n_layers=4, vocab_size=16384),
        train=TrainConfig(residence="host", batch_size=2, grad_accum=8, device_memory=2),
        optim=OptimConfig(lr=1e-3, clip=1e-3, **optim),
    )
    device = torch.device("cuda", 0)
    gc.collect()
    torch.cuda.empty_cache()  # blocks that other tests left would be taken first, and not by the same tensors at every step
    state, step, _ = run_of(cfg, device)
    found = []
    for i in range(5):
        if i > 1:  # after a first step, which takes what stays, and one after that, which is the first clipped one
            torch.cuda.memory._record_memory_history(clear_history=True)
        state, _ = step(state, batch_of(8, 2, 513, seed=i, vocabulary=cfg.model.vocab_size))
        if i > 1:
            events = torch.cuda.memory._snapshot()["device_traces"][0]
            found.append([(event["addr"], event["size"]) for event in events if event["action"] == "alloc" and event["size"] > 1 << 20])
    torch.cuda.memory._record_memory_history(enabled=None)
    assert len(found[0]) > 100
    assert found[0] == found[1] == found[2]


@pytest.mark.gpu
def test_a_recorded_function_gives_what_it_gives_unrecorded():
    def fn(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x @ y, (x * 2).sum()

    recorded = cuda_graphed(fn)
    for seed, n in ((0, 16), (1, 16), (2, 32), (3, 16)):
        x, y = (normal(n, n, seed=seed + i).cuda() for i in range(2))
        assert all(torch.equal(a, b) for a, b in zip(recorded(x, y), fn(x, y), strict=True))


@pytest.mark.parametrize("name", ["device", "host"])
def test_a_state_that_was_consumed_cannot_be_used_again(name):
    """Its tensors are those of the next one by now: a second step from it would be another step, without a word."""
    cfg = config()
    chosen, schedule = residing_in(replace(cfg, train=replace(cfg.train, residence=name))), new_schedule(cfg.optim, 10)
    first, step, flush = init_state(chosen), make_step(chosen, schedule), make_flush(chosen, schedule)
    second, _ = step(first, batch_of(1, 2, 9))
    for reuse in (
        lambda: step(first, batch_of(1, 2, 9)),
        lambda: step(replace(first, step=7), batch_of(1, 2, 9)),
        lambda: weights(chosen, first),
    ):
        with pytest.raises(StaleState, match="was consumed"):
            reuse()
    if name == "host":
        with pytest.raises(StaleState, match="pending"):
            weights(chosen, second)
        third = flush(second)
        for reuse in (lambda: flush(second), lambda: step(second, batch_of(1, 2, 9))):
            with pytest.raises(StaleState, match="was consumed"):
                reuse()
        second = third
    weights(chosen, second)
    step(second, batch_of(1, 2, 9))
