"""Evaluation: nats of each token; validation loss, perplexity and bits per byte, whole, per source and by position; radii; a sample."""

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hyperlm import model, passkey, sample
from hyperlm import tokenizer as tok
from hyperlm.batch import Batch
from hyperlm.config import Config
from hyperlm.data import Corpus, validation_documents, validation_sequences
from hyperlm.env import progress
from hyperlm.geometry import R_MAX
from hyperlm.loss import IGNORE
from hyperlm.loss import token_nats as nats_of_features
from hyperlm.tree import Tree

BINS = 80  # of radii
PROMPT = 24  # tokens of a held-out document that a sample begins with
NatsAt = Callable[[Tensor, Tensor], Tensor]  # tokens and targets, (B, N) int64 -> nats of the targets (B, N), at least fp32, 0 where IGNORE


@torch.no_grad()
def evaluate(params: Tree, corpus: Corpus, config: Config, device: torch.device, batch: int = 0) -> dict[str, float]:
    """Loss on the validation documents.

    Args:
        params: as `step.weights` returns them.
        batch: sequences at a time; 0 for those of a micro-batch.

    Returns:
        val_loss (nats a learnt token over all sources, special tokens included), val_ppl, val_bpb (bits per byte of text), with several
        sources val_bpb/<source>, and val_documents, how many all that rests on. Bits and bytes are those of text that is learnt, of
        conversations that of the assistant: tokens that stand for none, of the ends of texts and turns and of roles, count in neither.
        Also val_loss/positions_<from>_<to>, nats a learnt token by its place in the sequence: see `position_losses`;
        and if config.eval.passkey asks for it, val_passkey and val_passkey_choice, shares of trials: see `passkey.Grade`.
    """
    batch = batch or config.train.batch_size
    losses = validate(partial(token_nats, params, config=config), corpus, config, device, batch)
    return losses | passkeys(params, corpus, config, device, batch)


@torch.no_grad()
def validate(nats_at: NatsAt, corpus: Corpus, config: Config, device: torch.device, batch: int) -> dict[str, float]:
    """`evaluate`, but for passkeys, of anything that tells nats."""
    sources = by_source(nats_at, corpus, config, device, batch, config.eval.max_tokens)
    each = [source.sums for source in sources.values()]
    loss = sum(sums.nats for sums in each) / sum(sums.tokens for sums in each)
    bits = {name: (source.sums.nats - source.sums.special) / math.log(2) for name, source in sources.items()}
    per_byte = {f"val_bpb/{name}": bits[name] / source.size for name, source in sources.items()} if len(sources) > 1 else {}
    documents = sum(validation_documents(shard, config.eval.max_tokens) for shard in corpus.shards if len(shard.val))
    overall = {"val_loss": loss, "val_ppl": math.exp(min(loss, 80)), "val_bpb": sum(bits.values()) / sum(x.size for x in sources.values())}
    return overall | per_byte | {"val_documents": documents} | position_losses(sum(sums.by_position for sums in each))


