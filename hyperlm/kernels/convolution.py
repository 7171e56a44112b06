"""The short causal convolution with SiLU in Triton, and in the same pass the features of Phase 8 or the points of Phase 7, forward and backward.

A program works on one head of one of q, k, v, so that it holds the whole vector that the lift normalises: features and points cost no more
traffic than the convolution alone. Where the rotary embedding needs coordinate i + K/2 beside i, it is computed once more, from the cache.
Tokens are the rows of a tile; row n of an output needs rows n-3 .. n of its input. Backward in two passes, since row n of dx needs rows n .. n+3
of the convolution's gradient dz: `lift_backward` finds that, `taps_backward` what follows from it.

Layout: (B, N, C), C = 3 H K. B batch, N sequence, H heads, K head dim, W taps.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hyperlm.geometry import TINY
from hyperlm.kernels import special
from hyperlm.kernels.differentiation import Function, gradients
from hyperlm.kernels.launch import cdiv, launch
from hyperlm.kernels.layout import token_major

W = tl.constexpr(4)
FLOOR = tl.constexpr(TINY)
PLAIN, FEATURES, POINTS = (tl.constexpr(i) for i in range(3))  # what becomes of q and k
TAP_ROWS, TAP_TILES = 32, 16  # of a tile of `taps_backward`, and tiles of a program


@triton.jit
def inputs_at(x, tail, b, n, channel, N, C, TAIL: tl.constexpr):
    """Rows n of x (B, N, C), those before the first from tail (B, W-1, C) or zero."""
    rows = tl.load(x + (b * N + n).to(tl.int64)[:, None] * C + channel[None, :], mask=((n >= 0) & (n < N))[:, None], other=0.0).to(tl.float32)
    if TAIL:
        rows += tl.load(tail + (b * (W - 1) + n + W - 1)[:, None] * C + channel[None, :], mask=((n < 0) & (n > -W))[:, None], other=0.0).to(tl.float32)
    return rows


@triton.jit
def convolved_at(x, weight, tail, b, n, channel, N, C, K: tl.constexpr, ROWS: tl.constexpr, TAIL: tl.constexpr, UNROLL: tl.constexpr):
    """The convolution (ROWS, K) at rows n and these channels, before SiLU. UNROLL: all taps are loaded at once, into more registers."""
    z = tl.zeros((ROWS, K), tl.float32)
    if UNROLL:
        for tap in tl.static_range(W):
            z += inputs_at(x, tail, b, n - (W - 1) + tap, channel, N, C, TAIL) * tl.load(weight + tap * C + channel).to(tl.float32)[None, :]
    else:
        for tap in range(W):
            z += inputs_at(x, tail, b, n - (W - 1) + tap, channel, N, C, TAIL) * tl.load(weight + tap * C + channel).to(tl.float32)[None, :]
    return z


@triton.jit
def angles_at(cos, sin, n, N, K: tl.constexpr):
    """Of coordinates i at rows n, what the rotary embedding multiplies y_i and y_(i +- K/2) with."""
    ks = tl.arange(0, K)
    at = n[:, None] * (K // 2) + (ks % (K // 2))[None, :]
    mask = ((n >= 0) & (n < N))[:, None]
    return tl.load(cos + at, mask=mask, other=0.0), tl.load(sin + at, mask=mask, other=0.0) * tl.where(ks < K // 2, -1.0, 1.0)[None, :]


@triton.jit
def sinh_cosh(r):
    up, down = tl.exp(r), tl.exp(-r)
    return 0.5 * (up - down), 0.5 * (up + down)


@triton.jit
def convolve(
    x, weight, tail, r, beta, cos, sin, out, times, B, N, H, part_stride, row_stride,
    K: tl.constexpr, ROWS: tl.constexpr, TAIL: tl.constexpr, LIFT: tl.constexpr,
):  # fmt: skip
    """out = SiLU(convolution). Of q and k, u its direction: FEATURES elu(beta r u) + 1; POINTS sinh(r) times u rotated, and times (2, B, H, N)."""
    part, h, b = tl.program_id(1) // H, tl.program_id(1) % H, tl.program_id(2)
    C = 3 * H * K
    channel = tl.program_id(1) * K + tl.arange(0, K)
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    z = convolved_at(x, weight, tail, b, n, channel, N, C, K, ROWS, TAIL, True)
    y = z * special.sigmoid(z, LIFT == POINTS)  # points by ordinary instructions: the others need more registers than there are
    if LIFT == POINTS:
        if part < 2:
            z = convolved_at(x, weight, tail, b, n, tl.program_id(1) * K + (tl.arange(0, K) + K // 2) % K, N, C, K, ROWS, TAIL, True)
            same, other = angles_at(cos, sin, n, N, K)
            radius, _ = sinh_cosh(tl.load(r + (b * N + n) * (2 * H) + part * H + h, mask=n < N, other=0.0))
            scale = tl.rsqrt(tl.sum(y * y, 1) + FLOOR) * radius
            s = ((y * same + z * special.sigmoid(z, True) * other) * scale[:, None]).to(out.dtype.element_ty)
            y = s.to(tl.float32)
            at = ((part.to(tl.int64) * B + b) * H + h) * N + n
            tl.store(times + at, tl.sqrt_rn(1 + tl.sum(y * y, 1)), mask=n < N)
    if LIFT == FEATURES:
        if part < 2:
            radius = tl.load(r + (b * N + n) * (2 * H) + part * H + h, mask=n < N, other=0.0) * tl.load(beta + h)
            tangent = y * (tl.rsqrt(tl.sum(y * y, 1) + FLOOR) * radius)[:, None]
            y = tl.where(tangent > 0, tangent + 1, special.exp(tangent, False))
    to = part.to(tl.int64) * part_stride + (b * N + n).to(tl.int64)[:, None] * row_stride + h * K + tl.arange(0, K)[None, :]
    tl.store(out + to, y.to(out.dtype.element_ty), mask=(n < N)[:, None])


@triton.jit
def points_backward(
    y, d, x, weight, tail, r, cos, sin, dq, dk, d_times, d_r, b, n, h, part, row_stride, B, N, H, mine,
    K: tl.constexpr, ROWS: tl.constexpr, TAIL: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """The gradient of y from that of its point, d (ROWS, K) of s and d_times of t; and d_r."""
    ks = (tl.arange(0, K) + K // 2) % K  # the other coordinate of each plane
    z = convolved_at(x, weight, tail, b, n, (part * H + h) * K + ks, N, 3 * H * K, K, ROWS, TAIL, False)
    y_other = z * special.sigmoid(z, False)
    at, inside = (b * N + n).to(tl.int64)[:, None] * row_stride + h * K + ks[None, :], (n < N)[:, None]
    if part == 0:
        d_other = tl.load(dq + at, mask=inside, other=0.0).to(tl.float32)
    else:
        d_other = tl.load(dk + at, mask=inside, other=0.0).to(tl.float32)
    same, other = angles_at(cos, sin, n, N, K)
    radius = tl.load(r + (b * N + n) * (2 * H) + part * H + h, mask=n < N, other=0.0)
    sinh, cosh = sinh_cosh(radius)
    inverse = tl.rsqrt(tl.sum(y * y, 1) + FLOOR)
    u, u_other = (y * same + y_other * other) * inverse[:, None], (y_other * same - y * other) * inverse[:, None]  # rotated
    s, s_other = (u * sinh[:, None]).to(DTYPE).to(tl.float32), (u_other * sinh[:, None]).to(DTYPE).to(tl.float32)
    d_time = tl.load(d_times + ((part.to(tl.int64) * B + b) * H + h) * N + n, mask=n < N, other=0.0)
    pull = (d_time * tl.rsqrt(1 + tl.sum(s * s, 1)))[:, None]
    d, d_other = d + pull * s, d_other + pull * s_other
    along = tl.sum(d * u, 1)
    tl.store(d_r + (b * N + n) * (2 * H) + part * H + h, along * cosh, mask=mine)
    d, d_other = d - u * along[:, None], d_other - u_other * along[:, None]
    return (d * same - d_other * other) * (sinh * inverse)[:, None]  # rotated back


@triton.jit
def lift_backward(
    x, weight, tail, r, beta, cos, sin, dq, dk, dv, d_times, dz, d_r, d_beta, B, N, H, row_stride,
    K: tl.constexpr, ROWS: tl.constexpr, TAIL: tl.constexpr, LIFT: tl.constexpr,
):  # fmt: skip
    """The gradient of the convolution, dz (B, N, C), d_r, and of each program its part of d_beta (programs of a head, 2 H)."""
    part, h, b = tl.program_id(1) // H, tl.program_id(1) % H, tl.program_id(2)
    ks = tl.arange(0, K)
    channel = tl.program_id(1) * K + ks
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    z = convolved_at(x, weight, tail, b, n, channel, N, 3 * H * K, K, ROWS, TAIL, True)
    gate = special.sigmoid(z, False)
    at, inside = (b * N + n).to(tl.int64)[:, None] * row_stride + h * K + ks[None, :], (n < N)[:, None]
    if part == 0:  # a pointer chosen at run time would be of unknown alignment
        d = tl.load(dq + at, mask=inside, other=0.0).to(tl.float32)
    elif part == 1:
        d = tl.load(dk + at, mask=inside, other=0.0).to(tl.float32)
    else:
        d = tl.load(dv + at, mask=inside, other=0.0).to(tl.float32)
    if LIFT == POINTS:
        if part < 2:
            d = points_backward(
                z * gate, d, x, weight, tail, r, cos, sin, dq, dk, d_times, d_r, b, n, h, part, row_stride, B, N, H, n < N, K, ROWS, TAIL,
                dz.dtype.element_ty,
            )  # fmt: skip
    if LIFT == FEATURES:
        if part < 2:
            y = z * gate
            radius = tl.load(r + (b * N + n) * (2 * H) + part * H + h, mask=n < N, other=0.0)
            scale = radius * tl.load(beta + h)
            inverse = tl.rsqrt(tl.sum(y * y, 1) + FLOOR)
            u = y * inverse[:, None]
            tangent = u * scale[:, None]
            d = tl.where(tangent > 0, d, d * special.exp(tangent, False))
            along = tl.sum(d * u, 1)
            d = (d - u * along[:, None]) * (scale * inverse)[:, None]
            tl.store(d_r + (b * N + n) * (2 * H) + part * H + h, along * tl.load(beta + h), mask=n < N)
            tl.store(d_beta + (b * tl.num_programs(0) + tl.program_id(0)) * (2 * H) + part * H + h, tl.sum(tl.where(n < N, along * radius, 0.0), 0))
    d *= gate * (1 + z * (1 - gate))
    tl.store(dz + (b * N + n).to(tl.int64)[:, None] * (3 * H * K) + channel[None, :], d.to(dz.dtype.element_ty), mask=inside)


@triton.jit
def taps_backward(
    x, weight, tail, dz, dx, d_weight, N, C, ROWS: tl.constexpr, CHANNELS: tl.constexpr, TILES: tl.constexpr, TAIL: tl.constexpr
):  # fmt: skip
    """dx (B, N, C) of dz, and of each program its part of d_weight (programs, W, C)."""
    b = tl.program_id(2)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    dw0, dw1 = tl.zeros((ROWS, CHANNELS), tl.float32), tl.zeros((ROWS, CHANNELS), tl.float32)
    dw2, dw3 = tl.zeros((ROWS, CHANNELS), tl.float32), tl.zeros((ROWS, CHANNELS), tl.float32)
    first = -1 if TAIL and tl.program_id(0) == 0 else 0  # the rows of the tail come before the first tile
    for tile in range(first, TILES):
        n = (tl.program_id(0) * TILES + tile) * ROWS + tl.arange(0, ROWS)
        own = inputs_at(x, tail, b, n, channel, N, C, TAIL)
        dx_c = tl.zeros((ROWS, CHANNELS), tl.float32)
        # Row n was read with tap W-1 for output n, and with the taps before it for those after.
        pull = inputs_at(dz, dz, b, n, channel, N, C, False)
        dw3 += own * pull
        dx_c += pull * tl.load(weight + 3 * C + channel).to(tl.float32)[None, :]
        pull = inputs_at(dz, dz, b, n + 1, channel, N, C, False)
        dw2 += own * pull
        dx_c += pull * tl.load(weight + 2 * C + channel).to(tl.float32)[None, :]
        pull = inputs_at(dz, dz, b, n + 2, channel, N, C, False)
        dw1 += own * pull
        dx_c += pull * tl.load(weight + 1 * C + channel).to(tl.float32)[None, :]
        pull = inputs_at(dz, dz, b, n + 3, channel, N, C, False)
        dw0 += own * pull
        dx_c += pull * tl.load(weight + channel).to(tl.float32)[None, :]
        at = (b * N + n).to(tl.int64)[:, None] * C + channel[None, :]
        tl.store(dx + at, dx_c.to(dx.dtype.element_ty), mask=((n >= 0) & (n < N))[:, None])
    to = d_weight + (b * tl.num_programs(0) + tl.program_id(0)) * W * C + channel
    tl.store(to, tl.sum(dw0, 0))
    tl.store(to + C, tl.sum(dw1, 0))
    tl.store(to + 2 * C, tl.sum(dw2, 0))
    tl.store(to + 3 * C, tl.sum(dw3, 0))


def tile(K: int, dtype: torch.dtype, lift: int, *, backward: bool) -> tuple[int, int]:
    """Rows of a tile, and the warps that work on it, for heads of width K."""
    if lift == POINTS.value:
        return {32: 32, 64: 32, 128: 16, 256: 16}[K], 8
    if dtype == torch.float32:
        return (16, 8) if K != 128 else (32, 8)
    rows = {32: 64, 64: 64, 128: 32, 256: 16}[K]
    return (rows // 2, 4) if backward else (rows, 4)


def tap_channels(c: int) -> int:
    """Channels of a tile of `taps_backward`, which divide c."""
    return math.gcd(c, 64)


class Lift(NamedTuple):
    """What becomes of q and k: nothing (no radii), features (beta), or points (cos and sin)."""

    r: Tensor | None = None  # (B, N, 2 H)
    beta: Tensor | None = None  # (H,)
    cos: Tensor | None = None  # (N, K/2)
    sin: Tensor | None = None

    @property
    def kind(self) -> int:
        return PLAIN.value if self.r is None else FEATURES.value if self.cos is None else POINTS.value


def backward(
    x: Tensor, weight: Tensor, tail: Tensor | None, r: Tensor | None, beta: Tensor | None, cos: Tensor | None, sin: Tensor | None, heads: int,
    dq: Tensor, dk: Tensor, dv: Tensor, d_times: Tensor | None,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients of all inputs of `Convolution`, None for those that have none."""
    (b, n, c), h, lift = x.shape, heads, Lift(r, beta, cos, sin)
    k = c // 3 // h
    dq, dk, dv = (token_major(d.transpose(1, 2)) for d in (dq, dk, dv))
    if not dq.stride(1) == dk.stride(1) == dv.stride(1):
        dq, dk, dv = dq.contiguous(), dk.contiguous(), dv.contiguous()
    rows, warps = tile(k, x.dtype, lift.kind, backward=True)
    programs = cdiv(n, rows)
    dz, d_r = torch.empty_like(x), None if r is None else torch.empty_like(r)
    d_beta = None if beta is None else torch.empty(b * programs, 2, h, device=x.device)
    launch(
        lift_backward, (programs, 3 * h, b),
        x, weight, tail, *lift, dq, dk, dv, None if d_times is None else d_times.contiguous(), dz, d_r, d_beta, b, n, h, dq.stride(1),
        K=k, ROWS=rows, TAIL=tail is not None, LIFT=lift.kind, warps=warps, stages=1,
    )  # fmt: skip
    programs = cdiv(n, TAP_ROWS * TAP_TILES)
    dx, d_weight = torch.empty_like(x), torch.empty(b * programs, 4, c, device=x.device)
    launch(
        taps_backward, (programs, c // tap_channels(c), b),
        x, weight, tail, dz, dx, d_weight, n, c, ROWS=TAP_ROWS, CHANNELS=tap_channels(c), TILES=TAP_TILES, TAIL=tail is not None, warps=4, stages=1,
    )  # fmt: skip
    return dx, d_weight.sum(0).to(weight.dtype), None, d_r, None if d_beta is None else d_beta.sum((0, 1)), None, None, None


class Convolution(Function):
    """(x (B, N, C), weight (W, C), tail, the fields of a Lift, heads) -> q, k and v, (B, N, H, K) each; times (2, B, H, N) of points, or None."""

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, tail: Tensor | None, r: Tensor | None, beta: Tensor | None, cos: Tensor | None, sin: Tensor | None, heads: int
    ) -> tuple[Tensor | None, ...]:
        (b, n, c), lift = x.shape, Lift(r, beta, cos, sin)
        k = c // 3 // heads
        out = torch.empty(3, b, n, heads, k, device=x.device, dtype=x.dtype)
        times = None if cos is None else torch.empty(2, b, heads, n, device=x.device)
        rows, warps = tile(k, x.dtype, lift.kind, backward=False)
        launch(
            convolve, (cdiv(n, rows), 3 * heads, b),
            x, weight, tail, *lift, out, times, b, n, heads, out.stride(0), out.stride(2),
            K=k, ROWS=rows, TAIL=tail is not None, LIFT=lift.kind, warps=warps,
        )  # fmt: skip
        return out[0], out[1], out[2], times

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: tuple) -> None:
        *tensors, ctx.heads = inputs
        if tensors[2] is not None and tensors[2].requires_grad:
            raise NotImplementedError("no gradient reaches the tail of a convolution")
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, dq: Tensor, dk: Tensor, dv: Tensor, d_times: Tensor | None) -> tuple[Tensor | None, ...]:
        return gradients(backward, *ctx.saved_tensors, ctx.heads, dq, dk, dv, d_times)


