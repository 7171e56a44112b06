"""The decoder as pure functions over a parameter pytree: init, apply, and decoding with a cache.

x = E_low[tokens] E_high -> L blocks -> RMSNorm -> head, untied. Block: x += ssm(norm x) (optional); x += mixer(norm x); x += ffn(norm x).
The parameters are {"embed": {...}, "blocks": [{...}, ...], "head": {...}}, one group a stage, so that a stage can live anywhere while
others run. The residual stream x is at least fp32; what branches read of it is in the compute dtype, that of the matrices.
Axes: B batch, N sequence, D model width, V vocabulary, L layers.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from hyperlm import kernels as table
from hyperlm import tree
from hyperlm.config import Kind, ModelConfig
from hyperlm.declare import Spec, constant, declare, matrix, normal, realise, specs
from hyperlm.env import progress
from hyperlm.kernels.differentiation import Function, linear_vjp
from hyperlm.mixers import MIXERS
from hyperlm.mixers.frame import CONV_WIDTH, Context, LayerCache, linear, rope_angles, save_residual
from hyperlm.mixers.ssm import SSM
from hyperlm.precision import wide
from hyperlm.random import dropout

# AdamW moves every weight by about the learning rate, so an embedding learns as fast as E_low is small and E_high large. Measured at
# d 384, 6 layers, softmax, one seed: validation loss after 200 steps 4.29 with LOW_STD 0.02, 4.16 with 0.005; training loss after 100 steps
# 4.52, 4.35, and 4.31 with 0.002.
LOW_STD = 0.002  # of E_low at first
EMBED_STD = 0.1  # of the residual stream at first: large against what the blocks add to it
# Of logits at first, the same at every width. At d 4096 (2 layers, lr 2e-4, 20 steps of warm-up, one seed), training loss after 24 steps was
# 6.84 with 1.3, the gradient's norm above 25 till then; 6.38 with 0.45, and norms around 10; 6.84 with 0.13. At d 512 (4 layers, lr 1e-3),
# after 48: 5.51 with 1.0, 5.49 with 0.7, 5.52 with 0.45, 5.77 with 0.11.
LOGIT_STD = 0.02 * 512**0.5

Params = dict[str, Any]


class Cache(NamedTuple):
    """What decoding remembers: the number of tokens read, and for each layer its convolution tail and state or keys and values."""

    position: int
    layers: list[LayerCache]


# -- skeletons: parameters are declared here, and hold no memory -----------------------------------------------------------------------


class Embed(nn.Module):
    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.rate = cfg.dropout
        self.low = declare((cfg.vocab_size, cfg.embed_rank), normal(LOW_STD), decay=True)
        self.high = matrix(cfg.d_model, cfg.embed_rank, std=EMBED_STD / (LOW_STD * cfg.embed_rank**0.5))

    def forward(self, tokens: Tensor, ctx: Context) -> Tensor:
        x = F.linear(F.embedding(tokens, self.low), self.high)
        return dropout(x.to(wide(x.dtype)), self.rate, ctx.key)


class Norm(nn.Module):
    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.weight = declare((cfg.d_model,), constant(1.0))

    def forward(self, x: Tensor, y: Tensor | None, ctx: Context, values: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The stream x (its values, if it is hollow) with what the branch before adds, y, and the norm of that in the compute dtype."""
        return ctx.ops["add_norm"](x, y, self.weight, ctx.dtype, values)


