"""What stands around attention in a block: norms, gates, output products and the residual stream.

Axes: B batch, H heads, N sequence, V value dim, D model width, R, F and S widths of an MLP.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from hyperlm.precision import widen

EPS = 1e-6  # of every RMSNorm


def norm_gate(o: Tensor, weight: Tensor, gate: Tensor) -> Tensor:
    """RMSNorm of each head, times the SiLU of an output gate: o (B, H, N, V), weight (H, V), gate (B, N, H V) -> (B, N, H V)."""
    o = F.rms_norm(o.transpose(1, 2), (o.shape[-1],), eps=EPS) * weight.to(o.dtype)
    return o.flatten(2) * F.silu(gate)


def readout(o: Tensor, weight: Tensor, gate: Tensor, out: Tensor, result: Tensor | None = None) -> Tensor:
    """`norm_gate` times the output projection, out (D, H V) -> (B, N, D).

    result: what this returns, if it is known: then it is not computed again, and gradients alone are wanted.
    """
    return F.linear(norm_gate(o, weight, gate), out)


def add(x: Tensor, y: Tensor) -> Tensor:
    """x + y, wide."""
    return widen(x) + y


def add_norm(x: Tensor, y: Tensor | None, weight: Tensor, dtype: torch.dtype, values: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """What a branch adds to the residual stream, and its RMSNorm for the next branch.

    Args:
        x: (B, N, D), the stream, wide.
        y: (B, N, D), the result of the branch; None for nothing.
        weight: (D,), wide.
        dtype: of the norm.
        values: (B, N, D) in any dtype, the stream where x is a grad-only carrier: zeros without memory, which only receive its gradient.

    Returns:
        The stream with y, which without y is x as it is; and its norm times weight.
    """
    stream = x if values is None else x + values
    stream = stream if y is None else stream + y
    # A view, so that the norm's part of the gradient is added up by itself: the same bits whether x is a carrier or not.
    normed = F.rms_norm(stream.view_as(stream), stream.shape[-1:], weight.to(stream.dtype), eps=EPS)
    return x if y is None else stream, normed.to(dtype)


def mlp(x: Tensor, up: Tensor, down: Tensor, y: Tensor | None = None) -> Tensor:
    """Two products with GELU between them, x times the standard normal distribution function of x. Reference: Hendrycks and Gimpel 2016.

    Args:
        x: (..., R).
        up, down: (F, R) and (S, F).
        y: as `result` of `readout`.

    Returns:
        gelu(x up^T) down^T, (..., S).
    """
    return F.linear(F.gelu(F.linear(x, up)), down)
