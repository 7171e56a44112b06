"""Evaluation: validation loss, perplexity and bits per byte, whole and per source; the radius gauges of each layer."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hyperlm import model
from hyperlm import tokenizer as tok
from hyperlm.batch import Batch
from hyperlm.config import Config
from hyperlm.data import Corpus, validation_documents, validation_sequences
from hyperlm.env import progress
from hyperlm.geometry import R_MAX
from hyperlm.loss import head_nats
from hyperlm.tree import Tree

APART = 4096  # tokens
BINS = 80  # of radii


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
    """
    special = torch.tensor(sorted(tok.stop_ids(corpus.tokenizer)), device=device)
    batch = batch or config.train.batch_size
    shards = [shard for shard in corpus.shards if len(shard.val)]
    sets = {shard.name: validation_sequences(shard, config.data, config.eval.max_tokens) for shard in shards}
    sets = {name: (sequences, size) for name, (sequences, size) in sets.items() if size}
    bar = progress(desc="evaluating", total=sum(len(sequences.tokens) for sequences, _ in sets.values()), unit=" seq")
    results: dict[str, float] = {}
    nats, tokens, text_nats, size = 0.0, 0, 0.0, 0
    for name, (sequences, source_bytes) in sets.items():
        source_nats, source_tokens, special_nats = nats_of(params, sequences, config, device, batch, apart=special, done=bar.update)
        if len(sets) > 1:
            results[f"val_bpb/{name}"] = (source_nats - special_nats) / math.log(2) / source_bytes
        nats, tokens = nats + source_nats, tokens + source_tokens
        text_nats, size = text_nats + source_nats - special_nats, size + source_bytes
    bar.close()
    loss = nats / tokens
    documents = sum(validation_documents(shard, config.eval.max_tokens) for shard in shards)
    return {"val_loss": loss, "val_ppl": math.exp(min(loss, 80)), "val_bpb": text_nats / math.log(2) / size, **results, "val_documents": documents}


@torch.no_grad()
def nats_of(
    params: Tree,
    sequences: Batch,
    config: Config,
    device: torch.device,
    batch: int,
    *,
    apart: Tensor | None = None,
    done: Callable[[int], object] = lambda count: None,
) -> tuple[float, int, float]:
    """Summed nats of the targets of sequences (W, N), how many there are, and the nats of those among the ids `apart`.

    `batch` sequences at a time; `done` is told of each.
    """
    nats, tokens, nats_apart = torch.zeros((), dtype=torch.float64), 0, torch.zeros((), dtype=torch.float64)
    few: list[tuple[Tensor, Tensor]] = []  # features and targets apart, which go through the head once more when they are enough for a pass

    def head(features: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return head_nats(features, params["head"]["weight"], targets, kernels=config.kernels)

    for read, targets in zip(sequences.tokens.split(batch), sequences.targets.split(batch), strict=True):
        features = model.hidden(params, read.to(device), config.model, kernels=config.kernels).flatten(0, 1)
        targets = targets.to(device).flatten()
        part_nats, part_tokens = head(features, targets)
        nats += part_nats.cpu()
        tokens += int(part_tokens)
        if apart is not None:
            among = torch.isin(targets, apart)
            few.append((features[among], targets[among]))
            if sum(len(t) for _, t in few) >= APART:
                nats_apart += head(*map(torch.cat, zip(*few, strict=True)))[0].cpu()
                few.clear()
        done(len(read))
    if few:
        nats_apart += head(*map(torch.cat, zip(*few, strict=True)))[0].cpu()
    return float(nats), tokens, float(nats_apart)


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
