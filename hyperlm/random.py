"""Counter-based random numbers (Salmon et al. 2011): bits are a function of a counter, so that there is no state to save, and what is
computed again finds the same ones; and dropout, whose mask is made of them.

A stream is the counters from a base on. Bases are hashes (see `optim.stream_bases`), or lie multiples of STRIDE apart.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

MULTIPLIERS = (-49064778989728563, -4265267296055464877)  # of MurmurHash3's fmix64 (Appleby 2011)
STRIDE = -7046029254386353131  # odd: multiples of it, bases of different streams, are far from each other


def fmix64(counter: Tensor) -> Tensor:
    """64 random bits of each counter, int64."""
    for multiplier in MULTIPLIERS:
        counter = (counter ^ ((counter >> 33) & 0x7FFFFFFF)) * multiplier
    return counter ^ ((counter >> 33) & 0x7FFFFFFF)


def random_bits(base: Tensor, shape: Sequence[int]) -> Tensor:
    """16 random bits for each of n numbers, a multiple of 4, int64: a quarter of what a counter gives, of the n / 4 counters from `base`
    on."""
    bits = fmix64(base + torch.arange(math.prod(shape) // 4, device=base.device))
    return torch.stack([(bits >> below) & 0xFFFF for below in (0, 16, 32, 48)], 1).view(shape)


def uniform(bits: Tensor) -> Tensor:
    """16 random bits as numbers in [0, 1), fp32."""
    return bits.float() * (1 / 65536)


def keep_mask(x: Tensor, rate: float, key: Tensor) -> Tensor:
    """Which elements of x stay, bool like x: each with probability 1 - rate. key: int64 scalar on its device."""
    bits = fmix64(torch.arange(x.numel(), device=x.device) + key * STRIDE)
    share = ((bits >> 40) & 0xFFFFFF).to(torch.float32) * 2.0**-24
    return share.view(x.shape) >= rate


def dropout(x: Tensor, rate: float, key: Tensor | None) -> Tensor:
    """x with elements dropped and the others scaled by 1 / (1 - rate); as it is where there is no key (Srivastava et al. 2014)."""
    if key is None or rate == 0:
        return x
    return x * keep_mask(x, rate, key).to(x.dtype) * (1 / (1 - rate))
