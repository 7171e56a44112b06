"""The frame that every token mixer shares: projections, short convolutions, heads, the core, per-head norm, output gate.

Measured to matter more than anything else inside a mixer, so all kinds have the same.
Axes: B batch, N sequence, D model width, H heads, K head dim, M positions so far.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hyperlm.config import ModelConfig
from hyperlm.declare import constant, declare, last_tap, matrix
from hyperlm.geometry import R_MAX, R_MIN
from hyperlm.kernels.differentiation import Function, linear_vjp, weight_gradient
from hyperlm.random import keep_mask

CONV_WIDTH = 4
R_START = 1.0  # of every token before training
CAPACITY = 64  # positions that an empty cache has room for
GATE = 4  # what the key of a layer's dropout is to add for its gate, after the three branches

LayerCache = dict[str, Tensor]


class Residuals(NamedTuple):
    """What a pass without gradients leaves for the pass that repeats it with them, as policies of `jax.checkpoint` do it by name."""

    names: frozenset[str]  # of what is worth keeping; the rest is computed again
    values: dict[str, Tensor]  # filled by the first pass, taken by the second


class Context(NamedTuple):
    """What all layers of one pass have in common."""

    ops: dict[str, Callable]
    dtype: torch.dtype  # of matrices, and of what they multiply
    cos: Tensor  # (N, K/2), rotary angles of the positions at hand
    sin: Tensor
    position: int  # how many positions the cache already holds
    key: Tensor | None = None  # int64 scalar that dropout is a function of; None outside training
    gauges: list[dict[str, Tensor]] | None = None  # filled with each layer's radii if a list
    residuals: Residuals | None = None  # of the block at hand, where it is run twice


def save_residual(ctx: Context, name: str, fn: Callable[..., Tensor], *args: Tensor) -> Tensor:
    """fn(*args), kept under `name` where the context wants that; and where it is known already, fn(*args, known), which has its gradient without computing it."""
    if ctx.residuals is None:
        return fn(*args)
    if name in ctx.residuals.values:
        return fn(*args, ctx.residuals.values.pop(name))
    y = fn(*args)
    if name in ctx.residuals.names:
        ctx.residuals.values[name] = y
    return y


def linear(x: Tensor, weight: Tensor, known: Tensor | None = None) -> Tensor:
    """x weight^T, (..., C) by (D, C) -> (..., D): `known`, if it is."""
    return F.linear(x, weight) if known is None else KnownLinear.apply(x, weight, known)


class KnownLinear(Function):
    """A product that was computed before."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, y: Tensor) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor, Tensor, None]:
        return *linear_vjp(d, *ctx.saved_tensors), None


