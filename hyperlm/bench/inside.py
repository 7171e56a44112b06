"""What happens inside a model on given sequences: its radii, its directions, its scores; and what it loses when radii are replaced.

Operations of the dispatch table are wrapped, layer by layer, in a pass of the model as it is. Where a layer has no radii (softmax), the
norms of queries and keys before they are normalised stand in their place: its null.
Axes: W sequences, N tokens of each, B of them at a time, H heads, K head dim, V vocabulary, S sampled queries.
"""

from collections.abc import Callable
from itertools import count
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hyperlm import model
from hyperlm.batch import Batch
from hyperlm.config import ModelConfig
from hyperlm.geometry import arcosh1p, direction, lift, rotate
from hyperlm.kernels.reference import causal_conv
from hyperlm.kernels.reference.attention import TIP
from hyperlm.loss import IGNORE
from hyperlm.mixers.phase7 import OF_DISTANCE, factors
from hyperlm.precision import widen
from hyperlm.tree import Tree

Ops = dict[str, Callable]
TOKENS = 1 << 14  # at a time
LOGITS = 1 << 24  # at a time


class Seen(NamedTuple):
    """What a pass over sequences leaves."""

    lengths: list[Tensor]  # of each layer (2 H, W, N) fp32: radii of queries, then of keys; or norms
    rates: list[Tensor | None]  # of each layer (H,): the mean of -log decay a token, where there are decays
    nats: Tensor  # (W, N) fp32, of each target; 0 where that is ignored
    entropies: Tensor  # (W, N) fp32, nats, of what may follow each token


def changed(change: Callable[[int, Ops, Tree], Ops]) -> Callable:
    """`run` of one `model.hidden`: a layer has the operations change(layer, ops, its parameters) in place of those of the same names."""
    layers = count()

    def run(block: model.Block, params: Tree, x: Tensor, cache: None, ctx: Any) -> tuple[Tensor, dict]:
        return model.run_block(block, params, x, cache, ctx._replace(ops=ctx.ops | change(next(layers), ctx.ops, params)))

    return run


