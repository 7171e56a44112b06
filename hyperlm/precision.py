"""What is computed with: parameters are stored in fp32."""

import torch

from hyperlm import tree
from hyperlm.tree import Tree


def compute_copy(params: Tree, dtype: torch.dtype) -> Tree:
    """Parameters to compute with: matrices in `dtype`, vectors (norms, biases, temperatures) as they are."""
    return tree.map(lambda p: p.detach().to(dtype) if p.dim() > 1 else p.detach(), params)
