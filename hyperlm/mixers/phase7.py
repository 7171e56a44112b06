"""Phase 7: exact hyperbolic attention, O(N^2).

Queries and keys are lifted onto the hyperboloid (direction from the projection, rotated by RoPE, an isometry that fixes the origin;
radius from the token); scores are functions of their geodesic distance; values are Euclidean. exp(-beta d) and cosh(d)^-beta are positive
definite kernels for every beta > 0 in every dimension.
"""

import torch
from torch import Tensor

from configs import ModelConfig
from hyperlm.geometry import direction, time_of
from hyperlm.kernels.reference import wide, widen
from hyperlm.mixers.frame import CAPACITY, Context, LayerCache, Mixer, Radius, append, rotate


class Phase7(Mixer):
    ops = (*Mixer.ops, "hyperbolic_attention")

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__(cfg)
        self.score = cfg.score
        self.radius = Radius(cfg, 2 * cfg.n_heads)

    def core(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, cache: LayerCache | None, ctx: Context) -> tuple[Tensor, dict]:
        r_q, r_k = self.radius(x).chunk(2, 1)
        if ctx.gauges is not None:
            ctx.gauges.append({"q": r_q, "k": r_k})
        t_q, s_q = lift_rounded(rotate(direction(widen(q)), ctx), r_q, q.dtype)
        t_k, s_k = lift_rounded(rotate(direction(widen(k)), ctx), r_k, k.dtype)
        entries = {}
        if cache is not None:
            end = ctx.position + x.shape[1]
            entries = {name: append(cache[name], new, ctx.position) for name, new in (("t_k", t_k), ("s_k", s_k), ("v", v))}
            t_k, s_k, v = (entries[name][:, :, :end] for name in ("t_k", "s_k", "v"))
        return ctx.ops["hyperbolic_attention"](t_q, s_q, t_k, s_k, v, self.beta, self.score), entries

    @staticmethod
    def init_cache(cfg: ModelConfig, batch: int, *, device: torch.device, dtype: torch.dtype) -> LayerCache:
        shape = (batch, cfg.n_heads, CAPACITY)
        return {
            "t_k": torch.zeros(shape, device=device, dtype=wide(dtype)),
            "s_k": torch.zeros(*shape, cfg.head_dim, device=device, dtype=dtype),
            "v": torch.zeros(*shape, cfg.head_dim, device=device, dtype=dtype),
        }


def lift_rounded(u: Tensor, r: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Lift to (t, s) with s rounded to `dtype` first and t computed from the rounded s: the pair lies on the hyperboloid exactly.

    At r = 3 in bf16 this lowers the median error of distances from 0.13 to 0.0013 against rounding both.
    """
    s = (torch.sinh(r)[..., None] * u).to(dtype)
    return time_of(widen(s)), s