class FFN(nn.Module):
    """Low-rank both ways: D -> D/8 -> 4D, GELU, 4D -> D/8 -> D."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        d, r = cfg.d_model, cfg.ffn_rank
        self.up_low, self.up_high = matrix(r, d), matrix(4 * d, r)
        self.down_low, self.down_high = matrix(r, 4 * d), matrix(d, r)

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        return F.linear(self.low(x, ctx), self.down_high)

    def low(self, x: Tensor, ctx: Context) -> Tensor:
        """All but the last product, (B, N, D/8)."""
        up = save_residual(ctx, "ffn_up", linear, x, self.up_low)
        return save_residual(ctx, "ffn_down", ctx.ops["mlp"], up, self.up_high, self.down_low)


class Block(nn.Module):
    def __init__(self, cfg: ModelConfig, kind: Kind) -> None:
        super().__init__()
        self.rate = cfg.dropout
        if cfg.ssm:
            self.ssm_norm, self.ssm = Norm(cfg), SSM(cfg)
        self.mixer_norm, self.mixer = Norm(cfg), MIXERS[kind](cfg)
        self.ffn_norm, self.ffn = Norm(cfg), FFN(cfg)
        self.names = {name for name, _ in self.named_parameters()}

    def forward(self, x: Tensor, cache: LayerCache | None, ctx: Context) -> tuple[Tensor, LayerCache]:
        def drop(y: Tensor, branch: int) -> Tensor:
            return dropout(y, self.rate, None if ctx.key is None else ctx.key + branch)

        y, entries, values = None, {}, None
        if ctx.residuals is not None:
            values = ctx.residuals.values.pop("input", None)  # x has no values of its own then
        if hasattr(self, "ssm"):
            x, n = self.ssm_norm(x, y, ctx, values)
            y, entries = self.ssm(n, cache, ctx)
            y = drop(y, 1)
        x, n = self.mixer_norm(x, y, ctx, values)
        values = None if y is not None else values  # a stream that was added to has values of its own
        y, more = self.mixer(n, cache, ctx)
        x, n = self.ffn_norm(x, drop(y, 2), ctx, values)
        if self.rate:
            return ctx.ops["add"](x, drop(self.ffn(n, ctx), 3)), entries | more
        added = partial(add_linear, ctx.ops["add"])
        return save_residual(ctx, "output", added, x, self.ffn.low(n, ctx), self.ffn.down_high), entries | more


def add_linear(add: Callable, x: Tensor, y: Tensor, weight: Tensor, known: Tensor | None = None) -> Tensor:
    """x + y weight^T by `add`; where it is known, nobody reads it again, and its gradient alone is wanted."""
    return add(x, F.linear(y, weight)) if known is None else GradientOnly.apply(x, y, weight)


class GradientOnly(Function):
    """x + y weight^T without values."""

    @staticmethod
    def forward(x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
        return x.new_empty(()).expand_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y, weight = ctx.saved_tensors
        return d, *linear_vjp(d.to(y.dtype), y, weight)


def residual_widths(cfg: ModelConfig) -> dict[str, int]:
    """Numbers a token of what a block can leave for its backward pass, by the names that `save_residual` has for it in the order in which it is
    computed. "output" is not among them: its values are the next block's input."""
    return {"input": cfg.d_model, "mixer": cfg.d_model, "ffn_up": cfg.ffn_rank, "ffn_down": cfg.ffn_rank}


