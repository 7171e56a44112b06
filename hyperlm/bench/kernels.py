"""Suite `kernels`: causal linear attention in Triton beside its peers and the memory floor, on random data, checked first.

The peers are flash-linear-attention's (`pip install -e '.[peers]'`), where installed, and torch's softmax attention, which computes
something else in O(N^2). Floor: the bytes of q, k, v and o once (forward), and of these and their gradients (forward and backward), at the
rate of a large copy on the same device. Two times, in ms: "called", the median of calls from Python, each with an empty L2 cache; and
"device", the mean of calls replayed from a CUDA graph, which the launching does not slow down.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from hyperlm import env, kernels
from hyperlm.bench.report import Result, Row

SHAPES = ((8, 16, 2048, 64), (8, 16, 4096, 64), (4, 16, 8192, 64), (2, 16, 16384, 64), (1, 16, 65536, 64), (8, 16, 4096, 128), (4, 64, 4096, 128))
TOLERANCE = 1e-2  # relative error in bf16 that a kernel is timed with
QUADRATIC_LIMIT = 16384  # longest sequence for softmax attention


class Inputs(NamedTuple):
    """bf16, token-major in memory: q, k, v, d_out (B, H, N, K), and log decays (B, H, N), head-major."""

    q: Tensor
    k: Tensor
    v: Tensor
    d_out: Tensor
    log_decay: Tensor


def inputs(b: int, h: int, n: int, k: int, device: torch.device) -> Inputs:
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device)

    def leaf(x: Tensor) -> Tensor:
        return x.to(torch.bfloat16).transpose(1, 2).requires_grad_()

    q, key = (leaf(F.elu(normal(b, n, h, k)) + 1) for _ in range(2))
    log_decay = (-F.softplus(0.5 * normal(b, h, n) - 3)).requires_grad_()
    return Inputs(q, key, leaf(normal(b, n, h, k)), leaf(normal(b, n, h, k)).detach(), log_decay)


def copy_rate(device: torch.device) -> float:
    """Bytes a second, read and written, of a large copy."""
    x = torch.empty(1 << 30, dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    return 2 * x.nbytes / (milliseconds(lambda: y.copy_(x)) / 1e3)


def milliseconds(fn: Callable[[], object]) -> float:
    from triton.testing import do_bench

    return do_bench(fn, warmup=10, rep=60, return_mode="median")


def device_milliseconds(fn: Callable[[], object]) -> float:
    from triton.testing import do_bench_cudagraph

    with torch.cuda.stream(torch.cuda.Stream()):
        return do_bench_cudagraph(fn, rep=15)


def contestants(decayed: bool) -> dict[str, Callable[[Inputs], Tensor]]:
    """{name: function of the inputs giving (B, H, N, K)}; those that are installed."""
    linear = kernels.OPS["linear_attention"]["triton"]
    found: dict[str, Callable[[Inputs], Tensor]] = {"hyperlm": lambda x: linear(x.q, x.k, x.v)[0]}
    if decayed:
        return {"hyperlm, decay": lambda x: linear(x.q, x.k, x.v, x.log_decay)[0]}
    try:
        from fla.ops.linear_attn import chunk_linear_attn, fused_chunk_linear_attn
    except ImportError:
        pass
    else:
        for name, fn in (("fla chunk", chunk_linear_attn), ("fla fused chunk", fused_chunk_linear_attn)):
            found[name] = lambda x, fn=fn: fn(*(y.transpose(1, 2) for y in (x.q, x.k, x.v)), scale=1.0, normalize=False)[0].transpose(1, 2)
    for name, backend in (("softmax, cuDNN", SDPBackend.CUDNN_ATTENTION), ("softmax, FlashAttention-2", SDPBackend.FLASH_ATTENTION)):

        def softmax(x: Inputs, backend: SDPBackend = backend) -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(x.q, x.k, x.v, is_causal=True)

        found[name] = softmax
    return found


def error(fn: Callable[[Inputs], Tensor], decayed: bool, device: torch.device) -> float:
    """Largest relative error of output and gradients against the float64 reference, on a small problem."""
    x = inputs(1, 2, 500, 64, device)
    exact = Inputs(*(y.detach().double().requires_grad_() for y in x))
    leaves = ("q", "k", "v", "log_decay") if decayed else ("q", "k", "v")
    out = fn(x)
    truth = kernels.OPS["linear_attention"]["torch"](exact.q, exact.k, exact.v, exact.log_decay if decayed else None)[0]
    found = [out, *torch.autograd.grad(out, [getattr(x, name) for name in leaves], x.d_out)]
    expected = [truth, *torch.autograd.grad(truth, [getattr(exact, name) for name in leaves], exact.d_out)]
    return max(float((a.double() - e).norm() / e.norm()) for a, e in zip(*([y.detach() for y in ys] for ys in (found, expected)), strict=True))


def crossing(device: torch.device) -> str:
    """From which length linear attention with decay is faster than cuDNN's softmax attention, forward and backward, for 16 heads of 64."""
    tried = []
    for n in (128, 256, 512, 1024, 2048, 4096):
        x = inputs(65536 // n, 16, n, 64, device)
        times = []
        for fn, leaves in ((contestants(True)["hyperlm, decay"], [x.q, x.k, x.v, x.log_decay]), (contestants(False)["softmax, cuDNN"], [x.q, x.k, x.v])):
            times.append(device_milliseconds(lambda fn=fn, leaves=leaves, x=x: torch.autograd.grad(fn(x), leaves, x.d_out)))
        tried.append((n, *times))
    faster = [n for n, ours, theirs in tried if ours < theirs]
    listed = ", ".join(f"{n}: {ours:.3f} against {theirs:.3f}" for n, ours, theirs in tried)
    return f"65,536 tokens, 16 heads of 64, forward+backward with decay against cuDNN softmax, device ms: {listed}; faster from {min(faster, default='none')} on"


def run(device: torch.device) -> Result:
    """Check, then time every contestant at every shape."""
    everyone = [(name, fn, decayed) for decayed in (False, True) for name, fn in contestants(decayed).items()]
    rate = copy_rate(device)
    notes = [f"a copy moves {rate / 1e12:.2f} TB/s"]
    for name, fn, decayed in everyone:
        if not name.startswith("softmax"):
            off = error(fn, decayed, device)
            notes.append(f"{name}: largest relative error of output and gradients {off:.1e}")
            if not off < TOLERANCE:
                raise RuntimeError(f"{name} is wrong (relative error {off:.1e}), so its speed says nothing")
    from hyperlm.kernels import linear_attention

    rows: list[Row] = []
    for b, h, n, k in env.progress(SHAPES, "kernels"):
        x = inputs(b, h, n, k, device)
        size = x.q.numel() * x.q.element_size()
        floors = {"forward": 4 * size / rate * 1e3, "forward+backward": 11 * size / rate * 1e3}
        for name, fn, decayed in everyone:
            if name.startswith("softmax") and n > QUADRATIC_LIMIT:
                continue
            leaves = [x.q, x.k, x.v] + ([x.log_decay] if decayed else [])
            calls = {
                "forward": torch.no_grad()(lambda fn=fn: fn(x)),
                "forward+backward": lambda fn=fn, leaves=leaves: torch.autograd.grad(fn(x), leaves, x.d_out),
            }
            row: Row = {"B, H, N, K": f"{b}, {h}, {n}, {k}", "kernel": name}
            if name.startswith("hyperlm"):
                row["divided into"] = linear_attention.division(b * h, n, device)
            for what, call in calls.items():
                row[f"{what}, called"] = milliseconds(call)
                row[f"{what}, device"] = device_milliseconds(call)
                row[f"{what}, device / floor"] = row[f"{what}, device"] / floors[what]
            rows.append(row)
    return Result("kernels", rows, [*notes, crossing(device)])
