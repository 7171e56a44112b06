"""The memory plan against real tensors."""

from dataclasses import replace

import pytest
import torch
from conftest import CASES

from configs import PRESETS
from hyperlm import memory, model, residence, tree
from hyperlm.batch import next_tokens
from hyperlm.config import Config, DataConfig, OptimConfig, TrainConfig, resolve
from hyperlm.env import CONTEXT, GIB
from hyperlm.optim import new_schedule
from hyperlm.residence import PlanError
from hyperlm.residence.host import buffers, search
from hyperlm.residence.host.policy import fixed
from hyperlm.residence.host.search import Run
from hyperlm.residence.host.store import HostStore
from hyperlm.step import init_state, make_step

N, B = 48, 3


def config(cfg, **train) -> Config:
    return Config(model=cfg, train=TrainConfig(batch_size=B, **train), data=DataConfig(seq_len=N))


def test_planned_activations_are_those_that_autograd_saves(cfg):
    params = tree.map(lambda p: p.requires_grad_(), model.init(cfg, 0))
    own = {p.untyped_storage().data_ptr() for p in tree.leaves(params)}
    sizes, alive = {}, []

    def pack(x):
        if x.untyped_storage().data_ptr() not in own:
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            alive.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        alive.append(model.hidden(params, torch.zeros(B, N, dtype=torch.int64), cfg))
    planned = sum(memory.saved_bytes(config(cfg), layer, torch.float32) for layer in range(cfg.n_layers))
    assert planned == pytest.approx(sum(sizes.values()), rel=0.1)


def test_planned_weights_and_moments_are_those_of_the_state():
    settings = config(CASES["hybrid-ssm"])
    state = init_state(residence.make(settings, torch.device("cpu")))
    device, host = residence.plans(settings, torch.float32)
    assert device.weights == sum(p.nbytes for p in tree.leaves(state.params))
    assert device.optimizer == sum(p.nbytes for p in tree.leaves(state.opt_state))
    assert host.device < device.device and host.host > 0


def test_recomputation_is_planned_as_less():
    cfg = replace(CASES["phase7"], n_layers=6)
    kept, recomputed = (residence.plans(config(cfg, recompute=flag), torch.float32)[0] for flag in (False, True))
    assert recomputed.activations < kept.activations / 2


def run_of(settings: Config, dtype: torch.dtype = torch.float32) -> Run:
    policy = fixed(settings, dtype)
    return Run(settings, dtype, policy, buffers.chunk_bytes(settings, policy, dtype))


def test_gradients_stay_in_spare_memory_and_where_residuals_had_been():
    run = run_of(config(CASES["phase7"], residence="host"))
    params, _ = memory.stored(run.config)
    embed, block = (run.of_gradients(part) for part in (params["embed"], params["blocks"][0]))
    residuals = run.of_residuals(run.policy, run.config.train.grad_accum)

    def count(spare: int, resident: int = 0) -> int:
        policy = replace(run.policy, resident_blocks=resident, head_aliases_slots=True)
        return search.with_resident_gradients(run, policy, spare).resident_gradients

    assert (count(0), count(embed), count(embed + block - 1), count(embed + block)) == (0, 1, 1, 2)
    assert residuals >= block and count(embed, resident=1) == 2  # the first block's gradient comes when its residuals have been read
    assert count(1 << 40) == run.config.model.n_layers + 1


def test_more_gradients_stay_in_the_place_of_the_head():
    for vocabulary, expected in ((64, 0), (64 * 64, 2)):
        run = run_of(config(replace(CASES["phase7"], vocab_size=vocabulary), residence="host"))
        spare = run.of_gradients(memory.stored(run.config)[0]["embed"])
        for aliases, more in ((False, expected), (True, 0)):
            policy = search.with_resident_gradients(run, replace(run.policy, head_aliases_slots=aliases), spare)
            assert (policy.resident_gradients, policy.in_head) == (1 + more, more)


@pytest.mark.parametrize("clip_scope", ["global", "layer"])
@pytest.mark.parametrize("state", ["fp32", "int8"])
def test_what_is_allocated_is_what_is_declared_and_that_is_what_is_planned(cfg, state, clip_scope):
    """On a CPU too: every buffer of a run's first step, by its name, against the plan that was printed."""
    settings = replace(config(cfg, residence="host"), optim=OptimConfig(lr=1e-3, state=state, clip_scope=clip_scope))
    chosen = residence.make(settings, torch.device("cpu"))
    planned, policy = chosen.plan, chosen.plan.policy
    store = HostStore(settings, new_schedule(settings.optim, 10), torch.device("cpu"), planned)
    store.allocate(init_state(chosen))
    slots = store.transfer.slots
    sizes = buffers.declared(settings, policy, torch.float32, buffers.chunk_bytes(settings, policy, torch.float32))
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in (*slots.memory, slots.of_head)}
    assert sum(storages.values()) == sizes["slots"] + sizes["head"] == planned.weights
    assert sum(x.nbytes for x in store.updates.ring.buffers) == sizes["chunks"] == planned.optimizer
    assert (store.shelf.memory.nbytes, sum(x.nbytes for x in store.residuals.ring.buffers)) == (sizes["shelf"], sizes["loads"])
    assert planned.activations > sizes["shelf"] + sizes["loads"]


def test_a_batch_that_was_not_planned_for_is_refused():
    settings = replace(config(CASES["phase8"], residence="host"), optim=OptimConfig(lr=1e-3))
    chosen = residence.make(settings, torch.device("cpu"))
    state, step = init_state(chosen), make_step(chosen, new_schedule(settings.optim, 10))
    with pytest.raises(PlanError, match=f"1 x {B} x {N + 1} tokens, where memory was planned for 4 x {B} x {N}"):
        step(state, next_tokens(torch.zeros(1, B, N + 2, dtype=torch.int64)))
    step(state, next_tokens(torch.zeros(1, B, N + 1, dtype=torch.int64)))  # nothing was lost


@pytest.mark.parametrize("budget", [3, 5.81, 24])
def test_3_billion_parameters_fit_a_small_card_with_room_to_spare(budget):
    settings = PRESETS["max"]()
    settings = resolve(replace(settings, optim=replace(settings.optim, state="int8")))
    allowed = round(budget * GIB) - CONTEXT
    planned = search.plan(settings, torch.bfloat16, allowed)
    assert planned.device + search.MARGIN[0] <= allowed and planned.host < 24 * GIB
    assert planned.group >= 4 and (planned.policy.resident_blocks == 32 or budget < 24)
