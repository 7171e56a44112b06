"""Suite `decode`: tokens/s and memory of generating one token after another, against batch size and length of what came before."""

from collections.abc import Callable, Iterator
from functools import cache, partial
from itertools import product

import torch

from hyperlm import env, model, sample, tree
from hyperlm.bench import checks
from hyperlm.bench.arms import of_kind
from hyperlm.bench.pool import Failure, attempt
from hyperlm.bench.result import Figure, Lines, Result, Row, Table
from hyperlm.bench.speed import OUT_OF_MEMORY, SPREAD, timed
from hyperlm.config import Config, ConfigError
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
def measure(
    label: str, weights: Callable[[], tree.Tree], config: Config, device: torch.device, batch: int, context: int, budget: float
) -> tuple[Row, list[Row]]:
    """One model at one batch size and context: its row, and one of each call."""
    row: Row = {"model": label, "batch": batch, "context": context}
    calls: list[Row] = []
    try:
        params = weights()
        memory = filled_cache(config, batch, context, device)
        row["cache MiB"] = sum(x.nbytes for layer in memory.layers for x in layer.values()) / (1 << 20)
        token = torch.zeros(batch, dtype=torch.int64, device=device)
        env.reset_peak_memory(device)
        decode = sample.decoder(params, config.model, batch=batch, kernels=config.kernels)
        _, memory = decode(token, memory)
        took = timed(lambda: decode(token, memory), device, budget)
        row |= {"tok/s": batch / took.median, "± %": took.spread, "GiB": env.peak_memory(device) / env.GIB}
        calls = [{"model": label, "batch": batch, "context": context, "call": i, "seconds": each} for i, each in enumerate(took.each)]
    except torch.OutOfMemoryError:
        row["tok/s"] = OUT_OF_MEMORY
    return row, calls


def check(kinds: list[str], config: Config, device: torch.device, contexts: list[int], batches: list[int]) -> None:
    """Raises ConfigError where the memory of a CPU cannot hold a cache."""
    for kind in kinds if device.type == "cpu" else ():
        largest = filled_cache(of_kind(config, kind), max(batches), max(contexts), torch.device("meta"))
        need, have = sum(x.nbytes for layer in largest.layers for x in layer.values()), env.total_memory(device)
        if need > have:
            raise ConfigError(
                f"--lengths {max(contexts)}: a cache of {kind} needs {need / env.GIB:,.1f} GiB, "
                f"and {device} has {have / env.GIB:,.1f}; lower it"
            )


FIGURES: list[Figure] = [
    Lines(
        "decode_speed", "Decoding speed by context", "decode", "context", "tok/s", ("model", "batch"),
        x_label="context (tokens)", y_label="decoding (tokens/s)", log_x=True, log_y=True,
    ),
    Lines(
        "decode_cache", "Size of the cache by context", "decode", "context", "cache MiB", ("model", "batch"),
        x_label="context (tokens)", y_label="cache (MiB)", log_x=True, log_y=True,
    ),
]  # fmt: skip


def run(
    kinds: list[str], config: Config, device: torch.device, contexts: list[int], batches: list[int], budget: float = 0.5
) -> Iterator[Result]:
    """Measure every kind at every batch size and context length; `budget` is the seconds to time each number for. One that fails, or
    is not right (see checks.py), is a row that says why, and is not measured further. Yields what is measured so far."""
    caption = f"Generating one token after another, and the cache that it reads. {SPREAD}."
    rows: list[Row] = []
    calls: list[Row] = []
    notes: list[str] = []
    with env.progress(total=len(kinds) * len(batches) * len(contexts), desc="decode") as bar:
        for kind in kinds:
            variant = of_kind(config, kind)
            weights = cache(lambda variant=variant: compute_copy(model.init(variant.model, 0, device=device), env.compute_dtype(device)))
            count = tree.count(model.declaration(variant.model))
            notes.append(f"{kind}: {count:,} parameters; caches hold random numbers, as if the context had been read")
            points = list(product(batches, contexts))
            for done, (batch, context) in enumerate(points, 1):
                wrong = attempt(checks.model, variant, device) if done == 1 else None
                outcome = wrong or attempt(partial(measure, kind, weights, batch=batch, context=context, budget=budget), variant, device)
                failed = isinstance(outcome, Failure)
                row, each = ({"model": kind, "batch": batch, "context": context, "failed": outcome.why}, []) if failed else outcome
                rows.append(row)
                calls += each
                yield Result(
                    "decode",
                    [Table("decode", list(rows), caption, digits=3), Table("calls", list(calls), shown=False)],
                    list(notes),
                    FIGURES,
                )
                bar.update(len(points) - done + 1 if failed else 1)
                if failed:
                    break