def parts(batch: Batch) -> list[slice]:
    """The sequences of a batch (W, N), as many at a time as have about TOKENS tokens."""
    w, n = batch.tokens.shape
    size = max(1, TOKENS // n)
    return [slice(start, min(w, start + size)) for start in range(0, w, size)]


def spread(features: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Nats of targets and entropies of what they are drawn from: features (T, D), weight (V, D), targets (T,) -> (T,) fp32 each."""
    pairs = []
    for chunk, to in zip(*(x.split(max(1, LOGITS // len(weight))) for x in (features, targets)), strict=True):
        log_p = F.log_softmax(widen(F.linear(chunk, weight)), -1)
        nats = -log_p.gather(1, to.clamp(min=0)[:, None])[:, 0]
        pairs.append((torch.where(to == IGNORE, 0, nats), -(log_p.exp() * log_p).sum(-1)))
    nats, entropies = map(torch.cat, zip(*pairs, strict=True))
    return nats.float(), entropies.float()


@torch.no_grad()
def passed(params: Tree, batch: Batch, cfg: ModelConfig, kernels: str, change: Callable[[slice], Callable]) -> tuple[Tensor, Tensor]:
    """Nats and entropies (W, N) of a batch on the model's device; change(part) is what `changed` takes for these sequences."""
    pairs = []
    for part in parts(batch):
        features = model.hidden(params, batch.tokens[part], cfg, kernels=kernels, run=changed(change(part)))
        pair = spread(features.flatten(0, 1), params["head"]["weight"], batch.targets[part].flatten())
        pairs.append([x.view(batch.tokens[part].shape) for x in pair])
    nats, entropies = map(torch.cat, zip(*pairs, strict=True))
    return nats, entropies


def observe(params: Tree, batch: Batch, cfg: ModelConfig, kernels: str = "auto") -> Seen:
    """One pass over a batch (W, N) on the model's device."""
    lengths: list[list[Tensor]] = [[] for _ in range(cfg.n_layers)]
    rates: list[list[Tensor]] = [[] for _ in range(cfg.n_layers)]

    def watch(layer: int, ops: Ops, _: Tree) -> Ops:
        def radii(*args: Tensor) -> tuple[Tensor, Tensor | None]:
            r, log_decay = ops["radii"](*args)
            lengths[layer].append(r.transpose(0, 1).float())
            if log_decay is not None:
                rates[layer].append(-log_decay.double().sum((0, 2)))
            return r, log_decay

        def convolved(*args: Any) -> tuple[Tensor, ...]:
            outputs = ops["causal_conv"](*args)
            lengths[layer].append(torch.cat([widen(x).norm(dim=-1) for x in outputs[:2]], 1).transpose(0, 1).float())
            return outputs

        return {name: watched for name, watched in (("radii", radii), ("causal_conv", convolved)) if name in ops}

    nats, entropies = passed(params, batch, cfg, kernels, lambda _: watch)
    each = [(sum(of_layer) / batch.tokens.numel()).float() if of_layer else None for of_layer in rates]
    return Seen([torch.cat(of_layer, 1) for of_layer in lengths], each, nats, entropies)


def with_radii(params: Tree, batch: Batch, cfg: ModelConfig, kernels: str, radii: list[Tensor], rows: slice) -> Tensor:
    """Nats (W, N) where radii are not those that the model finds.

    Args:
        radii: of each layer (2 H, W, N); not looked at where a layer has none.
        rows: which of the 2 H are replaced: queries, keys or both.
    """

    def change(part: slice) -> Callable[[int, Ops, Tree], Ops]:
        def replaced(layer: int, ops: Ops, _: Tree) -> Ops:
            def replacement(*args: Tensor) -> tuple[Tensor, Tensor | None]:
                r, log_decay = ops["radii"](*args)
                r = r.clone()  # in the layout that it has
                r[:, rows] = radii[layer][rows, part].transpose(0, 1).to(r)
                return r, log_decay

            return {"radii": replacement} if "radii" in ops else {}

        return replaced

    return passed(params, batch, cfg, kernels, change)[0]


# -- scores ----------------------------------------------------------------------------------------------------------------------------


class Polar(NamedTuple):
    """Queries and keys of a layer with radii."""

    q: Tensor  # (B, H, N, K) wide, unit directions; rotated where the layer rotates, if that was asked for
    k: Tensor
    r_q: Tensor  # (B, H, N)
    r_k: Tensor
    beta: Tensor  # (H,)


@torch.no_grad()
def polar(
    params: Tree, tokens: Tensor, cfg: ModelConfig, kernels: str, look: Callable[[int, Polar], object], *, rotated: bool = True
) -> None:
    """Show `look` the queries and keys of each layer that has radii, of tokens (B, N), one layer after the other."""

    def watch(layer: int, ops: Ops, weights: Tree) -> Ops:
        beta = cfg.head_dim**0.5 * weights["mixer.log_beta"].float().exp()

        def seeing(name: str) -> Callable:
            def op(x: Tensor, weight: Tensor, r: Tensor, *rest: Any) -> Any:
                q, k, _, _ = causal_conv(widen(x), widen(weight), cfg.n_heads)
                q, k = direction(q), direction(k)
                if rotated and name == "hyperbolic_points":
                    q, k = (rotate(y, *rest[:2]) for y in (q, k))
                look(layer, Polar(q, k, *r.float().chunk(2, 1), beta))
                return ops[name](x, weight, r, *rest)

            return op

        return {name: seeing(name) for name in ("hyperbolic_points", "tangent_features") if name in ops}

    model.hidden(params, tokens, cfg, kernels=kernels, run=changed(watch))


def scores(at: Polar, queries: Tensor, score: str) -> tuple[Tensor, Tensor, Tensor]:
    """How much sampled queries attend to every key, before what is subtracted from all scores of a query.

    Args:
        queries: (S,) their positions.
        score: that of phase7; or "tangent", of phase8: the logarithm of its kernel, without decay.

    Returns:
        scores and cosines of the angle between query and key, (B, H, S, N) fp64, and which keys are no later than the query, (S, N).
    """
    at = Polar(*(x.double() for x in at))  # a product in fp32 may be one of TF32
    q, r_q, beta = at.q[:, :, queries], at.r_q[:, :, queries, None], at.beta[:, None, None]
    r_k = at.r_k[:, :, None, :]
    cosine = q @ at.k.mT
    if score == "tangent":
        phi_q, phi_k = F.elu(beta * r_q * q) + 1, F.elu(beta * r_k.mT * at.k) + 1
        values = torch.log(phi_q @ phi_k.mT)
    elif score not in OF_DISTANCE:
        q, k = factors(*lift(q, r_q[..., 0]), *lift(at.k, at.r_k), at.beta, score)
        values = q @ k.mT
    else:  # cosh d - 1, in which nothing cancels
        w = torch.cosh(r_q - r_k) - 1 + torch.sinh(r_q) * torch.sinh(r_k) * (1 - cosine).clamp(min=0)
        values = -beta * (torch.log1p(w) if score == "logcosh" else arcosh1p(w, TIP))
    past = torch.arange(at.k.shape[2], device=q.device)[None, :] <= queries[:, None]
    return values, cosine, past