class LinearPair(Function):
    """See `linear_pair`."""

    @staticmethod
    def forward(x: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        return F.linear(x, first), F.linear(x, second)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, d_first: Tensor, d_second: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, first, second = ctx.saved_tensors
        dx, d_weight = linear_vjp(d_first, x, first)
        dx.view(-1, dx.shape[-1]).addmm_(d_second.flatten(0, -2), second)
        return dx, d_weight, weight_gradient(d_second, x)


def linear_pair(x: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Two products of one x (..., C), by first (D, C) and second (E, C) -> (..., D), (..., E). The second's part of the gradient of x is added to
    the first's as it is computed, with no tensor of its own."""
    return LinearPair.apply(x, first, second)


def rope_angles(position: int, n: int, k: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin (N, K/2) of the rotary embedding at positions position .. position + n - 1, fp32. Reference: Su et al. 2021."""
    inverse = 10000.0 ** (-torch.arange(0, k, 2, dtype=torch.float32, device=device) / k)
    angles = torch.arange(position, position + n, dtype=torch.float32, device=device)[:, None] * inverse
    return angles.cos(), angles.sin()


def append(buffer: Tensor, new: Tensor, position: int) -> Tensor:
    """Write `new` (B, H, n, ...) into `buffer` (B, H, capacity, ...) at `position`, doubling the buffer when it is full.

    The buffer given is consumed: use the one returned.
    """
    end = position + new.shape[2]
    if end > buffer.shape[2]:
        grown = buffer.new_empty(*buffer.shape[:2], max(end, 2 * buffer.shape[2]), *buffer.shape[3:])
        grown[:, :, :position] = buffer[:, :, :position]
        buffer = grown
    buffer[:, :, position:end] = new.to(buffer.dtype)
    return buffer


class Radius(nn.Module):
    """Radii of the polar lift for `count` heads, r = R_MIN + (R_MAX - R_MIN) sigmoid(w . x + b): see `reference.radii`.

    Geometry enters the models only here: with norm-fixed queries and keys a hyperbolic score is dot-product attention in disguise.
    """

    def __init__(self, cfg: ModelConfig, count: int) -> None:
        super().__init__()
        share = (R_START - R_MIN) / (R_MAX - R_MIN)
        self.weight = declare((count, cfg.d_model), constant(0.0), decay=True)  # radii start equal: random ones would drown the directions
        self.bias = declare((count,), constant(math.log(share / (1 - share))))


class Mixer(nn.Module):
    """Base of all mixers: what comes before and after. A kind declares its own parameters and defines `mix`, `ops` and `init_cache`."""

    cache_grows = True  # with the length of the text

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        d, k, h = cfg.d_model, cfg.head_dim, cfg.n_heads
        self.n_heads, self.head_dim, self.rate = h, k, cfg.dropout
        self.qkv = matrix(3 * d, d)
        self.conv = declare((CONV_WIDTH, 3 * d), last_tap)
        self.log_beta = declare((h,), constant(0.0))  # inverse temperature, in units of sqrt(K)
        self.norm = declare((h, k), constant(1.0))
        self.gate_down = matrix(cfg.gate_rank, d)
        self.gate_up = matrix(d, cfg.gate_rank)
        self.out = matrix(d, d)

    @property
    def beta(self) -> Tensor:
        """Inverse temperature of each head, (H,)."""
        return self.head_dim**0.5 * torch.exp(self.log_beta)

    def narrow(self) -> list[Tensor]:
        """The kind's own projections of x to a few numbers a token, (numbers, D) each."""
        return []

    def mix(self, qkv: Tensor, gate: Tensor, few: Tensor, cache: LayerCache | None, ctx: Context) -> tuple[Tensor, LayerCache]:
        """Convolution, the kind's core, and `readout`: qkv (B, N, 3 D), gate (B, N, D) and the products of `narrow` (B, N, numbers) -> (B, N, D)
        and the next cache."""
        raise NotImplementedError

    @staticmethod
    def ops(cfg: ModelConfig) -> tuple[str, ...]:
        """The operations of the dispatch table that the kind needs."""
        raise NotImplementedError

    @staticmethod
    def init_cache(cfg: ModelConfig, batch: int, *, device: torch.device | str, dtype: torch.dtype) -> LayerCache:
        """The core's part of an empty cache."""
        raise NotImplementedError

    def forward(self, x: Tensor, cache: LayerCache | None, ctx: Context) -> tuple[Tensor, LayerCache]:
        """x (B, N, D) -> y (B, N, D) and the next cache."""
        narrow = torch.cat(
            [self.gate_down, *self.narrow()]
        )  # one product: narrow ones leave a GPU idle, and each adds its own gradient of x
        qkv, small = linear_pair(x, self.qkv, narrow)
        low, few = small.split([len(self.gate_down), len(narrow) - len(self.gate_down)], -1)
        gate = F.linear(low, self.gate_up)
        if self.drops(ctx):
            gate = gate * keep_mask(gate, self.rate, ctx.key + GATE).to(gate.dtype)  # SiLU(0) = 0
        return self.mix(qkv, gate, few, cache, ctx)

    def drops(self, ctx: Context) -> bool:
        return self.rate > 0 and ctx.key is not None

    def readout(self, o: Tensor, gate: Tensor, ctx: Context) -> Tensor:
        """What the core found, o (B, H, N, K), by norm, gate and output projection, (B, N, D). The gated values are what dropout does most for: on
        tinyshakespeare (d 384, 12 layers, rate 0.3, hybrid, one seed) the best validation loss is 1.444 nats a byte with them and 1.481 without."""
        norm = self.norm / (1 - self.rate) if self.drops(ctx) else self.norm
        return save_residual(ctx, "mixer", ctx.ops["readout"], o, norm, gate, self.out)
