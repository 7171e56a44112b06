"""How many operations a token takes in training, what a card can do in a second, and so how much of it a run uses: model FLOPs
utilisation, MFU, as appendix B of the PaLM paper (Chowdhery et al. 2022) defines it.

Counted are the products of matrices, two operations for each multiplication, forward and twice that backward; whatever is computed again
is not.
As there, every position attends to every other: a causal kernel makes half of that. Linear attention is counted as a recurrence, so how a
kernel cuts it into chunks counts in none.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from hyperlm import kernels, memory, model
from hyperlm.config import Config, ModelConfig
from hyperlm.tree import Tree

# bf16 products a second of each card that sums them in fp32, without sparsity, as NVIDIA states them: data sheets of H100, H200, A100,
# L4, L40S and A10; for GeForce cards, appendix A of the whitepapers of the Ampere, Ada and Blackwell architectures.
PEAKS = {
    "NVIDIA H200": 989e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA A10": 125e12,
    "NVIDIA GeForce RTX 3080": 59.5e12,
    "NVIDIA GeForce RTX 3090": 71e12,
    "NVIDIA GeForce RTX 4080": 97.5e12,
    "NVIDIA GeForce RTX 4090": 165.2e12,
    "NVIDIA GeForce RTX 5090": 209.5e12,
}


VALUES = {"hyperbolic_attention": 4, "softmax_attention": 2, "linear_attention": 2}  # where the operations of a core have their values


def peak(device: torch.device) -> float | None:
    """bf16 operations a second that a device is known to make at most; None where nobody said."""
    return PEAKS.get(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def core(op: str, cfg: ModelConfig, n: int) -> int:
    """Operations of one position of an attention over n, forward: its scores and what they weigh, or a state that is written and read."""
    return {"hyperbolic_attention": 4 * n, "softmax_attention": 4 * n, "linear_attention": 4 * cfg.head_dim}.get(op, 0) * cfg.d_model


@lru_cache
def a_token(cfg: ModelConfig, n: int) -> int:
    """Operations that training takes for a token in a sequence of n: the forward pass runs on the meta device, and its products are
    counted."""
    declared, kinds = model.declaration(cfg), [cfg.layer_kind(layer) for layer in range(cfg.n_layers)]
    cores = 0  # operations of a block's core, which stands for itself in no product here

    def counted(op: str) -> Callable:
        def stand_in(*args: Any) -> Any:
            nonlocal cores
            cores += n * core(op, cfg, n)
            o = torch.empty_like(args[VALUES[op]])
            return (o, None) if op == "linear_attention" else o

        return stand_in if core(op, cfg, n) else kernels.OPS[op].reference

    def on_meta(stage: Tree) -> Tree:
        return memory.on_meta(stage, torch.float32)

    angles = torch.empty(n, cfg.head_dim // 2, device="meta")
    ctx = model.Context({op: counted(op) for op in model.ops(cfg)}, torch.float32, angles, angles, 0)
    total = 0
    with torch.no_grad():
        with FlopCounterMode(display=False) as ends:
            x = model.embed(on_meta(declared["embed"]), torch.empty(1, n, dtype=torch.int64, device="meta"), cfg, ctx)
            features = model.finish(on_meta(declared["head"]), x, cfg, ctx)
            F.linear(features, on_meta(declared["head"])["weight"])
        for kind in dict.fromkeys(kinds):  # blocks of one kind are alike
            layer, cores = kinds.index(kind), 0
            with FlopCounterMode(display=False) as block:
                functional_call(model.skeleton(cfg).blocks[layer], on_meta(declared["blocks"][layer]), (x, None, ctx), strict=True)
            total += kinds.count(kind) * (block.get_total_flops() + cores)
    return 3 * (ends.get_total_flops() + total) // n


def a_step(config: Config) -> int:
    """Operations of a step."""
    t = config.train
    return t.batch_size * t.grad_accum * config.data.seq_len * a_token(config.model, config.data.seq_len)


def seconds_a_token(config: Config, device: torch.device) -> float | None:
    """The least that a token can take on a device, where its peak is known."""
    most = peak(device)
    return a_token(config.model, config.data.seq_len) / most if most else None
