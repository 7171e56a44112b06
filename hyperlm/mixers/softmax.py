"""The Euclidean twin: softmax attention with rotary embedding and normalised queries and keys, in the same frame. Every claim about
geometry is a claim against it."""

import torch
import torch.nn.functional as F
from torch import Tensor

from configs import ModelConfig
from hyperlm.geometry import direction
from hyperlm.kernels.reference import widen
from hyperlm.mixers.frame import CAPACITY, Context, LayerCache, Mixer, append, rotate


class Softmax(Mixer):
    def core(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, cache: LayerCache | None, ctx: Context) -> tuple[Tensor, dict]:
        q = (rotate(direction(widen(q)), ctx) * self.beta[:, None, None]).to(v.dtype)
        k = rotate(direction(widen(k)), ctx).to(v.dtype)
        entries, end = {}, ctx.position + x.shape[1]
        if cache is not None:
            entries = {name: append(cache[name], new, ctx.position) for name, new in (("k", k), ("v", v))}
            k, v = (entries[name][:, :, :end] for name in ("k", "v"))
        past = None
        if ctx.position and x.shape[1] > 1:  # queries are the last N of the M positions; SDPA's own mask would align the first
            past = torch.ones(x.shape[1], end, dtype=torch.bool, device=x.device).tril(ctx.position)
        causal = past is None and x.shape[1] > 1
        return F.scaled_dot_product_attention(q, k, v, attn_mask=past, is_causal=causal, scale=1.0), entries

    @staticmethod
    def init_cache(cfg: ModelConfig, batch: int, *, device: torch.device, dtype: torch.dtype) -> LayerCache:
        shape = (batch, cfg.n_heads, CAPACITY, cfg.head_dim)
        return {name: torch.zeros(shape, device=device, dtype=dtype) for name in ("k", "v")}
