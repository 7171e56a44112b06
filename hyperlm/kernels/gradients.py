"""Gradients in Triton, added up and measured: of numbers in bf16, torch itself does both at half the speed of memory or less. And a copy
of scalars to the host."""

from collections.abc import Sequence
from itertools import accumulate as running

import torch
import triton
import triton.language as tl
from torch import Tensor

from hyperlm.kernels.add_norm import add_wide
from hyperlm.kernels.launch import cdiv, launch

ELEMENTS, TILES = 4096, 8  # numbers at a time that a program measures, and how many times


@triton.jit
def square(x, sums, N, ELEMENTS: tl.constexpr, TILES: tl.constexpr):
    """Of each program, its part of the sum of squares, (programs,)."""
    total = tl.zeros((ELEMENTS,), tl.float32)
    for tile in range(TILES):
        at = (tl.program_id(0).to(tl.int64) * TILES + tile) * ELEMENTS + tl.arange(0, ELEMENTS)
        numbers = tl.load(x + at, mask=at < N, other=0.0).to(tl.float32)
        total += numbers * numbers
    tl.store(sums + tl.program_id(0), tl.sum(total, 0))


def accumulate(total: Tensor, x: Tensor) -> None:
    """`reference.accumulate`."""
    add_wide(total, x.contiguous(), total)


def copy_to_host(x: Tensor, to: Tensor) -> None:
    """`reference.copy_to_host`. A copy would wait until all larger ones that are under way have come home."""
    add_wide(x.contiguous(), None, to)


def norm(parts: Sequence[Tensor]) -> Tensor:
    """`reference.norm`."""
    programs = [cdiv(x.numel(), ELEMENTS * TILES) for x in parts]
    sums = torch.empty(sum(programs), device=parts[0].device)
    for x, count, first in zip(parts, programs, running(programs, initial=0), strict=False):
        launch(square, (count,), x.contiguous(), sums[first:], x.numel(), ELEMENTS=ELEMENTS, TILES=TILES, warps=8)
    return sums.sum().sqrt()
