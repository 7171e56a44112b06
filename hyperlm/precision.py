"""What is computed with, and what is added up in: parameters and sums of gradients are fp32."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hyperlm import tree
from hyperlm.tree import Tree


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype that values of `dtype` are accumulated in: fp32, or fp64 for fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def widen(x: Tensor) -> Tensor:
    return x.to(wide(x.dtype))


def compute_copy(params: Tree, dtype: torch.dtype) -> Tree:
    """Parameters to compute with: matrices in `dtype`, vectors (norms, biases, temperatures) as they are."""
    return tree.map(lambda p: p.detach().to(dtype) if p.dim() > 1 else p.detach(), params)


def summed(sums: list[Tensor] | None, grads: Sequence[Tensor], accumulate: Callable[[Tensor, Tensor], None]) -> list[Tensor]:
    """Gradients added to their fp32 sums, in place by an `accumulate` of the dispatch table; the first ones are copied, since whoever
    computed them may overwrite them."""
    if sums is None:
        return [g.to(torch.float32, copy=True) for g in grads]
    for total, g in zip(sums, grads, strict=True):
        accumulate(total, g)
    return sums
