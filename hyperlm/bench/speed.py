"""Suite `speed`: forward and training tokens/s and peak memory of whole models, at several sequence lengths, and how time grows with them.

Random tokens, real steps: forward, backward, clipping and AdamW. Forward alone is what an evaluation does: up to the loss, the head
included, with weights and nothing else in memory. Each length has about the same number of tokens a step, so that only the length differs.
A number is the median of several calls; beside it stands their spread, and every call's time is in results.json.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from statistics import median
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hyperlm import env, model, residence, tree
from hyperlm.batch import next_tokens
from hyperlm.bench import checks
from hyperlm.bench.arms import of_kind
from hyperlm.bench.pool import Failure, attempt
from hyperlm.bench.result import Figure, Lines, Result, Row, Table
from hyperlm.config import Config, ConfigError
from hyperlm.loss import head_nats
from hyperlm.optim import new_schedule
from hyperlm.state import State
from hyperlm.step import init_params, init_state, make_step, weights
from hyperlm.tree import Tree

OUT_OF_MEMORY = "out of memory"


class Timing(NamedTuple):
    """What calls of the same took, in seconds."""

    each: list[float]

    @property
    def median(self) -> float:
        return median(self.each)

    @property
    def spread(self) -> float:
        """Half of the range from the first to the third quartile, in percent of the median."""
        low, high = np.quantile(self.each, (0.25, 0.75))
        return float(100 * (high - low) / 2 / self.median)


SPREAD = "±: half of the interquartile range of the times of all calls, in percent of their median"


def timed(fn: Callable[[], object], device: torch.device, budget: float) -> Timing:
    """Of calls after a warm-up, as many as `budget` seconds allow (3 to 50)."""

    def once() -> float:
        start = time.perf_counter()
        fn()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    once()
    first = once()
    return Timing([first, *(once() for _ in range(int(min(49, max(2, budget / first)))))])


def of_length(config: Config, n: int, tokens: int) -> Config:
    """The configuration with sequences of length `n`, and about `tokens` tokens a step."""
    return replace(config, train=replace(config.train, batch_size=max(1, tokens // n), grad_accum=1), data=replace(config.data, seq_len=n))


def weights_alone(config: Config, device: torch.device) -> Tree:
    """Initial weights to compute with, where the residence has them, without moments."""
    chosen = residence.make(config, device)
    return weights(chosen, State(init_params(chosen), {}, step=0, updates=0, tokens=0, seed=0))


def measure(label: str, config: Config, device: torch.device, budget: float) -> tuple[Row, list[Row]]:
    """One model at one sequence length, in the residence that `config` names: its row, and one of each call."""
    b, n = config.train.batch_size, config.data.seq_len
    row: Row = {"model": label, "parameters": tree.count(model.declaration(config.model)), "batch": b, "length": n}
    calls: list[Row] = []

    def note(what: str, fn: Callable[[], object]) -> None:
        env.reset_peak_memory(device)
        took = timed(fn, device, budget)
        row[f"{what} tok/s"], row[f"{what} ± %"] = b * n / took.median, took.spread
        row[f"{what} GiB"] = env.peak_memory(device) / env.GIB
        calls.extend({"model": label, "length": n, "what": what, "call": i, "seconds": each} for i, each in enumerate(took.each))

    try:
        batch = next_tokens(torch.randint(config.model.vocab_size, (1, b, n + 1), generator=torch.Generator().manual_seed(n))).to(device)
        params = weights_alone(config, device)

        @torch.no_grad()
        def forward(params: Tree) -> Tensor:
            features = model.hidden(params, batch.tokens[0], config.model, kernels=config.kernels)
            return head_nats(features.flatten(0, 1), params["head"]["weight"], batch.targets.flatten(), kernels=config.kernels)[0]

        note("forward", lambda: forward(params))
        params = None
        chosen = residence.make(config, device)
        state, step = init_state(chosen), make_step(chosen, new_schedule(config.optim, 1000))

        def train() -> None:
            nonlocal state
            state, _ = step(state, batch)

        note("training", train)
    except torch.OutOfMemoryError:
        row |= {name: OUT_OF_MEMORY for what in ("forward", "training") if (name := f"{what} tok/s") not in row}
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return row, calls


class Exponent(NamedTuple):
    """p of the fit: time for one sequence ~ N^p, and its standard error."""

    p: float
    error: float


POINTS = 4  # lengths that an exponent and its error take at least


def exponent(rows: list[Row], column: str) -> Exponent | None:
    """Fitted over the longer half of the lengths measured, where the trend is, and at least POINTS of them; None where there are fewer."""
    points = sorted((row["length"], row["length"] / row[column]) for row in rows if isinstance(row.get(column), float))
    points = points[-max(POINTS, (len(points) + 1) // 2) :]
    if len({n for n, _ in points}) < POINTS:
        return None
    x, y = np.log(np.array(points)).T
    (slope, _), covariance = np.polyfit(x, y, 1, cov=True)  # scaled by the residuals over all points but two
    return Exponent(float(slope), float(covariance[0, 0] ** 0.5))


def check(kinds: list[str], config: Config, device: torch.device, lengths: list[int], tokens: int) -> None:
    """Raises ConfigError where the memory of a CPU cannot hold a step: it would be found out late, and perhaps by the system."""
    for kind in kinds if device.type == "cpu" else ():
        for n in lengths:
            variant = of_length(of_kind(config, kind), n, tokens)
            need, have = residence.on_device.plan(variant, torch.float32, 0).device, env.total_memory(device)
            if need > have:
                most = f"{need / env.GIB:,.1f} GiB, and {device} has {have / env.GIB:,.1f}"
                raise ConfigError(f"--lengths {n}: a step of {kind} needs {most}; lower --lengths, --tokens or the shape of the model")


def growth(rows: list[Row]) -> tuple[list[Row], list[str]]:
    """How the time of a sequence grows with its length, a row for each kind, and notes on what was measured at too few lengths to say."""
    grown: list[Row] = []
    notes: list[str] = []
    for kind in dict.fromkeys(row["model"] for row in rows):
        exponents: Row = {"model": kind}
        for what in ("forward", "training"):
            fit = exponent([row for row in rows if row["model"] == kind], f"{what} tok/s")
            if fit:
                exponents[what] = f"{fit.p:.2f} ± {fit.error:.2f}"
            else:
                notes.append(f"{kind}: how its time of {what} grows with the length takes at least {POINTS} lengths to say")
        grown += [exponents] * (len(exponents) > 1)
    return grown, notes


GROWTH = (
    "The exponent p of the fit: time of a sequence ~ length^p, over the longer half of the lengths measured and at least four; "
    "± its standard error."
)
FIGURES: list[Figure] = [
    Lines(
        "speed_training", "Training speed by length of the sequence", "speed", "length", "training tok/s",
        x_label="length (tokens)", y_label="training (tokens/s)", log_x=True, low=0.0,
    ),
    Lines(
        "speed_forward", "Forward speed by length of the sequence", "speed", "length", "forward tok/s",
        x_label="length (tokens)", y_label="forward (tokens/s)", log_x=True, low=0.0,
    ),
    Lines(
        "speed_memory", "Peak memory of training by length of the sequence", "speed", "length", "training GiB",
        x_label="length (tokens)", y_label="peak memory of training (GiB)", log_x=True, low=0.0,
    ),
]  # fmt: skip


def run(kinds: list[str], config: Config, device: torch.device, lengths: list[int], tokens: int, budget: float = 2.0) -> Iterator[Result]:
    """Measure every kind at every length. One that fails, or is not right (see checks.py), is a row that says why, and is not measured
    further.

    Args:
        kinds: see `arms.of_kind`.
        config: the model, but for its kind.
        tokens: about how many a step has.
        budget: seconds to time each number for.

    Yields:
        What is measured so far.
    """
    caption = f"Speed of whole models on random tokens, about {tokens:,} a step, and peak memory. {SPREAD}."
    rows: list[Row] = []
    calls: list[Row] = []
    with env.progress(total=len(kinds) * len(lengths), desc="speed") as bar:
        for kind in kinds:
            for done, n in enumerate(lengths, 1):
                bar.set_postfix_str(f"{kind}, N {n:,}")
                variant = of_kind(config, kind)
                wrong = attempt(checks.model, variant, device) if done == 1 else None
                outcome = wrong or attempt(partial(measure, kind, budget=budget), of_length(variant, n, tokens), device)
                failed = isinstance(outcome, Failure)
                row, each = ({"model": kind, "length": n, "failed": outcome.why}, []) if failed else outcome
                rows.append(row)
                calls += each
                grown, notes = growth(rows)
                if residence.make(config, device).plan.host:
                    notes.append("forward: weights come from host memory as they are used, as in an evaluation")
                tables = [
                    Table("speed", list(rows), caption, digits=3),
                    Table("growth", grown, GROWTH),
                    Table("calls", list(calls), shown=False),
                ]
                yield Result("speed", tables, notes, FIGURES)
                bar.update(len(lengths) - done + 1 if failed else 1)
                if failed:
                    break
