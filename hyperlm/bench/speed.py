"""Suite `speed`: forward and training tokens/s and peak memory of whole models, at several sequence lengths, and how time grows with them.

Random tokens, real steps: forward, backward, clipping and AdamW. Forward alone is what an evaluation does: up to the loss, the head included,
with weights and nothing else in memory. Each length has about the same number of tokens a step, so that only the length differs.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from statistics import median

import numpy as np
import torch
from torch import Tensor

from hyperlm import env, model, plan, tree
from hyperlm.batch import next_tokens
from hyperlm.bench.report import Plot, Result, Row
from hyperlm.config import Config, ConfigError, Kind
from hyperlm.loss import head_nats
from hyperlm.optim import new_schedule
from hyperlm.state import State
from hyperlm.step import init_params, init_state, make_step, weights
from hyperlm.tree import Tree

OUT_OF_MEMORY = "out of memory"


def seconds(fn: Callable[[], object], device: torch.device, budget: float) -> float:
    """Median seconds of a call after a warm-up, from as many calls as `budget` seconds allow (3 to 50)."""

    def once() -> float:
        start = time.perf_counter()
        fn()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    once()
    first = once()
    return median([first, *(once() for _ in range(int(min(49, max(2, budget / first)))))])


def of_length(config: Config, n: int, tokens: int) -> Config:
    """The configuration with sequences of length `n`, and about `tokens` tokens a step."""
    return replace(config, train=replace(config.train, batch_size=max(1, tokens // n), grad_accum=1), data=replace(config.data, seq_len=n))


def weights_alone(config: Config, device: torch.device) -> Tree:
    """Initial weights to compute with, where the residence has them, without moments."""
    return weights(config, State(init_params(config, device), {}, step=0, updates=0, tokens=0, seed=0), device)


def measure(config: Config, device: torch.device, budget: float) -> Row:
    """One model at one sequence length, in the residence that `config` names."""
    b, n = config.train.batch_size, config.data.seq_len
    row: Row = {"model": config.model.kind, "parameters": tree.count(model.declaration(config.model)), "batch": b, "length": n}
    try:
        batch = next_tokens(torch.randint(config.model.vocab_size, (1, b, n + 1), generator=torch.Generator().manual_seed(n))).to(device)
        params = weights_alone(config, device)

        @torch.no_grad()
        def forward(params: Tree) -> Tensor:
            features = model.hidden(params, batch.tokens[0], config.model, kernels=config.kernels)
            return head_nats(features.flatten(0, 1), params["head"]["weight"], batch.targets.flatten(), kernels=config.kernels)[0]

        env.reset_peak_memory(device)
        row["forward tok/s"] = b * n / seconds(lambda: forward(params), device, budget)
        row["forward GiB"] = env.peak_memory(device) / env.GIB
        params = None
        state, step = init_state(config, device), make_step(config, new_schedule(config.optim, 1000), device)

        def train() -> None:
            nonlocal state
            state, _ = step(state, batch)

        env.reset_peak_memory(device)
        row["training tok/s"] = b * n / seconds(train, device, budget)
        row["training GiB"] = env.peak_memory(device) / env.GIB
    except torch.OutOfMemoryError:
        row |= {name: OUT_OF_MEMORY for name in ("forward tok/s", "forward GiB", "training tok/s", "training GiB") if name not in row}
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return row


def exponent(rows: list[Row], column: str) -> float:
    """p of the fit: time for one sequence ~ N^p, over the longer half of the lengths measured (at least two), where the trend is."""
    points = [(row["length"], row["length"] / row[column]) for row in rows if isinstance(row[column], float)]
    points = points[-max(2, (len(points) + 1) // 2) :]
    if len(points) < 2:
        return float("nan")
    x, y = np.log(np.array(points)).T
    return float(np.polyfit(x, y, 1)[0])


def check(kinds: list[Kind], config: Config, device: torch.device, lengths: list[int], tokens: int) -> None:
    """Raises ConfigError where the memory of a CPU cannot hold a step: it would be found out late, and perhaps by the system."""
    for kind in kinds if device.type == "cpu" else ():
        for n in lengths:
            own = of_length(replace(config, model=replace(config.model, kind=kind)), n, tokens)
            need, have = plan.everything(own, torch.float32).device, env.total_memory(device)
            if need > have:
                most = f"{need / env.GIB:,.1f} GiB, and {device} has {have / env.GIB:,.1f}"
                raise ConfigError(f"--lengths {n}: a step of {kind} needs {most}; lower --lengths, --tokens or the shape of the model")


def growth(rows: list[Row], kind: Kind) -> str:
    p = {what: exponent([row for row in rows if row["model"] == kind], f"{what} tok/s") for what in ("forward", "training")}
    if any(map(math.isnan, p.values())):
        return f"{kind}: how its time grows takes at least two lengths to say"
    return f"{kind}: time of a sequence grows as N^{p['forward']:.2f} forward and N^{p['training']:.2f} training (fitted over the longer half of the lengths)"


def run(kinds: list[Kind], config: Config, device: torch.device, lengths: list[int], tokens: int, budget: float = 2.0) -> Iterator[Result]:
    """Measure every kind at every length.

    Args:
        config: the model, but for its kind.
        tokens: about how many a step has.
        budget: seconds to time each number for.

    Yields:
        What is measured so far.
    """
    plots = [
        Plot("speed_training.png", "Training speed", "length", "training tok/s", ("model",)),
        Plot("speed_forward.png", "Forward speed", "length", "forward tok/s", ("model",)),
        Plot("speed_memory.png", "Peak memory of training", "length", "training GiB", ("model",)),
    ]
    rows: list[Row] = []
    with env.progress(total=len(kinds) * len(lengths), desc="speed") as bar:
        for kind in kinds:
            for n in lengths:
                bar.set_postfix_str(f"{kind}, N {n:,}")
                rows.append(measure(of_length(replace(config, model=replace(config.model, kind=kind)), n, tokens), device, budget))
                bar.update()
                notes = [growth(rows, kind) for kind in dict.fromkeys(row["model"] for row in rows)]
                if config.train.residence == "host":
                    notes.append("forward: weights come from host memory as they are used, as in an evaluation")
                yield Result("speed", list(rows), notes, plots)
