"""Evaluation: validation loss, perplexity and bits per byte, whole and per source; the radius gauges of each layer."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from configs import Config
from hyperlm import model
from hyperlm.data import Corpus, validation_windows
from hyperlm.env import progress
from hyperlm.loss import head_nats
from hyperlm.tree import Tree


@torch.no_grad()
def evaluate(params: Tree, corpus: Corpus, config: Config, device: torch.device, batch: int = 0) -> dict[str, float]:
    """Loss on the validation documents.

    Args:
        params: as `step.weights` returns them.
        batch: sequences at a time; 0 for those of a micro-batch.

    Returns:
        val_loss (nats a token over all sources), val_ppl, val_bpb (bits per byte of raw text), and with several sources val_bpb/<source>.
    """
    n, batch = config.data.seq_len, batch or config.train.batch_size
    shards = [shard for shard in corpus.shards if len(shard.val)]
    sets = [validation_windows(shard, n, config.eval.max_tokens) for shard in shards]
    bar = progress(desc="evaluating", total=sum(len(windows) for windows, _ in sets), unit=" seq")
    results: dict[str, float] = {}
    nats, tokens, size = 0.0, 0, 0
    for shard, (windows, source_bytes) in zip(shards, sets, strict=True):
        source_nats, source_tokens = nats_of(params, windows, config, device, batch, bar.update)
        if len(shards) > 1:
            results[f"val_bpb/{shard.name}"] = source_nats / math.log(2) / source_bytes
        nats, tokens, size = nats + source_nats, tokens + source_tokens, size + source_bytes
    bar.close()
    loss = nats / tokens
    return {"val_loss": loss, "val_ppl": math.exp(min(loss, 80)), "val_bpb": nats / math.log(2) / size, **results}


@torch.no_grad()
def nats_of(
    params: Tree, windows: Tensor, config: Config, device: torch.device, batch: int, done: Callable[[int], object] = lambda count: None
) -> tuple[float, int]:
    """Summed nats of the targets of windows (W, N+1), and how many there are; `batch` windows at a time, `done` told of each."""
    nats, tokens = torch.zeros((), dtype=torch.float64), 0
    for part in windows.split(batch):
        part = part.to(device)
        features = model.hidden(params, part[:, :-1].clamp(min=0), config.model, kernels=config.kernels)
        part_nats, part_tokens = head_nats(features.flatten(0, 1), params["head"]["weight"], part[:, 1:].flatten(), kernels=config.kernels)
        nats += part_nats.cpu()
        tokens += int(part_tokens)
        done(len(part))
    return float(nats), tokens


@torch.no_grad()
def radius_gauges(params: Tree, tokens: Tensor, config: Config) -> dict[str, float]:
    """Mean, 5th and 95th percentile of the radii of queries and keys on tokens (B, N): {"radius/layer_00/q_mean": ...}."""
    gauges: dict[str, Any] = {}
    layers = model.radii(params, tokens, config.model, kernels=config.kernels)
    hyperbolic = [i for i in range(config.model.n_layers) if config.model.layer_kind(i) != "softmax"]
    for layer, radii in zip(hyperbolic, layers, strict=True):
        for name, r in radii.items():
            low, high = torch.quantile(r.flatten()[: 1 << 20].float(), torch.tensor([0.05, 0.95], device=r.device)).tolist()
            gauges |= {f"radius/layer_{layer:02d}/{name}_{what}": x for what, x in (("mean", r.mean().item()), ("p05", low), ("p95", high))}
    return gauges
