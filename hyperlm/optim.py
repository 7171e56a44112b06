"""AdamW as (keep, init, update), its schedule and gradient clipping. `update` takes any part of the parameter tree, so that it can run layer by
layer."""

import hashlib
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from configs import OptimConfig
from hyperlm import kernels, tree
from hyperlm.kernels.reference import ALL, APART, BLOCK, CORRECTION, MOMENTS, ROW, UNDO, WEIGHTS
from hyperlm.stages import stages
from hyperlm.tree import Tree


class Optimizer(NamedTuple):
    """How parameters are kept, and how they learn.

    keep(values) -> a parameter as it is stored, given fp32 values; init(params) -> opt_state; update(grads, opt_state, params, step, *, decay,
    origin, factor=None, what=ALL) -> (params, opt_state).

    `update` works in place: the tensors of params, opt_state and grads are consumed. Its `step` counts the updates made before (0 for the
    first) and decides learning rate and bias correction; `decay` has the structure of params, with True where weight decay acts; `origin` says
    where each leaf's random stream starts (see `origins`), (leaves,) int64 on their device; gradients are multiplied by `factor`, an
    fp32 scalar on their device; `what` names the part of the update to make, if not all of it: see `reference.adamw8`.
    """

    keep: Callable[[Tensor], Tensor]
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


def scaled(grads: list[Tensor], factor: Tensor | None) -> list[Tensor]:
    """Gradients in fp32 (fp64 stays) times `factor`; those in fp32 are overwritten."""
    wide = [g.float() if g.dtype == torch.bfloat16 else g for g in grads]
    if factor is not None:
        torch._foreach_mul_(wide, factor)
    return wide


def adam_in_place(
    cfg: OptimConfig, rate: float, step: int, p: list[Tensor], g: list[Tensor], m: list[Tensor], v: list[Tensor], decay: list[bool],
    factor: Tensor | None = None, what: int = ALL,
) -> None:  # fmt: skip
    """AdamW's update number `step` of p, m and v in place, or the part of it that `what` names: see `reference.adamw8`."""

    def shrink(by: float) -> None:
        if decayed := [leaf for leaf, acts in zip(p, decay, strict=True) if acts and cfg.weight_decay]:
            torch._foreach_mul_(decayed, by)

    def absorb(m: list[Tensor], v: list[Tensor], g: list[Tensor]) -> None:
        torch._foreach_lerp_(m, g, 1 - cfg.beta1)
        torch._foreach_mul_(v, cfg.beta2)
        torch._foreach_addcmul_(v, g, g, 1 - cfg.beta2)

    def draw(m: list[Tensor], v: list[Tensor], sign: int = 1) -> None:
        scale = torch._foreach_sqrt(v)
        torch._foreach_div_(scale, math.sqrt(1 - cfg.beta2 ** (step + 1)))
        torch._foreach_add_(scale, 1e-8)
        torch._foreach_addcdiv_(p, m, scale, -sign * rate / (1 - cfg.beta1 ** (step + 1)))

    if what in (WEIGHTS, CORRECTION, UNDO):
        ahead = [x.clone() for x in m], [x.clone() for x in v]
        absorb(*ahead, scaled(g, None))
    if what in (ALL, MOMENTS, CORRECTION):
        absorb(m, v, scaled(g, factor))
    if what == ALL:
        shrink(1 - rate * cfg.weight_decay)
        draw(m, v)
    elif what == WEIGHTS:
        kept = [x.clone() for x in p]
        shrink(1 - rate * cfg.weight_decay)
        draw(*ahead)
        for x, before in zip(p, kept, strict=True):
            x.copy_(torch.where(factor > 0, x, before))
    elif what in (CORRECTION, UNDO):
        draw(*ahead, sign=-1)
        if what == CORRECTION:
            draw(m, v)
        else:
            shrink(1 / (1 - rate * cfg.weight_decay))


def adamw(cfg: OptimConfig, lr: Callable[[int], float]) -> Optimizer:
    """AdamW (Loshchilov & Hutter 2019), elementwise, in the dtype of the parameters: fp32."""

    def init(params: Tree) -> Tree:
        return {"m": tree.map(torch.zeros_like, params), "v": tree.map(torch.zeros_like, params)}

    def update(
        grads: Tree, opt_state: Tree, params: Tree, step: int, *, decay: Tree, origin: Tensor | None = None, factor: Tensor | None = None, what: int = ALL
    ) -> tuple[Tree, Tree]:
        p, g, m, v = (tree.leaves(t) for t in (params, grads, opt_state["m"], opt_state["v"]))
        adam_in_place(cfg, lr(step), step, p, g, m, v, tree.leaves(decay), factor, what)
        return params, opt_state

    return Optimizer(lambda values: values, init, update)


