"""Phase 8: linear attention in the tangent space at the origin, O(N).

Queries and keys are tangent vectors r u (direction from the projection, radius from the token); the feature map elu(beta r u) + 1 makes a
positive kernel of them, and a decay per head adds proper time: the kernel of the product of hyperbolic space with a time axis. No rotary
embedding and no normaliser. Decoding carries a K x K state per head, whatever the length.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from configs import ModelConfig
from hyperlm.declare import constant, declare
from hyperlm.geometry import direction
from hyperlm.kernels.reference import wide, widen
from hyperlm.mixers.frame import Context, LayerCache, Mixer, Radius

SLOWEST, FASTEST = 1e-3, 0.3  # initial decay rates per token, spread over the heads


class Phase8(Mixer):
    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__(cfg)
        h = cfg.n_heads
        self.radius = Radius(cfg, 2 * h)
        rates = [SLOWEST * (FASTEST / SLOWEST) ** (i / max(1, h - 1)) for i in range(h)]
        self.decay = declare((h, cfg.d_model), constant(0.0), decay=True)
        self.decay_bias = declare((h,), constant([math.log(math.expm1(rate)) for rate in rates]))  # inverse of softplus

    def core(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, cache: LayerCache | None, ctx: Context) -> tuple[Tensor, dict]:
        r_q, r_k = self.radius(x).chunk(2, 1)
        if ctx.gauges is not None:
            ctx.gauges.append({"q": r_q, "k": r_k})
        q, k = self.features(q, r_q), self.features(k, r_k)
        log_decay = -F.softplus(F.linear(x, self.decay) + self.decay_bias).mT  # (B, H, N), wide as the bias is
        if cache is not None and x.shape[1] == 1:
            o, state = ctx.ops["linear_attention_step"](q[:, :, 0], k[:, :, 0], v[:, :, 0], log_decay[:, :, 0], cache["state"])
            o = o[:, :, None]
        else:
            o, state = ctx.ops["linear_attention"](q, k, v, log_decay, None if cache is None else cache["state"])
        return o, {"state": state}

    def features(self, x: Tensor, r: Tensor) -> Tensor:
        """phi(beta r u) = elu(beta r u) + 1 of x (B, H, N, K) with radii r (B, H, N); computed wide, in the dtype of x."""
        tangent = direction(widen(x)) * (self.beta[:, None] * r)[..., None]
        return (F.elu(tangent) + 1).to(x.dtype)

    @staticmethod
    def init_cache(cfg: ModelConfig, batch: int, *, device: torch.device, dtype: torch.dtype) -> LayerCache:
        return {"state": torch.zeros(batch, cfg.n_heads, cfg.head_dim, cfg.head_dim, device=device, dtype=wide(dtype))}
