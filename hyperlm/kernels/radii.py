"""Radii and decays of heads in Triton: what a token's few numbers mean, forward and backward in a launch each instead of a dozen.

Layout: products (T, C), T = B N tokens, a row some stride from the next; first the G columns of radii, then the H of decays.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hyperlm.geometry import R_MAX, R_MIN
from hyperlm.kernels.differentiation import Function, gradients
from hyperlm.kernels.launch import cdiv, launch

LEAST, RANGE = tl.constexpr(R_MIN), tl.constexpr(R_MAX - R_MIN)
TOKENS, COLUMNS = 64, 32  # of a program


@triton.jit
def columns_of(G, COLUMNS: tl.constexpr):
    """The columns of a program, counted from the first radius or the first decay, and which of them they are."""
    block, of_radii = tl.program_id(1), tl.cdiv(G, COLUMNS)
    is_decay = block >= of_radii
    if is_decay:
        block -= of_radii
    return block * COLUMNS + tl.arange(0, COLUMNS), is_decay


@triton.jit
def numbers_at(product, bias, t, own, before, count, T, stride):
    """Products with their bias, of tokens t and of columns `own` of the `count` after the first `before`; and which of these there are."""
    there = (t < T)[:, None] & (own < count)[None, :]
    x = tl.load(product + t[:, None] * stride + (before + own)[None, :], mask=there, other=0.0).to(tl.float32)
    return x + tl.load(bias + own, mask=own < count, other=0.0)[None, :], there


@triton.jit
def forward(product, radius_bias, decay_bias, r, log_decay, T, N, G, H, stride, TOKENS: tl.constexpr, COLUMNS: tl.constexpr):
    """r (T, G) and log_decay (B, H, N)."""
    own, is_decay = columns_of(G, COLUMNS)
    t = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    if is_decay:
        x, mask = numbers_at(product, decay_bias, t, own, G, H, T, stride)
        softplus = tl.maximum(x, 0.0) + tl.log(1 + tl.exp(-tl.abs(x)))
        tl.store(log_decay + ((t // N)[:, None] * H + own[None, :]) * N + (t % N)[:, None], -softplus, mask=mask)
    else:
        x, mask = numbers_at(product, radius_bias, t, own, 0, G, T, stride)
        tl.store(r + t[:, None] * G + own[None, :], tl.sigmoid(x) * RANGE + LEAST, mask=mask)


@triton.jit
def backward_of(
    product, radius_bias, decay_bias, d_r, d_log_decay, d_product, d_bias, T, N, G, H, stride, TOKENS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """d_product (T, G + H), and each program's part of the gradients of both biases, (programs, G + H)."""
    own, is_decay = columns_of(G, COLUMNS)
    t = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    if is_decay:
        x, mask = numbers_at(product, decay_bias, t, own, G, H, T, stride)
        d = -tl.load(d_log_decay + ((t // N)[:, None] * H + own[None, :]) * N + (t % N)[:, None], mask=mask, other=0.0) * tl.sigmoid(x)
        column, count = G + own, H
    else:
        x, mask = numbers_at(product, radius_bias, t, own, 0, G, T, stride)
        share = tl.sigmoid(x)
        d = tl.load(d_r + t[:, None] * G + own[None, :], mask=mask, other=0.0) * (share * (1 - share) * RANGE)
        column, count = own, G
    tl.store(d_product + t[:, None] * (G + H) + column[None, :], d.to(d_product.dtype.element_ty), mask=mask)
    tl.store(d_bias + tl.program_id(0) * (G + H) + column, tl.sum(d, 0), mask=own < count)


def grid(tokens: int, g: int, h: int) -> tuple[int, int]:
    return cdiv(tokens, TOKENS), cdiv(g, COLUMNS) + cdiv(h, COLUMNS)


def given(x: Tensor | None, like: Tensor) -> Tensor:
    """What a kernel takes where there are no decays: a tensor of no numbers, since the branch that no program enters is compiled all the
    same."""
    return like.new_empty(0) if x is None else x


def sizes(product: Tensor, radius_bias: Tensor, decay_bias: Tensor | None) -> tuple[int, int, int, int, int]:
    b, n, _ = product.shape
    return b * n, n, len(radius_bias), 0 if decay_bias is None else len(decay_bias), product.stride(1)


def backward(
    product: Tensor, radius_bias: Tensor, decay_bias: Tensor | None, d_r: Tensor, d_log_decay: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    t, n, g, h, stride = sizes(product, radius_bias, decay_bias)
    shape = grid(t, g, h)
    d_product = torch.empty(*product.shape[:2], g + h, device=product.device, dtype=product.dtype)
    d_bias = torch.empty(shape[0], g + h, device=product.device)
    d_log_decay = given(d_log_decay, d_r).contiguous()
    launch(
        backward_of, shape,
        product, radius_bias, given(decay_bias, radius_bias), d_r.contiguous(), d_log_decay, d_product, d_bias, t, n, g, h, stride,
        TOKENS=TOKENS, COLUMNS=COLUMNS,
    )  # fmt: skip
    d_bias = d_bias.sum(0)
    return d_product, d_bias[:g], None if decay_bias is None else d_bias[g:]


class Radii(Function):
    """(product (B, N, G + H), radius_bias (G,), decay_bias (H,) or None) -> r (B, N, G), log_decay (B, H, N) or None."""

    @staticmethod
    def forward(product: Tensor, radius_bias: Tensor, decay_bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        t, n, g, h, stride = sizes(product, radius_bias, decay_bias)
        r = torch.empty(*product.shape[:2], g, device=product.device)
        log_decay = torch.empty(product.shape[0], h, n, device=product.device)
        launch(
            forward, grid(t, g, h),
            product, radius_bias, given(decay_bias, radius_bias), r, log_decay, t, n, g, h, stride, TOKENS=TOKENS, COLUMNS=COLUMNS,
        )  # fmt: skip
        return r, log_decay if h else None

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: tuple) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, d_r: Tensor, d_log_decay: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        return gradients(backward, *ctx.saved_tensors, d_r, d_log_decay)


def radii(product: Tensor, radius_bias: Tensor, decay_bias: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """`reference.radii`, of products in bf16 or fp32."""
    b, n, _ = product.shape
    if product.stride(2) != 1 or (b > 1 and product.stride(0) != n * product.stride(1)):
        product = product.contiguous()
    r, log_decay = Radii.apply(product, radius_bias, decay_bias)
    return r.mT, log_decay
