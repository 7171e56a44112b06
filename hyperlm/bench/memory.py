"""Suite `memory`: what training needs on the device and in host memory, how fast it is, and what it moves between them. Random tokens, real
steps."""

from collections.abc import Iterator
from functools import partial

import torch

from hyperlm import env, memory, residence
from hyperlm.batch import next_tokens
from hyperlm.bench.arms import of_kind
from hyperlm.bench.pool import Failure, attempt
from hyperlm.bench.result import Bars, Figure, Result, Row, Table
from hyperlm.bench.speed import SPREAD, timed
from hyperlm.config import Config, ConfigError
from hyperlm.optim import new_schedule
from hyperlm.step import init_state, make_step


def measure(label: str, config: Config, device: torch.device, budget: float) -> tuple[Row, list[Row]]:
    """One model, in the residence that `config` names: its row, and one of each step."""
    t, allowed = config.train, env.allowed_memory(device, config.train.device_memory)
    chosen = residence.make(config, device, allowed)
    planned = chosen.plan
    row: Row = {
        "model": label,
        "parameters": sum(memory.parameters(config).values()),
        "residence": planned.residence,
        "state": config.optim.state,
        "clipped by": config.optim.clip_scope if config.optim.clip else "nothing",
        "step": f"{t.grad_accum * t.batch_size} x {config.data.seq_len}",
        "at a time": planned.group * t.batch_size,
    }
    if device.type == "cuda" and t.device_memory:
        env.limit_memory(device, allowed)
    state, step, done = init_state(chosen), make_step(chosen, new_schedule(config.optim, 1000)), 0
    shape = t.grad_accum, t.batch_size, config.data.seq_len + 1

    def once() -> None:
        nonlocal state, done
        windows = torch.randint(config.model.vocab_size, shape, generator=torch.Generator().manual_seed(done))
        state, _ = step(state, next_tokens(windows))
        done += 1

    once()  # allocates what stays
    env.reset_peak_memory(device)
    steps = timed(once, device, budget)
    took = steps.median
    row["tok/s"], row["± %"] = t.grad_accum * t.batch_size * config.data.seq_len / took, steps.spread
    row["planned GiB"], row["allocated GiB"] = planned.device / env.GIB, env.peak_memory(device) / env.GIB
    if device.type == "cuda":
        row["reserved GiB"] = torch.cuda.max_memory_reserved(device) / env.GIB
        row["process GiB"] = env.used_memory(device) / env.GIB
        row["retries"] = torch.cuda.memory_stats(device)["num_alloc_retries"]
    row["host GiB"] = env.peak_memory(torch.device("cpu")) / env.GIB
    if planned.host:
        h2d, d2h = planned.bytes_moved[0 if state.clipped else 1]
        row["GB/s in"], row["GB/s home"] = h2d / took / 1e9, d2h / took / 1e9
    return row, [{"model": label, "call": i, "seconds": each} for i, each in enumerate(steps.each)]


def check(kinds: list[str], config: Config, device: torch.device) -> None:
    """Raises ConfigError where host memory cannot hold what the residence needs there."""
    for kind in kinds:
        planned = residence.make(of_kind(config, kind), device).plan
        need = planned.host or (planned.device if device.type == "cpu" else 0)
        if need > (have := env.available_memory(torch.device("cpu"))):
            sizes = f"{need / env.GIB:,.1f} GiB of host memory, and {have / env.GIB:,.1f} are free"
            raise ConfigError(f"--suite memory: training {kind} needs {sizes}; lower the shape of the model, or --optim.state int8")


FIGURES: list[Figure] = [Bars("memory", "Peak memory of training", "memory", "model", "allocated GiB", "peak memory allocated (GiB)")]


def run(kinds: list[str], config: Config, device: torch.device, budget: float = 10.0) -> Iterator[Result]:
    """Measure every kind; `budget` is the seconds to time its steps for. One that fails is a row that says why. Yields what is measured so
    far."""
    caption = f"Training on random tokens in real steps: the most memory that was in use, and speed. {SPREAD}."
    notes = [
        "process: all that the driver counts on this GPU, other processes included; host: the most that this process had resident",
        "GB/s: bytes that a step moves, from the plan, over the time that it takes",
        "retries: how often memory was so tight that the allocator had to give blocks back first, which is slow",
    ]
    rows: list[Row] = []
    calls: list[Row] = []
    for kind in env.progress(kinds, "memory"):
        outcome = attempt(partial(measure, kind, budget=budget), of_kind(config, kind), device)
        row, each = ({"model": kind, "failed": outcome.why}, []) if isinstance(outcome, Failure) else outcome
        rows.append(row)
        calls += each
        shown = Table("memory", list(rows), caption, digits=3, quiet=["residence", "state", "clipped by", "retries"])
        yield Result("memory", [shown, Table("calls", list(calls), shown=False)], notes, FIGURES)
