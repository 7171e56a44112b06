"""AdamW against torch's, the schedule and clipping by hand."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from conftest import normal

from configs import PRESETS
from hyperlm import optim, tree
from hyperlm.config import Config, ModelConfig, OptimConfig, resolve
from hyperlm.kernels.reference import optimizer as reference
from hyperlm.kernels.reference.optimizer import UpdatePart
from hyperlm.optim import Leaf, Update, leaves_of

NO_STREAM = torch.tensor(0)  # of what is not rounded


def params() -> dict:
    return {"w": normal(5, 4, seed=1), "b": normal(4, seed=2)}


def test_adamw_equals_torch_with_decay_on_matrices_only():
    cfg = OptimConfig(lr=0.01, weight_decay=0.3)
    mine, theirs = params(), tree.map(lambda p: p.clone().requires_grad_(), params())
    oracle = torch.optim.AdamW(
        [{"params": [theirs["w"]], "weight_decay": 0.3}, {"params": [theirs["b"]], "weight_decay": 0.0}],
        lr=0.01,
        betas=(0.9, 0.95),
        eps=1e-8,
    )
    ours = optim.adamw(cfg, lambda step: 0.01)
    state = ours.init(mine)
    for step in range(20):
        grads = {"w": normal(5, 4, seed=10 + step), "b": normal(4, seed=50 + step)}
        for name, p in theirs.items():
            p.grad = grads[name].clone()
        oracle.step()
        ours.update(leaves_of(grads, state, mine, {"w": True, "b": False}, [NO_STREAM] * 2), Update(step))
    for name in mine:
        torch.testing.assert_close(mine[name], theirs[name].detach(), rtol=1e-10, atol=1e-12)


def test_updating_leaf_by_leaf_equals_updating_at_once():
    rule, whole, parts = optim.adamw(OptimConfig(), lambda step: 0.01), params(), params()
    grads = {"w": normal(5, 4, seed=3), "b": normal(4, seed=4)}
    decay = {"w": True, "b": False}
    rule.update(leaves_of(tree.map(torch.clone, grads), rule.init(whole), whole, decay, [NO_STREAM] * 2), Update(0))
    for leaf in leaves_of(grads, rule.init(parts), parts, decay, [NO_STREAM] * 2):
        rule.update([leaf], Update(0))
    assert all(torch.equal(parts[name], whole[name]) for name in parts)


@pytest.mark.parametrize("state", ["fp32", "int8"])
def test_gradients_times_zero_are_zero_even_where_they_are_not_finite(state):
    rule, ends = optim.optimizer(cfg := OptimConfig(lr=1e-3, state=state), optim.new_schedule(cfg, 10)), []
    for bad in (math.nan, math.inf, 0.0):
        w = [rule.keep(normal(3, 256, seed=1).float()), rule.keep(normal(256, seed=2).float())]
        moments = rule.init(w)
        for step, (factor, value) in enumerate(((1.0, 0.3), (0.0, bad))):
            grads = [torch.full_like(x, value, dtype=torch.float32) for x in w]
            rule.update(leaves_of(grads, moments, w, [True, False], torch.tensor([1, 2])), Update(step, torch.tensor(factor)))
        ends.append(tree.leaves([w, moments]))
    for end in ends[:2]:
        assert all(torch.equal(x, y) for x, y in zip(end, ends[2], strict=True))


def test_schedule_warms_up_and_follows_a_cosine_to_its_floor():
    cfg = OptimConfig(lr=1.0, warmup_steps=10, lr_floor=0.1)
    lr = optim.learning_rate(optim.new_schedule(cfg, 110), cfg)
    assert lr(0) == pytest.approx(0.1) and lr(9) == pytest.approx(1.0) and lr(10) == pytest.approx(1.0)
    assert lr(60) == pytest.approx(0.55) and lr(110) == pytest.approx(0.1) and lr(500) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("given", "total", "steps"),
    [
        (0, 1, 1),
        (0, 2, 1),
        (0, 5, 3),
        (0, 60, 30),
        (0, 100, 50),
        (0, 200, 50),
        (0, 500, 50),
        (0, 501, 51),
        (0, 2_000, 200),
        (0, 50_000, 1000),
        (20, 200, 20),
        (20, 5, 5),
    ],
)
def test_warm_up_is_a_tenth_of_a_run_but_as_long_as_the_rate_needs(given, total, steps):
    """At least 50 steps, where that is no more than half of the run; at most 1,000; what is given, if anything is."""
    cfg = OptimConfig(lr=1.0, warmup_steps=given)
    lr = optim.learning_rate(optim.new_schedule(cfg, total), cfg)
    assert [lr(step) for step in range(steps)] == pytest.approx([(step + 1) / steps for step in range(steps)])
    assert steps == total or lr(steps + 1) < 1


@pytest.mark.parametrize(
    ("width", "rate"),
    [(32, 7.8e-3), (128, 7.8e-3), (256, 3.9e-3), (512, 1.95e-3), (1024, 9.8e-4), (2048, 4.9e-4), (4096, 2.44e-4), (8192, 1.22e-4)],
)
def test_a_rate_that_is_not_given_follows_from_the_width(width, rate):
    config = Config(model=ModelConfig(d_model=width, head_dim=32))
    assert resolve(config).optim.lr == pytest.approx(rate, rel=0.01)
    assert resolve(resolve(config)) == resolve(config)  # what is stored is a number, and stays it
    given = replace(config, optim=OptimConfig(lr=0.3))
    assert resolve(given) == given


@pytest.mark.parametrize("preset", PRESETS)
def test_the_rates_of_presets_follow_from_their_widths_or_are_measured(preset):
    config = resolve(PRESETS[preset]())
    assert config.optim.lr == {"study": 4e-3}.get(preset, 1 / config.model.d_model)


def test_settings_that_were_not_resolved_train_nothing_silently():
    with pytest.raises(ValueError, match="resolve"):
        optim.learning_rate(optim.new_schedule(OptimConfig(), 5), OptimConfig())(0)


@pytest.mark.parametrize(("step", "total"), [(5, 1000), (20, 1000), (100, 1000), (100, 120), (60, 80)])
def test_an_extended_schedule_neither_jumps_nor_warms_up_again(step, total):
    """A run of 100 steps, 10 of warm-up, that is to end at another step from `step` on."""
    cfg = OptimConfig(lr=0.3, lr_floor=0.1, warmup_steps=10)
    before = optim.new_schedule(cfg, 100)
    after = optim.extended(before, cfg, step, total)
    old, new = optim.learning_rate(before, cfg), optim.learning_rate(after, cfg)
    assert new(step) == pytest.approx(old(step)) and new(total) == pytest.approx(0.03)
    assert all(new(s) == old(s) for s in range(min(step, 10)))
    rates = [new(s) for s in range(max(step, 10), total + 1)]
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(rates))
    assert max(abs(a - b) for a, b in itertools.pairwise(rates)) <= 0.3 * math.pi / 2 / (total - max(step, 10)) * 1.01
    assert optim.extended(before, cfg, step, total) == after


def grads() -> dict:
    return {
        "embed": {"a": torch.full((4,), 3.0)},
        "blocks": [{"w": torch.full((4,), 0.1)}, {"w": torch.full((4,), 4.0)}],
        "head": {"h": torch.zeros(2)},
    }


def test_global_clipping_scales_everything_by_one_exact_norm():
    expected = math.sqrt(4 * (9 + 0.01 + 16))
    clipped, norm = optim.clip(grads(), 1.0, "global")
    assert norm.item() == pytest.approx(expected)
    assert reference.norm(tree.leaves(clipped)).item() == pytest.approx(1.0)
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


# -- 8-bit moments ---------------------------------------------------------------------------------------------------------------------


def updated(draw: int, w: torch.Tensor, grads: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weights (fp32) and both moments after some updates, with noise that depends on `draw`."""
    rule = optim.adamw8(OptimConfig(weight_decay=0.1), lambda step: 0.01)
    params = [rule.keep(w.clone())]
    state, origin = rule.init(params), torch.tensor([draw << 40])
    for step, g in enumerate(grads):
        rule.update(leaves_of([g.clone()], state, params, [True], origin), Update(step))
    moments = state["moments"][0]
    scales, codes = moments.view(torch.float32)[:, reference.QUANT_BLOCK // 2 :], moments[:, : 2 * reference.QUANT_BLOCK]
    m = codes[:, : reference.QUANT_BLOCK].view(torch.int8).float()
    m, v = m * m.abs() / 127**2 * scales[:, :1], (codes[:, reference.QUANT_BLOCK :].float() / 255) ** 4 * scales[:, 1:]
    return params[0].float(), m.flatten()[: w.numel()].view(w.shape), v.flatten()[: w.numel()].view(w.shape)


def test_rounding_to_bf16_and_to_8_bits_is_right_on_average():
    w, g = normal(3, 100, seed=1).float().bfloat16().float(), normal(3, 100, seed=2).float() * torch.logspace(-2, 0, 100)
    exact = w * (1 - 0.001) - 0.01 * g / (g.abs() + 1e-8)
    found = [torch.stack(x) for x in zip(*(updated(draw, w, [g]) for draw in range(2000)), strict=True)]
    for draws, truth in zip(found, (exact, 0.1 * g, 0.05 * g * g), strict=True):
        rare = 0.02 * truth.abs().max() / 2000  # a step, where the other neighbour was hardly ever drawn
        error = draws.std(0) / 2000**0.5 + rare
        assert float(((draws.mean(0) - truth).abs() / error).max()) < 6


def test_gradients_in_8_bits_are_right_on_average():
    x = normal(3, 100, seed=2).float() * torch.logspace(-2, 0, 100)
    parts, origin = [0.75 * x, 0.25 * x], torch.tensor(0)
    coded, squares = zip(*(reference.encode8(parts, origin, torch.tensor(draw << 20)) for draw in range(2000)), strict=True)
    draws = torch.stack([reference.decode8(c).flatten()[:300].view(3, 100) for c in coded])
    torch.testing.assert_close(squares[0].sum(), x.square().sum())
    error = draws.std(0) / 2000**0.5 + 0.02 * x.abs().max() / 2000
    assert float(((draws.mean(0) - x).abs() / error).max()) < 6 and float((draws.std(0) / x.abs().max()).max()) < 0.01


def in_parts(draw: int, factor: float, *parts: UpdatePart, g: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights (fp32) and first moment after the second update, made in these parts: WEIGHTS with factor 1, the others with `factor`."""
    cfg = OptimConfig(weight_decay=0.5)
    rule = optim.adamw8(cfg, lambda step: 0.01)
    params = [rule.keep(w.clone())]
    state, origin = rule.init(params), torch.tensor([draw << 40])
    rule.update(leaves_of([g.flip(0).clone()], state, params, [True], origin), Update(0))
    for part in parts:
        by = torch.tensor(1.0 if part == UpdatePart.WEIGHTS else factor)
        rule.update(leaves_of([g.clone()], state, params, [True], origin), Update(1, by, part))
    return params[0].float(), state["moments"][0]


@pytest.mark.parametrize("factor", [1.0, 0.3])
def test_an_update_in_two_parts_is_the_update(factor):
    """The weights' part and the moments' with the same factor are bit for bit the whole; with another, the correction is right on average."""
    w, g = normal(2, 300, seed=1).float().bfloat16().float(), normal(2, 300, seed=2).float()
    if factor == 1:
        assert all(
            torch.equal(a, b)
            for a, b in zip(
                in_parts(3, 1.0, UpdatePart.FULL, g=g, w=w), in_parts(3, 1.0, UpdatePart.WEIGHTS, UpdatePart.MOMENTS, g=g, w=w), strict=True
            )
        )
    found, whole = (
        torch.stack([in_parts(draw, factor, *parts, g=g, w=w)[0] for draw in range(1000)])
        for parts in ((UpdatePart.WEIGHTS, UpdatePart.CORRECT), (UpdatePart.FULL,))
    )
    error = (found.var(0) / 1000 + whole.var(0) / 1000).sqrt() + 0.02 * w.abs().max() / 1000
    assert float(((found.mean(0) - whole.mean(0)).abs() / error).max()) < 6
    vector = [in_parts(0, factor, *parts, g=g[0], w=w[0]) for parts in ((UpdatePart.WEIGHTS, UpdatePart.CORRECT), (UpdatePart.FULL,))]
    for a, b in zip(*vector, strict=True):  # in fp32
        torch.testing.assert_close(a, b)


def test_an_update_undone_leaves_weights_and_moments():
    w, g = normal(2, 300, seed=1).float().bfloat16().float(), normal(2, 300, seed=2).float()
    before, moments = in_parts(0, 1.0, g=g, w=w)
    back, same = in_parts(0, 1.0, UpdatePart.WEIGHTS, UpdatePart.ROLLBACK, g=g, w=w)
    assert torch.equal(same, moments)
    torch.testing.assert_close(back, before, rtol=2**-6, atol=1e-4)
    for a, b in zip(
        in_parts(0, 1.0, UpdatePart.WEIGHTS, UpdatePart.ROLLBACK, g=g[0], w=w[0]), in_parts(0, 1.0, g=g[0], w=w[0]), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_8_bit_moments_learn_what_wide_ones_do():
    """Linear regression from noisy samples: both end near the truth, and near each other."""
    truth = normal(8, 300, seed=1).float()
    ends = []
    for rule in (
        optim.adamw(OptimConfig(weight_decay=0.0), lambda step: 0.03 * 0.99**step),
        optim.adamw8(OptimConfig(weight_decay=0.0), lambda step: 0.03 * 0.99**step),
    ):
        params = {"w": rule.keep(torch.zeros(8, 300))}
        state = rule.init(params)
        for step in range(400):
            x = normal(600, 300, seed=step).float()
            g = {"w": (params["w"].float() - truth) @ x.mT @ x / 600}
            rule.update(leaves_of(g, state, params, {"w": False}, torch.tensor([5])), Update(step))
        ends.append((params["w"].float() - truth).norm() / truth.norm())
    assert ends[0] < 0.05 and ends[1] < ends[0] + 0.02


def test_a_moment_above_zero_never_becomes_zero():
    w, g = torch.zeros(2, 128), torch.full((2, 128), 1e-9)
    g[0, 0] = 1.0
    _, _, v = updated(0, w, [g])
    assert (v > 0).all()


def test_updating_in_parts_equals_updating_at_once():
    rule = optim.adamw8(OptimConfig(), lambda step: 0.01)
    w, g, n = rule.keep(normal(4, 512, seed=1).float()), normal(4, 512, seed=2).float(), reference.QUANT_BLOCK
    whole, part = [w.clone()], w.clone()
    state, moments = rule.init(whole), rule.init([part])["moments"][0]
    rule.update(leaves_of([g.clone()], state, whole, [True], torch.tensor([7])), Update(0))
    for first, last in ((0, 3), (3, 8)):
        cut = slice(first * n, last * n)
        stream = torch.tensor(7 + first * reference.COUNTERS)
        rule.update([Leaf(part.view(-1)[cut], g.flatten()[cut], {"moments": moments[first:last]}, True, stream)], Update(0))
    assert torch.equal(part, whole[0]) and torch.equal(moments, state["moments"][0])
