"""AdamW against torch's, the schedule and clipping by hand."""

import math

import pytest
import torch

from configs import OptimConfig
from conftest import normal
from hyperlm import optim, tree


def params() -> dict:
    return {"w": normal(5, 4, seed=1), "b": normal(4, seed=2)}


def test_adamw_equals_torch_with_decay_on_matrices_only():
    cfg = OptimConfig(lr=0.01, weight_decay=0.3)
    mine, theirs = params(), tree.map(lambda p: p.clone().requires_grad_(), params())
    oracle = torch.optim.AdamW(
        [{"params": [theirs["w"]], "weight_decay": 0.3}, {"params": [theirs["b"]], "weight_decay": 0.0}], lr=0.01, betas=(0.9, 0.95), eps=1e-8
    )
    ours = optim.adamw(cfg, lambda step: 0.01)
    state = ours.init(mine)
    for step in range(20):
        grads = {"w": normal(5, 4, seed=10 + step), "b": normal(4, seed=50 + step)}
        for name, p in theirs.items():
            p.grad = grads[name].clone()
        oracle.step()
        mine, state = ours.update(grads, state, mine, step, decay={"w": True, "b": False})
    for name in mine:
        torch.testing.assert_close(mine[name], theirs[name].detach(), rtol=1e-10, atol=1e-12)


def test_updating_leaf_by_leaf_equals_updating_at_once():
    rule, whole, parts = optim.adamw(OptimConfig(), lambda step: 0.01), params(), params()
    grads = {"w": normal(5, 4, seed=3), "b": normal(4, seed=4)}
    whole, _ = rule.update(tree.map(torch.clone, grads), rule.init(whole), whole, 0, decay={"w": True, "b": False})
    for name, decays in (("w", True), ("b", False)):
        part = {name: parts[name]}
        rule.update({name: grads[name]}, rule.init(part), part, 0, decay={name: decays})
        assert torch.equal(part[name], whole[name])


def test_schedule_warms_up_and_follows_a_cosine_to_its_floor():
    lr = optim.schedule(OptimConfig(lr=1.0, warmup_steps=10, lr_floor=0.1), 110)
    assert lr(0) == pytest.approx(0.1) and lr(9) == pytest.approx(1.0) and lr(10) == pytest.approx(1.0)
    assert lr(60) == pytest.approx(0.55) and lr(110) == pytest.approx(0.1) and lr(500) == pytest.approx(0.1)
    assert optim.schedule(OptimConfig(lr=1.0), 5)(0) == pytest.approx(1.0)  # a tenth of five steps, at least one


def grads() -> dict:
    return {"embed": {"a": torch.full((4,), 3.0)}, "blocks": [{"w": torch.full((4,), 0.1)}, {"w": torch.full((4,), 4.0)}], "head": {"h": torch.zeros(2)}}


def test_global_clipping_scales_everything_by_one_exact_norm():
    expected = math.sqrt(4 * (9 + 0.01 + 16))
    clipped, norm = optim.clip(grads(), 1.0, "global")
    assert norm.item() == pytest.approx(expected)
    assert tree.norm(clipped).item() == pytest.approx(1.0)
    assert clipped["embed"]["a"][0].item() == pytest.approx(3 / expected)


def test_layer_clipping_scales_each_layer_by_its_own_norm():
    clipped, norm = optim.clip(grads(), 1.0, "layer")
    assert norm.item() == pytest.approx(math.sqrt(4 * (9 + 0.01 + 16)))
    assert clipped["embed"]["a"].norm().item() == pytest.approx(1.0)
    assert clipped["blocks"][0]["w"][0].item() == pytest.approx(0.1)  # already short
    assert clipped["blocks"][1]["w"].norm().item() == pytest.approx(1.0)


def test_no_limit_leaves_gradients_alone():
    clipped, _ = optim.clip(grads(), 0.0, "global")
    assert clipped["blocks"][1]["w"][0].item() == 4.0
