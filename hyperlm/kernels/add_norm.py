"""The residual stream in Triton: what a branch adds to it, and the RMSNorm that the next branch reads, in one pass forward and one
backward; and sums without a norm.

Layout: (T, D), T tokens, D model width. The stream is fp32, or rounded where a block begins; branches are in the dtype of the matrices.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hyperlm.kernels.differentiation import Function, gradients
from hyperlm.kernels.launch import cdiv, launch, next_power_of_2
from hyperlm.kernels.reference import frame

EPS = tl.constexpr(frame.EPS)
TOKENS = 16  # of a program, in the backward pass
ELEMENTS = 4096  # numbers that a program adds, where there is no norm


@triton.jit
def add_norm_forward(x, y, weight, out, n, T, D, WIDTH: tl.constexpr, ADD: tl.constexpr):
    """n = norm(out) weight, out = x + y with ADD; else x is the stream as it is."""
    t, c = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH)
    row = tl.load(x + t * D + c, mask=c < D, other=0.0).to(tl.float32)
    if ADD:
        row += tl.load(y + t * D + c, mask=c < D, other=0.0).to(tl.float32)
        tl.store(out + t * D + c, row, mask=c < D)
    row *= tl.rsqrt(tl.sum(row * row, 0) / D + EPS)
    tl.store(n + t * D + c, (row * tl.load(weight + c, mask=c < D, other=0.0)).to(n.dtype.element_ty), mask=c < D)


@triton.jit
def add_norm_backward(
    out, weight, d_out, d_n, dx, dy, d_weight, T, D, WIDTH: tl.constexpr, TOKENS: tl.constexpr, ADD: tl.constexpr, STREAM: tl.constexpr
):  # fmt: skip
    """dx, dy (the same, in the dtype of the branch), and each program's part of d_weight, (programs, D). STREAM: there is a d_out."""
    c = tl.arange(0, WIDTH)
    dw = tl.zeros((WIDTH,), tl.float32)
    for token in range(TOKENS):
        t = (tl.program_id(0) * TOKENS + token).to(tl.int64)
        mask = (c < D) & (t + c * 0 < T)
        row = tl.load(out + t * D + c, mask=mask, other=0.0).to(tl.float32)
        d = tl.load(d_n + t * D + c, mask=mask, other=0.0).to(tl.float32)
        inverse = tl.rsqrt(tl.sum(row * row, 0) / D + EPS)
        unit = row * inverse
        dw += d * unit
        d *= tl.load(weight + c, mask=c < D, other=0.0)  # from the cache: registers are dearer
        d = (d - unit * (tl.sum(d * unit, 0) / D)) * inverse
        if STREAM:
            d += tl.load(d_out + t * D + c, mask=mask, other=0.0)
        tl.store(dx + t * D + c, d, mask=mask)
        if ADD:
            tl.store(dy + t * D + c, d.to(dy.dtype.element_ty), mask=mask)
    tl.store(d_weight + tl.program_id(0) * D + c, dw, mask=c < D)


@triton.jit
def sum_of(x, y, out, N, ELEMENTS: tl.constexpr, ADD: tl.constexpr):
    """out = x + y with ADD, else x; in fp32."""
    at = tl.program_id(0).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
    row = tl.load(x + at, mask=at < N, other=0.0).to(tl.float32)
    if ADD:
        row += tl.load(y + at, mask=at < N, other=0.0).to(tl.float32)
    tl.store(out + at, row, mask=at < N)


def warps(D: int) -> int:
    """Of a program that holds a token."""
    return min(32, max(1, next_power_of_2(D) // 256))


def backward(
    stream: Tensor, weight: Tensor, branch: torch.dtype | None, d_out: Tensor | None, d_n: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Gradients of x, y (None without) and weight."""
    d, t = stream.shape[-1], stream.numel() // stream.shape[-1]
    d_n = torch.zeros_like(stream) if d_n is None else d_n.contiguous()
    dx = torch.empty_like(stream, dtype=torch.float32)
    dy = None if branch is None else torch.empty_like(stream, dtype=branch)
    programs = cdiv(t, TOKENS)
    d_weight = torch.empty(programs, d, device=stream.device)
    launch(
        add_norm_backward, (programs,),
        stream, weight, None if d_out is None else d_out.contiguous(), d_n, dx, dy, d_weight, t, d,
        WIDTH=next_power_of_2(d), TOKENS=TOKENS, ADD=dy is not None, STREAM=d_out is not None, warps=warps(d), stages=1,
    )  # fmt: skip
    return dx, dy, d_weight.sum(0)


class AddNorm(Function):
    """(x (..., D) fp32, y or None, weight (D,) fp32, dtype, values of x or None) -> the stream and its norm, in dtype."""

    @staticmethod
    def forward(x: Tensor, y: Tensor | None, weight: Tensor, dtype: torch.dtype, values: Tensor | None) -> tuple[Tensor, Tensor]:
        stream = x if values is None else values
        d, t = stream.shape[-1], stream.numel() // stream.shape[-1]
        out, n = x.view_as(x) if y is None else torch.empty_like(stream, dtype=torch.float32), torch.empty_like(stream, dtype=dtype)
        launch(add_norm_forward, (t,), stream, y, weight, out, n, t, d, WIDTH=next_power_of_2(d), ADD=y is not None, warps=warps(d))
        return out, n

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: tuple) -> None:
        _, y, weight, _, values = inputs
        ctx.branch = None if y is None else y.dtype
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(output[0] if y is not None or values is None else values, weight)

    @staticmethod
    def backward(ctx, d_out: Tensor | None, d_n: Tensor | None) -> tuple[Tensor | None, ...]:
        return *gradients(backward, *ctx.saved_tensors, ctx.branch, d_out, d_n), None, None


def add_norm(x: Tensor, y: Tensor | None, weight: Tensor, dtype: torch.dtype, values: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`reference.add_norm`, of a stream in fp32."""
    x, values = (x.contiguous(), None) if values is None else (x, values.contiguous())
    return AddNorm.apply(x, None if y is None else y.contiguous(), weight, dtype, values)


def add_wide(x: Tensor, y: Tensor | None, out: Tensor) -> None:
    """out = x + y, or x, in fp32; `out` may be `x`."""
    launch(sum_of, (cdiv(x.numel(), ELEMENTS),), x, y, out, x.numel(), ELEMENTS=ELEMENTS, ADD=y is not None, warps=8)


class Add(Function):
    """(x, y) -> x + y, fp32."""

    @staticmethod
    def forward(x: Tensor, y: Tensor) -> Tensor:
        out = torch.empty_like(x, dtype=torch.float32)
        add_wide(x, y, out)
        return out

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: Tensor) -> None:
        ctx.dtypes = tuple(x.dtype for x in inputs)

    @staticmethod
    def backward(ctx, d: Tensor) -> tuple[Tensor, ...]:
        return tuple(d.to(dtype) for dtype in ctx.dtypes)


def add(x: Tensor, y: Tensor) -> Tensor:
    """`reference.add`, of bf16 or fp32."""
    return Add.apply(x.contiguous(), y.contiguous())
