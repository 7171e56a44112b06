"""The short causal convolution with SiLU in Triton, and in the same pass the polar lift and feature map of Phase 8, forward and backward.

A program works on one head of one of q, k, v, so that it holds the whole vector that the lift normalises: features cost no more traffic
than the convolution alone. Tokens are the rows of a tile; row n of an output needs rows n-3 .. n of its input, and row n of a gradient
rows n .. n+3 of the gradient after it, which come from their tile by products with shift matrices.

Layout: (B, N, C), C = 3 H K. B batch, N sequence, H heads, K head dim, W taps.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hyperlm.geometry import TINY
from hyperlm.kernels.differentiation import gradients
from hyperlm.kernels.launch import launch
from hyperlm.kernels.layout import token_major

W = tl.constexpr(4)
FLOOR = tl.constexpr(TINY)
TILES = 4  # of a program, in the backward pass


@triton.jit
def inputs_at(x, tail, b, n, channel, N, C, TAIL: tl.constexpr):
    """Rows n of x (B, N, C), those before the first from tail (B, W-1, C) or zero."""
    rows = tl.load(x + (b * N + n).to(tl.int64)[:, None] * C + channel[None, :], mask=((n >= 0) & (n < N))[:, None], other=0.0).to(tl.float32)
    if TAIL:
        rows += tl.load(tail + (b * (W - 1) + n + W - 1)[:, None] * C + channel[None, :], mask=((n < 0) & (n > -W))[:, None], other=0.0).to(tl.float32)
    return rows


@triton.jit
def convolve(
    x, weight, tail, r, beta, out, N, H, part_stride, row_stride,
    K: tl.constexpr, ROWS: tl.constexpr, TAIL: tl.constexpr, LIFT: tl.constexpr,
):  # fmt: skip
    """out = SiLU(convolution); with LIFT, elu(beta r u) + 1 of it for q and k, u its direction."""
    part, h, b = tl.program_id(1) // H, tl.program_id(1) % H, tl.program_id(2)
    C = 3 * H * K
    channel = tl.program_id(1) * K + tl.arange(0, K)
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    z = tl.zeros((ROWS, K), tl.float32)
    for tap in tl.static_range(W):
        z += inputs_at(x, tail, b, n - (W - 1) + tap, channel, N, C, TAIL) * tl.load(weight + channel * W + tap).to(tl.float32)[None, :]
    y = z * tl.sigmoid(z)
    if LIFT:
        if part < 2:
            radius = tl.load(r + (b * N + n) * (2 * H) + part * H + h, mask=n < N, other=0.0) * tl.load(beta + h)
            tangent = y * (tl.rsqrt(tl.sum(y * y, 1) + FLOOR) * radius)[:, None]
            y = tl.where(tangent > 0, tangent + 1, tl.exp(tangent))
    to = part.to(tl.int64) * part_stride + (b * N + n).to(tl.int64)[:, None] * row_stride + h * K + tl.arange(0, K)[None, :]
    tl.store(out + to, y.to(out.dtype.element_ty), mask=(n < N)[:, None])


@triton.jit
def later(rows, by):
    """Row n + by at row n of a tile; zero at its end."""
    a = tl.arange(0, rows.shape[0])
    return tl.dot((a[:, None] + by == a[None, :]).to(rows.dtype), rows, input_precision="ieee")


@triton.jit
def convolve_backward(
    x, weight, tail, r, beta, dq, dk, dv, dx, d_weight, d_r, d_beta, N, H, row_stride,
    K: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr, TAIL: tl.constexpr, LIFT: tl.constexpr,
):  # fmt: skip
    """dx, d_r, and of each program its part of d_weight (programs of a head, C, W) and d_beta (programs of a head, 2 H)."""
    part, h, b = tl.program_id(1) // H, tl.program_id(1) % H, tl.program_id(2)
    C = 3 * H * K
    ks = tl.arange(0, K)
    channel = tl.program_id(1) * K + ks
    a = tl.arange(0, ROWS)
    own = ROWS - (W - 1)  # rows of a tile whose gradient it knows
    dw0, dw1 = tl.zeros((K,), tl.float32), tl.zeros((K,), tl.float32)
    dw2, dw3 = tl.zeros((K,), tl.float32), tl.zeros((K,), tl.float32)
    db = 0.0
    for tile in range(TILES):
        n = (tl.program_id(0) * TILES + tile) * own + a
        z = tl.zeros((ROWS, K), tl.float32)
        for tap in range(W):
            z += inputs_at(x, tail, b, n - (W - 1) + tap, channel, N, C, TAIL) * tl.load(weight + channel * W + tap).to(tl.float32)[None, :]
        gate = tl.sigmoid(z)
        at, inside = (b * N + n).to(tl.int64)[:, None] * row_stride + h * K + ks[None, :], (n < N)[:, None]
        if part == 0:  # a pointer chosen at run time would be of unknown alignment
            d = tl.load(dq + at, mask=inside, other=0.0).to(tl.float32)
        elif part == 1:
            d = tl.load(dk + at, mask=inside, other=0.0).to(tl.float32)
        else:
            d = tl.load(dv + at, mask=inside, other=0.0).to(tl.float32)
        mine = (a < own) & (n < N)
        if LIFT:
            if part < 2:
                y = z * gate
                radius = tl.load(r + (b * N + n) * (2 * H) + part * H + h, mask=n < N, other=0.0)
                scale = radius * tl.load(beta + h)
                inverse = tl.rsqrt(tl.sum(y * y, 1) + FLOOR)
                u = y * inverse[:, None]
                tangent = u * scale[:, None]
                d = tl.where(tangent > 0, d, d * tl.exp(tangent))
                along = tl.sum(d * u, 1)
                d = (d - u * along[:, None]) * (scale * inverse)[:, None]
                tl.store(d_r + (b * N + n) * (2 * H) + part * H + h, along * tl.load(beta + h), mask=mine)
                db += tl.sum(tl.where(mine, along * radius, 0.0), 0)
        dz = d * gate * (1 + z * (1 - gate))
        counted = tl.where(mine[:, None], dz, 0.0)
        dw0 += tl.sum(counted * inputs_at(x, tail, b, n - 3, channel, N, C, TAIL), 0)  # read again: registers are dearer than the cache
        dw1 += tl.sum(counted * inputs_at(x, tail, b, n - 2, channel, N, C, TAIL), 0)
        dw2 += tl.sum(counted * inputs_at(x, tail, b, n - 1, channel, N, C, TAIL), 0)
        dw3 += tl.sum(counted * inputs_at(x, tail, b, n, channel, N, C, TAIL), 0)
        exact = dz.to(dx.dtype.element_ty)  # what the matrix units take
        dx_c = dz * tl.load(weight + channel * W + W - 1).to(tl.float32)[None, :]
        for by in range(1, W):
            dx_c += later(exact, by) * tl.load(weight + channel * W + W - 1 - by).to(tl.float32)[None, :]
        tl.store(dx + (b * N + n).to(tl.int64)[:, None] * C + channel[None, :], dx_c.to(dx.dtype.element_ty), mask=mine[:, None])
    program = b * tl.num_programs(0) + tl.program_id(0)
    tl.store(d_weight + (program * C + channel) * W, dw0)
    tl.store(d_weight + (program * C + channel) * W + 1, dw1)
    tl.store(d_weight + (program * C + channel) * W + 2, dw2)
    tl.store(d_weight + (program * C + channel) * W + 3, dw3)
    if LIFT:
        if part < 2:
            tl.store(d_beta + program * (2 * H) + part * H + h, db)


def tile(K: int, dtype: torch.dtype) -> tuple[int, int]:
    """Rows of a tile, and the warps that work on it, for heads of width K."""
    if dtype == torch.float32:
        return (16, 8) if K != 128 else (32, 8)
    return {32: 64, 64: 64, 128: 32, 256: 16}[K], 8


def backward(
    x: Tensor, weight: Tensor, tail: Tensor | None, r: Tensor | None, beta: Tensor | None, heads: int, dq: Tensor, dk: Tensor, dv: Tensor
) -> tuple[Tensor | None, ...]:
    """Gradients of x, weight, tail (None), r, beta and heads (None)."""
    (b, n, c), h = x.shape, heads
    k = c // 3 // h
    dq, dk, dv = (token_major(d.transpose(1, 2)) for d in (dq, dk, dv))
    if not dq.stride(1) == dk.stride(1) == dv.stride(1):
        dq, dk, dv = dq.contiguous(), dk.contiguous(), dv.contiguous()
    rows, warps = tile(k, x.dtype)
    programs = triton.cdiv(n, (rows - 3) * TILES)
    dx = torch.empty_like(x)
    d_weight = torch.empty(b * programs, c, 4, device=x.device)
    d_r = d_beta = None
    if r is not None:
        d_r, d_beta = torch.empty_like(r), torch.empty(b * programs, 2, h, device=x.device)
    launch(
        convolve_backward, (programs, 3 * h, b),
        x, weight, tail, r, beta, dq, dk, dv, dx, d_weight, d_r, d_beta, n, h, dq.stride(1),
        K=k, ROWS=rows, TILES=TILES, TAIL=tail is not None, LIFT=r is not None, warps=warps, stages=1,
    )  # fmt: skip
    return dx, d_weight.sum(0).to(weight.dtype), None, d_r, None if r is None else d_beta.sum((0, 1)), None


class Convolution(torch.autograd.Function):
    """(x (B, N, C), weight (C, W), tail, radii (B, N, 2 H) or None, beta (H,), heads) -> SiLU(convolution) of q, k and v, (B, N, H, K) each."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, tail: Tensor | None, r: Tensor | None, beta: Tensor | None, heads: int) -> tuple[Tensor, Tensor, Tensor]:
        b, n, c = x.shape
        k = c // 3 // heads
        out = torch.empty(3, b, n, heads, k, device=x.device, dtype=x.dtype)
        rows, warps = tile(k, x.dtype)
        launch(
            convolve, (triton.cdiv(n, rows), 3 * heads, b),
            x, weight, tail, r, beta, out, n, heads, out.stride(0), out.stride(2),
            K=k, ROWS=rows, TAIL=tail is not None, LIFT=r is not None, warps=warps,
        )  # fmt: skip
        return out[0], out[1], out[2]

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: tuple) -> None:
        x, weight, tail, r, beta, ctx.heads = inputs
        if tail is not None and tail.requires_grad:
            raise NotImplementedError("no gradient reaches the tail of a convolution")
        ctx.save_for_backward(x, weight, tail, r, beta)

    @staticmethod
    def backward(ctx, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor | None, ...]:
        return gradients(backward, *ctx.saved_tensors, ctx.heads, dq, dk, dv)


