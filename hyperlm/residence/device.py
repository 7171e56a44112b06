"""Everything on the device that computes: the fast residence, for models that fit."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hyperlm import kernels, memory, model, tree
from hyperlm.batch import Batch
from hyperlm.config import Config
from hyperlm.cuda_graph import cuda_graphed
from hyperlm.env import compute_dtype
from hyperlm.loss import head_nats
from hyperlm.memory import BF16, FP32
from hyperlm.optim import Schedule, Update, clip, leaves_of, optimizer, stream_bases
from hyperlm.precision import compute_copy, summed
from hyperlm.residence.base import Advance, Plan, Residence, Result
from hyperlm.state import State
from hyperlm.tree import Tree


def plan(config: Config, dtype: torch.dtype, budget: int) -> Plan:
    """What a run needs: a budget changes nothing of it."""
    cfg, t = config.model, config.train
    item, total = dtype.itemsize, sum(memory.parameters(config).values())
    params, opt_state = memory.stored(config)
    boundary = t.batch_size * config.data.seq_len * cfg.d_model * FP32
    blocks, head = memory.activations(config, dtype), memory.head_bytes(config, dtype, t.batch_size * config.data.seq_len)
    return Plan(
        "device",
        weights=memory.size(params) + (total * item if item == BF16 else 0),  # fp32 is computed with as it is
        gradients=total * (FP32 + item) if t.grad_accum > 1 or item == BF16 else total * FP32,
        optimizer=memory.size(opt_state),
        activations=cfg.n_layers * boundary + max(head, max(blocks)) if t.recompute else sum(blocks) + head,
        host=0,
    )


def make(config: Config, device: torch.device, planned: Plan) -> Residence:
    return Residence(
        config,
        device,
        home=device,
        plan=planned,
        store=lambda stage: tree.map(lambda x: x.to(device), stage),
        weights=lambda params: compute_copy(params, compute_dtype(device)),
        advance=lambda schedule: make_advance(config, schedule, device),
        flush=lambda schedule: lambda state: state,
    )


class Weights:
    """What is computed with: parameters in the compute dtype, to be differentiated; on a GPU always at the same place, where a recorded
    graph reads them."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.in_place = dtype, device.type == "cuda"
        self.params: Tree = None

    def refresh(self, params: Tree) -> None:
        if self.params is None or not self.in_place:
            copy = compute_copy(params, self.dtype)
            self.params = tree.map(lambda p: (p.clone() if self.in_place else p).requires_grad_(), copy)
            return
        with torch.no_grad():
            torch._foreach_copy_(tree.leaves(self.params), tree.leaves(params))


def make_gradients(cfg: Config, device: torch.device) -> Callable[[Tree, Batch, Sequence[Tensor], int], tuple[Tensor, Tree]]:
    """Micro-batch after micro-batch through the whole model; on a GPU replayed from a CUDA graph."""
    dtype = compute_dtype(device)
    run = model.compiled_block() if cfg.train.compile else model.run_block
    accumulate = kernels.table(("accumulate",), device, cfg.kernels)["accumulate"]
    weights = Weights(dtype, device)

    def of_micro_batch(tokens: Tensor, targets: Tensor, key: Tensor, count: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        with torch.profiler.record_function("forward"):
            features = model.hidden(weights.params, tokens, cfg.model, kernels=cfg.kernels, key=key, recompute=cfg.train.recompute, run=run)
            nats, _ = head_nats(features.flatten(0, 1), weights.params["head"]["weight"], targets.flatten(), kernels=cfg.kernels)
        with torch.profiler.record_function("backward"):
            return nats.detach(), torch.autograd.grad(nats / count, tree.leaves(weights.params))

    if device.type == "cuda":
        of_micro_batch = cuda_graphed(of_micro_batch)

    def gradients(params: Tree, batch: Batch, keys: Sequence[Tensor], count: int) -> tuple[Tensor, Tree]:
        weights.refresh(params)
        divisor, total = torch.full((), float(count), device=device), torch.zeros((), device=device)
        sums: list[Tensor] | None = None
        for tokens, targets, key in zip(batch.tokens, batch.targets, keys, strict=True):
            nats, grads = of_micro_batch(tokens, targets, key, divisor)
            total += nats
            sums = summed(sums, grads, accumulate)
        return total, tree.unflatten(sums or [], params)

    return gradients


def make_advance(cfg: Config, schedule: Schedule, device: torch.device) -> Advance:
    gradients, rule = make_gradients(cfg, device), optimizer(cfg.optim, schedule, cfg.kernels)
    measured = kernels.table(("norm",), device, cfg.kernels)["norm"]
    declared = model.declaration(cfg.model)
    decay = tree.map(lambda spec: spec.decay, declared)
    starts = tree.leaves(stream_bases(declared, cfg.train.seed))
    streams = torch.tensor(starts, device=device).unbind()

    def advance(state: State, batch: Batch, keys: Sequence[Tensor], count: int) -> tuple[State, Result]:
        nats, grads = gradients(state.params, batch, keys, count)
        with torch.no_grad(), torch.profiler.record_function("update"):
            grads, norm = clip(grads, cfg.optim.clip, cfg.optim.clip_scope, measured)
            finite = bool(torch.isfinite(norm + nats))
            if finite:
                rule.update(leaves_of(grads, state.opt_state, state.params, decay, streams), Update(state.updates))
        return state, Result(nats, norm, finite)

    return advance
