"""Suite `memory`: what training needs on the device and in host memory, how fast it is, and what it moves between them. Random tokens, real steps."""

from collections.abc import Iterator
from dataclasses import replace

import torch

from hyperlm import env, plan
from hyperlm.batch import next_tokens
from hyperlm.bench.report import Result, Row
from hyperlm.bench.speed import seconds
from hyperlm.config import Config, ConfigError, Kind
from hyperlm.optim import new_schedule
from hyperlm.step import init_state, make_step


def measure(config: Config, device: torch.device, budget: float) -> Row:
    """One model, in the residence that `config` names."""
    t, dtype = config.train, env.compute_dtype(device)
    allowed = env.allowed_memory(device, t.device_memory)
    planned = plan.visits(config, dtype, allowed) if t.residence == "host" else plan.everything(config, dtype)
    row: Row = {
        "model": config.model.kind,
        "parameters": sum(plan.parameters(config).values()),
        "residence": t.residence,
        "state": config.optim.state,
        "clipped by": config.optim.clip_scope if config.optim.clip else "nothing",
        "step": f"{t.grad_accum * t.batch_size} x {config.data.seq_len}",
        "at a time": planned.group * t.batch_size if t.residence == "host" else t.batch_size,
    }
    if device.type == "cuda" and t.device_memory:
        env.limit_memory(device, allowed)
    state, step, done = init_state(config, device), make_step(config, new_schedule(config.optim, 1000), device), 0
    shape = t.grad_accum, t.batch_size, config.data.seq_len + 1

    def once() -> None:
        nonlocal state, done
        windows = torch.randint(config.model.vocab_size, shape, generator=torch.Generator().manual_seed(done))
        state, _ = step(state, next_tokens(windows))
        done += 1

    once()  # allocates what stays
    env.reset_peak_memory(device)
    took = seconds(once, device, budget)
    row["tok/s"] = t.grad_accum * t.batch_size * config.data.seq_len / took
    row["planned GiB"], row["allocated GiB"] = planned.device / env.GIB, env.peak_memory(device) / env.GIB
    if device.type == "cuda":
        row["reserved GiB"] = torch.cuda.max_memory_reserved(device) / env.GIB
        row["process GiB"] = env.used_memory(device) / env.GIB
        row["retries"] = torch.cuda.memory_stats(device)["num_alloc_retries"]
    row["host GiB"] = env.peak_memory(torch.device("cpu")) / env.GIB
    if t.residence == "host":
        there, back = plan.traffic(config, dtype, planned, clipped=state.clipped)
        row["GB/s in"], row["GB/s home"] = there / took / 1e9, back / took / 1e9
    return row


def check(kinds: list[Kind], config: Config, device: torch.device) -> None:
    """Raises ConfigError where host memory cannot hold what the residence needs there."""
    for kind in kinds:
        own, dtype = replace(config, model=replace(config.model, kind=kind)), env.compute_dtype(device)
        if config.train.residence == "host":
            need = plan.visits(own, dtype, env.allowed_memory(device, config.train.device_memory)).host
        else:
            need = plan.everything(own, dtype).device if device.type == "cpu" else 0
        if need > (have := env.available_memory(torch.device("cpu"))):
            sizes = f"{need / env.GIB:,.1f} GiB of host memory, and {have / env.GIB:,.1f} are free"
            raise ConfigError(f"--suite memory: training {kind} needs {sizes}; lower the shape of the model, or --optim.state int8")


def run(kinds: list[Kind], config: Config, device: torch.device, budget: float = 10.0) -> Iterator[Result]:
    """Measure every kind; `budget` is the seconds to time its steps for. Yields what is measured so far."""
    notes = [
        "process: all that the driver counts on this GPU, other processes included; host: the most that this process had resident",
        "GB/s: bytes that a step moves, from the plan, over the time that it takes",
        "retries: how often memory was so tight that the allocator had to give blocks back first, which is slow",
    ]
    rows: list[Row] = []
    for kind in env.progress(kinds, "memory"):
        rows.append(measure(replace(config, model=replace(config.model, kind=kind)), device, budget))
        yield Result("memory", list(rows), notes)
