"""Cross entropy of the head, in chunks of the vocabulary: a sum of nats and a count, never a mean, so that parts add up exactly.

Once through the chunks for the normaliser of every token, and with gradients once more for these, in place of the logits: so each row of
the head's gradient is a single product over all tokens, with no sum beside it. The last chunk's logits are computed once.
Axes: T tokens, D model width, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hyperlm import kernels as table
from hyperlm.kernels.differentiation import Function
from hyperlm.precision import wide

IGNORE = -1  # a target that does not count
# Logits at a time: what plain torch makes of them takes several copies in fp32, and a kernel works in their place.
MAX_LOGITS = {"torch": 1 << 24, "triton": 1 << 26}
TOKENS = 2048  # of which the gradient is computed at a time
OPS = ("cross_entropy_backward", "online_logsumexp")


def chunks(vocabulary: int, tokens: int, max_logits: int) -> list[slice]:
    """The vocabulary in chunks of at most `max_logits` logits of so many tokens."""
    size = max(1, max_logits // tokens)
    whole = size // 128 * 128 or size  # rows that a kernel reads in whole
    count = -(-vocabulary // whole)
    size = min(whole, -(-vocabulary // (count * 128)) * 128)  # of about the same size
    return [slice(start, min(vocabulary, start + size)) for start in range(0, vocabulary, size)]


def logsumexp(
    features: Tensor, weight: Tensor, targets: Tensor, parts: list[slice], ops: dict[str, Callable]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Once through the chunks: of each token the log normaliser and the target's logit, (T,) and wide; the buffer of a chunk, and the
    logits of the last one, which are still in it."""
    log_z = torch.full((len(features),), -torch.inf, device=features.device, dtype=wide(features.dtype))
    target_logit = torch.zeros_like(log_z)
    buffer = features.new_empty(len(features) * parts[0].stop)  # for one chunk at a time
    for part in parts:
        logits = logits_of(features, weight[part], buffer)
        ops["online_logsumexp"](logits, part.start, targets, log_z, target_logit)
    return log_z, target_logit, buffer, logits


def logits_of(features: Tensor, rows: Tensor, buffer: Tensor) -> Tensor:
    """Of one chunk, (T, C), in the memory of `buffer`."""
    return torch.mm(features, rows.mT, out=buffer[: len(features) * len(rows)].view(len(features), len(rows)))


class HeadNats(Function):
    """(features, weight, targets, backend, max_logits, needs_grad) -> nats; and if `needs_grad` the gradients, computed on the way."""

    @staticmethod
    def forward(
        features: Tensor, weight: Tensor, targets: Tensor, backend: str, max_logits: int, needs_grad: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        ops = table.table(OPS, features.device, backend)
        parts = chunks(len(weight), len(features), max_logits or default_max_logits(features.device, backend))
        d_features, d_weight = (
            (torch.empty_like(features), torch.empty_like(weight)) if needs_grad else (None, None)
        )  # first, while there are large gaps
        log_z, target_logit, buffer, logits = logsumexp(features, weight, targets, parts, ops)
        counted = targets != IGNORE
        nats = torch.where(counted, log_z - target_logit, 0).sum(dtype=log_z.dtype if needs_grad else torch.float64)
        if not needs_grad:
            return nats, None, None

        log_z = torch.where(counted, log_z, torch.inf)  # what is ignored then has no probability anywhere
        sums: list[Tensor] = []  # of d_features, by TOKENS of them
        for part in reversed(parts):
            logits = logits if part is parts[-1] else logits_of(features, weight[part], buffer)  # the last ones are still there
            ops["cross_entropy_backward"](logits, part.start, targets, log_z)
            for number, (d_logits, to) in enumerate(zip(logits.split(TOKENS), d_features.split(TOKENS), strict=True)):
                if len(parts) == 1:
                    torch.mm(d_logits, weight, out=to)
                elif part is parts[-1]:
                    sums.append((d_logits @ weight[part]).to(log_z.dtype))
                else:
                    sums[number] += d_logits @ weight[part]
            torch.mm(logits.mT, features, out=d_weight[part])
        for to, x in zip(d_features.split(TOKENS), sums, strict=False):
            to.copy_(x)
        return nats, d_features, d_weight

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        _, d_features, d_weight = output
        if d_weight is not None:
            ctx.mark_non_differentiable(d_features, d_weight)
            ctx.set_materialize_grads(False)  # else zeros as large as these would come with the gradient
            ctx.save_for_backward(d_features, d_weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        d_features, d_weight = ctx.saved_tensors
        # in place: there is no second time
        return d_features.mul_(grad.to(d_features.dtype)), d_weight.mul_(grad.to(d_weight.dtype)), None, None, None, None


def default_max_logits(device: torch.device, backend: str) -> int:
    return MAX_LOGITS[table.select("cross_entropy_backward", device, backend).backend]


def head_nats(features: Tensor, weight: Tensor, targets: Tensor, *, kernels: str = "auto", max_logits: int = 0) -> tuple[Tensor, Tensor]:
    """Summed cross entropy of the next token.

    Args:
        features: (T, D), normalised, any float dtype.
        weight: (V, D), the head.
        targets: (T,) int64; IGNORE where a position does not count.
        max_logits: logits that may exist at the same time; 0 for a default.

    Returns:
        nats and the number of counted targets, scalars; nats at least in fp32, without gradients in fp64. Differentiable once.
    """
    needs_grad = torch.is_grad_enabled() and (features.requires_grad or weight.requires_grad)
    return HeadNats.apply(features, weight, targets, kernels, max_logits, needs_grad)[0], (targets != IGNORE).sum()


@torch.no_grad()
def token_nats(features: Tensor, weight: Tensor, targets: Tensor, *, kernels: str = "auto", max_logits: int = 0) -> Tensor:
    """Cross entropy of each next token, (T,), at least fp32, 0 where it is ignored; with the arguments of `head_nats`, which is their
    sum."""
    ops = table.table(OPS, features.device, kernels)
    parts = chunks(len(weight), len(features), max_logits or default_max_logits(features.device, kernels))
    log_z, target_logit, *_ = logsumexp(features, weight, targets, parts, ops)
    return torch.where(targets != IGNORE, log_z - target_logit, 0)
