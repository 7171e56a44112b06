"""Phase 7: exact hyperbolic attention, O(N^2).

Queries and keys are lifted onto the hyperboloid (direction from the projection, rotated by RoPE, an isometry that fixes the origin;
radius from the token); scores are functions of their geodesic distance; values are Euclidean. exp(-beta d) and cosh(d)^-beta are positive
definite kernels for every beta > 0 in every dimension.
"""

import torch
from torch import Tensor

from hyperlm.config import ModelConfig
from hyperlm.kernels.reference import wide
from hyperlm.mixers.frame import CAPACITY, Context, LayerCache, Mixer, Radius, append


class Phase7(Mixer):
    ops = ("radii", "hyperbolic_points", "hyperbolic_attention", "readout")

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__(cfg)
        self.score = cfg.score
        self.radius = Radius(cfg, 2 * cfg.n_heads)

    def narrow(self) -> list[Tensor]:
        return [self.radius.weight]

    def mix(self, qkv: Tensor, gate: Tensor, few: Tensor, cache: LayerCache | None, ctx: Context) -> tuple[Tensor, LayerCache]:
        r, _ = ctx.ops["radii"](few, self.radius.bias)
        if ctx.gauges is not None:
            ctx.gauges.append(dict(zip("qk", r.chunk(2, 1), strict=True)))
        tail, entries = None if cache is None else cache["tail"], {}
        t_q, s_q, t_k, s_k, v, tail = ctx.ops["hyperbolic_points"](qkv, self.conv, r, ctx.cos, ctx.sin, tail)
        if cache is not None:
            end = ctx.position + qkv.shape[1]
            entries = {name: append(cache[name], new, ctx.position) for name, new in (("t_k", t_k), ("s_k", s_k), ("v", v))}
            t_k, s_k, v = (entries[name][:, :, :end] for name in ("t_k", "s_k", "v"))
        o = ctx.ops["hyperbolic_attention"](t_q, s_q, t_k, s_k, v, self.beta, self.score)
        return self.readout(o, gate, ctx), {"tail": tail, **entries}

    @staticmethod
    def init_cache(cfg: ModelConfig, batch: int, *, device: torch.device, dtype: torch.dtype) -> LayerCache:
        shape = (batch, cfg.n_heads, CAPACITY)
        return {
            "t_k": torch.zeros(shape, device=device, dtype=wide(dtype)),
            "s_k": torch.zeros(*shape, cfg.head_dim, device=device, dtype=dtype),
            "v": torch.zeros(*shape, cfg.head_dim, device=device, dtype=dtype),
        }

