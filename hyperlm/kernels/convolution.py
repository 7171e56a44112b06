"""The short causal convolution with SiLU in Triton, and in the same pass the features of Phase 8 or the points of Phase 7, forward and
backward.

A program works on whole heads of one of q, k, v, so that it holds the whole vector that the lift normalises: features and points cost no
more traffic than the convolution alone. Where the rotary embedding needs coordinate i + K/2 beside i, it is computed once more, from the
cache. Row n of an output needs rows n-3 .. n of its input. Forward, a tile is rows of one head, and reads each of the four again, from the
cache. Backward, row n of dx needs rows n .. n+3 of the convolution's gradient dz as well, which is dear to find: a program walks along a
sequence, a tile being one row of several heads, and remembers three rows of x and of dz; the last three rows of a program are computed
again by the next.

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
from hyperlm.kernels.launch import cdiv, launch, next_power_of_2
from hyperlm.kernels.layout import token_major

W = tl.constexpr(4)
FLOOR = tl.constexpr(TINY)
PLAIN, FEATURES, POINTS = (tl.constexpr(i) for i in range(3))  # what becomes of q and k


@triton.jit
def inputs_at(x, tail, b, n, channel, N, C, TAIL: tl.constexpr):
    """Rows n of x (B, N, C), those before the first from tail (B, W-1, C) or zero; n and channel broadcast."""
    n += channel * 0  # masks have to be tiles
    rows = tl.load(x + (b * N + n).to(tl.int64) * C + channel, mask=(n >= 0) & (n < N), other=0.0).to(tl.float32)
    if TAIL:
        rows += tl.load(tail + (b * (W - 1) + n + W - 1) * C + channel, mask=(n < 0) & (n > -W), other=0.0).to(tl.float32)
    return rows


@triton.jit
def convolved_at(x, weight, tail, b, n, channel, N, C, TAIL: tl.constexpr):
    """The convolution (ROWS, K) at rows n and these channels, before SiLU."""
    n, channel = n[:, None], channel[None, :]
    z = inputs_at(x, tail, b, n - (W - 1), channel, N, C, TAIL) * tl.load(weight + channel).to(tl.float32)
    for tap in tl.static_range(1, W):
        z += inputs_at(x, tail, b, n - (W - 1) + tap, channel, N, C, TAIL) * tl.load(weight + tap * C + channel).to(tl.float32)
    return z


@triton.jit
def angles_at(cos, sin, n, N, K: tl.constexpr):
    """Of coordinates i at rows n, (ROWS, 1) or one, what the rotary embedding multiplies y_i and y_(i +- K/2) with."""
    ks = tl.arange(0, K)[None, :]
    at, mask = n * (K // 2) + ks % (K // 2), n + ks * 0 < N
    return tl.load(cos + at, mask=mask, other=0.0), tl.load(sin + at, mask=mask, other=0.0) * tl.where(ks < K // 2, -1.0, 1.0)


@triton.jit
def sinh_cosh(r):
    up, down = tl.exp(r), tl.exp(-r)
    return 0.5 * (up - down), 0.5 * (up + down)


@triton.jit
def convolve(
    x, weight, tail, r, beta, cos, sin, out, times, B, N, H, part_stride, row_stride,
    K: tl.constexpr, ROWS: tl.constexpr, TAIL: tl.constexpr, LIFT: tl.constexpr,
):  # fmt: skip
    """out = SiLU(convolution). Of q and k, u its direction: FEATURES elu(beta r u) + 1; POINTS sinh(r) times u rotated, and times (2, B,
    H, N)."""
    part, h, b = tl.program_id(1) // H, tl.program_id(1) % H, tl.program_id(2)
    C = 3 * H * K
    channel = tl.program_id(1) * K + tl.arange(0, K)
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    z = convolved_at(x, weight, tail, b, n, channel, N, C, TAIL)
    y = z * special.sigmoid(z, LIFT == POINTS)  # points by ordinary instructions: the others need more registers than there are
    if LIFT == POINTS:
        if part < 2:
            z = convolved_at(x, weight, tail, b, n, tl.program_id(1) * K + (tl.arange(0, K) + K // 2) % K, N, C, TAIL)
            same, other = angles_at(cos, sin, n[:, None], N, K)
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
def points_backward(y, y_other, d, d_other, same, other, radius, d_time, DTYPE: tl.constexpr):
    """The gradient of y from that of its point, d of s and d_time of t, and the gradient of the radius; `other` coordinates beside their
    own."""
    sinh, cosh = sinh_cosh(radius)
    inverse = tl.rsqrt(tl.sum(y * y, 1) + FLOOR)
    u, u_other = (y * same + y_other * other) * inverse[:, None], (y_other * same - y * other) * inverse[:, None]  # rotated
    s, s_other = (u * sinh[:, None]).to(DTYPE).to(tl.float32), (u_other * sinh[:, None]).to(DTYPE).to(tl.float32)
    d_radial = (d_time * tl.rsqrt(1 + tl.sum(s * s, 1)))[:, None]
    d, d_other = d + d_radial * s, d_other + d_radial * s_other
    along = tl.sum(d * u, 1)
    d, d_other = d - u * along[:, None], d_other - u_other * along[:, None]
    return (d * same - d_other * other) * (sinh * inverse)[:, None], along * cosh  # rotated back


@triton.jit
def features_backward(y, d, radius, scale):
    """The gradient of y from that of its features, and the gradient of beta r."""
    inverse = tl.rsqrt(tl.sum(y * y, 1) + FLOOR)
    u = y * inverse[:, None]
    tangent = u * (radius * scale)[:, None]
    d = tl.where(tangent > 0, d, d * special.exp(tangent, False))
    along = tl.sum(d * u, 1)
    return (d - u * along[:, None]) * (radius * scale * inverse)[:, None], along


@triton.jit
def start(x, tail, weight, b, n, channel, N, C, TAIL: tl.constexpr):
    """The taps, and the three rows before row n."""
    w0, w1 = tl.load(weight + channel).to(tl.float32), tl.load(weight + C + channel).to(tl.float32)
    w2, w3 = tl.load(weight + 2 * C + channel).to(tl.float32), tl.load(weight + 3 * C + channel).to(tl.float32)
    x0, x1 = inputs_at(x, tail, b, n - 3, channel, N, C, TAIL), inputs_at(x, tail, b, n - 2, channel, N, C, TAIL)
    return w0, w1, w2, w3, x0, x1, inputs_at(x, tail, b, n - 1, channel, N, C, TAIL)


@triton.jit
def at_row(x, b, n, channel, N, stride):
    """Row n of a tensor whose rows are `stride` apart; zero after the last."""
    return tl.load(x + (b * N + n).to(tl.int64) * stride + channel, mask=n + channel * 0 < N, other=0.0)


@triton.jit
def convolve_backward(
    x, weight, tail, r, beta, cos, sin, dq, dk, dv, d_times, dx, d_weight, d_r, d_beta, B, N, H, row_stride,
    K: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr, TAIL: tl.constexpr, LIFT: tl.constexpr,
):  # fmt: skip
    """dx (B, N, C), d_r, and of each program its part of d_weight (programs of a channel, W, C) and d_beta (programs of a head, 2 H)."""
    b, first, C = tl.program_id(2), tl.program_id(0) * ROWS, 3 * H * K
    head = tl.program_id(1) * HEADS  # the first, of those of q, k and v
    part, h = head // H, head % H + tl.arange(0, HEADS)
    channel = (part * H + h)[:, None] * K + tl.arange(0, K)[None, :]
    w0, w1, w2, w3, x0, x1, x2 = start(x, tail, weight, b, first, channel, N, C, TAIL)
    d_out = dq
    if part == 1:
        d_out = dk
    elif part == 2:
        d_out = dv
    own = h[:, None] * K + tl.arange(0, K)[None, :]
    next_x, next_d = at_row(x, b, first, channel, N, C), at_row(d_out, b, first, own, N, row_stride)
    dz0, dz1, dz2 = x0 * 0, x0 * 0, x0 * 0
    dw0, dw1, dw2, dw3 = x0 * 0, x0 * 0, x0 * 0, x0 * 0
    end, lifts = tl.minimum(first + ROWS, N), part < 2
    if LIFT == POINTS:
        ks = (tl.arange(0, K) + K // 2) % K  # the other coordinate of each plane
        beside, own_beside = (part * H + h)[:, None] * K + ks[None, :], h[:, None] * K + ks[None, :]
        v0, v1, v2, v3, o0, o1, o2 = start(x, tail, weight, b, first, beside, N, C, TAIL)
    if LIFT == FEATURES:
        scale = tl.load(beta + h)
        db = scale * 0
    for row in tl.range(0, ROWS + 3, loop_unroll_factor=3):  # so remembered rows need not move
        n = first + row
        x3, d = next_x.to(tl.float32), next_d.to(tl.float32)
        next_x, next_d = at_row(x, b, n + 1, channel, N, C), at_row(d_out, b, n + 1, own, N, row_stride)
        z = w0 * x0 + w1 * x1 + w2 * x2 + w3 * x3
        gate = special.sigmoid(z, False)
        inside, mine = n + h * 0 < N, n + h * 0 < end  # mine: and not the next program's as well
        at_radius = (b * N + n) * (2 * H) + part * H + h
        if LIFT == POINTS:
            o3 = at_row(x, b, n, beside, N, C).to(tl.float32)
            z_other = v0 * o0 + v1 * o1 + v2 * o2 + v3 * o3
            o0, o1, o2 = o1, o2, o3
            if lifts:
                d_other = at_row(d_out, b, n, own_beside, N, row_stride).to(tl.float32)
                d_time = tl.load(d_times + ((part.to(tl.int64) * B + b) * H + h) * N + n, mask=inside, other=0.0)
                same, other = angles_at(cos, sin, n, N, K)
                radius = tl.load(r + at_radius, mask=inside, other=0.0)
                y_other = z_other * special.sigmoid(z_other, False)
                d, along = points_backward(z * gate, y_other, d, d_other, same, other, radius, d_time, dx.dtype.element_ty)
                tl.store(d_r + at_radius, along, mask=mine)
        if LIFT == FEATURES:
            if lifts:
                radius = tl.load(r + at_radius, mask=inside, other=0.0)
                d, along = features_backward(z * gate, d, radius, scale)
                tl.store(d_r + at_radius, along * scale, mask=mine)
                db += tl.where(mine, along * radius, 0.0)
        dz3 = d * gate * (1 + z * (1 - gate))
        # Row n - 3 was read with tap W-1 for output n - 3, and with the taps before it for those after.
        to = (b * N + n - 3).to(tl.int64) * C + channel
        d_input = w3 * dz0 + w2 * dz1 + w1 * dz2 + w0 * dz3
        tl.store(dx + to, d_input.to(dx.dtype.element_ty), mask=(n - 3 + channel * 0 >= first) & (n - 3 + channel * 0 < N))
        dz0, dz1, dz2 = dz1, dz2, dz3
        dz3 = tl.where(n + channel * 0 < end, dz3, 0.0)
        dw0 += dz3 * x0
        dw1 += dz3 * x1
        dw2 += dz3 * x2
        dw3 += dz3 * x3
        x0, x1, x2 = x1, x2, x3
    program = b * tl.num_programs(0) + tl.program_id(0)
    to = d_weight + program.to(tl.int64) * W * C + channel
    tl.store(to, dw0)
    tl.store(to + C, dw1)
    tl.store(to + 2 * C, dw2)
    tl.store(to + 3 * C, dw3)
    if LIFT == FEATURES:
        if lifts:
            tl.store(d_beta + program * (2 * H) + part * H + h, db)


def tile(k: int, dtype: torch.dtype, lift: int) -> tuple[int, int]:
    """Forward: rows of a tile, and the warps that work on it, for heads of width k."""
    if lift == POINTS.value:
        return {32: 32, 64: 32, 128: 16, 256: 16}[k], 8
    if dtype == torch.float32:
        return (16, 8) if k != 128 else (32, 8)
    return {32: 64, 64: 64, 128: 32, 256: 16}[k], 4


class Walk(NamedTuple):
    """Backward: heads of a tile, rows that a program walks along, and its warps."""

    heads: int
    rows: int
    warps: int


def walk(n: int, h: int, k: int, dtype: torch.dtype, lift: int) -> Walk:
    """For n rows and h heads of width k."""
    rows = 64 if dtype == torch.bfloat16 and lift != POINTS.value else 32
    heads = math.gcd(h, max(1, 512 // k))
    return Walk(heads, min(rows, next_power_of_2(n)), max(1, heads * k // 128))  # 4 numbers a thread


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
    x: Tensor, weight: Tensor, tail: Tensor | None, r: Tensor | None, beta: Tensor | None, cos: Tensor | None, sin: Tensor | None,
    heads: int,
    dq: Tensor, dk: Tensor, dv: Tensor, d_times: Tensor | None,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients of all inputs of `Convolution`, None for those that have none."""
    (b, n, c), h, lift = x.shape, heads, Lift(r, beta, cos, sin)
    k = c // 3 // h
    dq, dk, dv = (token_major(d.transpose(1, 2)) for d in (dq, dk, dv))
    if not dq.stride(1) == dk.stride(1) == dv.stride(1):
        dq, dk, dv = dq.contiguous(), dk.contiguous(), dv.contiguous()
    w = walk(n, h, k, x.dtype, lift.kind)
    programs = cdiv(n, w.rows)
    dx, d_weight = torch.empty_like(x), torch.empty(b * programs, 4, c, device=x.device)
    d_r, d_beta = None if r is None else torch.empty_like(r), None if beta is None else torch.empty(b * programs, 2, h, device=x.device)
    launch(
        convolve_backward, (programs, 3 * h // w.heads, b),
        x, weight, tail, *lift, dq, dk, dv, None if d_times is None else d_times.contiguous(), dx, d_weight, d_r, d_beta, b, n, h,
        dq.stride(1),
        K=k, HEADS=w.heads, ROWS=w.rows, TAIL=tail is not None, LIFT=lift.kind, warps=w.warps,
    )  # fmt: skip
    return dx, d_weight.sum(0).to(weight.dtype), None, d_r, None if d_beta is None else d_beta.sum((0, 1)), None, None, None


class Convolution(Function):
    """(x (B, N, C), weight (W, C), tail, the fields of a Lift, heads) -> q, k and v, (B, N, H, K) each; times (2, B, H, N) of points, or
    None."""

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        tail: Tensor | None,
        r: Tensor | None,
        beta: Tensor | None,
        cos: Tensor | None,
        sin: Tensor | None,
        heads: int,
    ) -> tuple[Tensor | None, ...]:
        (b, n, c), lift = x.shape, Lift(r, beta, cos, sin)
        k = c // 3 // heads
        out = torch.empty(3, b, n, heads, k, device=x.device, dtype=x.dtype)
        times = None if cos is None else torch.empty(2, b, heads, n, device=x.device)
        rows, warps = tile(k, x.dtype, lift.kind)
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


