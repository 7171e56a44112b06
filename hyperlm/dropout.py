"""Dropout whose mask is a function of a key and the element's index: no random state to save, and a recomputation repeats it."""

import torch
from torch import Tensor

from hyperlm.kernels.reference import APART, noise


def kept(x: Tensor, rate: float, key: Tensor) -> Tensor:
    """Which elements of x stay, bool like x: each with probability 1 - rate. key: int64 scalar on its device."""
    bits = noise(torch.arange(x.numel(), device=x.device) + key * APART)
    uniform = ((bits >> 40) & 0xFFFFFF).to(torch.float32) * 2.0**-24
    return uniform.view(x.shape) >= rate


def dropout(x: Tensor, rate: float, key: Tensor | None) -> Tensor:
    """x with elements dropped and the others scaled by 1 / (1 - rate); as it is where there is no key (Srivastava et al. 2014)."""
    if key is None or rate == 0:
        return x
    return x * kept(x, rate, key).to(x.dtype) * (1 / (1 - rate))
