"""What is computed with, and what is added up in: parameters and sums of gradients are fp32."""

from collections.abc import Sequence

import torch
from torch import Tensor

from hyperlm import tree
from hyperlm.tree import Tree


def compute_copy(params: Tree, dtype: torch.dtype) -> Tree:
    """Parameters to compute with: matrices in `dtype`, vectors (norms, biases, temperatures) as they are."""
    return tree.map(lambda p: p.detach().to(dtype) if p.dim() > 1 else p.detach(), params)


def accumulate(sums: list[Tensor] | None, grads: Sequence[Tensor]) -> list[Tensor]:
    """Add gradients to their fp32 sums in place; the first ones are copied, since whoever computed them may overwrite them."""
    if sums is None:
        return [g.to(torch.float32, copy=True) for g in grads]
    torch._foreach_add_(sums, list(grads))
    return sums
