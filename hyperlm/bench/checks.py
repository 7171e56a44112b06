"""What must hold before a number is worth anything: that a model looks back only, and that its kernels compute what their references do.

Axes: B batch, N sequence, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from hyperlm import kernels, tree
from hyperlm import model as decoder
from hyperlm.config import Config, ModelConfig
from hyperlm.env import compute_dtype
from hyperlm.loss import head_nats
from hyperlm.precision import compute_copy
from hyperlm.tree import Tree

LENGTH = 256  # tokens that are checked: several chunks and tiles of every kernel
CUTS = (1, 2, 63, 64, 65, 200)  # positions from which on tokens change; at the first ones a token that is seen too early weighs most
VOCABULARY = 4096  # at most: embedding and head of a large model are not what is checked
# Of nats before a cut, in what computes in bf16 with work that is split by what comes later; fp32 on a CPU is exact.
ROUNDED = 5e-3
# The same with trained weights: 0.07 was seen of phase8 and hybrid on an H200, as much as their nats in bf16 are off those in fp32; decays
# of a chunk's last tokens scale its products before they are rounded. That code looks back only is found with initial weights.
TRAINED = 0.2
# Relative error of a gradient that is let pass; or, where torch in the same dtype is as far from fp32, TIMES its own. Gradients of matrices
# are compared one by one; those of vectors, too few numbers to tell rounding from mistakes, together.
GRADIENT, TIMES = 0.05, 3.0
TINY = 1e-20  # of a gradient that is exactly zero


class CheckFailed(Exception):
    """A model or a kernel that does not compute what it claims to: none of its numbers means anything."""


def random_tokens(vocabulary: int, shape: tuple[int, ...], seed: int, device: torch.device) -> Tensor:
    return torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(seed)).to(device)


@torch.no_grad()
def causal(
    nats: Callable[[Tensor, Tensor], Tensor], vocabulary: int, device: torch.device, length: int = LENGTH, rounded: float = ROUNDED
) -> None:
    """Check that tokens from position n on change no nats before n.

    Args:
        nats: (tokens, targets), both (B, N) int64 on `device`, -> nats (B, N) of the targets.
        vocabulary: ids that there are.
        length: N, at least 2.
        rounded: how much nats may change on a GPU, by rounding.

    Raises:
        CheckFailed: if one changes, or is not finite.
    """
    cuts = [n for n in CUTS if n < length]
    tokens = random_tokens(vocabulary, (1, length), 1, device).repeat(1 + len(cuts), 1)
    for row, n in enumerate(cuts, 1):  # another token at each place: never the same one
        tokens[row, n:] = (tokens[row, n:] + 1 + random_tokens(vocabulary - 1, (length - n,), 1 + row, device)) % vocabulary
    losses = nats(tokens, random_tokens(vocabulary, (1, length), 0, device).expand_as(tokens).contiguous()).double()
    if not torch.isfinite(losses).all():
        raise CheckFailed("its nats are not finite")
    for row, n in enumerate(cuts, 1):
        most = float((losses[row, :n] - losses[0, :n]).abs().max())
        if most > (0 if device.type == "cpu" else rounded):
            raise CheckFailed(f"it is not causal: tokens from position {n} on change nats before it by {most:.1e}")


def model(config: Config, device: torch.device) -> None:
    """Check a model of this kind, width and heads, with initial weights: that it is causal, and, where it does not run by the references
    alone, that loss and gradient are as near to theirs in fp32 as rounding allows. It has as few layers as have all its mixers.

    Raises:
        CheckFailed: if not.
    """
    cfg = few_layers(config.model)
    params = compute_copy(decoder.init(cfg, 0, device=device), compute_dtype(device))

    def nats(tokens: Tensor, targets: Tensor) -> Tensor:
        logits = decoder.apply(params, tokens, cfg, kernels=config.kernels).float()
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)

    causal(nats, cfg.vocab_size, device)
    ops = (*decoder.ops(cfg), "cross_entropy_backward", "online_logsumexp")
    if all(kernels.select(op, device, config.kernels, cfg.head_dim, compute_dtype(device)).backend == "torch" for op in ops):
        return
    truth, exact = gradient(params, cfg, "torch", torch.float32)
    _, plain = gradient(params, cfg, "torch", compute_dtype(device))
    loss, grads = gradient(params, cfg, config.kernels, compute_dtype(device))
    if not abs(loss - truth) <= 1e-2:
        raise CheckFailed(f"its kernels give a loss of {loss:.4f}, and their references in fp32 {truth:.4f}")
    for path, g in exact.items():
        error, rounding = (float((other[path] - g).norm()) / max(float(g.norm()), TINY) for other in (grads, plain))
        if not error <= max(GRADIENT, TIMES * rounding):
            raise CheckFailed(f"its kernels' gradient of {path} is off by {error:.1%}, and that of their references by {rounding:.1%}")


def few_layers(cfg: ModelConfig) -> ModelConfig:
    """Two layers, or as many as it takes to have all mixers; and no more vocabulary than is needed."""
    return replace(cfg, n_layers=min(cfg.n_layers, max(2, cfg.exact_every)), vocab_size=min(cfg.vocab_size, VOCABULARY), dropout=0.0)


def gradient(params: Tree, cfg: ModelConfig, backend: str, dtype: torch.dtype) -> tuple[float, dict[str, Tensor]]:
    """Nats a token of random tokens, and their gradient by `backend` in `dtype`: of each matrix by path, and of all vectors; flat, fp32."""
    weights = tree.map(lambda p: p.to(dtype if p.dim() > 1 else p.dtype).requires_grad_(), params)
    device = tree.leaves(params)[0].device
    tokens, targets = (random_tokens(cfg.vocab_size, (2, LENGTH), seed, device) for seed in (3, 4))
    features = decoder.hidden(weights, tokens, cfg, kernels=backend).flatten(0, 1)
    nats, count = head_nats(features, weights["head"]["weight"], targets.flatten(), kernels=backend)
    grads = torch.autograd.grad(nats / count, tree.leaves(weights))
    named = dict(zip(tree.by_path(weights), (g.float() for g in grads), strict=True))
    vectors = torch.cat([g for g in named.values() if g.dim() == 1])
    return nats.item() / int(count), {path: g.flatten() for path, g in named.items() if g.dim() > 1} | {"vectors": vectors}