def next_tail(x: Tensor, tail: Tensor | None) -> Tensor:
    """The last W-1 inputs of x (B, N, C) and what came before it."""
    missing = max(0, 3 - x.shape[1])
    if missing == 0:
        return x[:, -3:]
    before = x.new_zeros(x.shape[0], 3, x.shape[2]) if tail is None else tail.to(x.dtype)
    return torch.cat([before[:, -missing:], x], 1)


def convolved(
    x: Tensor, weight: Tensor, tail: Tensor | None, r: Tensor | None, beta: Tensor | None, heads: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v (B, H, N, K) and the next tail."""
    x, tail = x.contiguous(), None if tail is None else tail.contiguous()
    q, k, v = Convolution.apply(x, weight.contiguous(), tail, r, beta, heads)
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), next_tail(x, tail)


@torch.compiler.disable  # compiled code calls it as it is
def causal_conv(x: Tensor, weight: Tensor, heads: int, tail: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`reference.causal_conv`, in bf16 or fp32."""
    return convolved(x, weight, tail, None, None, heads)


@torch.compiler.disable  # compiled code calls it as it is
def tangent_features(
    x: Tensor, weight: Tensor, r: Tensor, beta: Tensor, tail: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`reference.tangent_features`, in bf16 or fp32."""
    return convolved(x, weight, tail, r.mT.contiguous(), beta.contiguous(), beta.shape[0])
