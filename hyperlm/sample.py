"""Text from a model: prefill, then one token at a time with a carried cache. Never a full forward pass per token.

Where a text ends is found in its characters: a stop string, or the same words again and again.
"""

import math
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor

from hyperlm import model, tree
from hyperlm import tokenizer as tok
from hyperlm.config import ConfigError, ModelConfig
from hyperlm.cuda_graph import cuda_graphed
from hyperlm.tree import Tree

PREFILL = 512  # tokens read at once
PENALISED = 64  # latest tokens that a repetition penalty looks at
REPEATED, LONGEST, TIMES = 160, 400, 4  # characters of a loop, of its longest part, and how often that is there: see `repeats`

Decode = Callable[[Tensor, model.Cache], tuple[Tensor, model.Cache]]


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn from the logits: repetition penalty, then temperature, then what top-k, top-p and min-p all keep."""

    temperature: float = 0.8
    """0 always takes the most probable token."""
    top_k: int = 0
    """Draw from the k most probable tokens; 0 for all."""
    top_p: float = 0.95
    """Draw from the fewest tokens whose probabilities reach this, of those that top-k keeps."""
    min_p: float = 0.0
    """Draw from tokens with at least this share of the most probable one's probability; 0 for all."""
    repetition_penalty: float = 1.0
    """Tokens among the latest 64 get less probable, the more so the larger this is (1.1 to 1.3 is usual); 1 for none."""


BOUNDS: dict[str, tuple[Callable[[float], bool], str]] = {
    "temperature": (lambda x: 0 <= x < math.inf, "of at least 0"),
    "top_k": (lambda x: x >= 0, "of at least 0"),
    "top_p": (lambda x: 0 < x <= 1, "above 0 and at most 1"),
    "min_p": (lambda x: 0 <= x <= 1, "of at least 0 and at most 1"),
    "repetition_penalty": (lambda x: 1 <= x <= 100, "of at least 1 and at most 100"),
}


def checked(sampling: Sampling) -> Sampling:
    """`sampling` itself.

    Raises:
        ConfigError: on a value that no distribution has.
    """
    for name, (fits, words) in BOUNDS.items():
        if not fits(value := getattr(sampling, name)):
            raise ConfigError(f"--{name.replace('_', '-')} {value}: must be a number {words}")
    return sampling


class NotFinite(ArithmeticError):
    """Logits from which nothing can be drawn: the weights have diverged."""


def generator(seed: int | None) -> torch.Generator:
    """Random numbers that are a function of the seed; without one, others each time.

    Raises:
        ValueError: if it is below 0 or has more than 64 bits.
    """
    random = torch.Generator()
    if seed is None:
        random.seed()
    elif not 0 <= seed < 1 << 64:
        raise ValueError(f"seed {seed}: must be at least 0 and below 2^64")
    else:
        random.manual_seed(seed)
    return random


def penalised(logits: Tensor, recent: Sequence[int], penalty: float) -> Tensor:
    """Logits (V,) with those of the tokens `recent` divided by `penalty` where they are positive, multiplied where they are negative.

    So each gets less probable. Reference: Keskar et al. 2019 (CTRL), which divides either; the sign is what all libraries have added since.
    """
    ids = torch.tensor(sorted(set(recent)), dtype=torch.int64, device=logits.device)
    x = logits[ids]
    return logits.scatter(0, ids, torch.where(x > 0, x / penalty, x * penalty))


def probabilities(logits: Tensor, sampling: Sampling, recent: Sequence[int] = ()) -> Tensor:
    """Distribution that the next token is drawn from: logits (V,) -> (V,), fp64, for every temperature of at least 0.

    Args:
        recent: the tokens that a repetition penalty makes less probable.

    Raises:
        NotFinite: if a logit is infinite or NaN.
    """
    x = logits.double()
    if not bool(torch.isfinite(x).all()):
        raise NotFinite("logits that are not finite")
    if sampling.repetition_penalty != 1 and recent:
        x = penalised(x, recent, sampling.repetition_penalty)
    if sampling.temperature == 0:
        return torch.nn.functional.one_hot(x.argmax(), len(x)).double()
    # The largest becomes 0, so that nothing overflows. A temperature below 1e-300 has no reciprocal; and no two logits are as near as that.
    p = torch.softmax((x - x.max()) / max(sampling.temperature, 1e-300), -1)
    p, order = p.sort(descending=True, stable=True)
    if sampling.top_k:
        p[min(sampling.top_k, len(p)) :] = 0
    before = p.cumsum(-1) - p
    # Each keeps a beginning of this order, so that min-p (Nguyen et al. 2024) is the same before or after the others.
    p[(before >= sampling.top_p * p.sum()) | (p < sampling.min_p * p[0])] = 0
    return torch.zeros_like(p).scatter_(0, order, p / p.sum())


# What moves a terminal's cursor, changes its colours, or turns the direction of writing: C0 but newline and tab, C1, marks of direction.
CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """Text with its control characters as escapes: \\x1b for the character, \\u202e for that which would turn what follows around."""
    return CONTROLS.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def empty_cache(params: Tree, cfg: ModelConfig) -> model.Cache:
    """The cache before a text (batch 1), on the device and in the dtype of `params`."""
    head = params["head"]["weight"]
    return model.init_cache(cfg, 1, device=head.device, dtype=head.dtype)


