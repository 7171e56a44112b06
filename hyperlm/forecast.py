"""What a run needs, and whether it fits this machine and how long it takes there, before it is started: the answer to --plan."""

import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from hyperlm import data, env, flops, memory, residence
from hyperlm.batch import next_tokens
from hyperlm.config import Config
from hyperlm.log import count, duration, labelled
from hyperlm.optim import new_schedule
from hyperlm.residence import Residence
from hyperlm.step import init_state, make_step

BYTES_A_TOKEN = 3.5  # of code and English, by a tokenizer that was trained on them; what text that nobody has tokenised yet is counted by
# What is assumed where measuring would take long: the share that a step makes of what products of matrices alone reach (on an H100, stated
# at 9.9e14 a second, `standard` made 1.0e14 and `max` from host memory 2.6e14), bytes a second each way on the bus, and initial numbers a
# second.
SHARE = {"cuda": 0.3, "cpu": 0.5}
BUS = 20e9
INITIAL = 2e7
PATIENCE = 30.0  # seconds that measuring may take
REPEATS = 3  # of a measured step, after the first


def here(chosen: Residence) -> Iterator[str]:
    """Lines on a run that fits, its residence and state decided; those that take longer last."""
    config = chosen.config
    yield labelled("fits", f"yes: {placed(chosen)}")
    yield labelled("disk", disk(config))
    steps, basis = steps_of(config)
    yield labelled("steps", f"{steps:,}, {basis}" if steps else basis)
    seconds, source = step_seconds(chosen)
    each = f"{count(seconds)} s a step, {count(tokens_of(config) / seconds)} tokens a second; {source}"
    yield labelled("time", f"about {duration(steps * seconds)}, evaluations and saves aside: {each}" if steps else each)


def machine(config: Config, device: torch.device) -> str:
    """What there is to run on."""
    dtype = str(env.compute_dtype(device)).removeprefix("torch.")
    host = f"{env.available_memory(torch.device('cpu')) / env.GIB:.1f} GiB of host memory are free"
    if device.type != "cuda":
        return labelled("machine", f"{device}, {dtype}; {host}")
    allowed = f"{env.allowed_memory(device, config.train.device_memory) / env.GIB:.1f} GiB of its memory may be used"
    return labelled("machine", f"{device}, {torch.cuda.get_device_name(device)}, {dtype}: {allowed}; {host}")


def tokens_of(config: Config) -> int:
    """Of a step."""
    return config.train.batch_size * config.train.grad_accum * config.data.seq_len


def needs(config: Config) -> Iterator[str]:
    """The parameter count and the memory plans: what the machine has plays no role."""
    counts, t = memory.parameters(config), config.train
    yield labelled(
        "parameters",
        f"{sum(counts.values()):,}: embedding {counts['embed']:,}, {config.model.n_layers} blocks {counts['blocks']:,}, "
        f"head {counts['head']:,}",
    )
    a_token = flops.a_token(config.model, config.data.seq_len)
    yield labelled(
        "a step", f"{t.batch_size} x {t.grad_accum} sequences of {config.data.seq_len} tokens, {count(a_token)} operations a token"
    )
    yield f"{'GiB':<17}" + "".join(f"{name:>{len(name) + 2}}" for name in COLUMNS) + f"{'device':>9}{'host':>8}"
    for state in ("fp32", "int8") if config.optim.state == "auto" else (config.optim.state,):
        variant = replace(config, optim=replace(config.optim, state=state))
        for dtype, where, residences in ((torch.bfloat16, "gpu", 2), (torch.float32, "cpu", 1)):
            for p in residence.plans(variant, dtype)[:residences]:
                parts = "".join(f"{getattr(p, name) / env.GIB:>{len(name) + 2}.2f}" for name in COLUMNS)
                yield f"{p.residence:<7}{where:<5}{state:<5}{parts}{p.device / env.GIB:>9.2f}{p.host / env.GIB:>8.2f}"
    p, budget = residence.plans(config, torch.bfloat16)[1], t.device_memory or residence.EXAMPLE
    within = "within" if p.device + env.CONTEXT <= round(budget * env.GIB) else "which does not fit"
    driver = f"{env.CONTEXT / env.GIB:.1f} GiB of a GPU are its driver's"
    yield labelled("", f"host: parameters and optimizer in host memory, {within} {budget:g} GiB of a GPU; {driver}")


COLUMNS = ("weights", "gradients", "optimizer", "activations")


