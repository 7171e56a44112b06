"""Cross entropy of a chunk of the vocabulary at a time: the normaliser online, and the gradient in place of the logits. Axes: T tokens, C chunk."""

import torch
from torch import Tensor

from hyperlm.precision import widen


def take_logits(logits: Tensor, first: int, targets: Tensor, log_z: Tensor, picked: Tensor) -> None:
    """Take in a chunk of logits (T, C): of T tokens, for numbers `first` .. first + C - 1 of a vocabulary.

    Args:
        targets: (T,) int64.
        log_z: (T,), wide; in place, the logarithm of the sum of exponentials of all logits so far, at first -inf.
        picked: (T,), wide; the logit of the target is added if it is among them.
    """
    x, place = widen(logits), targets - first
    there = (place >= 0) & (place < x.shape[1])
    log_z.copy_(torch.logaddexp(log_z, torch.logsumexp(x, -1)))
    picked += torch.where(there, x.gather(1, torch.where(there, place, 0)[:, None])[:, 0], 0)


def pull_logits(logits: Tensor, first: int, targets: Tensor, log_z: Tensor) -> None:
    """Replace the logits of a chunk by the gradient of the cross entropies: exp(logit - log_z), less 1 for the target. Arguments as in `take_logits`."""
    p, place = widen(logits).sub_(log_z[:, None]).exp_(), targets - first
    there = (place >= 0) & (place < p.shape[1])
    p.scatter_add_(1, torch.where(there, place, 0)[:, None], -there[:, None].to(p.dtype))
    if p is not logits:
        logits.copy_(p)
