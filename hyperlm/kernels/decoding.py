"""One token of a Phase 8 mixer in one launch: convolution and its tail, polar lift, features, state, read-out, norm and gate, in Triton.

A program is one head of one sequence. The state is updated in place; the tail is not, since threads share its numbers. B batch, H heads, K
head dim, W taps.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hyperlm.kernels.convolution import FLOOR, W
from hyperlm.kernels.launch import launch
from hyperlm.kernels.readout import EPS


@triton.jit
def newest(x, weight, tail, next_tail, b, H, part, h, K: tl.constexpr):
    """SiLU of the convolution at the new token, (K,); the next tail is one token further."""
    C = 3 * H * K
    channel = (part * H + h) * K + tl.arange(0, K)
    now = tl.load(x + b * C + channel)
    z = now.to(tl.float32) * tl.load(weight + (W - 1) * C + channel).to(tl.float32)
    for tap in tl.static_range(W - 1):
        before = tl.load(tail + (b * (W - 1) + tap) * C + channel)
        z += before.to(tl.float32) * tl.load(weight + tap * C + channel).to(tl.float32)
        if tap > 0:
            tl.store(next_tail + (b * (W - 1) + tap - 1) * C + channel, before)
    tl.store(next_tail + (b * (W - 1) + W - 2) * C + channel, now.to(next_tail.dtype.element_ty))
    return z * tl.sigmoid(z)


@triton.jit
def features(y, scale):
    """elu(scale u) + 1, u the direction of y."""
    tangent = y * tl.rsqrt(tl.sum(y * y, 0) + FLOOR) * scale
    return tl.where(tangent > 0, tangent + 1, tl.exp(tangent))


@triton.jit
def step_kernel(x, weight, tail, next_tail, r, beta, log_decay, state, norm, gate, y, H, K: tl.constexpr, KEYS: tl.constexpr):
    h, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    ks = tl.arange(0, K)
    temperature = tl.load(beta + h)
    q = features(newest(x, weight, tail, next_tail, b, H, 0, h, K), temperature * tl.load(r + b * 2 * H + h))
    k = features(newest(x, weight, tail, next_tail, b, H, 1, h, K), temperature * tl.load(r + b * 2 * H + H + h))
    v = newest(x, weight, tail, next_tail, b, H, 2, h, K)
    dtype = x.dtype.element_ty
    q, k, v = q.to(dtype).to(tl.float32), k.to(dtype).to(tl.float32), v.to(dtype).to(tl.float32)  # as the features of a sequence are stored
    decay = tl.exp(tl.load(log_decay + b * H + h))
    o = tl.zeros((K,), tl.float32)
    for block in range(K // KEYS):
        rows = block * KEYS + tl.arange(0, KEYS)
        one_hot = (ks[None, :] == rows[:, None]).to(tl.float32)
        at = state + ((b * H + h) * K + rows[:, None]) * K + ks[None, :]
        s = decay * tl.load(at) + tl.sum(one_hot * k[None, :], 1)[:, None] * v[None, :]
        tl.store(at, s)
        o += tl.sum(tl.sum(one_hot * q[None, :], 1)[:, None] * s, 0)
    o *= tl.rsqrt(tl.sum(o * o, 0) / K + EPS) * tl.load(norm + h * K + ks).to(tl.float32)
    g = tl.load(gate + (b * H + h) * K + ks).to(tl.float32)
    tl.store(y + (b * H + h) * K + ks, (o * g * tl.sigmoid(g)).to(dtype))


def keys(K: int) -> int:
    """Rows of the state that a program works on at a time."""
    return min(K, 4096 // K)


def tangent_step(
    x: Tensor, weight: Tensor, r: Tensor, beta: Tensor, log_decay: Tensor, state: Tensor, tail: Tensor, norm: Tensor, gate: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`reference.tangent_step`, in bf16 or fp32. The state given is overwritten."""
    b, h = log_decay.shape
    y = torch.empty(b, x.shape[1] // 3, device=x.device, dtype=x.dtype)
    state, tail = state.contiguous(), tail.contiguous()
    next_tail = torch.empty_like(tail)
    launch(
        step_kernel, (h, b),
        x.contiguous(), weight.contiguous(), tail, next_tail, r.contiguous(), beta.contiguous(), log_decay.contiguous(), state,
        norm.contiguous(),
        gate.contiguous(), y, h, K=norm.shape[1], KEYS=keys(norm.shape[1]),
    )  # fmt: skip
    return y, state, next_tail
