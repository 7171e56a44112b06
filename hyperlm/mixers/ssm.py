"""The SSM branch (experimental): a diagonal recurrence in the tangent space at the origin.

h_n = exp(-a_n) h_{n-1} + (1 - exp(-a_n)) b_n with a_n = softplus(...) per channel: a contraction towards the origin, pulled towards b_n.
Linear, because Möbius addition is not associative and no scan of it can be exact. Read out through the exponential map with a clipped
radius. Axes: B batch, N sequence, D model width, S state width D/4.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hyperlm.config import ModelConfig
from hyperlm.declare import constant, declare, matrix
from hyperlm.geometry import R_MAX, exp_map
from hyperlm.mixers.frame import Context, LayerCache, linear_pair
from hyperlm.precision import wide

SLOWEST, FASTEST = 1e-3, 0.3  # initial contraction rates per token, spread over the channels


class SSM(nn.Module):
    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        s = cfg.ssm_dim
        rates = [SLOWEST * (FASTEST / SLOWEST) ** (i / (s - 1)) for i in range(s)]
        self.rate = declare((s, cfg.d_model), constant(0.0), decay=True)
        self.rate_bias = declare((s,), constant([math.log(math.expm1(rate)) for rate in rates]))
        self.into = matrix(s, cfg.d_model)
        self.out = matrix(cfg.d_model, s)

    def forward(self, x: Tensor, cache: LayerCache | None, ctx: Context) -> tuple[Tensor, LayerCache]:
        """x (B, N, D) -> y (B, N, D) and the next cache."""
        rate, into = linear_pair(x, self.rate, self.into)
        log_a = -F.softplus(rate + self.rate_bias)  # wide, as the bias is
        b = -torch.expm1(log_a) * into
        h = ctx.ops["scan"](log_a, b, None if cache is None else cache["ssm"])
        _, s = exp_map(h, R_MAX)
        return F.linear(s.to(x.dtype), self.out), {"ssm": h[:, -1]}

    @staticmethod
    def ops(cfg: ModelConfig) -> tuple[str, ...]:
        return ("scan",)

    @staticmethod
    def init_cache(cfg: ModelConfig, batch: int, *, device: torch.device | str, dtype: torch.dtype) -> LayerCache:
        return {"ssm": torch.zeros(batch, cfg.ssm_dim, device=device, dtype=wide(dtype))}
