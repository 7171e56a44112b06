"""Cross entropy of the head, in chunks: a sum of nats and a count, never a mean, so that parts add up exactly.

The (T, V) logits never exist whole. With gradients, chunks are of the vocabulary: once for the normaliser of every token, once more for the
gradients, so that each row of the head's is a single product over all tokens, with no sum beside it. Without, chunks are of tokens.
Axes: T tokens, D model width, V vocabulary.
"""

import torch
from torch import Tensor

IGNORE = -1  # a target that does not count
CHUNK_ELEMENTS = 1 << 24  # logits of a chunk: 64 MiB in fp32


def chunks(length: int, width: int) -> list[slice]:
    """`length` rows in chunks, of which the product with `width` others has at most CHUNK_ELEMENTS."""
    size = max(1, CHUNK_ELEMENTS // width)
    return [slice(start, min(length, start + size)) for start in range(0, length, size)]


def chunk_nats(logits: Tensor, targets: Tensor) -> Tensor:
    """Nats (T,) of wide logits (T, V), zero where ignored."""
    picked = logits.gather(-1, targets.clamp(min=0)[:, None])[:, 0]
    return torch.where(targets == IGNORE, 0, torch.logsumexp(logits, -1) - picked)


class HeadNats(torch.autograd.Function):
    """(features, weight, targets) -> nats, with the gradients found on the way."""

    @staticmethod
    def forward(features: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        wide = torch.float64 if features.dtype == torch.float64 else torch.float32
        parts, rows = chunks(weight.shape[0], features.shape[0]), torch.arange(features.shape[0], device=features.device)

        def logits_of(part: slice) -> Tensor:
            return (features @ weight[part].mT).to(wide)

        def own(part: slice) -> tuple[Tensor, Tensor]:
            """Of every token, the place of its target in a chunk (some place, if it is in another), and whether it is there."""
            place = targets - part.start
            there = (place >= 0) & (targets < part.stop)
            return torch.where(there, place, 0), there

        log_z = torch.full((features.shape[0],), -torch.inf, device=features.device, dtype=wide)
        picked = torch.zeros_like(log_z)
        for part in parts:
            logits = logits_of(part)
            place, there = own(part)
            log_z = torch.logaddexp(log_z, torch.logsumexp(logits, -1))
            picked += torch.where(there, logits[rows, place], 0)
        counted = targets != IGNORE
        nats = torch.where(counted, log_z - picked, 0).sum()

        d_features, d_weight = torch.zeros_like(features, dtype=wide), torch.empty_like(weight)
        log_z = torch.where(counted, log_z, torch.inf)  # what is ignored then has no probability anywhere
        for part in parts:
            logits = logits if len(parts) == 1 else logits_of(part)
            p = logits.sub_(log_z[:, None]).exp_()  # softmax; then its difference from the target
            place, there = own(part)
            p[rows, place] -= there.to(wide)
            p = p.to(features.dtype)
            d_features += p @ weight[part]
            torch.mm(p.mT, features, out=d_weight[part])
        return nats, d_features.to(features.dtype), d_weight

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: tuple) -> None:
        _, d_features, d_weight = output
        ctx.mark_non_differentiable(d_features, d_weight)
        ctx.save_for_backward(d_features, d_weight)

    @staticmethod
    def backward(ctx, grad: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, None]:
        d_features, d_weight = ctx.saved_tensors
        return d_features.mul_(grad.to(d_features.dtype)), d_weight.mul_(grad.to(d_weight.dtype)), None  # in place: there is no second time


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
    parts = chunks(features.shape[0], weight.shape[0])
    total = sum(chunk_nats((features[part] @ weight.mT).double(), targets[part]).sum() for part in parts)
    return total, count
