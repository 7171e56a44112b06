"""AdamW as (keep, init, update), its schedule and gradient clipping. `update` takes any leaves of the parameter tree, or parts of them, so
that it can run layer by layer and piece by piece."""

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from hyperlm import kernels, tree
from hyperlm.config import OptimConfig
from hyperlm.kernels.reference.optimizer import QUANT_BLOCK, ROW, UpdatePart
from hyperlm.kernels.reference.optimizer import norm as norm_of
from hyperlm.random import STRIDE
from hyperlm.stages import stages
from hyperlm.tree import Tree

# Least steps of warm-up for the rate of `config.peak_rate`. Largest norm of the gradient after 20, 30 and 50 of them at d 4096 (32
# layers, 32 x 512 tokens a step, one seed; the run with 30 was stopped at step 80 of 200): 15.3, 3.4, 3.2; during them 25.6, 15.8, 9.5;
# training loss at the end 4.27 with 20, 3.98 with 50. Narrower models need fewer (5 at d 512, 10 at d 1024), and lose nothing by 50: 4.11
# with 20 and 4.09 with 50 at d 512, 4.01 and 3.98 at d 1024.
WARMUP = 50


@dataclass(frozen=True)
class Leaf:
    """A parameter, or some whole blocks of one, with all that its update reads. An update consumes these tensors: param and moments become
    the new ones."""

    param: Tensor
    grad: Tensor  # of as many numbers, fp32 or bf16, or in 8 bits (see `reference.encode8`)
    moments: dict[str, Tensor]  # by their names in opt_state
    decay: bool  # whether weight decay acts
    stream: Tensor  # int64 scalar on the leaf's device: counter base of its random stream (see `stream_bases`)


@dataclass(frozen=True)
class Update:
    """What is done to leaves."""

    step: int  # updates made before: decides learning rate and bias correction
    factor: Tensor | None = None  # fp32 scalar on their device, of the gradient's scale; by 0 it counts as 0 even where it is not finite
    part: UpdatePart = UpdatePart.FULL  # see `reference.adamw8`


class Optimizer(NamedTuple):
    """How parameters are kept, and how they learn."""

    keep: Callable[[Tensor], Tensor]  # fp32 values -> the parameter as it is stored
    init: Callable[[Tree], Tree]  # params -> opt_state, {name: tree like params}
    update: Callable[[Sequence[Leaf], Update], None]  # in place


def leaves_of(grads: Tree, opt_state: Tree, params: Tree, decay: Tree, streams: Iterable[Tensor]) -> list[Leaf]:
    """The leaves of trees like the parameters; `streams` in their order."""
    moments = {name: tree.leaves(part) for name, part in opt_state.items()}
    return zip_leaves(tree.leaves(grads), moments, tree.leaves(params), tree.leaves(decay), streams)


def zip_leaves(
    grads: Sequence[Tensor], moments: dict[str, list[Tensor]], params: Sequence[Tensor], decay: Sequence[bool], streams: Iterable[Tensor]
) -> list[Leaf]:
    """The same of lists, as leaves are updated chunk by chunk."""
    each = zip(params, grads, decay, streams, *moments.values(), strict=True)
    return [Leaf(param, grad, dict(zip(moments, values, strict=True)), acts, stream) for param, grad, acts, stream, *values in each]


@dataclass(frozen=True)
class Schedule:
    """The learning rate of a run as a share of its peak: linear warm-up, then from `share` at step `start` by a cosine to the floor at
    step `end`.

    Part of what a checkpoint holds: a run that is extended goes on from the rate that it has, and one that is only resumed keeps its curve.
    """

    warmup: int
    start: int
    share: float
    end: int


def new_schedule(cfg: OptimConfig, total: int) -> Schedule:
    """That of a new run of `total` steps. Warm-up that is not given is a tenth of it, from WARMUP to 1,000 steps but at most half of it."""
    warmup = min(cfg.warmup_steps, total) or min(max(WARMUP, math.ceil(total / 10)), 1000, math.ceil(total / 2))
    return Schedule(warmup, warmup, 1.0, total)


def extended(schedule: Schedule, cfg: OptimConfig, step: int, total: int) -> Schedule:
    """The schedule from step `step` on of a run that is now to end at step `total`: its warm-up stays, and the rate does not jump."""
    if step < schedule.warmup:
        return replace(schedule, end=max(total, schedule.warmup))
    return Schedule(schedule.warmup, step, learning_rate(schedule, cfg)(step) / cfg.lr, total)


def learning_rate(schedule: Schedule, cfg: OptimConfig) -> Callable[[int], float]:
    """The learning rate of step 0, 1, ...

    Raises:
        ValueError: when asked for one, if `cfg` is of a configuration that was not resolved: its peak is 0.
    """

    def lr(step: int) -> float:
        if not cfg.lr:
            raise ValueError("no learning rate: optim.lr follows from the width in config.resolve(config)")
        if step < schedule.warmup:
            return cfg.lr * (step + 1) / schedule.warmup
        progress = min(1.0, (step - schedule.start) / max(1, schedule.end - schedule.start))
        return cfg.lr * (cfg.lr_floor + (schedule.share - cfg.lr_floor) * 0.5 * (1 + math.cos(math.pi * progress)))

    return lr


