"""Everything on the device that computes: the fast residence, for models that fit."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hyperlm import kernels, model, tree
from hyperlm.batch import Batch
from hyperlm.config import Config
from hyperlm.cuda_graph import cuda_graphed
from hyperlm.env import compute_dtype
from hyperlm.loss import head_nats
from hyperlm.optim import Schedule, Update, clip, leaves_of, optimizer, stream_bases
from hyperlm.precision import compute_copy, summed
from hyperlm.state import State
from hyperlm.tree import Tree

Advance = Callable[[State, Batch, Sequence[Tensor], int], tuple[State, Tensor, Tensor, bool]]


def make_gradients(cfg: Config, device: torch.device) -> Callable[[Tree, Batch, Sequence[Tensor], int], tuple[Tensor, Tree]]:
    """Micro-batch after micro-batch through the whole model; on a GPU replayed from a CUDA graph."""
    dtype = compute_dtype(device)
    run = torch.compile(model.run_block) if cfg.train.compile else model.run_block
    accumulate = kernels.table(("accumulate",), device, cfg.kernels)["accumulate"]
    weights: Tree = None  # what is computed with

    def refresh(params: Tree) -> None:
        """Bring `weights` up to date; on a GPU in place, where a recorded graph reads them."""
        nonlocal weights
        if device.type != "cuda":
            weights = tree.map(lambda p: p.requires_grad_(), compute_copy(params, dtype))
        elif weights is None:
            weights = tree.map(lambda p: p.clone().requires_grad_(), compute_copy(params, dtype))
        else:
            with torch.no_grad():
                torch._foreach_copy_(tree.leaves(weights), tree.leaves(params))

    def of_micro_batch(tokens: Tensor, targets: Tensor, key: Tensor, count: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        with torch.profiler.record_function("forward"):
            features = model.hidden(weights, tokens, cfg.model, kernels=cfg.kernels, key=key, recompute=cfg.train.recompute, run=run)
            nats, _ = head_nats(features.flatten(0, 1), weights["head"]["weight"], targets.flatten(), kernels=cfg.kernels)
        with torch.profiler.record_function("backward"):
            return nats.detach(), torch.autograd.grad(nats / count, tree.leaves(weights))

    if device.type == "cuda":
        of_micro_batch = cuda_graphed(of_micro_batch)

    def gradients(params: Tree, batch: Batch, keys: Sequence[Tensor], count: int) -> tuple[Tensor, Tree]:
        refresh(params)
        divisor, total, sums = torch.full((), float(count), device=device), torch.zeros((), device=device), None
        for tokens, targets, key in zip(batch.tokens, batch.targets, keys, strict=True):
            nats, grads = of_micro_batch(tokens, targets, key, divisor)
            total += nats
            sums = summed(sums, grads, accumulate)
        return total, tree.unflatten(sums, params)

    return gradients


def make_advance(cfg: Config, schedule: Schedule, device: torch.device) -> Advance:
    gradients, rule = make_gradients(cfg, device), optimizer(cfg.optim, schedule, cfg.kernels)
    measured = kernels.table(("norm",), device, cfg.kernels)["norm"]
    declared = model.declaration(cfg.model)
    decay = tree.map(lambda spec: spec.decay, declared)
    starts = tree.leaves(stream_bases(tree.map_with_path(lambda path, _: path, declared), cfg.train.seed))
    streams = torch.tensor(starts, device=device).unbind()

    def advance(state: State, batch: Batch, keys: Sequence[Tensor], count: int) -> tuple[State, Tensor, Tensor, bool]:
        nats, grads = gradients(state.params, batch, keys, count)
        with torch.no_grad(), torch.profiler.record_function("update"):
            grads, norm = clip(grads, cfg.optim.clip, cfg.optim.clip_scope, measured)
            finite = bool(torch.isfinite(norm + nats))
            if finite:
                rule.update(leaves_of(grads, state.opt_state, state.params, decay, streams), Update(state.updates))
        return state, nats, norm, finite

    return advance