def placed(chosen: Residence) -> str:
    """Where a run that fits has its parts."""
    device, planned, config = chosen.device, chosen.plan, chosen.config
    allowed = env.allowed_memory(device, config.train.device_memory)
    there = f", {planned.host / env.GIB:.1f} GiB of host memory" if planned.host else ""
    of_device = f"{planned.device / env.GIB:.1f} of {allowed / env.GIB:.1f} GiB on {device}"
    return f"in residence {planned.residence} with {config.optim.state} state: {of_device}{there}"


def disk(config: Config) -> str:
    """What checkpoints take: those that are kept, the best one, and the one that is being written."""
    each, most = memory.checkpoint_size(config), config.ckpt.keep + 2
    free = shutil.disk_usage(Path()).free
    verdict = "" if free > most * each else ": too little, lower --ckpt.keep or make room"
    return f"{most} checkpoints at most, {env.readable(each)} each; {env.readable(free)} of disk are free{verdict}"


def steps_of(config: Config) -> tuple[int, str]:
    """How many a run has, and what that rests on; 0 if it cannot be told."""
    t, quiet = config.train, lambda line: None
    if t.steps:
        return t.steps, "as asked for"
    try:
        corpus = data.prepare(config, quiet, only_cached=True)
        an_epoch = data.batches(corpus, config, quiet).steps_per_epoch
        basis = f"of {count(sum(s.train_tokens for s in corpus.shards))} tokens, in the cache"
    except data.NotTokenised as e:
        each = 1 if config.data.tokenizer == "bytes" else BYTES_A_TOKEN
        an_epoch = e.size / each / tokens_of(config)
        basis = f"of about {count(e.size / each)} tokens, estimated: {env.readable(e.size)} of text at {each} bytes a token"
    except data.DataError as e:
        return 0, f"unknown: {e}"
    return t.total_steps(an_epoch), f"{t.epochs:g} {'epoch' if t.epochs == 1 else 'epochs'} {basis}"


def step_seconds(chosen: Residence) -> tuple[float, str]:
    """Seconds of a step, and how they were found: measured, whole or in part, where that takes no longer than PATIENCE, else from rates."""
    config, device, planned = chosen.config, chosen.device, chosen.plan
    rate = SHARE[device.type] * products_a_second(device)
    whole, sequences = flops.a_step(config) / rate, config.train.batch_size * config.train.grad_accum
    left = PATIENCE - sum(memory.parameters(config).values()) / INITIAL
    if whole * (REPEATS + 1) <= left:
        return measured(chosen), f"measured: {REPEATS} steps on random tokens"
    few = min(int(left / (REPEATS + 1) / whole * sequences), config.train.batch_size)
    if few and not planned.host:
        part = replace(config, train=replace(config.train, batch_size=few, grad_accum=1))
        seconds = measured(residence.make(part, device)) * sequences / few
        return seconds, f"measured: {REPEATS} steps on random tokens, with {few} of their {sequences} sequences"
    source = (
        f"not measured: at {SHARE[device.type]:.0%} of the {count(rate / SHARE[device.type])} operations a second of matrix products here"
    )
    if planned.host and device.type == "cuda":
        whole = max(whole, max(planned.bytes_moved[0]) / BUS)
        source += f", and {BUS / 1e9:.0f} GB/s each way on the bus"
    return whole, source


def measured(chosen: Residence) -> float:
    """Seconds of a real step on random tokens: the fastest of a few, after the first, which makes what stays."""
    config = chosen.config
    state, step = init_state(chosen), make_step(chosen, new_schedule(config.optim, 1000))
    shape = config.train.grad_accum, config.train.batch_size, config.data.seq_len + 1
    batch, times = next_tokens(torch.randint(config.model.vocab_size, shape, generator=torch.Generator().manual_seed(0))), []
    for _ in env.progress(range(REPEATS + 1), "measuring", unit=" steps"):
        begun = time.perf_counter()
        state, _ = step(state, batch)  # it waits for the device
        times.append(time.perf_counter() - begun)
    return min(times[1:])


def products_a_second(device: torch.device) -> float:
    """Operations a second of a large product of matrices in what is computed with."""
    n, times = 8192 if device.type == "cuda" else 1024, []
    x = torch.ones(n, n, device=device, dtype=env.compute_dtype(device))
    for _ in range(4):
        begun = time.perf_counter()
        float((x @ x)[0, 0])
        times.append(time.perf_counter() - begun)
    return 2 * n**3 / min(times)
