"""Gradients added to their sums in Triton: torch itself adds numbers of two dtypes at less than half the speed of memory."""

import triton
import triton.language as tl
from torch import Tensor

from hyperlm.kernels.launch import launch

BLOCK = 4096  # numbers of a program


@triton.jit
def add(total, x, N, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < N
    tl.store(total + at, tl.load(total + at, mask=mask) + tl.load(x + at, mask=mask).to(tl.float32), mask=mask)


def accumulate(total: Tensor, x: Tensor) -> None:
    """`reference.accumulate`."""
    launch(add, (triton.cdiv(total.numel(), BLOCK),), total, x.contiguous(), total.numel(), BLOCK=BLOCK, warps=8)
