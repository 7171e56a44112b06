"""AdamW as an (init, update) pair, its schedule and gradient clipping. `update` takes any part of the parameter tree, so that it can run
layer by layer."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from configs import OptimConfig
from hyperlm import tree
from hyperlm.tree import Tree


class Optimizer(NamedTuple):
    """init(params) -> opt_state; update(grads, opt_state, params, step, decay=...) -> (params, opt_state)."""

    init: Callable[[Tree], Tree]
    update: Callable[..., tuple[Tree, Tree]]


def schedule(cfg: OptimConfig, total: int) -> Callable[[int], float]:
    """Learning rate of step 0, 1, ...: linear warm-up, then a cosine to lr * lr_floor at step `total`."""
    warmup = min(cfg.warmup_steps or min(1000, math.ceil(total / 10)), total)

    def lr(step: int) -> float:
        if step < warmup:
            return cfg.lr * (step + 1) / warmup
        progress = min(1.0, (step - warmup) / max(1, total - warmup))
        return cfg.lr * (cfg.lr_floor + (1 - cfg.lr_floor) * 0.5 * (1 + math.cos(math.pi * progress)))

    return lr


def adamw(cfg: OptimConfig, lr: Callable[[int], float]) -> Optimizer:
    """AdamW (Loshchilov & Hutter 2019), elementwise, in the dtype of the parameters.

    `update` works in place: the tensors of params, opt_state and grads are consumed. Its `step` counts the updates made before (0 for the first) and
    decides learning rate and bias correction; `decay` has the structure of params, with True where weight decay acts.
    """

    def init(params: Tree) -> Tree:
        return {"m": tree.map(torch.zeros_like, params), "v": tree.map(torch.zeros_like, params)}

    def update(grads: Tree, opt_state: Tree, params: Tree, step: int, *, decay: Tree) -> tuple[Tree, Tree]:
        p, g, m, v = (tree.leaves(t) for t in (params, grads, opt_state["m"], opt_state["v"]))
        rate = lr(step)
        decayed = [leaf for leaf, acts in zip(p, tree.leaves(decay), strict=True) if acts]
        if decayed and cfg.weight_decay:
            torch._foreach_mul_(decayed, 1 - rate * cfg.weight_decay)
        torch._foreach_lerp_(m, g, 1 - cfg.beta1)
        torch._foreach_mul_(v, cfg.beta2)
        torch._foreach_addcmul_(v, g, g, 1 - cfg.beta2)
        scale = torch._foreach_sqrt(v)
        torch._foreach_div_(scale, math.sqrt(1 - cfg.beta2 ** (step + 1)))
        torch._foreach_add_(scale, 1e-8)
        torch._foreach_addcdiv_(p, m, scale, -rate / (1 - cfg.beta1 ** (step + 1)))
        return params, opt_state

    return Optimizer(init, update)


def clip(grads: Tree, limit: float, scope: str) -> tuple[Tree, Tensor]:
    """Scale `grads` in place so that no norm exceeds `limit` (0 for no limit).

    Args:
        scope: "global" (one norm over everything) or "layer" (embedding, each block and head by their own).

    Returns:
        grads, and the global norm before clipping as an fp32 scalar on their device.
    """
    parts = [grads["embed"], *grads["blocks"], grads["head"]]
    norms = torch.stack([tree.norm(part) for part in parts])
    total = torch.linalg.vector_norm(norms)
    if limit:
        factors = (limit / (norms if scope == "layer" else total.expand_as(norms)).clamp(min=1e-30)).clamp(max=1)
        for part, factor in zip(parts, factors, strict=True):
            torch._foreach_mul_(tree.leaves(part), factor)
    return grads, total
