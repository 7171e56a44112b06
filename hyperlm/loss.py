"""Cross entropy of the head, in chunks of tokens: a sum of nats and a count, never a mean, so that parts add up exactly.

The (T, V) logits never exist whole: each chunk's logits, loss and gradients are computed together in the forward pass.
Axes: T tokens, D model width, V vocabulary.
"""

import torch
from torch import Tensor

IGNORE = -1  # a target that does not count
CHUNK_ELEMENTS = 1 << 25  # logits of a chunk: 128 MiB in fp32


def chunks(features: Tensor, weight: Tensor) -> list[slice]:
    size = max(1, CHUNK_ELEMENTS // weight.shape[0])
    return [slice(start, start + size) for start in range(0, features.shape[0], size)]


def chunk_nats(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Nats (T,) of wide logits (T, V), zero where ignored, and the log normaliser (T, 1)."""
    log_z = torch.logsumexp(logits, -1, keepdim=True)
    picked = logits.gather(-1, targets.clamp(min=0)[:, None])
    return torch.where(targets == IGNORE, 0, (log_z - picked)[:, 0]), log_z


class HeadNats(torch.autograd.Function):
    """(features, weight, targets) -> nats, with the gradients found on the way."""

    @staticmethod
    def forward(features: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        wide = torch.float64 if features.dtype == torch.float64 else torch.float32
        nats = torch.zeros((), dtype=wide, device=features.device)
        d_features = torch.empty_like(features)
        d_weight = torch.zeros_like(weight, dtype=wide)
        for part in chunks(features, weight):
            x, y = features[part], targets[part]
            logits = (x @ weight.mT).to(wide)
            losses, log_z = chunk_nats(logits, y)
            nats += losses.sum()
            p = logits.sub_(log_z).exp_()  # softmax; then its difference from the target, zero where ignored
            p.scatter_add_(-1, y.clamp(min=0)[:, None], p.new_full((len(y), 1), -1.0))
            p.masked_fill_((y == IGNORE)[:, None], 0)
            p = p.to(x.dtype)
            d_features[part] = p @ weight
            d_weight += p.mT @ x
        return nats, d_features, d_weight.to(weight.dtype)

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: tuple) -> None:
        _, d_features, d_weight = output
        ctx.mark_non_differentiable(d_features, d_weight)
        ctx.save_for_backward(d_features, d_weight)

    @staticmethod
    def backward(ctx, grad: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, None]:
        d_features, d_weight = ctx.saved_tensors
        return d_features * grad.to(d_features.dtype), d_weight * grad.to(d_weight.dtype), None


def head_nats(features: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Summed cross entropy of the next token.

    Args:
        features: (T, D), normalised, any float dtype.
        weight: (V, D), the head.
        targets: (T,) int64; IGNORE where a position does not count.

    Returns:
        nats and the number of counted targets, scalars; nats at least in fp32. Differentiable once.
    """
    count = (targets != IGNORE).sum()
    if torch.is_grad_enabled() and (features.requires_grad or weight.requires_grad):
        return HeadNats.apply(features, weight, targets)[0], count
    total = sum(chunk_nats((features[part] @ weight.mT).double(), targets[part])[0].sum() for part in chunks(features, weight))
    return total, count
