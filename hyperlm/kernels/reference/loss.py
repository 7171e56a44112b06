"""Cross entropy of a chunk of the vocabulary at a time: the normaliser online, and the gradient in place of the logits.

Axes: T tokens, C numbers of a chunk.
"""

import torch
from torch import Tensor

from hyperlm.precision import widen


def online_logsumexp(logits: Tensor, first: int, targets: Tensor, log_z: Tensor, target_logit: Tensor) -> None:
    """The log-sum-exp of all logits so far, and one chunk (T, C) more: of T tokens, for numbers `first` .. first + C - 1 of a vocabulary.

    Args:
        targets: (T,) int64.
        log_z: (T,), wide; in place, the logarithm of the sum of exponentials of all logits so far, at first -inf.
        target_logit: (T,), wide; the logit of the target is added if it is in this chunk.
    """
    x, column = widen(logits), targets - first
    inside = (column >= 0) & (column < x.shape[1])
    log_z.copy_(torch.logaddexp(log_z, torch.logsumexp(x, -1)))
    target_logit += torch.where(inside, x.gather(1, torch.where(inside, column, 0)[:, None])[:, 0], 0)


def cross_entropy_backward(logits: Tensor, first: int, targets: Tensor, log_z: Tensor) -> None:
    """Replace the logits of a chunk by the gradient of the cross entropies: exp(logit - log_z), less 1 for the target. Arguments as in
    `online_logsumexp`."""
    p, column = widen(logits).sub_(log_z[:, None]).exp_(), targets - first
    inside = (column >= 0) & (column < p.shape[1])
    p.scatter_add_(1, torch.where(inside, column, 0)[:, None], -inside[:, None].to(p.dtype))
    if p is not logits:
        logits.copy_(p)
