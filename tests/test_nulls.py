"""The nulls of Phase 7: scores against a loop over radii and directions, the identity that they come from, the contract of every model, and the
suite that trains them side by side."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import CASES, TINY, normal
from test_model import (  # noqa: F401 - the contract of every model, here for each null
    gradients,
    test_a_changed_token_never_changes_earlier_logits,
    test_bf16_on_a_gpu_is_near_fp64,
    test_decoding_equals_apply_position_by_position,
    test_gradients_agree_with_finite_differences,
    test_initial_loss_is_that_of_guessing,
    test_reading_in_pieces_equals_reading_at_once,
    test_recomputation_changes_memory_and_not_gradients,
    tokens_of,
    trainable,
)
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from hyperlm import flops, kernels, model, tree
from hyperlm.config import ModelConfig
from hyperlm.geometry import R_MAX, R_MIN, direction, distance, lift, time_of
from hyperlm.kernels.reference import softmax_attention
from hyperlm.mixers.frame import rope_angles
from hyperlm.mixers.phase7 import WITH_BIAS, WITH_GAIN, factors

NULLS = ("cosine", "bias", "gain", "first-order")
B, H, K = 2, 3, 8


def with_score(score: str, **settings) -> ModelConfig:
    return replace(TINY, kind="phase7", score=score, **settings)


@pytest.fixture(params=[score for score in NULLS if score != "first-order"])  # which is among the cases of all suites
def cfg(request) -> ModelConfig:
    return with_score(request.param)


def score_of(name: str, beta: float, r_q: float, r_k: float, cosine: float) -> float:
    """Of one query and one key, as an equation has it."""
    bias = -beta * math.log(math.cosh(r_k))
    return {
        "cosine": beta * cosine,
        "bias": beta * cosine + bias,
        "gain": beta * math.tanh(r_q) * math.tanh(r_k) * cosine,
        "first-order": beta * math.tanh(r_q) * math.tanh(r_k) * cosine + bias,
        "logcosh": -beta * math.log(math.cosh(r_q) * math.cosh(r_k) - math.sinh(r_q) * math.sinh(r_k) * cosine),  # by the law of cosines
    }[name]


def in_a_loop(name: str, s_q, s_k, v, beta) -> torch.Tensor:
    """Attention over pairs, one after the other, from the points' radii and directions."""
    o, (b, h, n, _), m = torch.zeros(*s_q.shape[:3], v.shape[-1], dtype=v.dtype), s_q.shape, s_k.shape[2]
    for at in ((i, j, k) for i in range(b) for j in range(h) for k in range(n)):
        x, r_q, weights = s_q[at], math.asinh(float(s_q[at].norm())), []
        for y in s_k[at[0], at[1], : m - n + at[2] + 1]:
            cosine = float(x @ y / x.norm() / y.norm())
            weights.append(math.exp(score_of(name, float(beta[at[1]]), r_q, math.asinh(float(y.norm())), cosine)))
        o[at] = torch.tensor(weights, dtype=v.dtype) @ v[at[0], at[1], : len(weights)] / sum(weights)
    return o


def points(n: int, seed: int, *, largest: float = R_MAX) -> tuple[torch.Tensor, torch.Tensor]:
    """(t, s) of points at radii up to `largest`."""
    r = R_MIN + (largest - R_MIN) * torch.sigmoid(normal(B, H, n, seed=seed + 100) * 3)
    return lift(direction(normal(B, H, n, K, seed=seed)), r)


def attend(score: str, t_q, s_q, t_k, s_k, v, beta) -> torch.Tensor:
    q, k = factors(t_q, s_q, t_k, s_k, beta, score)
    return softmax_attention(q, k, v)


# -- what the scores are ---------------------------------------------------------------------------------------------------------------


