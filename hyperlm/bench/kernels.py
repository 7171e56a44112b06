"""Suites `linear` and `hyperbolic`: the attention kernels beside their peers and the limits of the device, on random data, checked first.

The peers of linear attention are flash-linear-attention's (`pip install -e '.[peers]'`), where installed; those of hyperbolic attention are
torch's softmax attention, which also stands beside linear attention, computing something else. Two times, in ms: "called", the median of
calls from Python, each with an empty L2 cache; and "device", the mean of calls replayed from a CUDA graph, which launching does not slow
down, with its spread over ten replays. What is wrong or fails is a row that says why. Limits are lower bounds of a time: bytes of inputs
and outputs at the rate of a large copy, operations of the products at the rate of a large product, special functions at 16 a clock and
multiprocessor, all of the same device.
"""

from collections.abc import Callable, Iterator
from statistics import mean
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from hyperlm import env, geometry, kernels
from hyperlm.bench.pool import Failure, attempt
from hyperlm.bench.result import Figure, Lines, Result, Row, Table
from hyperlm.bench.speed import SPREAD, Timing
from hyperlm.geometry import R_MAX, R_MIN

Shape = tuple[int, int, int, int]  # B, H, N, K
Inputs = dict[str, Tensor]  # bf16 (B, H, N, K), token-major in memory, and what else an op takes, fp32

LINEAR: tuple[Shape, ...] = (
    (8, 16, 2048, 64), (8, 16, 4096, 64), (4, 16, 8192, 64), (2, 16, 16384, 64), (1, 16, 65536, 64), (8, 16, 4096, 128), (4, 64, 4096, 128),
)  # fmt: skip
HYPERBOLIC: tuple[Shape, ...] = (
    (8, 16, 2048, 64), (8, 16, 4096, 64), (4, 16, 8192, 64), (2, 16, 16384, 64), (1, 16, 65536, 64), (4, 32, 4096, 128),
)  # fmt: skip
CROSSING = (128, 256, 512, 1024, 2048, 4096)  # lengths between which linear attention becomes faster than softmax
TOLERANCE = 1e-2  # relative error in bf16 that a kernel is timed with
QUADRATIC_LIMIT = 16384  # longest sequence for softmax attention beside linear attention


class Contestant(NamedTuple):
    """A kernel, the inputs that it is differentiated for, its reference if it is ours or computes the same, and up to which N it is
    timed."""

    name: str
    fn: Callable[[Inputs], Tensor]
    leaves: tuple[str, ...]
    reference: Callable[[Inputs], Tensor] | None = None
    limit: int = 1 << 30


def normal(*shape: int, device: torch.device) -> Tensor:
    return torch.randn(*shape, device=device)


def leaf(x: Tensor) -> Tensor:
    """(B, N, H, K) as a differentiable bf16 (B, H, N, K)."""
    return x.to(torch.bfloat16).transpose(1, 2).requires_grad_()


def linear_inputs(shape: Shape, device: torch.device) -> Inputs:
    """Features q and k, v, the gradient of the output, and log decays (B, H, N) as the model makes them."""
    b, h, n, k = shape
    q, key = (leaf(F.elu(normal(b, n, h, k, device=device)) + 1) for _ in range(2))
    v, d_out = (leaf(normal(b, n, h, k, device=device)) for _ in range(2))
    log_decay = (-F.softplus(0.5 * normal(b, h, n, device=device) - 3)).requires_grad_()
    return {"q": q, "k": key, "v": v, "d_out": d_out.detach(), "log_decay": log_decay}