@torch.no_grad()
def prefill(params: Tree, tokens: list[int], cache: model.Cache, cfg: ModelConfig, *, kernels: str = "auto") -> tuple[Tensor, model.Cache]:
    """Take in a prompt of at least one token: the logits (V,) after it, and the next cache (batch 1)."""
    device = params["head"]["weight"].device
    for start in range(0, len(tokens), PREFILL):
        part = torch.tensor([tokens[start : start + PREFILL]], device=device)
        logits, cache = model.extend(params, part, cache, cfg, kernels=kernels)
    return logits[0, -1], cache


@torch.no_grad()
def decoder(params: Tree, cfg: ModelConfig, *, batch: int = 1, kernels: str = "auto") -> Decode:
    """`model.decode` of these parameters: (token (B,), cache) -> (logits (B, V), next cache).

    On a GPU, where no cache grows and every weight stays in place, it is replayed from a CUDA graph. The logits and the cache are then
    overwritten by the next call.
    """
    head = params["head"]["weight"]
    if head.device.type != "cuda" or model.cache_grows(cfg) or not isinstance(params["blocks"], list):
        return lambda token, cache: model.decode(params, token, cache, cfg, kernels=kernels)
    static = model.init_cache(cfg, batch, device=head.device, dtype=head.dtype).layers

    def advance(token: Tensor) -> Tensor:
        logits, after = model.decode(params, token, model.Cache(0, static), cfg, kernels=kernels)
        for x, y in zip(tree.leaves(static), tree.leaves(after.layers), strict=True):
            x.copy_(y)
        return logits

    run = cuda_graphed(advance)
    run(torch.zeros(batch, dtype=torch.int64, device=head.device))  # recorded now: what this leaves in `static` does not matter yet

    @torch.no_grad()
    def decode(token: Tensor, cache: model.Cache) -> tuple[Tensor, model.Cache]:
        if cache.layers is not static:
            torch._foreach_copy_(tree.leaves(static), tree.leaves(cache.layers))
        return run(token), model.Cache(cache.position + 1, static)

    return decode


@torch.no_grad()
def generate(
    logits: Tensor,
    cache: model.Cache,
    sampling: Sampling,
    generator: torch.Generator,
    *,
    stop: set[int],
    usable: int,
    decode: Decode,
    before: Sequence[int] = (),
) -> Iterator[tuple[int, Tensor, model.Cache]]:
    """Draw tokens until one in `stop`, which is not read.

    Args:
        logits, cache: as `prefill` returns them.
        generator: on the CPU; the text is a function of it.
        usable: tokens that the tokenizer has; the model's vocabulary may be larger.
        decode: of the same model, from `decoder`.
        before: the tokens read so far, for a repetition penalty; those in `stop` are never penalised.

    Yields:
        Each token once it has been read, with the logits after it and the next cache.

    Raises:
        NotFinite: if there are no probabilities to draw from.
    """
    recent = deque((token for token in before if token not in stop), PENALISED)
    while True:
        token = int(torch.multinomial(probabilities(logits[:usable], sampling, recent).cpu(), 1, generator=generator))
        if token in stop:
            return
        recent.append(token)
        logits, cache = decode(torch.tensor([token], device=logits.device), cache)
        logits = logits[0]
        yield token, logits, cache


def until(pieces: Iterable[str], stops: Sequence[str]) -> Iterator[str]:
    """A text that comes in pieces, up to the first of `stops` that is complete, which is left out.

    What may be the beginning of one is held back until that is certain.
    """
    held = ""
    for piece in pieces:
        held += piece
        if ends := [(at + len(stop), at) for stop in stops if (at := held.find(stop)) >= 0]:
            if before := held[: min(ends)[1]]:
                yield before
            return
        begun = (n for stop in stops for n in range(min(len(stop) - 1, len(held)), 0, -1) if held.endswith(stop[:n]))
        certain = len(held) - max(begun, default=0)
        if certain:
            yield held[:certain]
        held = held[certain:]
    if held:
        yield held


def write(
    params: Tree,
    cfg: ModelConfig,
    tokenizer: Tokenizer,
    ids: list[int],
    sampling: Sampling,
    generator: torch.Generator,
    limit: int,
    *,
    kernels: str = "auto",
) -> str:
    """The text that follows `ids`, of at most `limit` tokens.

    Raises:
        NotFinite: if there are no probabilities to draw from.
    """
    tokens = generate(
        *prefill(params, ids, empty_cache(params, cfg), cfg, kernels=kernels),
        sampling,
        generator,
        stop=tok.stop_ids(tokenizer),
        usable=tok.vocabulary_size(tokenizer),
        decode=decoder(params, cfg, kernels=kernels),
        before=ids,
    )
    return "".join(tok.stream(tokenizer, (token for (token, _, _), _ in zip(tokens, range(limit), strict=False))))


def repeats(text: str) -> bool:
    """Whether a text ends in a loop: its last characters, `REPEATED` or more, are one string of at most `LONGEST` `TIMES` times or more."""
    for period in range(1, min(len(text) // TIMES, LONGEST) + 1):
        span = max(REPEATED, TIMES * period)
        if span <= len(text) and text[-1 - period] == text[-1] and text[-span:-period] == text[period - span :]:
            return True
    return False
