"""How much memory a run needs, from the declaration alone: nothing is allocated.

Activations are counted, not estimated: a block runs on the meta device, where tensors have shapes but no memory, and the bytes that
autograd saves for the backward pass are added up.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.func import functional_call

from configs import Config
from hyperlm import kernels, model, tree
from hyperlm.declare import Spec
from hyperlm.env import GIB
from hyperlm.loss import CHUNK_ELEMENTS

FP32, BF16 = 4, 2


@dataclass(frozen=True)
class Plan:
    """Bytes that one residence needs, by what they are for."""

    residence: str
    weights: int
    gradients: int
    optimizer: int
    activations: int
    host: int

    @property
    def device(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations


def parameters(config: Config) -> dict[str, int]:
    """Parameters of each stage, counted from the declaration."""
    declared = model.declaration(config.model)
    return {stage: tree.count(declared[stage]) for stage in ("embed", "blocks", "head")}


def on_meta(declared: Any, dtype: torch.dtype) -> Any:
    def leaf(spec: Spec) -> torch.Tensor:
        return torch.empty(spec.shape, device="meta", dtype=dtype if len(spec.shape) > 1 else torch.float32, requires_grad=True)

    return tree.map(leaf, declared)


class Fused(torch.autograd.Function):
    """A reference on the meta device that saves what a kernel in its place saves: inputs and outputs, nothing between them."""

    @staticmethod
    def forward(ctx: Any, fn: Callable, *args: Any) -> Any:
        out = fn(*args)
        ctx.save_for_backward(*(x for x in (*args, *(out if isinstance(out, tuple) else (out,))) if torch.is_tensor(x)))
        return out


def stand_ins(config: Config, dtype: torch.dtype) -> dict[str, Callable]:
    """For every op, a function for the meta device that saves as much as what will run: Triton where bf16 says that there is a GPU."""
    cfg = config.model
    triton = dtype == torch.bfloat16 and config.kernels != "torch" and cfg.head_dim in kernels.HEAD_DIMS

    def stand_in(op: str) -> Callable:
        reference = kernels.OPS[op]["torch"]
        taken = triton and "triton" in kernels.OPS[op]
        fused = op == "softmax_attention" or taken  # torch's own attention is fused as well
        return partial(Fused.apply, reference) if fused else reference

    return {op: stand_in(op) for op in model.ops(cfg)}


def saved_bytes(config: Config, layer: int, dtype: torch.dtype) -> int:
    """Bytes that the forward pass of one block saves for its backward pass, its parameters aside."""
    cfg, b, n = config.model, config.train.batch_size, config.data.seq_len
    params = on_meta(model.declaration(cfg)["blocks"][layer], dtype)
    own = {p.untyped_storage()._cdata for p in params.values()}
    sizes: dict[int, int] = {}
    kept = []  # storages must stay alive, or their identities would be used again

    def pack(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in own:
            sizes[storage._cdata] = storage.nbytes()
            kept.append(x)
        return x

    x = torch.empty(b, n, cfg.d_model, device="meta", requires_grad=True)
    key = torch.empty((), dtype=torch.int64, device="meta") if cfg.dropout else None
    angles = torch.empty(n, cfg.head_dim // 2, device="meta")
    ctx = model.Context(stand_ins(config, dtype), dtype, angles, angles, 0, key)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        functional_call(model.skeleton(cfg).blocks[layer], params, (x, None, ctx), strict=True)
    return sum(sizes.values())


def plans(config: Config, dtype: torch.dtype) -> list[Plan]:
    """The memory plan of each residence, computing in `dtype`."""
    cfg, t = config.model, config.train
    count = parameters(config)
    total, layer = sum(count.values()), count["blocks"] // cfg.n_layers
    item = BF16 if dtype == torch.bfloat16 else FP32
    boundary = t.batch_size * config.data.seq_len * cfg.d_model * FP32
    by_kind = {cfg.layer_kind(i): saved_bytes(config, i, dtype) for i in range(cfg.n_layers)}
    blocks = [by_kind[cfg.layer_kind(i)] for i in range(cfg.n_layers)]
    head = 3 * min(CHUNK_ELEMENTS, t.batch_size * config.data.seq_len * cfg.vocab_size) * FP32 + count["head"] * FP32
    kept = cfg.n_layers * boundary + max(head, max(blocks)) if t.recompute else sum(blocks) + head
    copy = total * item if item == BF16 else 0  # fp32 is computed with as it is
    device = Plan(
        "device",
        weights=total * FP32 + copy,
        gradients=total * (FP32 + item) if t.grad_accum > 1 or item == BF16 else total * FP32,
        optimizer=total * 2 * FP32,
        activations=kept,
        host=0,
    )
    host = Plan(
        "host",
        weights=2 * max(layer, count["head"], count["embed"]) * item,
        gradients=2 * layer * FP32 + count["head"] * FP32,
        optimizer=0,
        activations=2 * boundary + max(max(blocks), head),
        host=total * (FP32 + item + FP32 + 2 * FP32) + t.grad_accum * cfg.n_layers * boundary,
    )
    return [device, host]


def table(config: Config) -> str:
    """The parameter count and the plans, as lines to print."""
    count, t = parameters(config), config.train
    lines = [
        f"parameters {sum(count.values()):,} (embedding {count['embed']:,}, {config.model.n_layers} blocks {count['blocks']:,}, head {count['head']:,})",
        f"a step     {t.batch_size} x {t.grad_accum} sequences of {config.data.seq_len} tokens",
        f"{'GiB':<17}" + "".join(f"{name:>12}" for name in ("weights", "gradients", "optimizer", "activations", "device", "host")),
    ]
    for dtype, where in ((torch.bfloat16, "gpu, bf16"), (torch.float32, "cpu, fp32")):
        for p in plans(config, dtype):
            cells = (p.weights, p.gradients, p.optimizer, p.activations, p.device, p.host)
            lines.append(f"{p.residence:<7}{where:<10}" + "".join(f"{c / GIB:>12.2f}" for c in cells))
    lines.append("device: everything on the device that computes. host: parameters and optimizer in host memory (planned; training there is not built yet).")
    return "\n".join(lines)
