"""The decoder, for every kind: causality, decoding, gradients, counts, dropout."""

import math
from dataclasses import replace

import pytest
import torch
from conftest import CASES, TINY, generator

from configs import PRESETS
from hyperlm import model, random, tree
from hyperlm.config import resolve
from hyperlm.kernels import reference
from hyperlm.loss import head_nats
from hyperlm.random import dropout


def tokens_of(cfg, batch: int, n: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(cfg.vocab_size, (batch, n), generator=generator(seed))


@pytest.mark.parametrize("n", [1, 2, 63, 65, 100, 130])
def test_a_changed_token_never_changes_earlier_logits(cfg, n):
    params = model.init(cfg, 0, dtype=torch.float64)
    tokens = tokens_of(cfg, 2, n)
    logits = model.apply(params, tokens, cfg)
    for at in {0, n // 3, n // 2, n - 1}:
        changed = tokens.clone()
        changed[:, at] = (changed[:, at] + 1) % cfg.vocab_size
        after = model.apply(params, changed, cfg)
        torch.testing.assert_close(after[:, :at], logits[:, :at], rtol=0, atol=1e-12)
        assert (
            (after[:, at:] - logits[:, at:]).abs().amax(-1).min() > 1e-9
            if cfg.kind != "phase7"
            else (after[:, at] - logits[:, at]).abs().max() > 1e-9
        )


@pytest.mark.parametrize("n", [1, 5, 70])
def test_decoding_equals_apply_position_by_position(cfg, n):
    params, tokens = model.init(cfg, 1, dtype=torch.float64), tokens_of(cfg, 3, n)
    expected = model.apply(params, tokens, cfg)
    cache = model.init_cache(cfg, 3, dtype=torch.float64)
    for i in range(n):
        logits, cache = model.decode(params, tokens[:, i], cache, cfg)
        torch.testing.assert_close(logits, expected[:, i], rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("cuts", [[70], [69, 1], [1, 69], [3, 33, 34], [64, 6]])
def test_reading_in_pieces_equals_reading_at_once(cfg, cuts):
    params, tokens = model.init(cfg, 2, dtype=torch.float64), tokens_of(cfg, 2, 70)
    cache, pieces = model.init_cache(cfg, 2, dtype=torch.float64), []
    for part in tokens.split(cuts, 1):
        logits, cache = model.extend(params, part, cache, cfg)
        pieces.append(logits)
    torch.testing.assert_close(torch.cat(pieces, 1), model.apply(params, tokens, cfg), rtol=1e-8, atol=1e-9)


def test_the_state_of_phase8_does_not_grow():
    cfg = CASES["phase8-ssm"]
    params, cache = model.init(cfg, 0), model.init_cache(cfg, 1)
    size = tree.count(cache.layers)
    for i in range(100):
        _, cache = model.decode(params, torch.tensor([i % 64]), cache, cfg)
    assert tree.count(cache.layers) == size


def gradients(cfg, params, tokens, **options):
    features = model.hidden(params, tokens[:, :-1], cfg, **options)
    nats, _ = head_nats(features.flatten(0, 1), params["head"]["weight"], tokens[:, 1:].flatten())
    leaves = tree.by_path(params)
    return dict(zip(leaves, torch.autograd.grad(nats, list(leaves.values())), strict=True))


def trainable(cfg, seed=0, dtype=torch.float64):
    return tree.map(lambda p: p.requires_grad_(), model.init(cfg, seed, dtype=dtype))


def test_every_parameter_receives_a_gradient(cfg):
    for path, gradient in gradients(cfg, trainable(cfg), tokens_of(cfg, 4, 40)).items():
        assert gradient.isfinite().all() and gradient.abs().max() > 1e-8, path


def test_recomputation_changes_memory_and_not_gradients(cfg):
    cfg = replace(cfg, dropout=0.1)
    params, tokens, key = trainable(cfg), tokens_of(cfg, 2, 33), torch.tensor(5)
    kept = gradients(cfg, params, tokens, key=key)
    recomputed = gradients(cfg, params, tokens, key=key, recompute=True)
    for path in kept:
        torch.testing.assert_close(recomputed[path], kept[path], rtol=0, atol=0)


def test_gradients_agree_with_finite_differences(cfg):
    params, tokens = trainable(cfg), tokens_of(cfg, 2, 20)
    slopes = gradients(cfg, params, tokens)

    def nats() -> float:
        with torch.no_grad():
            logits = model.apply(params, tokens[:, :-1], cfg)
            return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum").item()

    for path, p in tree.by_path(params).items():
        way = torch.randn(p.shape, generator=generator(7), dtype=p.dtype)
        way /= way.norm()
        with torch.no_grad():
            h = 1e-5
            p.add_(way, alpha=h)
            up = nats()
            p.add_(way, alpha=-2 * h)
            down = nats()
            p.add_(way, alpha=h)
        assert (slopes[path] * way).sum().item() == pytest.approx((up - down) / (2 * h), rel=1e-4, abs=1e-6), path


def test_a_missing_parameter_is_an_error_and_not_a_default():
    params = model.init(TINY, 0)
    del params["blocks"][0]["mixer.out"]
    with pytest.raises(RuntimeError, match="mixer.out"):
        model.apply(params, tokens_of(TINY, 1, 4), TINY)


def test_initial_values_depend_on_seed_and_path_alone():
    few, many = model.init(TINY, 0), model.init(replace(TINY, n_layers=4), 0)
    assert torch.equal(few["blocks"][1]["mixer.qkv"], many["blocks"][1]["mixer.qkv"])
    assert not torch.equal(few["blocks"][0]["mixer.qkv"], few["blocks"][1]["mixer.qkv"])
    assert not torch.equal(few["head"]["weight"], model.init(TINY, 1)["head"]["weight"])


def test_initial_loss_is_that_of_guessing(cfg):
    logits = model.apply(model.init(cfg, 0), tokens_of(cfg, 8, 50), cfg)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens_of(cfg, 8, 50, seed=1).flatten())
    assert loss.item() == pytest.approx(math.log(cfg.vocab_size), abs=0.1)


def test_dropout_drops_its_share_and_is_a_function_of_the_key():
    x = torch.ones(1000, 1000)
    a, b = dropout(x, 0.25, torch.tensor(3)), dropout(x, 0.25, torch.tensor(4))
    assert torch.equal(a, dropout(x, 0.25, torch.tensor(3))) and not torch.equal(a, b)
    assert (a == 0).float().mean().item() == pytest.approx(0.25, abs=0.003)
    assert ((a == 0) & (b == 0)).float().mean().item() == pytest.approx(0.0625, abs=0.003)
    assert a.mean().item() == pytest.approx(1.0, abs=0.005)
    assert torch.equal(dropout(x, 0.25, None), x)


def test_a_mixer_drops_its_share_of_what_it_gated_and_scales_the_rest(cfg):
    """One mixer alone, as `model.context` gives it its operations: dropped values are 0, the others those without dropout times 1 / (1 - rate)."""
    cfg = replace(cfg, dropout=0.25, ssm=False)
    block, params = model.skeleton(cfg).blocks[0], trainable(cfg)["blocks"][0]
    mixer = {name.removeprefix("mixer."): p for name, p in params.items() if name.startswith("mixer.")}
    gated = []

    def watched(o, weight, gate, out):
        gated.append(reference.norm_gate(o, weight, gate))
        return reference.readout(o, weight, gate, out)

    for key in (None, torch.tensor(5)):
        ctx = model.context(torch.float64, tokens_of(cfg, 3, 40), cfg, "torch", key=key)
        ctx = ctx._replace(ops=ctx.ops | {"readout": watched})
        x = torch.randn(3, 40, cfg.d_model, generator=generator(), dtype=torch.float64)
        torch.func.functional_call(block.mixer, mixer, (x, None, ctx), strict=True)
    plain, dropped = gated
    stays = dropped != 0
    assert stays.double().mean().item() == pytest.approx(0.75, abs=0.03)
    torch.testing.assert_close(dropped[stays], plain[stays] / 0.75)


def test_branches_and_gates_of_all_layers_drop_by_keys_of_their_own(monkeypatch):
    cfg, keys = replace(CASES["hybrid-ssm"], dropout=0.1), []

    def watched(x, rate, key):
        keys.append(int(key))
        return random.fmix64(torch.arange(x.numel())).view(x.shape) > 0

    monkeypatch.setattr("hyperlm.random.keep_mask", watched)
    monkeypatch.setattr("hyperlm.mixers.frame.keep_mask", watched)
    model.hidden(model.init(cfg, 0), tokens_of(cfg, 1, 5), cfg, key=torch.tensor(0))
    assert len(keys) == len(set(keys)) == 1 + 4 * cfg.n_layers and max(keys) < 1 << 20


def test_radii_are_within_their_limits(cfg):
    layers = model.radii(model.init(cfg, 0), tokens_of(cfg, 2, 9), cfg)
    hyperbolic = [i for i, block in enumerate(model.skeleton(cfg).blocks) if hasattr(block.mixer, "radius")]
    assert cfg.hyperbolic_layers == hyperbolic and len(layers) == len(hyperbolic)
    for layer in layers:
        for r in layer.values():
            assert r.shape == (2, cfg.n_heads, 9) and r.min() >= 0.05 and r.max() <= 4.0


GOLDEN = {
    "small": 2_862_400,
    "standard": 50_588_544,
    "max": 3_141_021_696,
    "max-ssm": 3_543_838_720,
    "study": 17_527_552,
    "glance": 719_520,
}


@pytest.mark.parametrize("preset", PRESETS)
def test_parameter_counts_of_the_presets(preset):
    assert tree.count(model.declaration(resolve(PRESETS[preset]()).model)) == GOLDEN[preset]


def test_the_largest_preset_has_three_billion_parameters_by_hand():
    d, layers, v, k = 4096, 32, 50304, 64
    h = d // k
    frame = 3 * d * d + 3 * d * 4 + h + d + 2 * 128 * d + d * d  # qkv, conv, beta, head norm, gate, out
    phase8 = 2 * h * d + 2 * h + h * d + h  # radii, decay
    ffn = 2 * (d * d // 8 + 4 * d * d // 8)
    assert v * d // 4 + d * d // 4 + layers * (frame + phase8 + ffn + 2 * d) + d + v * d == GOLDEN["max"]
    assert 3.0e9 <= GOLDEN["max"] <= 3.2e9


@pytest.mark.gpu
def test_bf16_on_a_gpu_is_near_fp64(cfg):
    params, tokens = model.init(cfg, 0, dtype=torch.float64), tokens_of(cfg, 2, 100)
    truth = model.apply(params, tokens, cfg)
    from hyperlm.precision import compute_copy

    on_gpu = compute_copy(tree.map(lambda p: p.float().cuda(), params), torch.bfloat16)
    found = model.apply(on_gpu, tokens.cuda(), cfg).double().cpu()
    assert (found - truth).norm() / truth.norm() < 3e-2
