"""Cross entropy of a chunk of logits in Triton: read once for the normaliser, and replaced by their gradient in one pass more.

A program works on a row of logits (T, C): T tokens, C numbers of the vocabulary from `first` on.
"""

import triton
import triton.language as tl
from torch import Tensor

from hyperlm.kernels.launch import launch

ELEMENTS = 4096  # logits that a program holds at a time


@triton.jit
def logsumexp_kernel(logits, targets, log_z, target_logit, first, C, ELEMENTS: tl.constexpr):
    """See `reference.online_logsumexp`."""
    t = tl.program_id(0).to(tl.int64)
    largest, total = -float("inf"), 0.0
    for start in range(0, C, ELEMENTS):
        c = start + tl.arange(0, ELEMENTS)
        x = tl.load(logits + t * C + c, mask=c < C, other=-float("inf")).to(tl.float32)
        now = tl.maximum(largest, tl.max(x, 0))
        total = total * tl.exp(largest - now) + tl.sum(tl.exp(x - now), 0)
        largest = now
    before, in_chunk = tl.load(log_z + t), largest + tl.log(total)
    least, most = tl.minimum(before, in_chunk), tl.maximum(before, in_chunk)
    tl.store(log_z + t, most + tl.log(1 + tl.exp(least - most)))
    column = tl.load(targets + t) - first
    inside = (column >= 0) & (column < C)
    tl.store(target_logit + t, tl.load(target_logit + t) + tl.load(logits + t * C + column, mask=inside, other=0.0).to(tl.float32))


@triton.jit
def gradient_kernel(logits, targets, log_z, first, C, ELEMENTS: tl.constexpr):
    """See `reference.cross_entropy_backward`."""
    t = tl.program_id(0).to(tl.int64)
    normaliser, column = tl.load(log_z + t), tl.load(targets + t) - first
    for start in range(0, C, ELEMENTS):
        c = start + tl.arange(0, ELEMENTS)
        x = tl.load(logits + t * C + c, mask=c < C, other=0.0).to(tl.float32)
        p = tl.exp(x - normaliser) - tl.where(c == column, 1.0, 0.0)
        tl.store(logits + t * C + c, p.to(logits.dtype.element_ty), mask=c < C)


def online_logsumexp(logits: Tensor, first: int, targets: Tensor, log_z: Tensor, target_logit: Tensor) -> None:
    """`reference.online_logsumexp`, in bf16 or fp32."""
    launch(logsumexp_kernel, (len(logits),), logits, targets, log_z, target_logit, first, logits.shape[1], ELEMENTS=ELEMENTS, warps=8)


def cross_entropy_backward(logits: Tensor, first: int, targets: Tensor, log_z: Tensor) -> None:
    """`reference.cross_entropy_backward`, in bf16 or fp32."""
    launch(gradient_kernel, (len(logits),), logits, targets, log_z, first, logits.shape[1], ELEMENTS=ELEMENTS, warps=8)