def hyperbolic_inputs(shape: Shape, device: torch.device) -> Inputs:
    """Points (t, s) at random radii, the same directions as q and k for softmax, v, beta, and the gradient of the output."""
    b, h, n, k = shape
    x: Inputs = {"beta": torch.full((h,), k**0.5, device=device).requires_grad_()}
    for name in "qk":
        u = geometry.direction(normal(b, n, h, k, device=device))
        x[name] = leaf(u * k**0.25)
        s = leaf(torch.sinh(R_MIN + (R_MAX - R_MIN) * torch.rand(b, n, h, 1, device=device)) * u)
        x[f"s_{name}"], x[f"t_{name}"] = s, geometry.time_of(s.detach().float()).requires_grad_()
    x["v"], d_out = (leaf(normal(b, n, h, k, device=device)) for _ in range(2))
    return x | {"d_out": d_out.detach()}


def softmax(backend: SDPBackend) -> Callable[[Inputs], Tensor]:
    def attention(x: Inputs) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(x["q"], x["k"], x["v"], is_causal=True, scale=1.0)

    return attention


def softmaxes(limit: int) -> list[Contestant]:
    backends = {"softmax, cuDNN": SDPBackend.CUDNN_ATTENTION, "softmax, FlashAttention-2": SDPBackend.FLASH_ATTENTION}
    return [Contestant(name, softmax(backend), ("q", "k", "v"), limit=limit) for name, backend in backends.items()]


def linear_contestants() -> list[Contestant]:
    """Those that are installed."""

    def ours(backend: str, *decay: str) -> Callable[[Inputs], Tensor]:
        return lambda x: kernels.OPS["linear_attention"].backend(backend)(x["q"], x["k"], x["v"], *(x[name] for name in decay))[0]

    contestants = [Contestant("hyperlm", ours("triton"), ("q", "k", "v"), ours("torch"))]
    contestants.append(Contestant("hyperlm, decay", ours("triton", "log_decay"), ("q", "k", "v", "log_decay"), ours("torch", "log_decay")))
    try:
        from fla.ops.linear_attn import chunk_linear_attn, fused_chunk_linear_attn
    except ImportError:
        return contestants + softmaxes(QUADRATIC_LIMIT)
    for name, fn in (("fla chunk", chunk_linear_attn), ("fla fused chunk", fused_chunk_linear_attn)):

        def peer(x: Inputs, fn: Callable = fn) -> Tensor:
            return fn(*(x[y].transpose(1, 2) for y in "qkv"), scale=1.0, normalize=False)[0].transpose(1, 2)

        contestants.append(Contestant(name, peer, ("q", "k", "v"), ours("torch")))
    return contestants + softmaxes(QUADRATIC_LIMIT)


def hyperbolic_contestants() -> list[Contestant]:
    leaves = ("t_q", "s_q", "t_k", "s_k", "v", "beta")

    def ours(backend: str, score: str) -> Callable[[Inputs], Tensor]:
        return lambda x: kernels.OPS["hyperbolic_attention"].backend(backend)(*(x[name] for name in leaves), score)

    contestants = [
        Contestant(f"hyperlm, {score}", ours("triton", score), leaves, ours("torch", score)) for score in ("logcosh", "distance")
    ]
    return contestants + softmaxes(1 << 30)


def milliseconds(fn: Callable[[], object]) -> float:
    from triton.testing import do_bench

    return do_bench(fn, warmup=10, rep=40, return_mode="median")


def device_milliseconds(fn: Callable[[], object]) -> list[float]:
    """Of each replay, the mean of its calls."""
    from triton.testing import do_bench_cudagraph

    with torch.cuda.stream(torch.cuda.Stream()):
        return do_bench_cudagraph(fn, rep=15, return_mode="all")


class Rates(NamedTuple):
    """What the device does in a ms: bytes of a copy, read and written; operations of a bf16 product; special functions."""

    bytes: float
    operations: float
    special: float


def rates(device: torch.device) -> Rates:
    from triton.runtime import driver

    x, a = torch.empty(1 << 30, dtype=torch.uint8, device=device), torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
    y = torch.empty_like(x)
    chip = driver.active.utils.get_device_properties(device.index)
    copied, product = milliseconds(lambda: y.copy_(x)), milliseconds(lambda: a @ a)
    return Rates(2 * x.nbytes / copied, 2 * 8192**3 / product, 16 * chip["multiprocessor_count"] * chip["sm_clock_rate"])


