"""What a step learns from: inputs, and apart from them what is to be predicted at each place."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Batch:
    """Sequences of N tokens, (..., N) int64 each: in a step (A, B, N), A micro-batches of B sequences."""

    tokens: Tensor  # what is read; real tokens everywhere, whether they are learnt or not
    targets: Tensor  # the token that follows at each place; loss.IGNORE where it is not learnt

    def map(self, fn: Callable[[Tensor], Tensor]) -> "Batch":
        return Batch(fn(self.tokens), fn(self.targets))

    def to(self, device: torch.device) -> "Batch":
        return self.map(lambda x: x.to(device, non_blocking=True))


def next_tokens(windows: Tensor) -> Batch:
    """Windows of text (..., N+1), in which every token is learnt from those before it."""
    return Batch(windows[..., :-1].contiguous(), windows[..., 1:].contiguous())


def joined(batches: Sequence[Batch]) -> Batch:
    """One after the other, along the first axis."""
    return Batch(torch.cat([b.tokens for b in batches]), torch.cat([b.targets for b in batches]))
