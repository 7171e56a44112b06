"""One optimizer step: step(state, batch) -> (state, metrics).

The gradient is that of total nats / total target tokens over all A micro-batches, whatever the split. Axes: A micro-batches, B batch,
N sequence.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from configs import Config
from hyperlm import model, tree
from hyperlm.env import compute_dtype
from hyperlm.loss import IGNORE
from hyperlm.optim import optimizer, schedule
from hyperlm.precision import compute_copy
from hyperlm.residence import device as on_device
from hyperlm.residence import host
from hyperlm.residence.streamed import streamed
from hyperlm.stages import moved
from hyperlm.state import State
from hyperlm.tree import Tree

Metrics = dict[str, Any]


def place(cfg: Config, device: torch.device) -> Callable[[Tree], Tree]:
    """Moves a stage of parameters or moments to where `cfg.train.residence` wants it."""
    if cfg.train.residence == "host":
        return lambda stage: host.in_host_memory(stage, device)
    return lambda stage: tree.map(lambda x: x.to(device), stage)


def init_state(cfg: Config, total_steps: int, device: torch.device) -> State:
    """The state before the first step."""
    rule = optimizer(cfg.optim, total_steps, cfg.kernels)
    here = torch.device("cpu") if cfg.train.residence == "host" else device
    params = moved(place(cfg, device), model.init(cfg.model, cfg.train.seed, device=here, keep=rule.keep))
    opt_state = {name: moved(place(cfg, device), part) for name, part in rule.init(params).items()}
    return State(params, opt_state, step=0, updates=0, tokens=0, seed=cfg.train.seed)


def weights(cfg: Config, params: Tree, device: torch.device) -> Tree:
    """What `model.hidden` and its like compute with on `device`, from the parameters of a settled state."""
    dtype = compute_dtype(device)
    return streamed(params, dtype, device, keep_ends=False) if cfg.train.residence == "host" else compute_copy(params, dtype)


def step_keys(state: State, micro_batches: int, device: torch.device) -> tuple[Tensor, ...]:
    """The keys that dropout of each micro-batch is a function of; layers add less than 1 << 20 to them."""
    first = ((state.seed & 0xFFFF) << 46) + (state.step << 20) * 1024
    return ((torch.arange(micro_batches, device=device) << 20) + first).unbind()


def make_step(cfg: Config, total_steps: int, device: torch.device) -> Callable[[State, Tensor], tuple[State, Metrics]]:
    """Build the step of a run.

    The step takes a batch (A, B, N+1) of int64 tokens (IGNORE where padded) and consumes its state: parameters and moments are updated in
    place, in the host residence when they are next used or `settle`d. Metrics: loss (nats a token over all micro-batches), grad_norm (before
    clipping), lr, tokens (targets in the batch), skipped (True if loss or gradient was not finite: nothing was updated; but clipped by layer
    in the host residence, where stages are updated before the others are known, only those without a finite gradient learn nothing from it).
    It synchronises with the device once, to decide whether to update.
    """
    lr = schedule(cfg.optim, total_steps)
    advance = (host if cfg.train.residence == "host" else on_device).make_advance(cfg, total_steps, device)

    def step(state: State, batch: Tensor) -> tuple[State, Metrics]:
        count = int((batch[:, :, 1:] != IGNORE).sum())
        keys = step_keys(state, len(batch), device)
        rate = lr(state.updates)
        state, nats, norm, finite = advance(state, batch.to(device, non_blocking=True), keys, count)
        metrics = {"loss": nats / count, "grad_norm": norm, "lr": rate, "tokens": count, "skipped": not finite}
        return replace(state, step=state.step + 1, updates=state.updates + finite, tokens=state.tokens + count), metrics

    return step


def make_settle(cfg: Config, total_steps: int, device: torch.device) -> Callable[[State], State]:
    """settle(state) -> state, with every parameter up to date: before anything but a step reads it."""
    return host.make_settle(cfg, total_steps, device) if cfg.train.residence == "host" else lambda state: state
