"""One optimizer step: step(state, batch) -> (state, metrics).

The gradient is that of total nats / total target tokens over all A micro-batches, whatever the split. Axes: A micro-batches, B batch,
N sequence.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from configs import Config
from hyperlm import model, tree
from hyperlm.loss import IGNORE
from hyperlm.optim import adamw, clip, schedule
from hyperlm.residence import device as on_device
from hyperlm.residence import host
from hyperlm.tree import Tree

Metrics = dict[str, Any]


@dataclass(frozen=True)
class State:
    """All that training changes. Data order and randomness are functions of (seed, step), so nothing else needs saving."""

    params: Tree
    opt_state: Tree
    step: int  # steps done
    updates: int  # steps whose update was applied; the rest had a non-finite gradient
    tokens: int  # target tokens seen
    seed: int


def init_state(cfg: Config, total_steps: int, device: torch.device) -> State:
    """The state before the first step: fp32 parameters and moments on `device`."""
    params = model.init(cfg.model, cfg.train.seed, device=device)
    opt_state = adamw(cfg.optim, schedule(cfg.optim, total_steps)).init(params)
    return State(params, opt_state, step=0, updates=0, tokens=0, seed=cfg.train.seed)


def step_key(state: State, micro_batch: int, device: torch.device) -> Tensor:
    """The key that dropout of one micro-batch is a function of; layers add less than 1 << 20 to it."""
    return torch.tensor(((state.seed & 0xFFFF) << 46) + (state.step << 20) * 1024 + (micro_batch << 20), device=device)


def make_step(cfg: Config, total_steps: int, device: torch.device) -> Callable[[State, Tensor], tuple[State, Metrics]]:
    """Build the step of a run.

    The step takes a batch (A, B, N+1) of int64 tokens (IGNORE where padded) and consumes its state: parameters and moments are updated in
    place. Metrics: loss (nats a token over all micro-batches), grad_norm (before clipping), lr, tokens (targets in the batch), skipped
    (True if loss or gradient was not finite: nothing was updated). It synchronises with the device once, to decide whether to update.
    """
    lr = schedule(cfg.optim, total_steps)
    optimizer = adamw(cfg.optim, lr)
    decay = tree.map(lambda spec: spec.decay, model.declaration(cfg.model))
    gradients = (host if cfg.train.residence == "host" else on_device).make_gradients(cfg, device)

    def step(state: State, batch: Tensor) -> tuple[State, Metrics]:
        count = int((batch[:, :, 1:] != IGNORE).sum())
        keys = [step_key(state, index, device) for index in range(len(batch))]
        nats, grads = gradients(state.params, batch.to(device, non_blocking=True), keys, count)
        with torch.no_grad(), torch.profiler.record_function("update"):
            grads, norm = clip(grads, cfg.optim.clip, cfg.optim.clip_scope)
            loss = nats / count
            finite = bool(torch.isfinite(norm + loss))
            new_params, opt_state = state.params, state.opt_state
            if finite:
                new_params, opt_state = optimizer.update(grads, opt_state, new_params, state.updates, decay=decay)
        metrics = {"loss": loss, "grad_norm": norm, "lr": lr(state.updates), "tokens": count, "skipped": not finite}
        state = replace(
            state,
            params=new_params,
            opt_state=opt_state,
            step=state.step + 1,
            updates=state.updates + finite,
            tokens=state.tokens + count,
        )
        return state, metrics

    return step
