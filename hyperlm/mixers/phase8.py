"""Phase 8: linear attention in the tangent space at the origin, O(N).

Queries and keys are tangent vectors r u (direction from the projection, radius from the token); the feature map elu(beta r u) + 1 makes a
positive kernel of them, and a decay per head adds proper time: the kernel of the product of hyperbolic space with a time axis. No rotary
embedding and no normaliser. Decoding carries a K x K state per head, whatever the length.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from hyperlm.config import ModelConfig
from hyperlm.declare import constant, declare
from hyperlm.mixers.frame import Context, LayerCache, Mixer, Radius
from hyperlm.precision import wide

SLOWEST, FASTEST = 1e-2, 1.0  # initial decay rates per token, spread over the heads


class Phase8(Mixer):
    cache_grows = False

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__(cfg)
        h = cfg.n_heads
        self.radius = Radius(cfg, 2 * h)
        rates = [SLOWEST * (FASTEST / SLOWEST) ** (i / max(1, h - 1)) for i in range(h)]
        self.decay = declare((h, cfg.d_model), constant(0.0), decay=True)
        self.decay_bias = declare((h,), constant([math.log(math.expm1(rate)) for rate in rates]))  # inverse of softplus

    def narrow(self) -> list[Tensor]:
        return [self.radius.weight, self.decay]

    def mix(self, qkv: Tensor, gate: Tensor, few: Tensor, cache: LayerCache | None, ctx: Context) -> tuple[Tensor, LayerCache]:
        r, log_decay = ctx.ops["radii"](few, self.radius.bias, self.decay_bias)
        if ctx.gauges is not None:
            ctx.gauges.append(dict(zip("qk", r.chunk(2, 1), strict=True)))
        tail, state = (None, None) if cache is None else (cache["tail"], cache["state"])
        if cache is not None and qkv.shape[1] == 1:
            token = (qkv[:, 0], self.conv, r[..., 0], self.beta, log_decay[..., 0])
            y, state, tail = ctx.ops["tangent_step"](*token, state, tail, self.norm, gate[:, 0])
            return F.linear(y, self.out)[:, None], {"tail": tail, "state": state}
        q, k, v, tail = ctx.ops["tangent_features"](qkv, self.conv, r, self.beta, tail)
        o, state = ctx.ops["linear_attention"](q, k, v, log_decay, state)
        return self.readout(o, gate, ctx), {"tail": tail, "state": state}

    @staticmethod
    def ops(cfg: ModelConfig) -> tuple[str, ...]:
        return "radii", "tangent_features", "linear_attention", "readout", "tangent_step"

    @staticmethod
    def init_cache(cfg: ModelConfig, batch: int, *, device: torch.device | str, dtype: torch.dtype) -> LayerCache:
        return {"state": torch.zeros(batch, cfg.n_heads, cfg.head_dim, cfg.head_dim, device=device, dtype=wide(dtype))}
