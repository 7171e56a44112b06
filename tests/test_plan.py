"""The memory plan against real tensors."""

from dataclasses import replace

import pytest
import torch
from conftest import CASES

from configs import PRESETS
from hyperlm import model, plan, tree
from hyperlm.config import Config, DataConfig, TrainConfig, resolve
from hyperlm.env import CONTEXT, GIB
from hyperlm.step import init_state

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
    planned = sum(plan.saved_bytes(config(cfg), layer, torch.float32) for layer in range(cfg.n_layers))
    assert planned == pytest.approx(sum(sizes.values()), rel=0.1)


def test_planned_weights_and_moments_are_those_of_the_state():
    settings = config(CASES["hybrid-ssm"])
    state = init_state(settings, torch.device("cpu"))
    device, host = plan.plans(settings, torch.float32)
    assert device.weights == sum(p.nbytes for p in tree.leaves(state.params))
    assert device.optimizer == sum(p.nbytes for p in tree.leaves(state.opt_state))
    assert host.device < device.device and host.host > 0


def test_recomputation_is_planned_as_less():
    cfg = replace(CASES["phase7"], n_layers=6)
    kept, recomputed = (plan.plans(config(cfg, recompute=flag), torch.float32)[0] for flag in (False, True))
    assert recomputed.activations < kept.activations / 2


def test_gradients_stay_in_spare_memory_and_where_what_was_read_had_been():
    settings = config(CASES["phase7"], residence="host")
    declared = plan.on_meta(model.declaration(settings.model), torch.float32)
    embed, block = (plan.gradient_bytes(settings, torch.float32, part) for part in (declared["embed"], declared["blocks"][0]))

    def count(spare: int, kept: int = 0, read: int = 0) -> int:
        stages, in_head, taken = plan.staying(settings, torch.float32, spare, kept, read, head=False)
        assert in_head == 0 and taken <= spare
        return stages

    assert (count(0), count(embed), count(embed + block - 1), count(embed + block)) == (0, 1, 1, 2)
    assert count(embed, kept=1, read=block) == 2  # the first block's gradient comes when its input has been read
    assert count(1 << 40) == settings.model.n_layers + 1


def test_more_gradients_stay_in_the_place_of_the_head():
    for vocabulary, expected in ((64, 0), (64 * 64, 2)):
        settings = config(replace(CASES["phase7"], vocab_size=vocabulary), residence="host")
        embed = plan.gradient_bytes(settings, torch.float32, plan.on_meta(model.declaration(settings.model), torch.float32)["embed"])
        assert plan.staying(settings, torch.float32, embed, 0, 0, head=True) == (1 + expected, expected, embed)
        assert plan.staying(settings, torch.float32, embed, 0, 0, head=False) == (1, 0, embed)


@pytest.mark.parametrize("budget", [3, 5.81, 24])
def test_3_billion_parameters_fit_a_small_card_with_room_to_spare(budget):
    settings = PRESETS["max"]()
    settings = resolve(replace(settings, optim=replace(settings.optim, state="int8")))
    allowed = round(budget * GIB) - CONTEXT
    planned = plan.visits(settings, torch.bfloat16, allowed)
    assert planned.device + plan.MARGIN[0] <= allowed and planned.host < 24 * GIB
    assert planned.group >= 4 and (planned.kept == 32 or budget < 24)
