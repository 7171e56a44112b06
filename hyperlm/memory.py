"""Counts and traces: parameters, bytes of trees and of activations, from the declaration alone; nothing is allocated.

Activations are counted, not estimated: a block runs on the meta device, where tensors have shapes but no memory, and the bytes that
autograd saves for the backward pass are added up.
"""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch
from torch.func import functional_call

from hyperlm import kernels, model, optim, tree
from hyperlm.config import Config, DataConfig, ModelConfig, OptimConfig, TrainConfig
from hyperlm.declare import Spec
from hyperlm.loss import MAX_LOGITS, TOKENS
from hyperlm.tree import Tree

FP32, BF16 = 4, 2


def parameters(config: Config) -> dict[str, int]:
    """Parameters of each stage, counted from the declaration."""
    declared = model.declaration(config.model)
    return {stage: tree.count(declared[stage]) for stage in ("embed", "blocks", "head")}


def stored(config: Config) -> tuple[Tree, dict[str, Tree]]:
    """Parameters and moments as they are stored, on the meta device. Only to be read: a search for a plan asks again and again."""
    return _stored(config.model, config.optim)


@lru_cache(maxsize=8)
def _stored(cfg: ModelConfig, optimizer: OptimConfig) -> tuple[Tree, dict[str, Tree]]:
    return optim.stored(model.declaration(cfg), optimizer)


def size(x: Any) -> int:
    """Bytes of all tensors of a tree."""
    return sum(leaf.nbytes for leaf in tree.leaves(x))


def checkpoint_size(config: Config) -> int:
    """Bytes of a checkpoint: parameters and moments."""
    return sum(map(size, stored(config)))


# -- activations -----------------------------------------------------------------------------------------------------------------------


def on_meta(declared: Any, dtype: torch.dtype) -> Any:
    def leaf(spec: Spec) -> torch.Tensor:
        return torch.empty(spec.shape, device="meta", dtype=dtype if len(spec.shape) > 1 else torch.float32, requires_grad=True)

    return tree.map(leaf, declared)


class Fused(torch.autograd.Function):
    """A reference on the meta device that saves what a kernel in its place saves: inputs and outputs, nothing between them, and no output that is
    for a cache. A view of what was between them is a copy there."""

    @staticmethod
    def forward(ctx: Any, fn: Callable, caches: bool, *args: Any) -> Any:
        out = fn(*args)
        several = isinstance(out, tuple)
        outputs = [x.clone() if x is not None and x.untyped_storage().nbytes() > x.nbytes else x for x in (out if several else (out,))]
        ctx.save_for_backward(*(x for x in (*args, *outputs[: len(outputs) - caches]) if torch.is_tensor(x)))
        return tuple(outputs) if several else outputs[0]


def has_kernel(op: str, config: Config, dtype: torch.dtype) -> bool:
    """Whether an operation will run in Triton: bf16 says that there is a GPU."""
    known = kernels.OPS[op]
    usable = known.triton is not None and (not known.per_head or config.model.head_dim in kernels.HEAD_DIMS)
    return dtype == torch.bfloat16 and usable and config.kernels in ("auto", "triton")


def stand_ins(config: Config, dtype: torch.dtype) -> dict[str, Callable]:
    """For every op, a function for the meta device that saves as much as what will run."""

    def stand_in(name: str) -> Callable:
        op = kernels.OPS[name]
        fused = (op.fused or has_kernel(name, config, dtype)) and op.saves == "inputs_outputs"
        return partial(Fused.apply, op.reference, op.cache_output) if fused else op.reference

    return {name: stand_in(name) for name in model.ops(config.model)}


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


def activations(config: Config, dtype: torch.dtype) -> list[int]:
    """Bytes that each block saves of a micro-batch."""
    train, data = TrainConfig(batch_size=config.train.batch_size), DataConfig(seq_len=config.data.seq_len)
    return _activations(Config(model=config.model, train=train, data=data, kernels=config.kernels), dtype)  # all that they depend on


@lru_cache
def _activations(config: Config, dtype: torch.dtype) -> list[int]:
    kinds = [config.model.layer_kind(layer) for layer in range(config.model.n_layers)]
    of_kind = {kind: saved_bytes(config, kinds.index(kind), dtype) for kind in dict.fromkeys(kinds)}
    return [of_kind[kind] for kind in kinds]


def head_bytes(config: Config, dtype: torch.dtype, tokens: int) -> int:
    """Bytes that `loss.head_nats` takes of so many tokens: a chunk of logits, features and their gradients, and the gradient of the head."""
    cfg = config.model
    backend, each = (
        ("triton", dtype.itemsize) if has_kernel("cross_entropy_backward", config, dtype) else ("torch", FP32 + 2 * dtype.itemsize)
    )
    chunk = min(MAX_LOGITS[backend], tokens * cfg.vocab_size) * each
    of_features = tokens * (FP32 + 2 * dtype.itemsize) + min(TOKENS, tokens) * dtype.itemsize
    return chunk + cfg.d_model * (of_features + cfg.vocab_size * dtype.itemsize)