def next_tail(x: Tensor, tail: Tensor | None) -> Tensor:
    """The last W-1 inputs of x (B, N, C) and what came before it."""
    missing = max(0, 3 - x.shape[1])
    if missing == 0:
        return x[:, -3:]
    before = x.new_zeros(x.shape[0], 3, x.shape[2]) if tail is None else tail.to(x.dtype)
    return torch.cat([before[:, -missing:], x], 1)


def convolved(x: Tensor, weight: Tensor, tail: Tensor | None, lift: Lift, heads: int) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """q, k, v (B, H, N, K), times of points, and the next tail."""
    x, tail = x.contiguous(), None if tail is None else tail.contiguous()
    q, k, v, times = Convolution.apply(x, weight.contiguous(), tail, *lift, heads)
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), times, next_tail(x, tail)


@torch.compiler.disable  # compiled code calls it as it is
def causal_conv(x: Tensor, weight: Tensor, heads: int, tail: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`reference.causal_conv`, in bf16 or fp32."""
    q, k, v, _, tail = convolved(x, weight, tail, Lift(), heads)
    return q, k, v, tail


@torch.compiler.disable  # compiled code calls it as it is
def tangent_features(
    x: Tensor, weight: Tensor, r: Tensor, beta: Tensor, tail: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`reference.tangent_features`, in bf16 or fp32."""
    q, k, v, _, tail = convolved(x, weight, tail, Lift(r.mT.contiguous(), beta.contiguous()), beta.shape[0])
    return q, k, v, tail


@torch.compiler.disable  # compiled code calls it as it is
def hyperbolic_points(
    x: Tensor, weight: Tensor, r: Tensor, cos: Tensor, sin: Tensor, tail: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`reference.hyperbolic_points`, in bf16 or fp32."""
    lift = Lift(r.mT.contiguous(), None, cos.contiguous(), sin.contiguous())
    s_q, s_k, v, times, tail = convolved(x, weight, tail, lift, r.shape[1] // 2)
    return times[0], s_q, times[1], s_k, v, tail
