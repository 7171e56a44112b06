"""Cross entropy of the head, in chunks of the vocabulary: a sum of nats and a count, never a mean, so that parts add up exactly.

Once through the chunks for the normaliser of every token, and with gradients once more for these, in place of the logits: so each row of the
head's gradient is a single product over all tokens, with no sum beside it. The last chunk's logits are computed once.
Axes: T tokens, D model width, V vocabulary.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from hyperlm import kernels as table
from hyperlm.kernels.differentiation import Function
from hyperlm.precision import wide

IGNORE = -1  # a target that does not count
# Logits at a time: what plain torch makes of them takes several copies in fp32, and a kernel works in their place.
AT_ONCE = {"torch": 1 << 24, "triton": 1 << 26}
TOKENS = 2048  # of which the gradient is found at a time
OPS = ("pull_logits", "take_logits")


def chunks(vocabulary: int, tokens: int, at_once: int) -> list[slice]:
    """The vocabulary in chunks of at most `at_once` logits of so many tokens."""
    size = max(1, at_once // tokens)
    whole = size // 128 * 128 or size  # rows that a kernel reads in whole
    count = -(-vocabulary // whole)
    size = min(whole, -(-vocabulary // (count * 128)) * 128)  # of about the same size
    return [slice(start, min(vocabulary, start + size)) for start in range(0, vocabulary, size)]


def taken(
    features: Tensor, weight: Tensor, targets: Tensor, parts: list[slice], ops: dict[str, Callable]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Once through the chunks: of each token the log normaliser and the target's logit, (T,) and wide; the memory of a chunk, and the
    logits of the last one, which are still in it."""
    log_z = torch.full((len(features),), -torch.inf, device=features.device, dtype=wide(features.dtype))
    picked = torch.zeros_like(log_z)
    room = features.new_empty(len(features) * parts[0].stop)  # for one chunk at a time
    for part in parts:
        logits = logits_of(features, weight[part], room)
        ops["take_logits"](logits, part.start, targets, log_z, picked)
    return log_z, picked, room, logits


def logits_of(features: Tensor, rows: Tensor, room: Tensor) -> Tensor:
    """Of one chunk, (T, C), in the memory of `room`."""
    return torch.mm(features, rows.mT, out=room[: len(features) * len(rows)].view(len(features), len(rows)))


class HeadNats(Function):
    """(features, weight, targets, backend, at_once, pulled) -> nats, with the gradients found on the way if `pulled`."""

    @staticmethod
    def forward(
        features: Tensor, weight: Tensor, targets: Tensor, backend: str, at_once: int, pulled: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        ops = table.table(OPS, features.device, backend)
        parts = chunks(len(weight), len(features), at_once or logits_at_once(features.device, backend))
        d_features, d_weight = (
            (torch.empty_like(features), torch.empty_like(weight)) if pulled else (None, None)
        )  # first, while there are large gaps
        log_z, picked, room, logits = taken(features, weight, targets, parts, ops)
        counted = targets != IGNORE
        nats = torch.where(counted, log_z - picked, 0).sum(dtype=log_z.dtype if pulled else torch.float64)
        if not pulled:
            return nats, None, None

        log_z = torch.where(counted, log_z, torch.inf)  # what is ignored then has no probability anywhere
        sums: list[Tensor] = []  # of d_features, by TOKENS of them
        for part in reversed(parts):
            logits = logits if part is parts[-1] else logits_of(features, weight[part], room)  # the last ones are still there
            ops["pull_logits"](logits, part.start, targets, log_z)
            for number, (own, to) in enumerate(zip(logits.split(TOKENS), d_features.split(TOKENS), strict=True)):
                if len(parts) == 1:
                    torch.mm(own, weight, out=to)
                elif part is parts[-1]:
                    sums.append((own @ weight[part]).to(log_z.dtype))
                else:
                    sums[number] += own @ weight[part]
            torch.mm(logits.mT, features, out=d_weight[part])
        for to, x in zip(d_features.split(TOKENS), sums, strict=False):
            to.copy_(x)
        return nats, d_features, d_weight

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: tuple) -> None:
        _, d_features, d_weight = output
        if d_weight is not None:
            ctx.mark_non_differentiable(d_features, d_weight)
            ctx.set_materialize_grads(False)  # else zeros as large as these would come with the gradient
            ctx.save_for_backward(d_features, d_weight)

    @staticmethod
    def backward(ctx, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        d_features, d_weight = ctx.saved_tensors
        # in place: there is no second time
        return d_features.mul_(grad.to(d_features.dtype)), d_weight.mul_(grad.to(d_weight.dtype)), None, None, None, None


def logits_at_once(device: torch.device, backend: str) -> int:
    return AT_ONCE[table.select("pull_logits", device, backend).backend]


def head_nats(features: Tensor, weight: Tensor, targets: Tensor, *, kernels: str = "auto", at_once: int = 0) -> tuple[Tensor, Tensor]:
    """Summed cross entropy of the next token.

    Args:
        features: (T, D), normalised, any float dtype.
        weight: (V, D), the head.
        targets: (T,) int64; IGNORE where a position does not count.
        at_once: logits that may exist at the same time; 0 for a default.

    Returns:
        nats and the number of counted targets, scalars; nats at least in fp32, without gradients in fp64. Differentiable once.
    """
    pulled = torch.is_grad_enabled() and (features.requires_grad or weight.requires_grad)
    return HeadNats.apply(features, weight, targets, kernels, at_once, pulled)[0], (targets != IGNORE).sum()


@torch.no_grad()
def token_nats(features: Tensor, weight: Tensor, targets: Tensor, *, kernels: str = "auto", at_once: int = 0) -> Tensor:
    """Cross entropy of each next token, (T,), at least fp32, 0 where it is ignored; with the arguments of `head_nats`, which is their sum."""
    ops = table.table(OPS, features.device, kernels)
    parts = chunks(len(weight), len(features), at_once or logits_at_once(features.device, kernels))
    log_z, picked, *_ = taken(features, weight, targets, parts, ops)
    return torch.where(targets != IGNORE, log_z - picked, 0)
