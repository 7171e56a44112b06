"""GELU between two products, with Triton at the speed of memory: torch's own takes longer over the error function than over its bytes.

What is between the products is the widest of a block. The backward pass has two tensors of it and no third, each overwritten by the next
that is wanted; and where the result is known already, the forward pass makes neither.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from hyperlm.kernels import special
from hyperlm.kernels.differentiation import Function, gradients, linear_vjp, weight_gradient
from hyperlm.kernels.launch import cdiv, launch

ELEMENTS = 4096  # numbers of a program


@triton.jit
def normal(x):
    """The standard normal distribution function at x to 1e-7, and exp(-x^2 / 2). Abramowitz and Stegun, Handbook of Mathematical
    Functions, 7.1.26."""
    bell = special.exp2(x * x * -0.7213475204444817, False)  # log2(e) / 2
    t = special.reciprocal(1 + 0.23164189 * tl.abs(x), False)  # 0.3275911 / sqrt(2)
    series = ((((1.061405429 * t - 1.453152027) * t + 1.421413741) * t - 0.284496736) * t + 0.254829592) * t
    beyond = 0.5 * series * bell
    return tl.where(x < 0, beyond, 1 - beyond), bell


@triton.jit
def gelu_forward(x, y, N, ELEMENTS: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
    value = tl.load(x + at, mask=at < N, other=0.0).to(tl.float32)
    cdf, _ = normal(value)
    tl.store(y + at, (value * cdf).to(y.dtype.element_ty), mask=at < N)


@triton.jit
def gelu_backward(x, d, N, RECOMPUTE: tl.constexpr, ELEMENTS: tl.constexpr):
    """In place of d, the gradient of gelu(x), that of x; and RECOMPUTE, in place of x, gelu(x)."""
    at = tl.program_id(0).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
    value = tl.load(x + at, mask=at < N, other=0.0).to(tl.float32)
    cdf, bell = normal(value)
    if RECOMPUTE:
        tl.store(x + at, (value * cdf).to(x.dtype.element_ty), mask=at < N)
    dx = tl.load(d + at, mask=at < N, other=0.0).to(tl.float32) * (cdf + value * bell * 0.3989422804014327)  # 1 / sqrt(2 pi)
    tl.store(d + at, dx.to(d.dtype.element_ty), mask=at < N)


def gelu_vjp_(x: Tensor, d: Tensor, *, recompute: bool) -> None:
    launch(gelu_backward, (cdiv(x.numel(), ELEMENTS),), x, d, x.numel(), RECOMPUTE=recompute, ELEMENTS=ELEMENTS, warps=8)


def backward(x: Tensor, up: Tensor, down: Tensor, wide: Tensor | None, active: Tensor | None, d: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, up and down from d, that of y, all with one row a token; wide and active, x up^T and its GELU, are overwritten
    if there."""
    if wide is None or active is None:
        wide, d_active = x @ up.mT, d @ down
        gelu_vjp_(wide, d_active, recompute=True)
        d_down = weight_gradient(d, wide)
    else:
        d_down = weight_gradient(d, active)
        d_active = torch.mm(d, down, out=active)
        gelu_vjp_(wide, d_active, recompute=False)
    return *linear_vjp(d_active, x, up), d_down


class MLP(Function):
    """(x (T, R), up (F, R), down (S, F), y (T, S) or None) -> y, and what the backward pass will overwrite."""

    @staticmethod
    def forward(x: Tensor, up: Tensor, down: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
        if y is not None:
            return y.view_as(y), None, None
        wide = F.linear(x, up)
        active = torch.empty_like(wide)
        launch(gelu_forward, (cdiv(wide.numel(), ELEMENTS),), wide, active, wide.numel(), ELEMENTS=ELEMENTS, warps=8)
        return F.linear(active, down), wide, active

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: tuple) -> None:
        between = [x for x in output[1:] if x is not None]
        ctx.mark_non_differentiable(*between)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:3], *output[1:])

    @staticmethod
    def backward(ctx, d: Tensor, *_: None) -> tuple[Tensor, Tensor, Tensor, None]:
        return *gradients(backward, *ctx.saved_tensors, d.contiguous()), None


def mlp(x: Tensor, up: Tensor, down: Tensor, y: Tensor | None = None) -> Tensor:
    """`reference.mlp`, in bf16 or fp32. It can be differentiated once."""
    result, _, _ = MLP.apply(x.flatten(0, -2), up, down, None if y is None else y.flatten(0, -2))
    return result.view(*x.shape[:-1], -1)
