"""One optimizer step: step(state, batch) -> (state, metrics).

The gradient is that of total nats / learnt targets over all A micro-batches, whatever the split. Axes: A micro-batches, B batch,
N sequence.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hyperlm import model, tree
from hyperlm.batch import Batch
from hyperlm.config import Config
from hyperlm.env import compute_dtype
from hyperlm.loss import IGNORE
from hyperlm.optim import Schedule, learning_rate, new_schedule, optimizer
from hyperlm.precision import compute_copy
from hyperlm.residence import device as on_device
from hyperlm.residence import host
from hyperlm.residence.streamed import streamed
from hyperlm.stages import moved
from hyperlm.state import State, consumed, require_settled
from hyperlm.tree import Tree

Metrics = dict[str, Any]


def place(cfg: Config, device: torch.device) -> Callable[[Tree], Tree]:
    """Moves a stage of parameters or moments to where `cfg.train.residence` wants it."""
    if cfg.train.residence == "host":
        return lambda stage: host.in_host_memory(stage, device)
    return lambda stage: tree.map(lambda x: x.to(device), stage)


def init_params(cfg: Config, device: torch.device) -> Tree:
    """Initial parameters as the optimizer keeps them, where the residence has them."""
    here = torch.device("cpu") if cfg.train.residence == "host" else device
    keep = optimizer(cfg.optim, new_schedule(cfg.optim, 1), cfg.kernels).keep
    return moved(place(cfg, device), model.init(cfg.model, cfg.train.seed, device=here, keep=keep))


def init_state(cfg: Config, device: torch.device, params: Tree | None = None) -> State:
    """The state before the first step, with `params`, placed and kept as `init_params` does it, or else with these."""
    rule = optimizer(cfg.optim, new_schedule(cfg.optim, 1), cfg.kernels)
    params = init_params(cfg, device) if params is None else params
    opt_state = {name: moved(place(cfg, device), part) for name, part in rule.init(params).items()}
    return State(params, opt_state, step=0, updates=0, tokens=0, seed=cfg.train.seed)


def weights(cfg: Config, state: State, device: torch.device) -> Tree:
    """What `model.hidden` and its like compute with on `device`.

    Raises:
        StaleState: unless `state` is current and settled.
    """
    require_settled(state)
    dtype = compute_dtype(device)
    return streamed(state.params, dtype, device, keep_ends=False) if cfg.train.residence == "host" else compute_copy(state.params, dtype)


def step_keys(state: State, micro_batches: int, device: torch.device) -> tuple[Tensor, ...]:
    """The keys that dropout of each micro-batch is a function of; layers add less than 1 << 20 to them."""
    first = ((state.seed & 0xFFFF) << 46) + (state.step << 20) * 1024
    return ((torch.arange(micro_batches, device=device) << 20) + first).unbind()


def make_step(cfg: Config, schedule: Schedule, device: torch.device) -> Callable[[State, Batch], tuple[State, Metrics]]:
    """Build the step of a run whose learning rate follows `schedule`.

    The step takes a batch of (A, B, N) tokens and targets and consumes its state: parameters and moments are updated in place, in the host
    residence when they are next used or `settle`d. Metrics: loss (nats a learnt token over all micro-batches; 0 where there is none),
    grad_norm (before clipping), lr, tokens (targets that are learnt), positions (tokens that are read, by which speed is told), skipped
    (True if loss or gradient was not finite: nothing was updated; but clipped by layer in the host residence, where stages are updated before
    the others are known, only those without a finite gradient learn nothing from it).
    It synchronises with the device once, to decide whether to update. A state that was consumed raises StaleState.
    """
    lr = learning_rate(schedule, cfg.optim)
    advance = (host if cfg.train.residence == "host" else on_device).make_advance(cfg, schedule, device)

    def step(state: State, batch: Batch) -> tuple[State, Metrics]:
        state = consumed(state)
        count = int((batch.targets != IGNORE).sum())
        keys = step_keys(state, len(batch.tokens), device)
        rate = lr(state.updates)
        state, nats, norm, finite = advance(state, batch.to(device), keys, max(1, count))
        counts = {"tokens": count, "positions": batch.tokens.numel()}
        metrics = {"loss": nats / max(1, count), "grad_norm": norm, "lr": rate, **counts, "skipped": not finite}
        return replace(state, step=state.step + 1, updates=state.updates + finite, tokens=state.tokens + count), metrics

    return step


def make_settle(cfg: Config, schedule: Schedule, device: torch.device) -> Callable[[State], State]:
    """settle(state) -> state, with every parameter up to date: before anything but a step reads it. It consumes its state as a step does."""
    if cfg.train.residence != "host":
        return lambda state: state
    settle = host.make_settle(cfg, schedule, device)
    return lambda state: settle(state) if state.pending is None else settle(consumed(state))