def convolved(
    x: Tensor, weight: Tensor, tail: Tensor | None, lift: Lift, heads: int
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """q, k, v (B, H, N, K), times of points, and the next tail."""
    x, tail = x.contiguous(), None if tail is None else tail.contiguous()
    q, k, v, times = Convolution.apply(x, weight.contiguous(), tail, *lift, heads)
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), times, next_tail(x, tail)


def causal_conv(x: Tensor, weight: Tensor, heads: int, tail: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`reference.causal_conv`, in bf16 or fp32."""
    q, k, v, _, tail = convolved(x, weight, tail, Lift(), heads)
    return q, k, v, tail


def tangent_features(
    x: Tensor, weight: Tensor, r: Tensor, beta: Tensor, tail: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`reference.tangent_features`, in bf16 or fp32."""
    q, k, v, _, tail = convolved(x, weight, tail, Lift(r.mT.contiguous(), beta.contiguous()), beta.shape[0])
    return q, k, v, tail


def hyperbolic_points(
    x: Tensor, weight: Tensor, r: Tensor, cos: Tensor, sin: Tensor, tail: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`reference.hyperbolic_points`, in bf16 or fp32."""
    lift = Lift(r.mT.contiguous(), None, cos.contiguous(), sin.contiguous())
    s_q, s_k, v, times, tail = convolved(x, weight, tail, lift, r.shape[1] // 2)
    return times[0], s_q, times[1], s_k, v, tail
