"""Suite `speed`: forward and training tokens/s and peak memory of whole models, at several sequence lengths, and how time grows with them.

Random tokens, real steps: forward, backward, clipping and AdamW. Each length has about the same number of tokens a step, so that only
the length differs.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from statistics import median

import numpy as np
import torch
from torch import Tensor

from configs import Config, Kind
from hyperlm import env, model, tree
from hyperlm.bench.report import Plot, Result, Row
from hyperlm.optim import new_schedule
from hyperlm.precision import compute_copy
from hyperlm.step import init_state, make_step

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


def measure(config: Config, device: torch.device, n: int, tokens: int, budget: float) -> Row:
    """One model at sequence length `n`, with about `tokens` tokens a step."""
    b = max(1, tokens // n)
    config = replace(config, train=replace(config.train, batch_size=b, grad_accum=1), data=replace(config.data, seq_len=n))
    row: Row = {"model": config.model.kind, "parameters": tree.count(model.declaration(config.model)), "batch": b, "length": n}
    try:
        batch = torch.randint(config.model.vocab_size, (1, b, n + 1), generator=torch.Generator().manual_seed(n)).to(device)
        state = init_state(config, device)
        step = make_step(config, new_schedule(config.optim, 1000), device)
        params = compute_copy(state.params, env.compute_dtype(device))

        @torch.no_grad()
        def forward() -> Tensor:
            return model.hidden(params, batch[0, :, :-1], config.model, kernels=config.kernels)

        env.reset_peak_memory(device)
        row["forward tok/s"] = b * n / seconds(forward, device, budget)
        row["forward GiB"] = env.peak_memory(device) / env.GIB
        del params
        env.reset_peak_memory(device)
        row["training tok/s"] = b * n / seconds(lambda: step(state, batch), device, budget)
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


def run(kinds: list[Kind], config: Config, device: torch.device, lengths: list[int], tokens: int, budget: float = 2.0) -> Result:
    """Measure every kind at every length.

    Args:
        config: the model, but for its kind.
        tokens: about how many a step has.
        budget: seconds to time each number for.
    """
    rows = []
    bar = env.progress(total=len(kinds) * len(lengths), desc="speed")
    for kind in kinds:
        for n in lengths:
            bar.set_postfix_str(f"{kind}, N {n:,}")
            rows.append(measure(replace(config, model=replace(config.model, kind=kind)), device, n, tokens, budget))
            bar.update()
    bar.close()
    notes = []
    for kind in kinds:
        own = [row for row in rows if row["model"] == kind]
        notes.append(
            f"{kind}: time of a sequence grows as N^{exponent(own, 'forward tok/s'):.2f} forward and N^{exponent(own, 'training tok/s'):.2f} training "
            "(fitted over the longer half of the lengths)"
        )
    plots = [
        Plot("speed_training.png", "Training speed", "length", "training tok/s", ("model",)),
        Plot("speed_forward.png", "Forward speed", "length", "forward tok/s", ("model",)),
        Plot("speed_memory.png", "Peak memory of training", "length", "training GiB", ("model",)),
    ]
    return Result("speed", rows, notes, plots)
