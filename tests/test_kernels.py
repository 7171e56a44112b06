"""Every operation of the dispatch table: outputs against naive float64 loops, gradients by finite differences, at awkward lengths."""

import math
from inspect import signature

import pytest
import torch
from conftest import normal
from torch.autograd import gradcheck

from hyperlm import kernels
from hyperlm.geometry import R_MAX, R_MIN, direction, distance, lift, lift_rounded
from hyperlm.kernels import reference as ref

B, H, K, V = 2, 3, 4, 5
LENGTHS = [1, 2, 63, 64, 65, 100, 200]


def points(n: int, seed: int, radius: float | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    r = (
        R_MIN + (R_MAX - R_MIN) * torch.sigmoid(normal(B, H, n, seed=seed + 1000))
        if radius is None
        else torch.full((B, H, n), radius).double()
    )
    return lift(direction(normal(B, H, n, K, seed=seed)), r)


@pytest.mark.parametrize("score", ["logcosh", "distance"])
@pytest.mark.parametrize(("n", "m"), [(1, 1), (7, 7), (3, 9), (1, 9)])
def test_hyperbolic_attention_equals_a_loop_over_geodesic_distances(score, n, m):
    (t_q, s_q), (t_k, s_k), v = points(n, 1), points(m, 2), normal(B, H, m, V, seed=3)
    beta = torch.tensor([0.5, 2.0, 8.0], dtype=torch.float64)
    o = ref.hyperbolic_attention(t_q, s_q, t_k, s_k, v, beta, score)
    for b in range(B):
        for h in range(H):
            for i in range(n):
                weights = []
                for j in range(m - n + i + 1):
                    d = distance(t_q[b, h, i], s_q[b, h, i], t_k[b, h, j], s_k[b, h, j]).item()
                    weights.append(math.cosh(d) ** -beta[h].item() if score == "logcosh" else math.exp(-beta[h].item() * d))
                expected = sum(w * v[b, h, j] for j, w in enumerate(weights)) / sum(weights)
                torch.testing.assert_close(o[b, h, i], expected, rtol=0, atol=1e-9 if score == "logcosh" else 0.03 * beta[h].item())


def test_distance_scores_differ_from_the_exact_ones_by_the_rounded_tip_only(monkeypatch):
    (t_q, s_q), (t_k, s_k), v = points(9, 1), points(9, 2), normal(B, H, 9, V, seed=3)
    beta = torch.tensor([0.5, 2.0, 8.0], dtype=torch.float64)
    monkeypatch.setattr("hyperlm.kernels.reference.attention.TIP", 0.0)
    o = ref.hyperbolic_attention(t_q, s_q, t_k, s_k, v, beta, "distance")
    d = distance(t_q[..., :, None], s_q[..., :, None, :], t_k[..., None, :], s_k[..., None, :, :])
    p = torch.exp(-beta[:, None, None] * d).tril()
    torch.testing.assert_close(o, (p / p.sum(-1, keepdim=True)) @ v, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("score", ["logcosh", "distance"])
def test_the_largest_weight_is_where_query_and_key_coincide(score):
    t, s = points(12, 4)
    o = ref.hyperbolic_attention(t, s, t, s, torch.eye(12, dtype=torch.float64).expand(B, H, 12, 12), torch.full((H,), 8.0).double(), score)
    assert (o.argmax(-1) == torch.arange(12)).all()


@pytest.mark.parametrize("score", ["logcosh", "distance"])
@pytest.mark.parametrize("case", ["generic", "coincident", "antipodal", "near the origin", "far away"])
def test_gradients_of_hyperbolic_attention(score, case):
    u = direction(normal(1, 1, 4, K, seed=5))
    u_k = {"coincident": u, "antipodal": -u}.get(case, direction(normal(1, 1, 4, K, seed=6)))
    radius = {"near the origin": R_MIN, "far away": R_MAX}.get(case, 1.0)
    r_q = torch.full((1, 1, 4), radius, dtype=torch.float64)
    r_k = r_q.clone()
    if case == "coincident":  # a hair apart, so that finite differences see one side of the clamp
        r_k += 1e-3

    def attend(u_q, r_q, u_k, r_k, v, beta):
        t_q, s_q = lift(u_q, r_q)
        t_k, s_k = lift(u_k, r_k)
        return ref.hyperbolic_attention(t_q, s_q, t_k, s_k, v, beta, score)

    inputs = [x.clone().requires_grad_() for x in (u, r_q, u_k, r_k, normal(1, 1, 4, V, seed=7), torch.tensor([3.0]).double())]
    # u is moved off the sphere by the differences; the lift is defined there too
    assert gradcheck(attend, inputs, eps=1e-7, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("score", ["logcosh", "distance"])
def test_gradients_stay_finite_where_points_coincide_in_fp32(score):
    u = direction(normal(1, 1, 16, K, seed=8, dtype=torch.float32)).requires_grad_()
    for radius in (R_MIN, 1.0, R_MAX):
        r = torch.full((1, 1, 16), radius, requires_grad=True)
        t, s = lift(u, r)
        o = ref.hyperbolic_attention(t, s, t, s, normal(1, 1, 16, V, seed=9, dtype=torch.float32), torch.tensor([11.0]), score)
        assert all(x.isfinite().all() for x in torch.autograd.grad(o.square().sum(), [u, r]))


def test_rounding_space_before_computing_time_keeps_points_on_the_hyperboloid():
    u, r = direction(normal(1, 1, 512, 64, seed=10, dtype=torch.float32)), torch.full((1, 1, 512), 3.0)
    t, s = lift_rounded(u, r, torch.bfloat16)
    truth = distance(
        *(x.double()[..., :, None] if x.dim() == 3 else x.double()[..., :, None, :] for x in lift(u, r)),
        *(x.double()[..., None, :] if x.dim() == 3 else x.double()[..., None, :, :] for x in lift(u, r)),
    )
    z = t[..., :, None] * t[..., None, :] - s.float() @ s.float().mT
    assert z.min() > 1 - 1e-4  # rounding of t t' in fp32, at cosh(3)^2 = 101
    error = (torch.acosh(z.clamp(min=1)) - truth).abs()
    assert error.median() < 2e-3  # 0.13 where t is rounded on its own


@pytest.mark.parametrize(("n", "m"), [(1, 1), (7, 7), (3, 9), (1, 9)])
def test_softmax_attention_sees_the_past_alone(n, m):
    q, k, v = normal(B, H, n, K, seed=1), normal(B, H, m, K, seed=2), normal(B, H, m, V, seed=3)
    weights = torch.exp(q @ k.mT).tril(m - n)
    torch.testing.assert_close(ref.softmax_attention(q, k, v), weights / weights.sum(-1, keepdim=True) @ v)


def quadratic(q, k, v, log_decay):
    g = log_decay.cumsum(-1)
    return ((q @ k.mT) * torch.exp(g[..., :, None] - g[..., None, :]).tril()) @ v


def linear_inputs(n: int) -> list[torch.Tensor]:
    return [
        normal(B, H, n, K, seed=1).abs(),
        normal(B, H, n, K, seed=2).abs(),
        normal(B, H, n, V, seed=3),
        -normal(B, H, n, seed=4).abs() * 0.2,
    ]


@pytest.mark.parametrize("n", LENGTHS)
def test_linear_attention_chunked_equals_recurrent_equals_quadratic(n):
    q, k, v, log_decay = linear_inputs(n)
    chunked, state = ref.linear_attention(q, k, v, log_decay)
    steps, carried = [], torch.zeros(B, H, K, V, dtype=torch.float64)
    for i in range(n):
        o, carried = ref.linear_attention_step(q[:, :, i], k[:, :, i], v[:, :, i], log_decay[:, :, i], carried)
        steps.append(o)
    torch.testing.assert_close(chunked, quadratic(q, k, v, log_decay), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(chunked, torch.stack(steps, 2), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(state, carried, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("cut", [1, 30, 64, 99])
def test_linear_attention_goes_on_from_a_state(cut):
    inputs = linear_inputs(100)
    whole, last = ref.linear_attention(*inputs)
    first, state = ref.linear_attention(*(x[:, :, :cut] for x in inputs))
    second, state = ref.linear_attention(*(x[:, :, cut:] for x in inputs), state)
    torch.testing.assert_close(torch.cat([first, second], 2), whole, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(state, last, rtol=1e-9, atol=1e-9)


def test_gradients_of_linear_attention(monkeypatch):
    monkeypatch.setattr("hyperlm.kernels.reference.attention.CHUNK", 4)
    inputs = [x[:1, :1].clone().requires_grad_() for x in linear_inputs(10)]
    state = normal(1, 1, K, V, seed=5).requires_grad_()
    assert gradcheck(ref.linear_attention, [*inputs, state])


def test_linear_attention_survives_strong_decay_over_long_sequences():
    q, k, v, log_decay = (x.float() for x in linear_inputs(1000))
    o, state = ref.linear_attention(q, k, v, log_decay * 500)
    assert o.isfinite().all() and state.isfinite().all()


@pytest.mark.parametrize("n", LENGTHS)
def test_scan_equals_a_loop(n):
    log_a, b, h = -normal(B, n, K, seed=1).abs(), normal(B, n, K, seed=2), normal(B, K, seed=3)
    found = ref.scan(log_a, b, h)
    for i in range(n):
        h = torch.exp(log_a[:, i]) * h + b[:, i]
        torch.testing.assert_close(found[:, i], h, rtol=1e-9, atol=1e-9)


def test_gradients_of_scan():
    assert gradcheck(
        ref.scan,
        [
            (-normal(2, 7, 3, seed=1).abs()).requires_grad_(),
            normal(2, 7, 3, seed=2).requires_grad_(),
            normal(2, 3, seed=3).requires_grad_(),
        ],
    )


def test_causal_convolution_equals_torch_and_goes_on_from_its_tail():
    x, weight = normal(B, 20, 3 * H * K, seed=1), normal(4, 3 * H * K, seed=2)
    padded = torch.nn.functional.pad(x.mT, (3, 0))
    expected = torch.nn.functional.silu(torch.nn.functional.conv1d(padded, weight.mT[:, None], groups=3 * H * K)).mT
    *whole, tail = ref.causal_conv(x, weight, H)
    for part, y in zip(expected.chunk(3, -1), whole, strict=True):
        torch.testing.assert_close(y, part.unflatten(-1, (H, K)).transpose(1, 2))
    torch.testing.assert_close(tail, x[:, -3:])
    pieces, tail = [], None
    for part in x.split([1, 2, 17], 1):
        *y, tail = ref.causal_conv(part, weight, H, tail)
        pieces.append(y)
    for i, y in enumerate(whole):
        torch.testing.assert_close(torch.cat([piece[i] for piece in pieces], 2), y)


def test_tangent_features_are_elu_plus_one_of_radius_times_direction():
    x, weight, r, beta = (
        normal(B, 9, 3 * H * K, seed=1),
        normal(4, 3 * H * K, seed=2),
        normal(B, 2 * H, 9, seed=3).abs(),
        normal(H, seed=4).abs(),
    )
    *plain, _ = ref.causal_conv(x, weight, H)
    *found, _ = ref.tangent_features(x, weight, r, beta)
    for part in (0, 1):
        y = plain[part] / plain[part].norm(dim=-1, keepdim=True) * (beta[:, None] * r[:, part * H : part * H + H])[..., None]
        torch.testing.assert_close(found[part], torch.where(y > 0, y + 1, y.exp()))
    torch.testing.assert_close(found[2], plain[2])


def test_radii_lie_between_their_limits_and_decays_below_zero():
    product = torch.tensor([[[-50.0, 0.0, 50.0, -50.0, 0.0, 50.0]]], dtype=torch.float64)
    r, log_decay = ref.radii(product, torch.zeros(3).double(), torch.zeros(3).double())
    torch.testing.assert_close(r[0, :, 0], torch.tensor([R_MIN, (R_MIN + R_MAX) / 2, R_MAX]).double())
    torch.testing.assert_close(log_decay[0, :, 0], torch.tensor([0.0, -math.log(2), -50.0]).double())


def test_norm_gate_leaves_each_head_with_its_weights_as_root_mean_square():
    o, gate = normal(B, H, 9, V, seed=1), normal(B, 9, H * V, seed=2)
    y = ref.norm_gate(3 * o, torch.full((H, V), 2.0).double(), gate) / torch.nn.functional.silu(gate)
    torch.testing.assert_close(y.unflatten(-1, (H, V)).square().mean(-1), torch.full((B, 9, H), 4.0).double(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        y.unflatten(-1, (H, V)).transpose(1, 2) / o, (2 / o.square().mean(-1, keepdim=True).sqrt()).expand_as(o), rtol=1e-4, atol=1e-4
    )


def test_a_backend_is_chosen_with_its_reason_and_never_replaced_silently():
    cpu = torch.device("cpu")
    assert kernels.select("scan", cpu).backend == "torch" and kernels.select("scan", cpu).reason
    assert kernels.select("scan", cpu, "torch").reason == "asked for"
    with pytest.raises(kernels.KernelError, match="--kernels triton"):
        kernels.select("softmax_attention", cpu, "triton")


@pytest.mark.skipif(not kernels.HAVE_TRITON, reason="Triton is not installed")
@pytest.mark.parametrize("name", kernels.OPS)
def test_a_kernel_takes_what_its_reference_takes(name):
    op = kernels.OPS[name]
    if op.triton is None:
        assert name == "softmax_attention" and op.fused  # of torch
    else:
        assert list(signature(op.triton).parameters) == list(signature(op.reference).parameters)