def position_losses(sums: Tensor) -> dict[str, float]:
    """Nats a target by its place in a sequence of N, {"val_loss/positions_0_64": ...}: in its first eighth, then up to N/4, N/2 and N.

    Args:
        sums: (2, N), summed nats and how many targets at each place. Where there are none, nothing is said.
    """
    n = sums.shape[1]
    edges = sorted({0, n // 8, n // 4, n // 2, n})
    parts = {f"val_loss/positions_{low}_{high}": sums[:, low:high].sum(1).tolist() for low, high in pairwise(edges)}
    return {name: nats / count for name, (nats, count) in parts.items() if count}


def passkeys(params: Tree, corpus: Corpus, config: Config, device: torch.device, batch: int) -> dict[str, float]:
    """How often a number hidden in a sequence of validation text is found, at depths from its beginning to its end; always the same."""
    if not config.eval.passkey:
        return {}
    depths = torch.linspace(0, 1, config.eval.passkey).tolist()
    texts = passkey.trials(passkey.words_of(corpus.tokenizer), passkey.hay_of(corpus), config.data.seq_len, depths)
    grade = passkey.graded(passkey.reader(params, config, device), texts, batch)
    return {"val_passkey": float(grade.said.mean()), "val_passkey_choice": float(grade.chosen.mean())}


@torch.no_grad()
def token_nats(params: Tree, tokens: Tensor, targets: Tensor, config: Config) -> Tensor:
    """Cross entropy of each target after the tokens up to its place: (B, N) int64 each -> (B, N), at least fp32, 0 where it is IGNORE.

    Logits exist for a chunk of the vocabulary at a time.
    """
    features = model.hidden(params, tokens, config.model, kernels=config.kernels).flatten(0, 1)
    return nats_of_features(features, params["head"]["weight"], targets.flatten(), kernels=config.kernels).view_as(targets)


class Sums(NamedTuple):
    """Of the targets of some sequences of N."""

    nats: float
    tokens: int  # how many there are
    special: float  # nats of those that stand for no text
    by_position: Tensor  # (2, N) fp64, on the CPU: nats, and how many targets, at each place


def nats_of(params: Tree, sequences: Batch, config: Config, device: torch.device, batch: int, *, special: Tensor | None = None) -> Sums:
    """`sums_of` a model."""
    return sums_of(partial(token_nats, params, config=config), sequences, device, batch, special=special)


def sums_of(
    nats_at: NatsAt,
    sequences: Batch,
    device: torch.device,
    batch: int,
    *,
    special: Tensor | None = None,
    done: Callable[[int], object] = lambda count: None,
) -> Sums:
    """Sums over the targets of sequences (W, N), `batch` sequences at a time.

    Args:
        special: ids, on the device.
        done: is told how many sequences were read, each time.
    """
    nats, tokens, special_nats = 0.0, 0, 0.0
    by_position = torch.zeros(2, sequences.tokens.shape[1], dtype=torch.float64, device=device)
    for read, targets in zip(sequences.tokens.split(batch), sequences.targets.split(batch), strict=True):
        targets = targets.to(device)
        each, counted = nats_at(read.to(device), targets), targets != IGNORE  # (B, N)
        of_special = each.new_zeros(()) if special is None else torch.where(torch.isin(targets, special), each, 0)
        sums = torch.stack([each.sum(dtype=torch.float64), counted.sum(), of_special.sum(dtype=torch.float64)]).tolist()
        nats, tokens, special_nats = nats + sums[0], tokens + int(sums[1]), special_nats + sums[2]
        by_position += torch.stack([each.sum(0, dtype=torch.float64), counted.sum(0)])
        done(len(read))
    return Sums(nats, tokens, special_nats, by_position.cpu())


class Source(NamedTuple):
    """Validation text of a source, where there is any of which something is learnt."""

    sequences: Batch  # (W, N)
    size: int  # bytes of what is learnt
    sums: Sums


@torch.no_grad()
def by_source(
    nats_at: NatsAt, corpus: Corpus, config: Config, device: torch.device, batch: int, max_tokens: int, stride: int = 0
) -> dict[str, Source]:
    """Nats of every source, `batch` sequences at a time; `max_tokens` and `stride` are those of `data.validation_sequences`."""
    special = torch.tensor(sorted(tok.stop_ids(corpus.tokenizer)), device=device)
    sets = {shard.name: validation_sequences(shard, config.data, max_tokens, stride) for shard in corpus.shards if len(shard.val)}
    sets = {name: (sequences, size) for name, (sequences, size) in sets.items() if size}
    with progress(desc="evaluating", total=sum(len(sequences.tokens) for sequences, _ in sets.values()), unit=" seq") as bar:
        return {
            name: Source(sequences, size, sums_of(nats_at, sequences, device, batch, special=special, done=bar.update))
            for name, (sequences, size) in sets.items()
        }


@torch.no_grad()
def radius_gauges(params: Tree, tokens: Tensor, config: Config) -> dict[str, Any]:
    """Radii of queries and keys on tokens (B, N): mean, 5th and 95th percentile of each layer, {"radius/layer_00/q_mean": ...}, and how
    many of all layers lie in each of BINS equal bins from 0 to R_MAX, "radius/q_counts"."""
    gauges: dict[str, Any] = {}
    layers = model.radii(params, tokens, config.model, kernels=config.kernels)
    for layer, radii in zip(config.model.hyperbolic_layers, layers, strict=True):
        for name, r in radii.items():
            low, high = torch.quantile(r.flatten()[: 1 << 20].float(), torch.tensor([0.05, 0.95], device=r.device)).tolist()
            gauges |= {f"radius/layer_{layer:02d}/{name}_{what}": x for what, x in (("mean", r.mean().item()), ("p05", low), ("p95", high))}
    for name in layers[0] if layers else ():
        gauges[f"radius/{name}_counts"] = sum(torch.histc(radii[name].float(), BINS, 0, R_MAX) for radii in layers).int().tolist()
    return gauges


# -- a sample --------------------------------------------------------------------------------------------------------------------------


def sample_prompt(corpus: Corpus, config: Config) -> list[int]:
    """Ids that a sample begins with: of `eval.prompt`, or of the beginning of a held-out document.

    Of a conversation they are all that comes before a reply.
    """
    if config.eval.prompt:
        return tok.encode(corpus.tokenizer, [tok.clean(config.eval.prompt)])[0]
    shard = next(s for s in corpus.shards if len(s.val_documents))
    document = shard.val[1 : 1 + int(shard.val_documents[0, 0])].tolist()  # it begins with the end of the text before
    (reply,) = tok.opening(corpus.tokenizer, "assistant")
    if reply in document:
        return document[: document.index(reply) + 1]
    return document[: min(PROMPT, len(document) // 2)]


def write_sample(params: Tree, seed: int, corpus: Corpus, config: Config) -> str:
    """A text that begins with the prompt; its special tokens are shown by name, those of the reply left out."""
    tokenizer, prompt = corpus.tokenizer, sample_prompt(corpus, config)
    ids, generator = [tok.end_of_text(tokenizer), *prompt], sample.generator(seed)
    text = sample.write(
        params, config.model, tokenizer, ids, sample.Sampling(), generator, config.eval.sample_tokens, kernels=config.kernels
    )
    return tokenizer.decode(prompt, skip_special_tokens=False) + text