class Head(nn.Module):
    """The final norm; the projection `weight` (V, D) is applied by `apply`, or in chunks by the loss."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.norm = Norm(cfg)
        self.weight = declare((cfg.vocab_size, cfg.d_model), normal(LOGIT_STD / cfg.d_model**0.5), decay=True)

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        return self.norm(x, None, ctx)[1]


class Skeleton(NamedTuple):
    embed: Embed
    blocks: list[Block]  # blocks of one kind are one module
    head: Head


@lru_cache
def skeleton(cfg: ModelConfig) -> Skeleton:
    """The modules of every stage, without memory."""
    kinds = [cfg.layer_kind(layer) for layer in range(cfg.n_layers)]
    blocks = {kind: Block(cfg, kind) for kind in dict.fromkeys(kinds)}
    return Skeleton(Embed(cfg), [blocks[kind] for kind in kinds], Head(cfg))


@lru_cache
def ops(cfg: ModelConfig) -> tuple[str, ...]:
    """The operations of the dispatch table that a model needs."""
    parts = [MIXERS[cfg.layer_kind(layer)] for layer in range(cfg.n_layers)] + ([SSM] if cfg.ssm else [])
    return tuple(sorted({"add", "add_norm", "mlp", *(op for part in parts for op in part.ops(cfg))}))


def declaration(cfg: ModelConfig) -> Params:
    """The parameter pytree with a `Spec` for each leaf: count it, plan it, or fill it."""
    s = skeleton(cfg)
    return {"embed": specs(s.embed), "blocks": [specs(block) for block in s.blocks], "head": specs(s.head)}


def init(
    cfg: ModelConfig,
    seed: int,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    keep: Callable[[Tensor], Tensor] | None = None,
) -> Params:
    """Initial parameters. Each leaf depends on the seed and its path alone, and is the same on every device.

    Args:
        keep: what becomes of each leaf's fp32 values instead of a conversion to `dtype`.
    """
    keep = keep or (lambda values: values.to(dtype))
    declared = declaration(cfg)
    bar = progress(desc="initialising", total=tree.count(declared), unit=" parameters", unit_scale=True)

    def fill(path: str, spec: Spec) -> Tensor:
        return keep(realise(path, spec, seed)).to(device)

    def filled(coming: Future[Tensor]) -> Tensor:
        values = coming.result()
        bar.update(values.numel())
        return values

    with bar, ThreadPoolExecutor(torch.get_num_threads()) as pool:  # random numbers of one generator are made by one thread
        try:
            return tree.map(filled, tree.map_with_path(lambda path, spec: pool.submit(fill, path, spec), declared))
        finally:
            pool.shutdown(cancel_futures=True)  # at once, when interrupted


# -- running it ------------------------------------------------------------------------------------------------------------------------


def run_block(block: Block, params: dict[str, Tensor], x: Tensor, cache: LayerCache | None, ctx: Context) -> tuple[Tensor, LayerCache]:
    """A block as a function of its parameters: x (B, N, D) -> x (B, N, D) and the next cache."""
    # None are tied, and which are missing is looked for only where some are: both take as long as the rest of the call.
    return functional_call(block, params, (x, cache, ctx), strict=params.keys() != block.names, tie_weights=False)


def compiled_block(backend: str = "inductor") -> Callable:
    """`run_block`, compiled by torch but for the kernels."""
    table.keep_out_of_compilation()
    return torch.compile(run_block, backend=backend)


def context(dtype: torch.dtype, tokens: Tensor, cfg: ModelConfig, kernels: str, position: int = 0, **options: Any) -> Context:
    """What all layers share when `tokens` (B, N) follow `position` earlier ones and matrices are in `dtype`."""
    angles = rope_angles(position, tokens.shape[1], cfg.head_dim, tokens.device)
    return Context(table.table(ops(cfg), tokens.device, kernels, cfg.head_dim, dtype), dtype, *angles, position, **options)


def embed(params: dict[str, Tensor], tokens: Tensor, cfg: ModelConfig, ctx: Context) -> Tensor:
    """The first stage: tokens (B, N) -> x (B, N, D)."""
    return functional_call(skeleton(cfg).embed, params, (tokens, ctx), strict=True)


def layer_context(ctx: Context, layer: int) -> Context:
    """The context of one layer: its three branches and its gate draw dropout from keys of their own."""
    return ctx._replace(key=None if ctx.key is None else ctx.key + 4 * layer)


def finish(params: dict[str, Tensor], x: Tensor, cfg: ModelConfig, ctx: Context) -> Tensor:
    """The last stage without its projection: x (B, N, D) -> normalised features (B, N, D)."""
    return functional_call(skeleton(cfg).head, params, (x, ctx), strict=True)


def hidden(
    params: Params,
    tokens: Tensor,
    cfg: ModelConfig,
    *,
    kernels: str = "auto",
    key: Tensor | None = None,
    recompute: bool = False,
    gauges: list | None = None,
    run: Callable = run_block,
) -> Tensor:
    """Normalised features before the head: tokens (B, N) int64 -> (B, N, D).

    Args:
        key: int64 scalar on the tokens' device; dropout is a function of it. None to run without dropout.
        recompute: keep only each block's input for the backward pass.
        gauges: a list that receives {"q": (B, H, N), "k": ...} radii from each hyperbolic layer.
        run: how to run a block; `run_block` or a compiled version of it.
    """
    ctx = context(params["head"]["weight"].dtype, tokens, cfg, kernels, key=key if cfg.dropout else None, gauges=gauges)
    x = embed(params["embed"], tokens, cfg, ctx)
    for layer, (block, block_params) in enumerate(zip(skeleton(cfg).blocks, params["blocks"], strict=True)):
        own = layer_context(ctx, layer)
        if recompute:  # functional_call inside the checkpointed function: outside, the recomputation would lose these parameters
            x = checkpoint(
                lambda x, b=block, p=block_params, c=own: run(b, p, x, None, c)[0], x, use_reentrant=False, preserve_rng_state=False
            )
        else:
            x, _ = run(block, block_params, x, None, own)
    return finish(params["head"], x, cfg, ctx)


def apply(params: Params, tokens: Tensor, cfg: ModelConfig, *, kernels: str = "auto") -> Tensor:
    """Logits (B, N, V) of tokens (B, N) int64. Logits at n depend on tokens 0..n alone."""
    return F.linear(hidden(params, tokens, cfg, kernels=kernels), params["head"]["weight"])


def radii(params: Params, tokens: Tensor, cfg: ModelConfig, *, kernels: str = "auto") -> list[dict[str, Tensor]]:
    """Radii {"q": (B, H, N), "k": (B, H, N)} of each hyperbolic layer; empty for a softmax model."""
    gauges: list[dict[str, Tensor]] = []
    hidden(params, tokens, cfg, kernels=kernels, gauges=gauges)
    return gauges


# -- decoding --------------------------------------------------------------------------------------------------------------------------


def init_cache(cfg: ModelConfig, batch: int, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Cache:
    """The cache before the first token. `dtype` is that of the parameters; states stay at least fp32."""

    def layer(kind: Kind) -> LayerCache:
        tail = torch.zeros(batch, CONV_WIDTH - 1, 3 * cfg.d_model, device=device, dtype=dtype)
        core = MIXERS[kind].init_cache(cfg, batch, device=device, dtype=dtype)
        branch = SSM.init_cache(cfg, batch, device=device, dtype=dtype) if cfg.ssm else {}
        return {"tail": tail} | core | branch

    return Cache(0, [layer(cfg.layer_kind(i)) for i in range(cfg.n_layers)])


def cache_grows(cfg: ModelConfig) -> bool:
    """Whether a cache needs more memory for a longer text."""
    return any(MIXERS[cfg.layer_kind(layer)].cache_grows for layer in range(cfg.n_layers))


def extend(params: Params, tokens: Tensor, cache: Cache, cfg: ModelConfig, *, kernels: str = "auto") -> tuple[Tensor, Cache]:
    """Read tokens (B, n) after what the cache holds: logits (B, n, V), equal to those of `apply` at these positions, and the next cache.

    The cache given is consumed: key and value buffers are written in place.
    """
    ctx = context(params["head"]["weight"].dtype, tokens, cfg, kernels, cache.position)
    x = embed(params["embed"], tokens, cfg, ctx)
    layers = []
    for block, block_params, entries in zip(skeleton(cfg).blocks, params["blocks"], cache.layers, strict=True):
        x, entries = run_block(block, block_params, x, entries, ctx)
        layers.append(entries)
    x = finish(params["head"], x, cfg, ctx)
    return F.linear(x, params["head"]["weight"]), Cache(cache.position + tokens.shape[1], layers)


def decode(params: Params, token: Tensor, cache: Cache, cfg: ModelConfig, *, kernels: str = "auto") -> tuple[Tensor, Cache]:
    """One token (B,) after what the cache holds: logits (B, V) and the next cache, which replaces the one given."""
    logits, cache = extend(params, token[:, None], cache, cfg, kernels=kernels)
    return logits[:, 0], cache
