"""Triton kernels against their float64 references: outputs and every gradient. In Triton's interpreter in fp32 where there is no GPU."""

import ast
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import normal

from hyperlm import kernels, model, tree
from hyperlm.config import ModelConfig
from hyperlm.geometry import R_MAX, R_MIN, direction, time_of
from hyperlm.kernels import OPS
from hyperlm.kernels.reference import optimizer as reference
from hyperlm.kernels.reference.attention import TIP
from hyperlm.loss import head_nats
from hyperlm.mixers.frame import rope_angles

pytestmark = pytest.mark.skipif(not kernels.HAVE_TRITON, reason="Triton is not installed")

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
DTYPES = [torch.float32, torch.bfloat16] if GPU else [torch.float32]  # products of bf16 are wrong in the interpreter
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2}
HEAD_DIMS = kernels.HEAD_DIMS if GPU else (32, 64)
LENGTHS = (1, 63, 64, 100, 1000, 4096) if GPU else (1, 63, 64, 100)
# Sequences, heads and lengths for kernels that go row by row, 32 at most, which is what the interpreter is slow at.
WALKS = [(2, 2, n) for n in LENGTHS] if GPU else [(2, 2, 1), (2, 1, 32), (1, 2, 70)]
WIDE = (torch.float32, torch.float64)  # dtypes that stay as they are when a model computes in bf16


def spread(*shape: int, seed: int, dtype: torch.dtype, grad: bool = True) -> torch.Tensor:
    return normal(*shape, seed=seed).to(DEVICE, dtype).requires_grad_(grad)


