"""RMSNorm of each head times the SiLU of an output gate, in Triton: one pass forward, one backward; and the product after it.

Where the product is known already, what goes into it is computed in the backward pass alone, beside its gradient.

Layout: token-major, a token's heads contiguous. T tokens, H heads, V head dim.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from hyperlm.kernels import special
from hyperlm.kernels.differentiation import Function, gradients, weight_gradient
from hyperlm.kernels.launch import cdiv, launch
from hyperlm.kernels.layout import token_major
from hyperlm.kernels.reference import frame

EPS = tl.constexpr(frame.EPS)
TILES = 8  # of a program, in the backward pass


@triton.jit
def norm_gate_forward(o, weight, gate, y, T, H, stride_o, V: tl.constexpr, ROWS: tl.constexpr):
    t, h, vs = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1), tl.arange(0, V)
    mask, at = (t < T)[:, None], t.to(tl.int64)[:, None]
    x = tl.load(o + at * stride_o + h * V + vs[None, :], mask=mask, other=0.0).to(tl.float32)
    g = tl.load(gate + (at * H + h) * V + vs[None, :], mask=mask, other=0.0).to(tl.float32)
    w = tl.load(weight + h * V + vs).to(tl.float32)
    x *= tl.rsqrt(tl.sum(x * x, 1) / V + EPS)[:, None] * w[None, :]
    tl.store(y + (at * H + h) * V + vs[None, :], (x * g * special.sigmoid(g, False)).to(y.dtype.element_ty), mask=mask)


@triton.jit
def norm_gate_backward(
    o, weight, gate, y, d, do, d_weight, T, H, stride_o,
    V: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr, RECOMPUTE: tl.constexpr,
):  # fmt: skip
    """In place of d, the gradient of y, that of gate; do, and each program's part of d_weight, (programs of a head, H, V); and RECOMPUTE,
    y."""
    h, vs = tl.program_id(1), tl.arange(0, V)
    w = tl.load(weight + h * V + vs).to(tl.float32)
    dw = tl.zeros((V,), tl.float32)
    for tile in range(TILES):
        t = (tl.program_id(0) * TILES + tile) * ROWS + tl.arange(0, ROWS)
        mask, at = (t < T)[:, None], t.to(tl.int64)[:, None]
        dense = (at * H + h) * V + vs[None, :]
        x = tl.load(o + at * stride_o + h * V + vs[None, :], mask=mask, other=0.0).to(tl.float32)
        g = tl.load(gate + dense, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(d + dense, mask=mask, other=0.0).to(tl.float32)
        inverse = tl.rsqrt(tl.sum(x * x, 1) / V + EPS)[:, None]
        unit, opening = x * inverse, special.sigmoid(g, False)
        if RECOMPUTE:
            tl.store(y + dense, (unit * w[None, :] * g * opening).to(y.dtype.element_ty), mask=mask)
        tl.store(d + dense, (grad * unit * w[None, :] * opening * (1 + g * (1 - opening))).to(d.dtype.element_ty), mask=mask)
        grad *= g * opening
        dw += tl.sum(grad * unit, 0)
        grad *= w[None, :]
        grad = (grad - unit * (tl.sum(grad * unit, 1) / V)[:, None]) * inverse
        tl.store(do + dense, grad.to(do.dtype.element_ty), mask=mask)
    tl.store(d_weight + (tl.program_id(0) * H + h) * V + vs, dw)


def rows(V: int) -> int:
    """Rows of a tile."""
    return min(32, 2048 // V)


def backward(o: Tensor, weight: Tensor, gate: Tensor, out: Tensor, y: Tensor | None, d: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of o, weight, gate and out from d, that of y out^T."""
    b, n, h, v = o.shape
    recompute, d_gate, do = y is None, d @ out, torch.empty(o.shape, device=o.device, dtype=o.dtype)
    y = torch.empty_like(gate) if y is None else y
    programs = cdiv(b * n, rows(v) * TILES)
    d_weight = torch.empty(programs, h, v, device=o.device)
    launch(
        norm_gate_backward, (programs, h),
        o, weight, gate, y, d_gate, do, d_weight, b * n, h, o.stride(1), V=v, ROWS=rows(v), TILES=TILES, RECOMPUTE=recompute,
    )  # fmt: skip
    return do, d_weight.sum(0).to(weight.dtype), d_gate, weight_gradient(d, y)


class Readout(Function):
    """(o (B, N, H, V), weight (H, V), gate (B, N, H V), out (D, H V), result (B, N, D) or None) -> result, and what was multiplied."""

    @staticmethod
    def forward(o: Tensor, weight: Tensor, gate: Tensor, out: Tensor, result: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if result is not None:
            return result.view_as(result), None
        b, n, h, v = o.shape
        y = torch.empty_like(gate)
        launch(norm_gate_forward, (cdiv(b * n, rows(v)), h), o, weight, gate, y, b * n, h, o.stride(1), V=v, ROWS=rows(v))
        return F.linear(y, out), y

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: tuple) -> None:
        if output[1] is not None:
            ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:4], output[1])

    @staticmethod
    def backward(ctx, d: Tensor, _: None) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
        return *gradients(backward, *ctx.saved_tensors, d.contiguous()), None


def readout(o: Tensor, weight: Tensor, gate: Tensor, out: Tensor, result: Tensor | None = None) -> Tensor:
    """`reference.readout`, in bf16 or fp32."""
    return Readout.apply(token_major(o), weight.contiguous(), gate.contiguous(), out, result)[0]
