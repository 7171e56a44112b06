"""RMSNorm of each head times the SiLU of an output gate, in Triton: one pass forward, one backward.

Layout: token-major, a token's heads contiguous. T tokens, H heads, V head dim.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hyperlm.kernels import special
from hyperlm.kernels.differentiation import Function, gradients
from hyperlm.kernels.launch import cdiv, launch
from hyperlm.kernels.layout import token_major
from hyperlm.kernels.reference import EPS

SMALL = tl.constexpr(EPS)
TILES = 8  # of a program, in the backward pass


@triton.jit
def norm_gate_forward(o, weight, gate, y, T, H, stride_o, V: tl.constexpr, ROWS: tl.constexpr):
    t, h, vs = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1), tl.arange(0, V)
    mask, at = (t < T)[:, None], t.to(tl.int64)[:, None]
    x = tl.load(o + at * stride_o + h * V + vs[None, :], mask=mask, other=0.0).to(tl.float32)
    g = tl.load(gate + (at * H + h) * V + vs[None, :], mask=mask, other=0.0).to(tl.float32)
    w = tl.load(weight + h * V + vs).to(tl.float32)
    x *= tl.rsqrt(tl.sum(x * x, 1) / V + SMALL)[:, None] * w[None, :]
    tl.store(y + (at * H + h) * V + vs[None, :], (x * g * special.sigmoid(g, False)).to(y.dtype.element_ty), mask=mask)


@triton.jit
def norm_gate_backward(o, weight, gate, dy, do, d_gate, d_weight, T, H, stride_o, V: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr):
    """do, d_gate, and each program's part of d_weight, (programs of a head, H, V)."""
    h, vs = tl.program_id(1), tl.arange(0, V)
    w = tl.load(weight + h * V + vs).to(tl.float32)
    dw = tl.zeros((V,), tl.float32)
    for tile in range(TILES):
        t = (tl.program_id(0) * TILES + tile) * ROWS + tl.arange(0, ROWS)
        mask, at = (t < T)[:, None], t.to(tl.int64)[:, None]
        dense = (at * H + h) * V + vs[None, :]
        x = tl.load(o + at * stride_o + h * V + vs[None, :], mask=mask, other=0.0).to(tl.float32)
        g = tl.load(gate + dense, mask=mask, other=0.0).to(tl.float32)
        d = tl.load(dy + dense, mask=mask, other=0.0).to(tl.float32)
        inverse = tl.rsqrt(tl.sum(x * x, 1) / V + SMALL)[:, None]
        unit, opening = x * inverse, special.sigmoid(g, False)
        tl.store(d_gate + dense, (d * unit * w[None, :] * opening * (1 + g * (1 - opening))).to(d_gate.dtype.element_ty), mask=mask)
        d *= g * opening
        dw += tl.sum(d * unit, 0)
        d *= w[None, :]
        d = (d - unit * (tl.sum(d * unit, 1) / V)[:, None]) * inverse
        tl.store(do + dense, d.to(do.dtype.element_ty), mask=mask)
    tl.store(d_weight + (tl.program_id(0) * H + h) * V + vs, dw)


def rows(V: int) -> int:
    """Rows of a tile."""
    return min(32, 2048 // V)


def backward(o: Tensor, weight: Tensor, gate: Tensor, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    b, n, h, v = o.shape
    do, d_gate = torch.empty(o.shape, device=o.device, dtype=o.dtype), torch.empty_like(gate)
    programs = cdiv(b * n, rows(v) * TILES)
    d_weight = torch.empty(programs, h, v, device=o.device)
    launch(
        norm_gate_backward, (programs, h),
        o, weight, gate, dy.contiguous(), do, d_gate, d_weight, b * n, h, o.stride(1), V=v, ROWS=rows(v), TILES=TILES,
    )  # fmt: skip
    return do, d_weight.sum(0).to(weight.dtype), d_gate


class NormGate(Function):
    """(o (B, N, H, V), weight (H, V), gate (B, N, H V)) -> (B, N, H V)."""

    @staticmethod
    def forward(o: Tensor, weight: Tensor, gate: Tensor) -> Tensor:
        b, n, h, v = o.shape
        y = torch.empty_like(gate)
        launch(norm_gate_forward, (cdiv(b * n, rows(v)), h), o, weight, gate, y, b * n, h, o.stride(1), V=v, ROWS=rows(v))
        return y

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return gradients(backward, *ctx.saved_tensors, dy)


@torch.compiler.disable  # compiled code calls it as it is
def norm_gate(o: Tensor, weight: Tensor, gate: Tensor) -> Tensor:
    """`reference.norm_gate`, in bf16 or fp32."""
    return NormGate.apply(token_major(o), weight.contiguous(), gate.contiguous())
