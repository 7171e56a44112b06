"""The Euclidean twin: softmax attention with rotary embedding and normalised queries and keys, in the same frame. Every claim about
geometry is a claim against it."""

import torch
from torch import Tensor

from hyperlm.config import ModelConfig
from hyperlm.geometry import direction, rotate
from hyperlm.mixers.frame import CAPACITY, Context, LayerCache, Mixer, append
from hyperlm.precision import widen


class Softmax(Mixer):
    def mix(self, qkv: Tensor, gate: Tensor, few: Tensor, cache: LayerCache | None, ctx: Context) -> tuple[Tensor, LayerCache]:
        q, k, v, tail = ctx.ops["causal_conv"](qkv, self.conv, self.n_heads, None if cache is None else cache["tail"])
        q = (rotate(direction(widen(q)), ctx.cos, ctx.sin) * self.beta[:, None, None]).to(v.dtype)
        k = rotate(direction(widen(k)), ctx.cos, ctx.sin).to(v.dtype)
        entries = {}
        if cache is not None:
            end = ctx.position + qkv.shape[1]
            entries = {name: append(cache[name], new, ctx.position) for name, new in (("k", k), ("v", v))}
            k, v = (entries[name][:, :, :end] for name in ("k", "v"))
        o = ctx.ops["softmax_attention"](q, k, v)
        return self.readout(o, gate, ctx), {"tail": tail, **entries}

    @staticmethod
    def ops(cfg: ModelConfig) -> tuple[str, ...]:
        return "causal_conv", "softmax_attention", "readout"

    @staticmethod
    def init_cache(cfg: ModelConfig, batch: int, *, device: torch.device | str, dtype: torch.dtype) -> LayerCache:
        shape = (batch, cfg.n_heads, CAPACITY, cfg.head_dim)
        return {name: torch.zeros(shape, device=device, dtype=dtype) for name in ("k", "v")}
