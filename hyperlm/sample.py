"""Text from a model: prefill, then one token at a time with a carried cache. Never a full forward pass per token."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hyperlm import model, tree
from hyperlm.config import ModelConfig
from hyperlm.graph import replayed
from hyperlm.tree import Tree

PREFILL = 512  # tokens read at once

Decode = Callable[[Tensor, model.Cache], tuple[Tensor, model.Cache]]


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn from the logits."""

    temperature: float = 0.8
    """0 always takes the most probable token."""
    top_k: int = 0
    """Draw from the k most probable tokens; 0 for all."""
    top_p: float = 0.95
    """Draw from the fewest tokens whose probabilities reach this."""


class NotFinite(ArithmeticError):
    """Logits from which nothing can be drawn: the weights have diverged."""


def probabilities(logits: Tensor, how: Sampling) -> Tensor:
    """Distribution that the next token is drawn from: logits (V,) -> (V,), fp64, for every temperature of at least 0.

    Raises:
        NotFinite: if a logit is infinite or NaN.
    """
    x = logits.double()
    if not bool(torch.isfinite(x).all()):
        raise NotFinite("logits that are not finite")
    if how.temperature == 0:
        return torch.nn.functional.one_hot(x.argmax(), len(x)).double()
    # The largest becomes 0, so that nothing overflows. A temperature below 1e-300 has no reciprocal; and no two logits are as near as that.
    p = torch.softmax((x - x.max()) / max(how.temperature, 1e-300), -1)
    p, order = p.sort(descending=True, stable=True)
    if how.top_k:
        p[min(how.top_k, len(p)) :] = 0
    before = p.cumsum(-1) - p
    p[before >= how.top_p * p.sum()] = 0
    return torch.zeros_like(p).scatter_(0, order, p / p.sum())


# What moves a terminal's cursor, changes its colours, or turns the direction of writing: C0 but for newline and tab, C1, marks of direction.
CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """Text with its control characters as escapes: \\x1b for the character, \\u202e for that which would turn what follows around."""
    return CONTROLS.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def empty_cache(params: Tree, cfg: ModelConfig) -> model.Cache:
    """The cache before a text (batch 1), on the device and in the dtype of `params`."""
    head = params["head"]["weight"]
    return model.init_cache(cfg, 1, device=head.device, dtype=head.dtype)


@torch.no_grad()
def read(params: Tree, tokens: list[int], cache: model.Cache, cfg: ModelConfig, *, kernels: str = "auto") -> tuple[Tensor, model.Cache]:
    """Take in a prompt of at least one token: the logits (V,) after it, and the next cache (batch 1)."""
    device = params["head"]["weight"].device
    for start in range(0, len(tokens), PREFILL):
        part = torch.tensor([tokens[start : start + PREFILL]], device=device)
        logits, cache = model.extend(params, part, cache, cfg, kernels=kernels)
    return logits[0, -1], cache


@torch.no_grad()
def decoder(params: Tree, cfg: ModelConfig, *, batch: int = 1, kernels: str = "auto") -> Decode:
    """`model.decode` of these parameters: (token (B,), cache) -> (logits (B, V), next cache).

    On a GPU, where no cache grows and every weight stays in place, it is replayed from a CUDA graph. The logits and the cache are then overwritten by the next call.
    """
    head = params["head"]["weight"]
    if head.device.type != "cuda" or model.cache_grows(cfg) or not isinstance(params["blocks"], list):
        return lambda token, cache: model.decode(params, token, cache, cfg, kernels=kernels)
    own = model.init_cache(cfg, batch, device=head.device, dtype=head.dtype).layers

    def advance(token: Tensor) -> Tensor:
        logits, after = model.decode(params, token, model.Cache(0, own), cfg, kernels=kernels)
        for x, y in zip(tree.leaves(own), tree.leaves(after.layers), strict=True):
            x.copy_(y)
        return logits

    run = replayed(advance)
    run(torch.zeros(batch, dtype=torch.int64, device=head.device))  # recorded now: what this leaves in `own` does not matter yet

    @torch.no_grad()
    def decode(token: Tensor, cache: model.Cache) -> tuple[Tensor, model.Cache]:
        if cache.layers is not own:
            torch._foreach_copy_(tree.leaves(own), tree.leaves(cache.layers))
        return run(token), model.Cache(cache.position + 1, own)

    return decode


@torch.no_grad()
def generate(
    logits: Tensor,
    cache: model.Cache,
    how: Sampling,
    generator: torch.Generator,
    *,
    stop: set[int],
    usable: int,
    decode: Decode,
) -> Iterator[tuple[int, Tensor, model.Cache]]:
    """Draw tokens until one in `stop`, which is not read.

    Args:
        logits, cache: as `read` returns them.
        generator: on the CPU; the text is a function of it.
        usable: tokens that the tokenizer has; the model's vocabulary may be larger.
        decode: of the same model, from `decoder`.

    Yields:
        Each token once it has been read, with the logits after it and the next cache.

    Raises:
        NotFinite: if there are no probabilities to draw from.
    """
    while (token := int(torch.multinomial(probabilities(logits[:usable], how).cpu(), 1, generator=generator))) not in stop:
        logits, cache = decode(torch.tensor([token], device=logits.device), cache)
        logits = logits[0]
        yield token, logits, cache