def token_major(*shape: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    """(B, H, N, K) as the models lay it out."""
    b, h, n, k = shape
    return normal(b, n, h, k, seed=seed).to(DEVICE, dtype).transpose(1, 2).requires_grad_()


def poison() -> None:
    """Fill what the allocator will hand out next with NaN, so that a kernel that reads what it did not write shows."""
    if GPU:
        torch.full((1 << 28,), float("nan"), device=DEVICE)


def compare(op: str, inputs: list, dtype: torch.dtype, outputs_used: int | None = None, terms: Callable | None = None) -> None:
    """The Triton kernel of `op` against its reference in float64, with random gradients of every differentiable output, or of the first few.

    The error is relative to the norm of the truth, or to that of a tensor of ones where it is smaller (a gradient may be exactly zero).
    terms: from inputs and gradients in float64, the size of what a gradient is the tiny or vanishing difference of, by the gradient's number;
    its error is then relative to that.
    """

    weights: list[torch.Tensor] = []  # of the outputs in what is differentiated, the same for both

    def run(fn, arguments):
        found = fn(*arguments)
        outputs = [x for x in (found if isinstance(found, tuple) else (found,)) if x is not None]
        leaves = [x for x in arguments if torch.is_tensor(x) and x.requires_grad]
        weighted = [x for x in outputs[:outputs_used] if x.requires_grad]
        if not weights:
            weights.extend(normal(*x.shape, seed=50 + i).to(x.device, x.dtype) for i, x in enumerate(weighted))
        own = [w.to(x.dtype) for w, x in zip(weights, weighted, strict=True)]
        return outputs, torch.autograd.grad(weighted, leaves, own, allow_unused=True, materialize_grads=True) if leaves else ()

    poison()
    outputs, grads = run(OPS[op].triton, inputs)
    exact = [x.detach().double().requires_grad_(x.requires_grad) if torch.is_tensor(x) else x for x in inputs]
    true_outputs, true_grads = run(OPS[op].reference, exact)
    sizes = terms(exact, true_grads) if terms else {}
    for kind, found, truth in (("output", outputs, true_outputs), ("gradient", grads, true_grads)):
        for i, (x, y) in enumerate(zip(found, truth, strict=True)):
            assert x.shape == y.shape
            y = y.detach()
            scale = max(float(y.norm()), y.numel() ** 0.5, float(sizes.get(i, 0.0)) if kind == "gradient" else 0.0)
            error = float((x.detach().double() - y).norm()) / scale
            assert error <= TOLERANCE[dtype], f"{kind} {i}: relative error {error:.1e}"


def of_forgetting(inputs: list, grads: tuple) -> dict:
    """Terms of the decay's gradient, q . dq and k . dk, where there is only one position or the decay forgets everything at once."""
    return {3: (inputs[0].detach() * grads[0]).sum(-1).norm()}


def of_a_single_key(inputs: list, grads: tuple) -> dict:
    """Terms of every gradient but that of v, dP and do . o, times the largest slope of a score: where there is one key, all weight is its own."""
    t_q, _, _, _, v, beta, _ = inputs
    size = ((v * grads[4]).sum(-1) * beta[:, None] * t_q).norm() / TIP
    return dict.fromkeys((0, 1, 2, 3, 5), size.detach())


def features(*shape: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    return (F.elu(token_major(*shape, seed=seed, dtype=torch.float32).detach()) + 1).to(dtype).requires_grad_()


@pytest.mark.parametrize(("decay", "state"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize(
    ("n", "segment"), [*((n, None) for n in LENGTHS), *((n, 64) for n in LENGTHS if n > 64)]
)  # the others are one segment anyway
@pytest.mark.parametrize("k", HEAD_DIMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_attention(dtype, k, n, decay, state, segment, monkeypatch):
    if segment:
        monkeypatch.setattr("hyperlm.kernels.linear_attention.segment_length", lambda heads, n, device: segment)
    b, h = 2, 3 if GPU else 1
    q, k_, v = (
        features(b, h, n, k, seed=1, dtype=dtype),
        features(b, h, n, k, seed=2, dtype=dtype),
        token_major(b, h, n, k, seed=3, dtype=dtype),
    )
    log_decay = (-0.2 * normal(b, h, n, seed=4).abs()).float().to(DEVICE).requires_grad_() if decay else None
    initial = spread(b, h, k, k, seed=5, dtype=torch.float32) if state else None
    compare("linear_attention", [q, k_, v, log_decay, initial], dtype, None if state else 1, terms=of_forgetting if n == 1 else None)


@pytest.mark.parametrize(("k", "v"), [(32, 64), (64, 32)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_attention_of_keys_and_values_of_different_widths(dtype, k, v):
    b, h, n = 1, 2, 100
    q, k_, values = (
        features(b, h, n, k, seed=1, dtype=dtype),
        features(b, h, n, k, seed=2, dtype=dtype),
        spread(b, h, n, v, seed=3, dtype=dtype),
    )
    compare("linear_attention", [q, k_, values, None, None], dtype)
    compare("linear_attention", [q, k_, values, (-normal(b, h, n, seed=4).abs()).float().to(DEVICE).requires_grad_(), None], dtype, 1)


@pytest.mark.parametrize("rate", [1e-3, 0.3, 100.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_attention_at_slow_fast_and_violent_decay(dtype, rate, monkeypatch):
    if not GPU:
        monkeypatch.setattr("hyperlm.kernels.linear_attention.MARK", 64)
    b, h, n, k = 1, 1, 4096 if GPU else 200, 32
    q, k_, v = (
        features(b, h, n, k, seed=1, dtype=dtype),
        features(b, h, n, k, seed=2, dtype=dtype),
        token_major(b, h, n, k, seed=3, dtype=dtype),
    )
    log_decay = torch.full((b, h, n), -rate, device=DEVICE).requires_grad_()
    compare("linear_attention", [q, k_, v, log_decay, None], dtype, 1, terms=of_forgetting if rate > 10 else None)


def points(b: int, h: int, n: int, k: int, seed: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """(t, s) of points at radii from R_MIN to R_MAX, s rounded to `dtype` first; among them coincident and antipodal ones.

    Those coincide at radius 1: at R_MAX, fp32 itself knows cosh d - 1 to t^2 2^-24 only, 1 % of TIP^2, and tensor cores to less.
    """
    u = direction(normal(b, n, h, k, seed=seed, dtype=torch.float32))
    r = R_MIN + (R_MAX - R_MIN) * torch.rand(b, n, h, generator=torch.Generator().manual_seed(seed))
    if n >= 6:
        u[:, 1], u[:, 2], u[:, 3], u[:, 5] = u[:, 0], u[:, 0], -u[:, 0], u[:, 4] * (1 + 1e-3)
        r[:, 0], r[:, 1], r[:, 2], r[:, 3] = 1.0, 1.0, R_MIN, R_MAX
    s = (torch.sinh(r)[..., None] * u).to(DEVICE, dtype).transpose(1, 2)
    return time_of(s.double()).float().requires_grad_(), s.requires_grad_()


@pytest.mark.parametrize("score", ["logcosh", "distance"])
@pytest.mark.parametrize("n", [1, 17, *LENGTHS[2:]])
@pytest.mark.parametrize("k", HEAD_DIMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_hyperbolic_attention(dtype, k, n, score):
    b, h = (2, 3) if GPU else (1, 1)
    t_q, s_q = points(b, h, n, k, 1, dtype)
    t_k, s_k = points(b, h, n, k, 2, dtype)
    if n >= 64:  # some queries meet themselves: of 17, these would make up all of the norm, and of its rounding
        with torch.no_grad():
            t_k[:, :, :2], s_k[:, :, :2] = t_q[:, :, :2], s_q[:, :, :2]
    beta = (torch.tensor([1.0, 0.1, 5.0])[:h] * k**0.5).to(DEVICE).requires_grad_()
    v = token_major(b, h, n, k, seed=3, dtype=dtype)
    compare("hyperbolic_attention", [t_q, s_q, t_k, s_k, v, beta, score], dtype, terms=of_a_single_key if n == 1 else None)


def last_queries(n: int, m: int, group: int, dtype: torch.dtype) -> list:
    (t_q, s_q), (t_k, s_k), v = (
        points(2, 2 * group, n, 32, 1, dtype),
        points(2, 2, m, 32, 2, dtype),
        spread(2, 2, m, 32, seed=3, dtype=dtype),
    )
    return [t_q, s_q, t_k, s_k, v, torch.linspace(1, 9, 2 * group, device=DEVICE).requires_grad_(), "logcosh"]


@pytest.mark.parametrize(("n", "m", "group"), [(1, 70, 1), (20, 70, 1), (40, 40, 3)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_hyperbolic_attention_of_the_last_queries_and_of_grouped_keys(dtype, n, m, group):
    compare("hyperbolic_attention", last_queries(n, m, group, dtype), dtype)


@pytest.mark.parametrize(("m", "group"), [(70, 1), (1100, 2)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_hyperbolic_attention_of_one_query_without_gradients(dtype, m, group):
    """The decoding kernels."""
    compare("hyperbolic_attention", [x.detach() if torch.is_tensor(x) else x for x in last_queries(1, m, group, dtype)], dtype)


@pytest.mark.parametrize("score", ["logcosh", "distance"])
@pytest.mark.parametrize("beta", [1e-3, 1.0, 12.0, 200.0, 1e4])
@torch.no_grad()
def test_hyperbolic_attention_holds_at_every_temperature(score, beta):
    """Far keys alone: without scaling each row by its largest weight, every weight would vanish."""
    n = 1000 if GPU else 70
    (t_q, s_q), (t_k, s_k) = points(1, 1, n, 64, 1, torch.float32), points(1, 1, n, 64, 2, torch.float32)
    inputs = [t_q, s_q, t_k, s_k, torch.ones(1, 1, n, 64, device=DEVICE), torch.tensor([beta], device=DEVICE), score]
    torch.testing.assert_close(OPS["hyperbolic_attention"].triton(*inputs), inputs[4])  # a mean of ones


def test_hyperbolic_attention_is_finite_for_a_million_adversarial_pairs():
    n = 1000 if GPU else 100
    radii = torch.tensor([R_MIN, R_MIN + 1e-6, 1.0, R_MAX - 1e-6, R_MAX])
    u = direction(normal(1, 1, 1, 64, seed=1, dtype=torch.float32) + 1e-4 * normal(1, 1, n, 64, seed=2, dtype=torch.float32))
    u[:, :, ::3] *= -1
    s = (torch.sinh(radii[torch.arange(n) % 5])[:, None] * u).to(DEVICE, DTYPES[-1])
    leaves = [
        time_of(s.float()),
        s,
        time_of(s.float()),
        s.clone(),
        normal(1, 1, n, 64, seed=3).to(DEVICE, DTYPES[-1]),
        torch.tensor([11.0], device=DEVICE),
    ]
    leaves = [x.requires_grad_() for x in leaves]
    for score in ("logcosh", "distance"):
        o = OPS["hyperbolic_attention"].triton(*leaves, score)
        for x in (o, *torch.autograd.grad(o, leaves, torch.ones_like(o))):
            assert torch.isfinite(x).all()


def projected(b: int, n: int, h: int, k: int, dtype: torch.dtype) -> list[torch.Tensor]:
    return [spread(b, n, 3 * h * k, seed=1, dtype=dtype), spread(4, 3 * h * k, seed=2, dtype=dtype)]


@pytest.mark.parametrize(("b", "h", "n"), WALKS)
@pytest.mark.parametrize("k", HEAD_DIMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_causal_convolution(dtype, k, b, h, n):
    compare("causal_conv", [*projected(b, n, h, k, dtype), h], dtype)


@pytest.mark.parametrize(("b", "h", "n"), WALKS)
@pytest.mark.parametrize("k", HEAD_DIMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_tangent_features(dtype, k, b, h, n):
    r = (0.05 + 4 * torch.rand(b, n, 2 * h, generator=torch.Generator().manual_seed(3))).to(DEVICE).mT.requires_grad_()
    beta = (k**0.5 * (0.5 + torch.rand(h, generator=torch.Generator().manual_seed(4)))).to(DEVICE).requires_grad_()
    compare("tangent_features", [*projected(b, n, h, k, dtype), r, beta], dtype)


@pytest.mark.parametrize(("b", "h", "n"), WALKS)
@pytest.mark.parametrize("k", HEAD_DIMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_hyperbolic_points(dtype, k, b, h, n):
    r = (R_MIN + (R_MAX - R_MIN) * torch.rand(b, n, 2 * h, generator=torch.Generator().manual_seed(3))).to(DEVICE).mT.requires_grad_()
    compare("hyperbolic_points", [*projected(b, n, h, k, dtype), r, *rope_angles(5, n, k, DEVICE)], dtype)


@pytest.mark.parametrize("op", ["causal_conv", "tangent_features"])
@pytest.mark.parametrize("cut", [1, 2, 3, 70])
def test_a_convolution_goes_on_from_its_tail(op, cut):
    b, n, h, k = 2, 100 if GPU else 73, 2 if GPU else 1, 32
    x, weight = (y.detach() for y in projected(b, n, h, k, torch.float32))
    r, beta = torch.rand(b, 2 * h, n, device=DEVICE), torch.rand(h, device=DEVICE)

    def run(x, r, tail):
        return OPS[op].triton(x, weight, *((r, beta, tail) if op == "tangent_features" else (h, tail)))

    *whole, last = run(x, r, None)
    *first, tail = run(x[:, :cut], r[..., :cut], None)
    *second, tail = run(x[:, cut:], r[..., cut:], tail)
    for i, y in enumerate(whole):
        torch.testing.assert_close(torch.cat([first[i], second[i]], 2), y)
    torch.testing.assert_close(tail, last)


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize(("radii", "decays"), [(2, 0), (16, 8), (6, 3), (80, 40)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_radii(dtype, radii, decays, n):
    product = spread(2, n, 5 + radii + decays, seed=1, dtype=dtype)[..., 5:]  # as part of a wider one
    biases = [spread(size, seed=2 + size, dtype=torch.float32) if size else None for size in (radii, decays)]
    compare("radii", [product, *biases], dtype)


def readout_inputs(n: int, v: int, dtype: torch.dtype) -> list[torch.Tensor]:
    b, h = 2, 2
    out = (spread(40, h * v, seed=4, dtype=dtype, grad=False) * (h * v) ** -0.5).requires_grad_()
    return [token_major(b, h, n, v, seed=1, dtype=dtype), spread(h, v, seed=2, dtype=dtype), spread(b, n, h * v, seed=3, dtype=dtype), out]


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("v", HEAD_DIMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_readout(dtype, v, n):
    compare("readout", [*readout_inputs(n, v, dtype), None], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_readout_of_which_the_result_is_known(dtype):
    inputs = readout_inputs(70, 64, dtype)
    compare("readout", [*inputs, OPS["readout"].triton(*inputs).detach()], dtype)


@pytest.mark.parametrize("d", [96, 512, 4096])
@pytest.mark.parametrize("branch", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_add_norm(dtype, branch, d):
    x, weight = spread(2, 13, d, seed=1, dtype=torch.float32), spread(d, seed=3, dtype=torch.float32)
    y, hollow = spread(2, 13, d, seed=2, dtype=dtype) if branch else None, torch.zeros((), device=DEVICE).expand(x.shape).requires_grad_()
    compare("add_norm", [x, y, weight, dtype], dtype)
    compare("add_norm", [hollow, y, weight, dtype, x.detach().to(dtype)], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_add(dtype):
    x, y = (spread(3, 5, 1000, seed=seed, dtype=dtype) for seed in (1, 2))
    for inputs in ([x, y], [x.detach().float().requires_grad_(), y]):
        compare("add", inputs, dtype)


def mlp_inputs(dtype: torch.dtype) -> list[torch.Tensor]:
    t, r, f, s = 26, 24, 300, 40
    weights = (spread(f, r, seed=2, dtype=dtype, grad=False) * r**-0.5, spread(s, f, seed=3, dtype=dtype, grad=False) * f**-0.5)
    return [spread(2, t // 2, r, seed=1, dtype=dtype), *(w.requires_grad_() for w in weights)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_mlp(dtype):
    compare("mlp", [*mlp_inputs(dtype), None], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_mlp_of_which_the_result_is_known(dtype):
    inputs = mlp_inputs(dtype)
    compare("mlp", [*inputs, OPS["mlp"].triton(*inputs).detach()], dtype)


def test_mlp_refuses_a_second_backward_pass_over_what_the_first_overwrote():
    y = OPS["mlp"].triton(*mlp_inputs(torch.float32)).sum()
    y.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_gelu_far_from_0():
    x, one = torch.linspace(-12, 12, 20001, device=DEVICE)[:, None], torch.ones(1, 1, device=DEVICE)
    assert float((OPS["mlp"].triton(x, one, one).double() - F.gelu(x.double())).abs().max()) <= 1e-6


@pytest.mark.parametrize("start", [False, True])
@pytest.mark.parametrize("n", LENGTHS)
def test_scan(n, start):
    b, c = 2, 40
    log_a = (-normal(b, n, c, seed=1).abs()).float().to(DEVICE).requires_grad_()
    h = spread(b, c, seed=3, dtype=torch.float32) if start else None
    compare("scan", [log_a, spread(b, n, c, seed=2, dtype=torch.float32), h], torch.float32)


@pytest.mark.parametrize("k", HEAD_DIMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_token_of_phase_8(dtype, k):
    b, h = 3, 2
    x, weight = spread(b, 3 * h * k, seed=1, dtype=dtype, grad=False), spread(4, 3 * h * k, seed=2, dtype=dtype, grad=False)
    r, beta = torch.rand(b, 2 * h, device=DEVICE) * 4, torch.rand(h, device=DEVICE) * k**0.5
    log_decay, state = -torch.rand(b, h, device=DEVICE), torch.rand(b, h, k, k, device=DEVICE)
    tail, norm = spread(b, 3, 3 * h * k, seed=3, dtype=dtype, grad=False), spread(h, k, seed=4, dtype=dtype, grad=False)
    gate = spread(b, h * k, seed=5, dtype=dtype, grad=False)
    inputs = [x, weight, r, beta, log_decay, state, tail, norm, gate]
    expected = OPS["tangent_step"].reference(*(y.double() for y in inputs))
    for found, truth in zip(OPS["tangent_step"].triton(*inputs), expected, strict=True):
        assert float((found.double() - truth).norm() / truth.norm()) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("width", [1, 300, 5000])
def test_cross_entropy_of_a_chunk(dtype, width):
    """Logits of up to 60, targets before, among and after those of the chunk, or none; some normaliser from before, or none."""
    logits, first = (20 * normal(7, width, seed=1)).to(DEVICE, dtype), 100
    targets = torch.tensor([-1, 0, 99, 100, 100 + width // 2, 99 + width, 100 + width], device=DEVICE)
    before = torch.tensor([0.0, -torch.inf, 30.0, -50.0, 100.0, -torch.inf, 2.0], device=DEVICE)
    x, oracle = logits.double(), before.double()
    there = (targets >= first) & (targets < first + width)
    rows, place = torch.arange(7, device=DEVICE)[there], targets[there] - first
    oracle = torch.logaddexp(oracle, torch.logsumexp(x, 1))
    log_z, picked = before.clone(), torch.full((7,), 3.0, device=DEVICE)
    OPS["online_logsumexp"].triton(logits, first, targets, log_z, picked)
    torch.testing.assert_close(log_z.double(), oracle, rtol=1e-6, atol=1e-5)
    assert torch.equal(picked[there], 3 + logits[rows, place].float()) and (picked[~there] == 3).all()
    truth = (x - oracle[:, None]).exp()
    truth[rows, place] -= 1
    log_z[0], truth[0] = torch.inf, 0  # a token that does not count
    OPS["cross_entropy_backward"].triton(logits, first, targets, log_z)
    torch.testing.assert_close(logits.double(), truth, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)


@pytest.mark.parametrize("n", [1, 4096, 10000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_accumulate(dtype, n):
    total, x = normal(n, seed=1).float().to(DEVICE), normal(n, seed=2).to(DEVICE, dtype)
    expected = total + x.float()
    OPS["accumulate"].triton(total, x)
    assert torch.equal(total, expected)


def test_tell():
    x, at_home = normal(37, seed=1).float().to(DEVICE), torch.empty(37, pin_memory=GPU)
    OPS["copy_to_host"].triton(x, at_home)
    if GPU:
        torch.cuda.synchronize()
    assert torch.equal(at_home, x.cpu())


def test_norm():
    parts = [
        normal(*shape, seed=i).to(DEVICE, dtype)
        for i, (shape, dtype) in enumerate([((1,), torch.float32), ((300, 211), torch.bfloat16), ((40000,), torch.float32)])
    ]
    truth = torch.cat([x.double().flatten() for x in parts]).norm()
    for backend in ("triton", "torch"):
        torch.testing.assert_close(OPS["norm"].backend(backend)(parts).double(), truth, rtol=1e-5, atol=0)


@pytest.mark.parametrize("count", range(1, reference.PARTS + 1))
@pytest.mark.parametrize("n", [1, 255, 5000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gradients_in_8_bits(n, count, dtype):
    """The noise is the same: only a product rounded otherwise may tip a number to its neighbour."""
    parts = [normal(n, seed=i).to(DEVICE, dtype) for i in range(count)]
    base, offset = torch.tensor(5 << 40, device=DEVICE), torch.tensor(-3, device=DEVICE)
    (coded, squares), (exact, _) = (OPS["encode8"].backend(backend)(parts, base, offset) for backend in ("triton", "torch"))
    assert (coded[:, : reference.QUANT_BLOCK] != exact[:, : reference.QUANT_BLOCK]).float().mean() < 0.01
    torch.testing.assert_close(coded.view(torch.float32)[:, -1], exact.view(torch.float32)[:, -1], rtol=1e-6, atol=0)
    torch.testing.assert_close(squares.double().sum(), torch.stack(parts).double().sum(0).square().sum(), rtol=1e-5, atol=0)
    truth, largest = torch.stack(parts).float().sum(0), float(coded.view(torch.float32)[:, -1].max())
    step = 2 * (truth.abs() * largest).sqrt() / 127 + largest / 127**2  # from a code to the next
    assert ((reference.decode8(coded).flatten()[:n] - truth).abs() <= 1.01 * step).all()


@pytest.mark.parametrize("part", reference.UpdatePart)
@pytest.mark.parametrize("coded", [True, False])
@pytest.mark.parametrize("decay", [True, False])
@pytest.mark.parametrize("n", [1, 255, 1000, 2100])
def test_adamw_with_8_bit_moments(n, decay, coded, part):
    """The noise is the same: only a product rounded otherwise may tip a number to its neighbour."""
    results = []
    for backend in ("triton", "torch"):
        w, moments = (
            normal(n, seed=1).float().mul(0.02).bfloat16().to(DEVICE),
            torch.zeros(-(-n // 256), reference.ROW, dtype=torch.uint8, device=DEVICE),
        )
        for step in range(4):
            rates = torch.tensor([0.999, 0.9, 0.95, 1e-2 / (1 - 0.9 ** (step + 1)), (1 - 0.95 ** (step + 1)) ** -0.5], device=DEVICE)
            g = normal(n, seed=10 + step).float().bfloat16().to(DEVICE)
            g = (
                OPS["encode8"].backend(backend)([g], torch.tensor(step << 40, device=DEVICE), torch.tensor(0, device=DEVICE))[0]
                if coded
                else g
            )
            factor, base, offset = (
                torch.tensor(0.7, device=DEVICE),
                torch.tensor(step << 50, device=DEVICE),
                torch.tensor(step, device=DEVICE),
            )
            OPS["adamw8"].backend(backend)(
                w, g, moments, factor, rates, base, offset, decay, part if step == 3 else reference.UpdatePart.FULL
            )
        results.append((w, moments))
    (w, moments), (exact, exact_moments) = results
    differ = (w != exact).float().mean() + (moments[:, :512] != exact_moments[:, :512]).float().mean()
    assert differ < 0.01 and float((w.float() - exact.float()).abs().max()) <= 2**-8 * float(exact.float().abs().max())
    torch.testing.assert_close(moments.view(torch.float32)[:, 128:], exact_moments.view(torch.float32)[:, 128:], rtol=1e-5, atol=0)


@pytest.mark.parametrize("part", reference.UpdatePart)
@pytest.mark.parametrize("decay", [True, False])
def test_adamw_of_vectors(decay, part):
    results = []
    for backend in ("triton", "torch"):
        w, g, moments = (normal(*shape, seed=i).float().to(DEVICE) for i, shape in enumerate(((1500,), (1500,), (2, 1500))))
        rates, factor = torch.tensor([0.999, 0.9, 0.95, 0.02, 1.5], device=DEVICE), torch.tensor(0.7, device=DEVICE)
        OPS["adamw8"].backend(backend)(w, g, moments.abs_(), factor, rates, *torch.zeros(2, dtype=torch.int64, device=DEVICE), decay, part)
        results.append((w, moments))
    for found, truth in zip(*results, strict=True):
        torch.testing.assert_close(found, truth, rtol=1e-5, atol=1e-6)


def test_kernels_work_under_torch_func():
    q, k, v = (spread(1, 1, 20, 32, seed=i, dtype=torch.float32, grad=False) for i in range(3))
    log_decay = torch.full((1, 1, 20), -0.1, device=DEVICE)

    def total(fn, *x):
        return fn(*x)[0].sin().sum()

    for x, y in zip(
        *(torch.func.grad(total, (1, 2, 3, 4))(OPS["linear_attention"].backend(b), q, k, v, log_decay) for b in ("triton", "torch")),
        strict=True,
    ):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


def test_every_kernel_is_compared_with_its_reference():
    """By name, here: who adds an operation adds a test of it."""
    kernels_of = {op for op in OPS if not kernels.unusable(op, "triton", DEVICE)}
    assert kernels_of <= {node.value for node in ast.walk(ast.parse(Path(__file__).read_text())) if isinstance(node, ast.Constant)}


MODELS = {
    "phase7": ModelConfig(kind="phase7", d_model=64, n_layers=1, head_dim=32, vocab_size=64),
    "phase7-distance": ModelConfig(kind="phase7", score="distance", d_model=64, n_layers=1, head_dim=32, vocab_size=64),
    "phase8": ModelConfig(kind="phase8", d_model=64, n_layers=1, head_dim=32, vocab_size=64),
    "phase8-ssm": ModelConfig(kind="phase8", d_model=64, n_layers=1, head_dim=32, vocab_size=64, ssm=True),
}


@pytest.fixture(params=MODELS.values(), ids=MODELS.keys())
def cfg(request) -> ModelConfig:
    return request.param


def batch() -> torch.Tensor:
    """Longer than a tile of every kernel on a GPU, and than a walk of 32 rows in the interpreter."""
    return torch.randint(64, (1, 71 if GPU else 40), generator=torch.Generator().manual_seed(0)).to(DEVICE)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_model_trains_as_with_reference_kernels(cfg, compiled):
    params = model.init(cfg, 0, device=DEVICE)
    run = model.compiled_block("aot_eager") if compiled else model.run_block

    def loss_and_gradients(backend: str) -> tuple[torch.Tensor, ...]:
        p = tree.map(lambda x: x.detach().clone().requires_grad_(), params)
        features = model.hidden(p, batch()[:, :-1], cfg, kernels=backend, run=run if backend == "triton" else model.run_block)
        loss = head_nats(features.flatten(0, 1), p["head"]["weight"], batch()[:, 1:].flatten())[0]
        return loss, *torch.autograd.grad(loss, tree.leaves(p))

    for x, y in zip(loss_and_gradients("triton"), loss_and_gradients("torch"), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-3 * float(y.detach().abs().max()))


@torch.no_grad()
def test_a_model_decodes_as_with_reference_kernels(cfg):
    params, tokens = model.init(cfg, 0, device=DEVICE), batch()
    expected = model.apply(params, tokens, cfg, kernels="torch")
    logits, cache = model.extend(params, tokens[:, :35], model.init_cache(cfg, 1, device=DEVICE), cfg, kernels="triton")
    torch.testing.assert_close(logits, expected[:, :35], rtol=1e-3, atol=1e-3)
    for n in range(35, 40):
        logits, cache = model.decode(params, tokens[:, n], cache, cfg, kernels="triton")
        torch.testing.assert_close(logits, expected[:, n], rtol=1e-3, atol=1e-3)