def gradients(contestant: Contestant, x: Inputs) -> tuple[Tensor, ...]:
    return torch.autograd.grad(contestant.fn(x), [x[name] for name in contestant.leaves], x["d_out"])


def error(contestant: Contestant, x: Inputs) -> float:
    """Largest relative error of output and gradients against the reference in float64."""
    exact = {name: y.detach().double().requires_grad_() for name, y in x.items()}
    true = contestant._replace(fn=contestant.reference)
    computed, expected = ([c.fn(y), *gradients(c, y)] for c, y in ((contestant, x), (true, exact)))
    return max(float((a.detach().double() - e.detach()).norm() / e.detach().norm()) for a, e in zip(computed, expected, strict=True))


def check(contestants: list[Contestant], x: Inputs) -> tuple[list[Contestant], list[Row], list[str]]:
    """Those that may be timed, a row for each that may not, as it is wrong or fails, and a line on the error of each that has a
    reference."""
    right: list[Contestant] = []
    rows: list[Row] = []
    notes: list[str] = []
    for contestant in contestants:
        off = attempt(lambda c, _: error(c, x), contestant, x["q"].device) if contestant.reference is not None else 0.0
        if isinstance(off, Failure):
            rows.append({"kernel": contestant.name, "failed": off.why})
        elif not off < TOLERANCE:
            rows.append({"kernel": contestant.name, "failed": f"wrong: relative error {off:.1e}, so its speed says nothing"})
        else:
            right.append(contestant)
            notes += [f"{contestant.name}: largest relative error of output and gradients {off:.1e}"] * (contestant.reference is not None)
    return right, rows, notes


def timed(contestants: list[Contestant], shape: Shape, x: Inputs, limits: dict[str, float]) -> list[Row]:
    """A row for each contestant; `limits` are the shortest times that are possible, in ms, forward and forward+backward."""
    rows: list[Row] = []
    for contestant in contestants:
        if shape[2] > contestant.limit:
            continue
        row: Row = {"B, H, N, K": ", ".join(map(str, shape)), "kernel": contestant.name}
        outcome = attempt(lambda c, _: times(c, x, limits), contestant, x["q"].device)
        row |= {"failed": outcome.why} if isinstance(outcome, Failure) else outcome
        env.say(
            f"{row['B, H, N, K']:20} {contestant.name:26}" + "".join(f" {value:9.4g}" for value in row.values() if isinstance(value, float))
        )
        rows.append(row)
    return rows


def times(contestant: Contestant, x: Inputs, limits: dict[str, float]) -> Row:
    row: Row = {}
    for what, call in (("forward", torch.no_grad()(lambda: contestant.fn(x))), ("forward+backward", lambda: gradients(contestant, x))):
        row[f"{what}, called"] = milliseconds(call)
        replays = device_milliseconds(call)
        row[f"{what}, device"] = mean(replays)
        row[f"{what}, ± %"] = Timing(replays).spread
        row[f"{what}, device / limit"] = row[f"{what}, device"] / limits[what]
    return row


def by_length(rows: list[Row]) -> list[Row]:
    """For a figure: forward and backward of 16 heads of 64, for each token of a sequence."""
    points = []
    for row in rows:
        b, h, n, k = map(int, row.get("B, H, N, K", "0, 0, 0, 0").split(", "))
        if (h, k) == (16, 64) and "forward+backward, device" in row:
            points.append({"kernel": row["kernel"], "length": n, "ns a token": row["forward+backward, device"] * 1e6 / (b * n)})
    return points