def test_log_cosh_of_a_distance_is_a_bias_of_each_point_and_a_function_of_their_klein_coordinates():
    (t_q, s_q), (t_k, s_k) = points(40, 1), points(40, 2)
    truth = torch.log(torch.cosh(distance(t_q[..., :, None], s_q[..., :, None, :], t_k[..., None, :], s_k[..., None, :, :])))
    products = (s_q / t_q[..., None]) @ (s_k / t_k[..., None]).mT
    torch.testing.assert_close(t_q.log()[..., :, None] + t_k.log()[..., None, :] + torch.log1p(-products), truth, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("score", NULLS)
@pytest.mark.parametrize(("n", "m"), [(1, 1), (7, 7), (3, 9), (1, 9)])
def test_a_null_equals_a_loop_over_radii_and_directions(score, n, m):
    (t_q, s_q), (t_k, s_k), v, beta = points(n, 1), points(m, 2), normal(B, H, m, 5, seed=3), torch.tensor([0.5, 2.0, 8.0]).double()
    torch.testing.assert_close(attend(score, t_q, s_q, t_k, s_k, v, beta), in_a_loop(score, s_q, s_k, v, beta), rtol=0, atol=1e-9)


@pytest.mark.parametrize("score", [*NULLS, "logcosh"])
@torch.no_grad()
def test_a_layer_attends_by_its_score_and_by_nothing_else(score):
    """A block, against the one of logcosh with a loop in place of its attention: parameters are the same."""
    params = model.init(with_score("logcosh"), 0, dtype=torch.float64)["blocks"][0]
    params |= {"mixer.radius.weight": normal(8, 32, seed=5), "mixer.log_beta": normal(4, seed=6) / 4}  # radii of all sizes
    x, angles = normal(1, 9, 32, seed=7), rope_angles(0, 9, 8, torch.device("cpu"))

    def run(cfg: ModelConfig, **others) -> torch.Tensor:
        ops = {op: kernels.OPS[op]["torch"] for op in model.ops(cfg)} | others
        return functional_call(model.skeleton(cfg).blocks[0], params, (x, None, model.Context(ops, torch.float64, *angles, 0)), strict=True)[0]

    expected = run(with_score("logcosh"), hyperbolic_attention=lambda t_q, s_q, t_k, s_k, v, beta, _: in_a_loop(score, s_q, s_k, v, beta))
    torch.testing.assert_close(run(with_score(score)), expected, rtol=0, atol=1e-9)


def test_cosine_with_the_parameters_of_the_twin_is_the_twin():
    twin, null = replace(TINY, kind="softmax"), with_score("cosine")
    params, tokens = model.init(null, 0, dtype=torch.float64), tokens_of(TINY, 2, 40)
    of_twin = {**params, "blocks": [{name: p for name, p in block.items() if "radius" not in name} for block in params["blocks"]]}
    torch.testing.assert_close(model.apply(params, tokens, null), model.apply(of_twin, tokens, twin), rtol=1e-6, atol=1e-9)


def test_near_the_origin_phase7_is_its_first_order():
    """With radii that go as e and temperatures as 1 / e^2 scores stay as large, and what separates the two goes as e^2."""
    u_q, u_k, v = direction(normal(B, H, 12, K, seed=1)), direction(normal(B, H, 12, K, seed=2)), normal(B, H, 12, 5, seed=3)
    r_q, r_k = normal(B, H, 12, seed=4).abs() + 0.5, normal(B, H, 12, seed=5).abs() + 0.5
    between = []
    for e in (1.0, 1e-1, 1e-2):
        beta = torch.tensor([0.5, 2.0, 8.0]).double() / e**2
        inputs = *lift(u_q, e * r_q), *lift(u_k, e * r_k), v, beta
        between.append((attend("first-order", *inputs) - kernels.OPS["hyperbolic_attention"]["torch"](*inputs, "logcosh")).abs().max().item())
    assert between[0] > 0.1 and between[2] == pytest.approx(between[1] / 100, rel=0.1)


# -- the contract of a model -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("score", NULLS)
def test_gradients_reach_all_parameters_but_radii_on_which_a_score_does_not_depend(score):
    """A cosine depends on none, a bias on those of keys."""
    cfg, unequal = with_score(score), normal(8, 32, seed=5)
    params = trainable(cfg)
    for block in params["blocks"]:
        block["mixer.radius.weight"].data.copy_(unequal)  # a bias that all keys have cancels
    for path, gradient in gradients(cfg, params, tokens_of(cfg, 4, 40)).items():
        used = gradient
        if "radius" in path and score in ("cosine", "bias"):
            (of_queries, of_keys), used = gradient.chunk(2), gradient[4:]
            assert (of_queries == 0).all() and (score == "bias" or (of_keys == 0).all())
        assert used.abs().max() > 1e-8 or (score == "cosine" and "radius" in path), path


@pytest.mark.parametrize("score", NULLS)
def test_a_model_begins_as_phase7_does_whatever_its_score(score):
    whole, null = (tree.by_path(model.init(cfg, 3)) for cfg in (CASES["phase7"], with_score(score)))
    assert whole.keys() == null.keys() and all(torch.equal(whole[path], null[path]) for path in whole)


@pytest.mark.parametrize("score", [*NULLS, "logcosh", "distance"])
def test_an_attention_is_needed_only_where_the_score_is_of_its_kind(score):
    needed = {"hyperbolic_attention", "softmax_attention"} & set(model.ops(with_score(score)))
    assert needed == {"softmax_attention" if score in NULLS else "hyperbolic_attention"}
    assert "softmax_attention" in model.ops(replace(CASES["hybrid"], score=score)) or score not in NULLS


@pytest.mark.parametrize("score", NULLS)
def test_a_score_has_as_many_operations_as_phase7_whatever_widens_its_heads(score):
    assert flops.a_token(with_score(score), 64) == flops.a_token(with_score("logcosh"), 64)


# -- in the dtypes and by the kernels that models run in -------------------------------------------------------------------------------


def test_a_bias_in_bf16_is_as_good_as_with_twice_its_digits():
    s = (torch.sinh(torch.linspace(R_MIN, R_MAX, 500))[:, None] * direction(normal(500, 64, dtype=torch.float32))).bfloat16()[None, None]
    t, beta = time_of(s.float()), torch.tensor([8.0])
    _, k = factors(t, s, t, s, beta, "bias")
    found, truth = k[..., 64:].double().sum(-1), -8 * time_of(s.double()).log()
    assert k.dtype == torch.bfloat16 and k.shape[-1] == 72
    torch.testing.assert_close(found, truth, rtol=2**-17, atol=1e-6)  # atol: of the logarithm of a time near 1, in fp32
    assert ((truth.bfloat16() - truth) / truth).abs().max() > 2**-10  # a single number would not do


def in_bf16_or_fp32(device: str, n: int) -> list[torch.Tensor]:
    """Points at radii up to R_MAX, values and temperatures as a model has them there, and gradients wanted of all."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    r = R_MIN + (R_MAX - R_MIN) * torch.rand(2, 1, 4, n, generator=torch.Generator().manual_seed(0))
    s_q, s_k = (torch.sinh(r)[..., None] * direction(normal(2, 1, 4, n, 64, seed=1, dtype=torch.float32))).to(device, dtype)
    v, beta = normal(1, 4, n, 64, seed=2).to(device, dtype), torch.tensor([1.0, 4.0, 8.0, 12.0], device=device)
    leaves = time_of(s_q.float()), s_q, time_of(s_k.float()), s_k, v, beta
    return [x.detach().requires_grad_() for x in leaves]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("score", NULLS)
def test_fused_attention_takes_a_null_and_finds_its_values_and_gradients(score, device):
    """Of all that torch has for attention, only what needs memory for N numbers and not for N^2 is allowed; the truth is in fp64."""
    leaves = in_bf16_or_fp32(device, 1000 if device == "cuda" else 200)

    def fused(t_q, s_q, t_k, s_k, v, beta):
        q, k = factors(t_q, s_q, t_k, s_k, beta, score)
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION]):
            return softmax_attention(q, k, F.pad(v, (0, q.shape[-1] - 64)))[..., :64]

    def exact(t_q, s_q, t_k, s_k, v, beta):
        q, k = (s / (t[..., None] if score in WITH_GAIN else s.norm(dim=-1, keepdim=True)) for t, s in ((t_q, s_q), (t_k, s_k)))
        scores = beta[:, None, None] * (q @ k.mT - (t_k.log()[..., None, :] if score in WITH_BIAS else 0))
        return torch.softmax(scores.masked_fill(~torch.ones_like(scores, dtype=torch.bool).tril(), -torch.inf), -1) @ v

    def run(attention, leaves):
        o = attention(*leaves)
        return [o, *torch.autograd.grad(o, leaves, normal(*o.shape, seed=3).to(o.device, o.dtype), allow_unused=True, materialize_grads=True)]

    found, truth = run(fused, leaves), run(exact, [x.detach().double().requires_grad_() for x in leaves])
    for name, x, y in zip(("o", "t_q", "s_q", "t_k", "s_k", "v", "beta"), found, truth, strict=True):
        error = float((x.detach().double() - y.detach()).norm() / y.detach().norm().clamp(min=1e-9))
        assert error < (2e-2 if device == "cuda" else 1e-4), f"{name}: relative error {error:.1e}"


@pytest.mark.gpu
@pytest.mark.parametrize("score", NULLS)
def test_a_long_sequence_needs_memory_in_proportion(score):
    """16 times the length, not 256 times the memory; and causal there too."""
    params, peaks = tree.map(lambda p: p.cuda(), model.init(with_score(score, n_layers=1, head_dim=32), 0, dtype=torch.bfloat16)), []
    for n in (1024, 16384):
        tokens = tokens_of(TINY, 1, n).cuda()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        logits = model.apply(params, tokens, with_score(score, n_layers=1, head_dim=32))
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] < 20 * peaks[0]
    tokens[:, n // 2] += 1
    changed = model.apply(params, tokens % 64, with_score(score, n_layers=1, head_dim=32))
    torch.testing.assert_close(changed[:, : n // 2], logits[:, : n // 2], rtol=0, atol=1e-2)
    assert not torch.equal(changed, logits)