def adamw8(cfg: OptimConfig, lr: Callable[[int], float], backend: str = "auto") -> Optimizer:
    """AdamW with matrices in bf16, rounded at random, and their moments in 8 bits (see `reference.adamw8`); vectors and theirs in fp32.

    opt_state is {"moments": ...}: of a matrix (blocks, ROW) uint8, of a vector both moments, (2, n) fp32.
    """
    rates_of: dict[tuple, Tensor] = {}  # of the newest step, on each device

    def keep(values: Tensor) -> Tensor:
        return values.bfloat16() if values.dim() > 1 else values

    def init(params: Tree) -> Tree:
        def zeros(p: Tensor) -> Tensor:
            if p.dim() > 1:
                return torch.zeros(-(-p.numel() // BLOCK), ROW, dtype=torch.uint8, device=p.device)
            return torch.zeros(2, *p.shape, device=p.device)

        return {"moments": tree.map(zeros, params)}

    def rates(step: int, device: torch.device) -> Tensor:
        if (step, device) not in rates_of:
            for key in [key for key in rates_of if key[1] == device]:
                del rates_of[key]
            corrections = lr(step) / (1 - cfg.beta1 ** (step + 1)), 1 / math.sqrt(1 - cfg.beta2 ** (step + 1))
            rates_of[step, device] = torch.tensor([1 - lr(step) * cfg.weight_decay, cfg.beta1, cfg.beta2, *corrections], device=device)
        return rates_of[step, device]

    def update(
        grads: Tree, opt_state: Tree, params: Tree, step: int, *, decay: Tree, origin: Tensor, factor: Tensor | None = None, what: int = ALL
    ) -> tuple[Tree, Tree]:
        p, g, moments, acts = (tree.leaves(t) for t in (params, grads, opt_state["moments"], decay))
        device = p[0].device
        one = kernels.table(("adamw8",), device, backend)["adamw8"]
        factor = torch.ones((), device=device) if factor is None else factor
        starts = origin + signed(step * APART)
        vectors = [i for i, leaf in enumerate(p) if leaf.dtype == torch.float32]
        for i in sorted(set(range(len(p))) - set(vectors)):
            one(p[i], g[i], moments[i], factor, rates(step, device), starts[i], acts[i], what)
        if vectors:
            own, both = [p[i] for i in vectors], [moments[i] for i in vectors]
            pulled = [g[i] for i in vectors]
            adam_in_place(cfg, lr(step), step, own, pulled, [x[0] for x in both], [x[1] for x in both], [acts[i] for i in vectors], factor, what)
        return params, opt_state

    return Optimizer(keep, init, update)


def optimizer(cfg: OptimConfig, total: int, backend: str = "auto") -> Optimizer:
    """The optimizer of a run of `total` steps."""
    lr = schedule(cfg, total)
    return adamw8(cfg, lr, backend) if cfg.state == "int8" else adamw(cfg, lr)


def stored(declared: Tree, rule: Optimizer) -> tuple[Tree, Tree]:
    """Parameters (a tree of Specs) and optimizer state as they are stored, on the meta device: shapes and dtypes."""
    params = tree.map(lambda spec: rule.keep(torch.empty(spec.shape, device="meta")), declared)
    return params, rule.init(params)


def signed(x: int) -> int:
    """x modulo 2^64, as an int64."""
    return (x + (1 << 63)) % (1 << 64) - (1 << 63)


def origins(paths: Tree, seed: int) -> Tree:
    """Where the random stream of each leaf starts: a function of (seed, path); `update` adds the step."""

    def start(path: str) -> int:
        return int.from_bytes(hashlib.blake2b(f"{seed}/{path}/noise".encode(), digest_size=8).digest(), "little", signed=True)

    return tree.map(start, paths)


def clip_factors(norms: Tensor, limit: float, scope: str) -> tuple[Tensor, Tensor]:
    """By what to multiply the gradient of each stage so that no norm exceeds `limit` (0 for no limit).

    Args:
        norms: of the gradient of each stage, fp32.
        scope: "global" (one norm over everything) or "layer" (embedding, each block and head by their own).

    Returns:
        A factor for each stage, and the global norm.
    """
    total = torch.linalg.vector_norm(norms)
    if not limit:
        return torch.ones_like(norms), total
    return (limit / (norms if scope == "layer" else total.expand_as(norms)).clamp(min=1e-30)).clamp(max=1), total


def clip(grads: Tree, limit: float, scope: str) -> tuple[Tree, Tensor]:
    """Scale `grads` in place by `clip_factors`; also returns their global norm before."""
    parts = stages(grads)
    factors, total = clip_factors(torch.stack([tree.norm(part) for part in parts]), limit, scope)
    if limit:
        for part, factor in zip(parts, factors, strict=True):
            torch._foreach_mul_(tree.leaves(part), factor)
    return grads, total
