"""Cross entropy of a chunk of logits in Triton: read once for the normaliser, and replaced by their gradient in one pass more.

A program works on a row of logits (T, C): T tokens, C numbers of the vocabulary from `first` on.
"""

import triton
import triton.language as tl
from torch import Tensor

from hyperlm.kernels.launch import launch

BLOCK = 4096  # logits that a program holds


@triton.jit
def take(logits, targets, log_z, picked, first, C, BLOCK: tl.constexpr):
    """See `reference.take_logits`."""
    t = tl.program_id(0).to(tl.int64)
    largest, total = -float("inf"), 0.0
    for start in range(0, C, BLOCK):
        c = start + tl.arange(0, BLOCK)
        x = tl.load(logits + t * C + c, mask=c < C, other=-float("inf")).to(tl.float32)
        now = tl.maximum(largest, tl.max(x, 0))
        total = total * tl.exp(largest - now) + tl.sum(tl.exp(x - now), 0)
        largest = now
    before, here = tl.load(log_z + t), largest + tl.log(total)
    least, most = tl.minimum(before, here), tl.maximum(before, here)
    tl.store(log_z + t, most + tl.log(1 + tl.exp(least - most)))
    place = tl.load(targets + t) - first
    there = (place >= 0) & (place < C)
    tl.store(picked + t, tl.load(picked + t) + tl.load(logits + t * C + place, mask=there, other=0.0).to(tl.float32))


@triton.jit
def pull(logits, targets, log_z, first, C, BLOCK: tl.constexpr):
    """See `reference.pull_logits`."""
    t = tl.program_id(0).to(tl.int64)
    normaliser, place = tl.load(log_z + t), tl.load(targets + t) - first
    for start in range(0, C, BLOCK):
        c = start + tl.arange(0, BLOCK)
        x = tl.load(logits + t * C + c, mask=c < C, other=0.0).to(tl.float32)
        p = tl.exp(x - normaliser) - tl.where(c == place, 1.0, 0.0)
        tl.store(logits + t * C + c, p.to(logits.dtype.element_ty), mask=c < C)


def take_logits(logits: Tensor, first: int, targets: Tensor, log_z: Tensor, picked: Tensor) -> None:
    """`reference.take_logits`, in bf16 or fp32."""
    launch(take, (len(logits),), logits, targets, log_z, picked, first, logits.shape[1], BLOCK=BLOCK, warps=8)


def pull_logits(logits: Tensor, first: int, targets: Tensor, log_z: Tensor) -> None:
    """`reference.pull_logits`, in bf16 or fp32."""
    launch(pull, (len(logits),), logits, targets, log_z, first, logits.shape[1], BLOCK=BLOCK, warps=8)