def result(suite: str, rows: list[Row], notes: list[str]) -> Result:
    spread = SPREAD.replace("all calls", "the replays")
    caption = f"Times in ms, called from Python and on the device alone, and the latter against its limit. {spread}."
    drawn: Figure = Lines(
        f"{suite}_attention", "Forward and backward of 16 heads of 64, for each token of a sequence", "by length", "length", "ns a token",
        ("kernel",), x_label="length (tokens)", y_label="forward and backward (ns a token)", log_x=True, log_y=True,
    )  # fmt: skip
    return Result(suite, [Table("kernels", list(rows), caption), Table("by length", by_length(rows), shown=False)], list(notes), [drawn])


def crossing(entrants: list[Contestant], device: torch.device) -> str:
    """From which length linear attention with decay is faster than cuDNN's softmax attention, forward and backward, for 16 heads of 64."""
    took = {}
    for n in CROSSING:
        x = linear_inputs((65536 // n, 16, n, 64), device)
        took[n] = [mean(device_milliseconds(lambda c=c, x=x: gradients(c, x))) for c in entrants]
    listed = ", ".join(f"{n}: {ours:.3f} against {theirs:.3f}" for n, (ours, theirs) in took.items())
    first = min((n for n, (ours, theirs) in took.items() if ours < theirs), default="none")
    return f"65,536 tokens, 16 heads of 64, forward+backward with decay against cuDNN softmax, device ms: {listed}; faster from {first} on"


def linear(device: torch.device) -> Iterator[Result]:
    """Check, then time causal linear attention and its peers. Yields what is measured so far."""
    from hyperlm.kernels.linear_attention import division

    contestants, rows, notes = check(linear_contestants(), linear_inputs((1, 2, 500, 64), device))
    rate = rates(device)
    notes.insert(0, f"a copy moves {rate.bytes / 1e9:.2f} TB/s")
    for shape in env.progress(LINEAR, "linear"):
        x = linear_inputs(shape, device)
        limits = {"forward": 4 * x["q"].nbytes / rate.bytes, "forward+backward": 11 * x["q"].nbytes / rate.bytes}
        notes.append(f"{', '.join(map(str, shape))}: {division(shape[0] * shape[1], shape[2], device)}")
        rows += timed(contestants, shape, x, limits)
        yield result("linear", rows, notes)
    if len(entrants := [c for c in contestants if c.name in ("hyperlm, decay", "softmax, cuDNN")]) == 2:
        outcome = attempt(crossing, entrants, device)
        yield result("linear", rows, [*notes, f"crossing: {outcome.why}" if isinstance(outcome, Failure) else outcome])


def hyperbolic(device: torch.device) -> Iterator[Result]:
    """Check, then time exact hyperbolic attention and softmax attention. Yields what is measured so far.

    The limit is the larger of two: 2 products and 2 special functions a pair forward, 7 and 4 more backward (weights are computed twice).
    The distance takes 3 and 6 special functions, but is held against the same.
    """
    contestants, rows, notes = check(hyperbolic_contestants(), hyperbolic_inputs((1, 2, 500, 64), device))
    rate = rates(device)
    notes.insert(0, f"a product of 8192 x 8192 runs at {rate.operations / 1e9:.0f} TFLOP/s")
    for shape in env.progress(HYPERBOLIC, "hyperbolic"):
        b, h, n, k = shape
        pairs = b * h * n * (n + 1) / 2
        products = {"forward": 2 * 2 * pairs * k / rate.operations, "forward+backward": 9 * 2 * pairs * k / rate.operations}
        special = {"forward": 2 * pairs / rate.special, "forward+backward": 6 * pairs / rate.special}
        listed = "; ".join(f"{what}: products {products[what]:.3f} ms, special functions {special[what]:.3f} ms" for what in products)
        notes.append(f"{', '.join(map(str, shape))}: limits {listed}")
        rows += timed(contestants, shape, hyperbolic_inputs(shape, device), {what: max(products[what], special[what]) for what in products})
        yield result("hyperbolic", rows, notes)
