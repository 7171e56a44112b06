"""Suite `decode`: tokens/s and memory of generating one token after another, against batch size and length of what came before."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from itertools import product

import torch

from hyperlm import env, model, sample, tree
from hyperlm.bench.report import Plot, Result, Row
from hyperlm.bench.speed import OUT_OF_MEMORY, seconds
from hyperlm.config import Config, ConfigError, Kind
from hyperlm.precision import compute_copy

GROWING = ("k", "v", "s_k", "t_k")  # entries of a cache that have a position axis, the third


def filled_cache(config: Config, batch: int, context: int, device: torch.device) -> model.Cache:
    """A cache that has read `context` tokens, with random numbers in it and room for more."""
    cache = model.init_cache(config.model, batch, device=device, dtype=env.compute_dtype(device))

    def fill(name: str, x: torch.Tensor) -> torch.Tensor:
        shape = list(x.shape)
        if name in GROWING:
            shape[2] = context + 64
        return torch.rand(shape, device=device, dtype=torch.float32).to(x.dtype)

    return model.Cache(context, [{name: fill(name, x) for name, x in layer.items()} for layer in cache.layers])


@torch.no_grad()
def measure(weights: Callable[[], tree.Tree], config: Config, device: torch.device, batch: int, context: int, budget: float) -> Row:
    row: Row = {"model": config.model.kind, "batch": batch, "context": context}
    try:
        params = weights()
        memory = filled_cache(config, batch, context, device)
        row["cache MiB"] = sum(x.nbytes for layer in memory.layers for x in layer.values()) / (1 << 20)
        token = torch.zeros(batch, dtype=torch.int64, device=device)
        env.reset_peak_memory(device)
        decode = sample.decoder(params, config.model, batch=batch, kernels=config.kernels)
        _, memory = decode(token, memory)
        row["tok/s"] = batch / seconds(lambda: decode(token, memory), device, budget)
        row["GiB"] = env.peak_memory(device) / env.GIB
    except torch.OutOfMemoryError:
        row |= {name: OUT_OF_MEMORY for name in ("cache MiB", "tok/s", "GiB") if name not in row}
    return row


def check(kinds: list[Kind], config: Config, device: torch.device, contexts: list[int], batches: list[int]) -> None:
    """Raises ConfigError where the memory of a CPU cannot hold a cache."""
    for kind in kinds if device.type == "cpu" else ():
        own = replace(config, model=replace(config.model, kind=kind))
        largest = filled_cache(own, max(batches), max(contexts), torch.device("meta"))
        need, have = sum(x.nbytes for layer in largest.layers for x in layer.values()), env.total_memory(device)
        if need > have:
            raise ConfigError(f"--lengths {max(contexts)}: a cache of {kind} needs {need / env.GIB:,.1f} GiB, and {device} has {have / env.GIB:,.1f}; lower it")


def run(
    kinds: list[Kind], config: Config, device: torch.device, contexts: list[int], batches: list[int], budget: float = 0.5
) -> Iterator[Result]:
    """Measure every kind at every batch size and context length; `budget` is the seconds to time each number for. Yields what is measured so far."""
    rows: list[Row] = []
    notes: list[str] = []
    plots = [Plot("decode_speed.png", "Decoding speed", "context", "tok/s", ("model", "batch"))]
    with env.progress(total=len(kinds) * len(batches) * len(contexts), desc="decode") as bar:
        for kind in kinds:
            own = replace(config, model=replace(config.model, kind=kind))
            weights = cache(lambda own=own: compute_copy(model.init(own.model, 0, device=device), env.compute_dtype(device)))
            count = tree.count(model.declaration(own.model))
            notes.append(f"{kind}: {count:,} parameters; caches hold random numbers, as if the context had been read")
            for batch, context in product(batches, contexts):
                rows.append(measure(weights, own, device, batch, context, budget))
                bar.update()
                yield Result("decode", list(rows), list(notes), plots)
