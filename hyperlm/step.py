"""One optimizer step: step(state, batch) -> (state, metrics).

The gradient is that of total nats / learnt targets over all A micro-batches, whatever the split. Axes: A micro-batches, B batch,
N sequence.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hyperlm import model
from hyperlm.batch import Batch
from hyperlm.loss import IGNORE
from hyperlm.optim import Schedule, learning_rate, new_schedule, optimizer
from hyperlm.residence import Residence, require_planned
from hyperlm.stages import map_stages
from hyperlm.state import State, consumed, require_flushed
from hyperlm.tree import Tree

Metrics = dict[str, Any]


def init_params(residence: Residence) -> Tree:
    """Initial parameters as the optimizer keeps them, where the residence has them."""
    cfg = residence.config
    keep = optimizer(cfg.optim, new_schedule(cfg.optim, 1), cfg.kernels).keep
    return map_stages(residence.store, model.init(cfg.model, cfg.train.seed, device=residence.home, keep=keep))


def init_state(residence: Residence, params: Tree | None = None) -> State:
    """The state before the first step, with `params`, stored and kept as `init_params` does it, or else with these."""
    cfg = residence.config
    rule = optimizer(cfg.optim, new_schedule(cfg.optim, 1), cfg.kernels)
    params = init_params(residence) if params is None else params
    opt_state = {name: map_stages(residence.store, part) for name, part in rule.init(params).items()}
    return State(params, opt_state, step=0, updates=0, tokens=0, seed=cfg.train.seed)


def weights(residence: Residence, state: State) -> Tree:
    """What `model.hidden` and its like compute with.

    Raises:
        StaleState: unless `state` is current and flushed.
    """
    require_flushed(state)
    return residence.weights(state.params)


def step_keys(state: State, micro_batches: int, device: torch.device) -> tuple[Tensor, ...]:
    """The keys that dropout of each micro-batch is a function of; layers add less than 1 << 20 to them."""
    first = ((state.seed & 0xFFFF) << 46) + (state.step << 20) * 1024
    return ((torch.arange(micro_batches, device=device) << 20) + first).unbind()


def make_step(residence: Residence, schedule: Schedule) -> Callable[[State, Batch], tuple[State, Metrics]]:
    """Build the step of a run whose learning rate follows `schedule`.

    The step takes a batch of (A, B, N) tokens and targets and consumes its state: parameters and moments are updated in place, some of them
    when they are next used or flushed. Metrics: loss (nats a learnt token over all micro-batches; 0 where there is none),
    grad_norm (before clipping), lr, tokens (targets that are learnt), positions (tokens that are read, by which speed is told), skipped
    (True if loss or gradient was not finite: nothing was updated; but where stages are updated before the others are known, clipped by
    layer, only those without a finite gradient learn nothing from it).
    It synchronises with the device once, to decide whether to update. A state that was consumed raises StaleState, a batch that is larger than
    what memory was planned for PlanError; that state can still be used.
    """
    lr, advance, device = learning_rate(schedule, residence.config.optim), residence.advance(schedule), residence.device

    def step(state: State, batch: Batch) -> tuple[State, Metrics]:
        require_planned(residence.plan, batch.tokens.shape)
        state = consumed(state)
        count = int((batch.targets != IGNORE).sum())
        keys = step_keys(state, len(batch.tokens), device)
        rate = lr(state.updates)
        state, (nats, norm, finite) = advance(state, batch.to(device), keys, max(1, count))
        counts = {"tokens": count, "positions": batch.tokens.numel()}
        metrics = {"loss": nats / max(1, count), "grad_norm": norm, "lr": rate, **counts, "skipped": not finite}
        return replace(state, step=state.step + 1, updates=state.updates + finite, tokens=state.tokens + count), metrics

    return step


def make_flush(residence: Residence, schedule: Schedule) -> Callable[[State], State]:
    """flush(state) -> state, with every parameter up to date and written: before anything but a step reads it. Where an update is pending it
    consumes its state as a step does; where none is, it waits for what the last step still writes."""
    flush = residence.flush(schedule)
    return lambda state: flush(state if state.pending is None else consumed(state))
