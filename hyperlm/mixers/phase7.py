"""Phase 7: exact hyperbolic attention, O(N^2); and its nulls, which say what of it is geometry.

Queries and keys are lifted onto the hyperboloid (direction from the projection, rotated by RoPE, an isometry that fixes the origin;
radius from the token); scores are functions of their geodesic distance; values are Euclidean. exp(-beta d) and cosh(d)^-beta are positive
definite kernels for every beta > 0 in every dimension.

With Klein coordinates x = s / t = tanh(r) u of a point,

    log cosh d(q, k) = log cosh r_q + log cosh r_k + log(1 - x_q . x_k),

and a softmax over keys drops the first term. What is left to first order in x_q . x_k is a gain and a bias of the keys, which any dot-product
attention can have; the higher orders alone are geometry. The nulls are these parts, with the parameters of the whole:

    cosine       beta u_q . u_k                        the Euclidean twin
    bias         beta u_q . u_k - beta log cosh r_k
    gain         beta x_q . x_k
    first-order  beta x_q . x_k - beta log cosh r_k
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from hyperlm.config import ModelConfig
from hyperlm.geometry import direction
from hyperlm.mixers.frame import CAPACITY, Context, LayerCache, Mixer, Radius, append
from hyperlm.precision import wide, widen

OF_DISTANCE = ("logcosh", "distance")  # the other scores are dot products
WITH_GAIN, WITH_BIAS = ("gain", "first-order"), ("bias", "first-order")
ALIGNED = 8  # numbers in the width of heads that torch's fused kernels take


class Phase7(Mixer):
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
        r = dependent(r, self.score)
        tail, entries = None if cache is None else cache["tail"], {}
        t_q, s_q, t_k, s_k, v, tail = ctx.ops["hyperbolic_points"](qkv, self.conv, r, ctx.cos, ctx.sin, tail)
        if cache is not None:
            end = ctx.position + qkv.shape[1]
            entries = {name: append(cache[name], new, ctx.position) for name, new in (("t_k", t_k), ("s_k", s_k), ("v", v))}
            t_k, s_k, v = (entries[name][:, :, :end] for name in ("t_k", "s_k", "v"))
        if self.score in OF_DISTANCE:
            o = ctx.ops["hyperbolic_attention"](t_q, s_q, t_k, s_k, v, self.beta, self.score)
        else:
            q, k = factors(t_q, s_q, t_k, s_k, self.beta, self.score)
            more = q.shape[-1] - v.shape[-1]  # the fused kernels want one width
            o = ctx.ops["softmax_attention"](q, k, F.pad(v, (0, more)) if more else v)[..., : v.shape[-1]]
        return self.readout(o, gate, ctx), {"tail": tail, **entries}

    @staticmethod
    def ops(cfg: ModelConfig) -> tuple[str, ...]:
        return "radii", "hyperbolic_points", "hyperbolic_attention" if cfg.score in OF_DISTANCE else "softmax_attention", "readout"

    @staticmethod
    def init_cache(cfg: ModelConfig, batch: int, *, device: torch.device | str, dtype: torch.dtype) -> LayerCache:
        shape = (batch, cfg.n_heads, CAPACITY)
        return {
            "t_k": torch.zeros(shape, device=device, dtype=wide(dtype)),
            "s_k": torch.zeros(*shape, cfg.head_dim, device=device, dtype=dtype),
            "v": torch.zeros(*shape, cfg.head_dim, device=device, dtype=dtype),
        }


def dependent(r: Tensor, score: str) -> Tensor:
    """Radii of queries and keys, (B, 2 H, N), with a gradient of 0 for those on which a score does not depend: AdamW would follow rounding errors."""
    if score not in ("cosine", "bias"):
        return r
    r_q, r_k = r.chunk(2, 1)
    return torch.cat([r_q.detach() + 0 * r_q, r_k if score == "bias" else r_k.detach() + 0 * r_k], 1)


def factors(t_q: Tensor, s_q: Tensor, t_k: Tensor, s_k: Tensor, beta: Tensor, score: str) -> tuple[Tensor, Tensor]:
    """Queries and keys whose dot products are the scores of a null.

    A bias of the keys is two more of their numbers, which meet ones: it is split into a rounded part and what that lacks, for in bf16 a
    single number of 20 would be off by 0.06. Zeros fill up what is then the width.

    Args:
        t_q, t_k: (B, H, N), (B, H, M), wide.
        s_q, s_k: (B, H, N, K), (B, H, M, K).
        beta: (H,), wide.

    Returns:
        q (B, H, N, C) and k (B, H, M, C) in the dtype of s, C = K or with a bias K + 2, rounded up to a multiple of ALIGNED.
    """

    def coordinates(t: Tensor, s: Tensor) -> Tensor:
        return widen(s) / t[..., None] if score in WITH_GAIN else direction(widen(s))

    q = (coordinates(t_q, s_q) * beta[:, None, None]).to(s_q.dtype)
    k = coordinates(t_k, s_k).to(s_k.dtype)
    if score in WITH_BIAS:
        bias = -beta[:, None] * torch.log(t_k)
        rounded = bias.to(k.dtype)
        rest = (bias - rounded).detach().to(k.dtype)
        fill = -(k.shape[-1] + 2) % ALIGNED
        q = F.pad(q, (0, 2 + fill), value=1.0)
        k = F.pad(torch.cat([k, rounded[..., None], rest[..., None]], -1), (0, fill))
    return q, k
