"""The linear recurrence h_n = exp(log_a_n) h_{n-1} + b_n in Triton: tiles of positions in parallel, one tile after the other.

Its gradient is the same recurrence backward in time: g_n = dh_n + exp(log_a_{n+1}) g_{n+1}; then db_n = g_n and
d log_a_n = g_n exp(log_a_n) h_{n-1}. Layout (B, N, C): B batch, N positions, C channels.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hyperlm.kernels.differentiation import Function, gradients
from hyperlm.kernels.launch import cdiv, launch

ROWS, CHANNELS = 64, 32  # of a tile


@triton.jit
def compose(a1, b1, a2, b2):
    """h -> a2 (a1 h + b1) + b2."""
    return a1 * a2, b1 * a2 + b2


@triton.jit
def scan_forward(log_a, b, start, h, N, C, ROWS: tl.constexpr, CHANNELS: tl.constexpr, START: tl.constexpr):
    batch = tl.program_id(1).to(tl.int64)
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    last = (tl.arange(0, ROWS) == ROWS - 1)[:, None]
    state = tl.zeros((CHANNELS,), tl.float32)
    if START:
        state = tl.load(start + batch * C + c, mask=c < C, other=0.0)
    for tile in range(tl.cdiv(N, ROWS)):
        n = tile * ROWS + tl.arange(0, ROWS)
        at, mask = (batch * N + n)[:, None] * C + c[None, :], (n < N)[:, None] & (c < C)[None, :]
        a, add = tl.exp(tl.load(log_a + at, mask=mask, other=0.0)), tl.load(b + at, mask=mask, other=0.0)
        a, add = tl.associative_scan((a, add), 0, compose)
        states = a * state[None, :] + add
        tl.store(h + at, states, mask=mask)
        state = tl.sum(tl.where(last, states, 0.0), 0)


@triton.jit
def scan_backward(log_a, start, h, dh, d_log_a, db, d_start, N, C, ROWS: tl.constexpr, CHANNELS: tl.constexpr, START: tl.constexpr):
    batch = tl.program_id(1).to(tl.int64)
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    first = (tl.arange(0, ROWS) == 0)[:, None]
    carried = tl.zeros((CHANNELS,), tl.float32)
    tiles = tl.cdiv(N, ROWS)
    for step in range(tiles):
        n = (tiles - 1 - step) * ROWS + tl.arange(0, ROWS)
        at, mask = (batch * N + n)[:, None] * C + c[None, :], (n < N)[:, None] & (c < C)[None, :]
        a_next = tl.exp(tl.load(log_a + at + C, mask=mask & (n + 1 < N)[:, None], other=0.0))
        a_all, g = tl.associative_scan((a_next, tl.load(dh + at, mask=mask, other=0.0)), 0, compose, reverse=True)
        g += a_all * carried[None, :]
        before = tl.load(h + at - C, mask=mask & (n > 0)[:, None], other=0.0)
        if START:
            before += tl.load(start + batch * C + c[None, :] + n[:, None] * 0, mask=mask & (n == 0)[:, None], other=0.0)
        a = tl.exp(tl.load(log_a + at, mask=mask, other=0.0))
        tl.store(db + at, g, mask=mask)
        tl.store(d_log_a + at, g * a * before, mask=mask)
        carried = tl.sum(tl.where(first, g, 0.0), 0)
        if START:
            if step == tiles - 1:
                tl.store(d_start + batch * C + c, tl.sum(tl.where(first, g * a, 0.0), 0), mask=c < C)


def backward(log_a: Tensor, start: Tensor | None, h: Tensor, dh: Tensor) -> tuple[Tensor | None, ...]:
    batch, n, c = h.shape
    d_log_a, db, d_start = torch.empty_like(h), torch.empty_like(h), None if start is None else torch.empty_like(start)
    launch(
        scan_backward, (cdiv(c, CHANNELS), batch),
        log_a, start, h, dh.contiguous(), d_log_a, db, d_start, n, c, ROWS=ROWS, CHANNELS=CHANNELS, START=start is not None,
    )  # fmt: skip
    return d_log_a, db, d_start


class Scan(Function):
    """(log_a (B, N, C), b (B, N, C), start (B, C) or None), fp32 -> every state (B, N, C)."""

    @staticmethod
    def forward(log_a: Tensor, b: Tensor, start: Tensor | None) -> Tensor:
        (batch, n, c), h = b.shape, torch.empty_like(b)
        launch(scan_forward, (cdiv(c, CHANNELS), batch), log_a, b, start, h, n, c, ROWS=ROWS, CHANNELS=CHANNELS, START=start is not None)
        return h

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: Tensor) -> None:
        log_a, _, start = inputs
        ctx.save_for_backward(log_a, start, output)

    @staticmethod
    def backward(ctx, dh: Tensor) -> tuple[Tensor | None, ...]:
        return gradients(backward, *ctx.saved_tensors, dh)


def scan(log_a: Tensor, b: Tensor, h: Tensor | None = None) -> Tensor:
    """`reference.scan` in fp32, for one axis before the last two."""
    log_a = log_a.expand_as(b)
    return Scan.apply(
        log_a.to(torch.float32).contiguous(), b.to(torch.float32).contiguous(), None if h is None else h.to(torch.float32).contiguous()
    )