def adamw(cfg: OptimConfig, lr: Callable[[int], float]) -> Optimizer:
    """AdamW (Loshchilov & Hutter 2019), elementwise, in the dtype of the parameters: fp32."""

    def init(params: Tree) -> Tree:
        return {"m": tree.map(torch.zeros_like, params), "v": tree.map(torch.zeros_like, params)}

    def update(leaves: Sequence[Leaf], update: Update) -> None:
        if update.part != UpdatePart.FULL:
            raise NotImplementedError("updates in parts are those of 8-bit moments")
        p, m, v = [leaf.param for leaf in leaves], [leaf.moments["m"] for leaf in leaves], [leaf.moments["v"] for leaf in leaves]
        g = [leaf.grad.float() if leaf.grad.dtype == torch.bfloat16 else leaf.grad for leaf in leaves]
        if update.factor is not None:
            torch._foreach_mul_(g, update.factor)
            g = [torch.nan_to_num_(x, 0, 0, 0) for x in g]  # infinity times 0
        step, rate = update.step, lr(update.step)
        decayed = [leaf.param for leaf in leaves if leaf.decay]
        if decayed and cfg.weight_decay:
            torch._foreach_mul_(decayed, 1 - rate * cfg.weight_decay)
        torch._foreach_lerp_(m, g, 1 - cfg.beta1)
        torch._foreach_mul_(v, cfg.beta2)
        torch._foreach_addcmul_(v, g, g, 1 - cfg.beta2)
        scale = torch._foreach_sqrt(v)
        torch._foreach_div_(scale, math.sqrt(1 - cfg.beta2 ** (step + 1)))
        torch._foreach_add_(scale, 1e-8)
        torch._foreach_addcdiv_(p, m, scale, -rate / (1 - cfg.beta1 ** (step + 1)))

    return Optimizer(lambda values: values, init, update)


def adamw8(cfg: OptimConfig, lr: Callable[[int], float], backend: str = "auto") -> Optimizer:
    """AdamW with matrices in bf16, rounded at random, and their moments in 8 bits (see `reference.adamw8`); vectors and theirs in fp32.

    opt_state is {"moments": ...}: of a matrix (blocks, ROW) uint8, of a vector both moments, (2, n) fp32.
    """
    scalars: dict[tuple, tuple[Tensor, Tensor]] = {}  # of the two newest steps, on each device

    def keep(values: Tensor) -> Tensor:
        return values.bfloat16() if values.dim() > 1 else values

    def init(params: Tree) -> Tree:
        def zeros(p: Tensor) -> Tensor:
            if p.dim() > 1:
                return torch.zeros(-(-p.numel() // QUANT_BLOCK), ROW, dtype=torch.uint8, device=p.device)
            return torch.zeros(2, *p.shape, device=p.device)

        return {"moments": tree.map(zeros, params)}

    def scalars_of(step: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Rates, and the offset of random streams."""
        if (step, device) not in scalars:
            for key in [key for key in scalars if key[0] < step - 1]:
                del scalars[key]
            corrections = lr(step) / (1 - cfg.beta1 ** (step + 1)), 1 / math.sqrt(1 - cfg.beta2 ** (step + 1))
            rates = copy_to_device([1 - lr(step) * cfg.weight_decay, cfg.beta1, cfg.beta2, *corrections], device)
            scalars[step, device] = rates, copy_to_device(signed(step * STRIDE), device)
        return scalars[step, device]

    def update(leaves: Sequence[Leaf], update: Update) -> None:
        device = leaves[0].param.device
        adamw8 = kernels.table(("adamw8",), device, backend)["adamw8"]
        factor = torch.ones((), device=device) if update.factor is None else update.factor
        rates, offset = scalars_of(update.step, device)
        for leaf in leaves:
            adamw8(leaf.param, leaf.grad, leaf.moments["moments"], factor, rates, leaf.stream, offset, leaf.decay, update.part)

    return Optimizer(keep, init, update)


def optimizer(cfg: OptimConfig, schedule: Schedule, backend: str = "auto") -> Optimizer:
    """The optimizer of a run whose learning rate follows `schedule`."""
    lr = learning_rate(schedule, cfg)
    # "auto", where nobody decided, is what it takes where memory suffices.
    return adamw8(cfg, lr, backend) if cfg.state == "int8" else adamw(cfg, lr)


def stored(declared: Tree, cfg: OptimConfig) -> tuple[Tree, Tree]:
    """Parameters (a tree of Specs) and optimizer state as they are stored, on the meta device: shapes and dtypes."""
    rule = optimizer(cfg, new_schedule(cfg, 1))
    params = tree.map(lambda spec: rule.keep(torch.empty(spec.shape, device="meta")), declared)
    return params, rule.init(params)


def signed(x: int) -> int:
    """x modulo 2^64, as an int64."""
    return (x + (1 << 63)) % (1 << 64) - (1 << 63)


def copy_to_device(numbers: float | int | list, device: torch.device) -> Tensor:
    """A few numbers on a device. Made there, they would wait for all that it has yet to do."""
    return torch.tensor(numbers, pin_memory=device.type == "cuda").to(device, non_blocking=True)


def stream_bases(params: Tree, seed: int) -> Tree:
    """The counter base of each leaf's random stream: a function of (seed, path); `update` adds an offset for the step."""

    def base(path: str, _: object) -> int:
        return int.from_bytes(hashlib.blake2b(f"{seed}/{path}/noise".encode(), digest_size=8).digest(), "little", signed=True)

    return tree.map_with_path(base, params)


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


def clip(grads: Tree, limit: float, scope: str, norm: Callable[[list[Tensor]], Tensor] = norm_of) -> tuple[Tree, Tensor]:
    """Scale `grads` in place by `clip_factors`; also returns their global norm before. norm: that of the dispatch table."""
    parts = stages(grads)
    factors, total = clip_factors(torch.stack([norm(tree.leaves(part)) for part in parts]), limit, scope)
    if limit:
        for part, factor in zip(parts, factors, strict=True):
            torch._foreach_mul_(tree.leaves(part), factor)
    return grads, total
