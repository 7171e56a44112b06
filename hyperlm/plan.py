"""How much memory a run needs, from the declaration alone: nothing is allocated.

Activations are counted, not estimated: a block runs on the meta device, where tensors have shapes but no memory, and the bytes that
autograd saves for the backward pass are added up.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import accumulate
from typing import Any

import torch
from torch.func import functional_call

from hyperlm import kernels, model, optim, tree
from hyperlm.config import Config, ModelConfig
from hyperlm.declare import Spec
from hyperlm.env import CONTEXT, GIB
from hyperlm.kernels.reference.optimizer import CODED, PARTS, QUANT_BLOCK
from hyperlm.loss import MAX_LOGITS, TOKENS
from hyperlm.residence import INPUTS, PIECE, PIECES, SLOTS, STREAMED, slab
from hyperlm.stages import stages
from hyperlm.tree import Tree

FP32, BF16 = 4, 2
WORKSPACE = (
    64 << 20
)  # bytes that cuBLAS keeps of what torch allocates, on a Hopper GPU: half for the backward pass, which has a thread of its own
MARGIN = 224 << 20, 0.05  # bytes of device memory, and share of it, that a plan leaves for gaps between allocations: the larger
SMALL = 48 << 20  # bytes of that for tensors that torch keeps apart, below 1 MiB or of other streams
LOGITS = 0.6  # of the room that a block leaves for more logits of the head: it is in pieces
EXAMPLE = 5.81  # GiB of device memory to plan the host residence for, where no budget is set
# Operations of matrix products that a GPU makes in blocks, with all else that these do, while a byte crosses the bus. On an H200 460e12 a second to
# 49e9; a GPU for games on a narrower bus makes fewer.
BALANCE = 9400


@dataclass(frozen=True)
class Plan:
    """Bytes that one residence needs, by what they are for."""

    residence: str
    weights: int
    gradients: int
    optimizer: int
    activations: int
    host: int
    group: int = 1  # micro-batches at a time
    remembers: bool = False  # whether products of blocks as wide as the stream are kept, and not found again, as narrow ones are
    kept: int = 0  # blocks of which the inputs, and those products, stay on the device
    staying: int = 0  # stages, from the first, whose gradients stay on the device until their pending update
    in_head: int = 0  # the last of these, whose gradients lie where the head comes to
    shared: bool = False  # whether the head takes the place of all other stages but the last block
    working: int = 0  # bytes of activations that a block or the head has, one after the other
    logits: int = 0  # of the head at a time, in the room that a block needs at another; 0 for the default

    @property
    def device(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations


def parameters(config: Config) -> dict[str, int]:
    """Parameters of each stage, counted from the declaration."""
    declared = model.declaration(config.model)
    return {stage: tree.count(declared[stage]) for stage in ("embed", "blocks", "head")}


def stored(config: Config) -> tuple[Tree, dict[str, Tree]]:
    """Parameters and moments as they are stored, on the meta device."""
    return optim.stored(model.declaration(config.model), config.optim)


def on_meta(declared: Any, dtype: torch.dtype) -> Any:
    def leaf(spec: Spec) -> torch.Tensor:
        return torch.empty(spec.shape, device="meta", dtype=dtype if len(spec.shape) > 1 else torch.float32, requires_grad=True)

    return tree.map(leaf, declared)


class Fused(torch.autograd.Function):
    """A reference on the meta device that saves what a kernel in its place saves: inputs and outputs, nothing between them, and no output that is
    for a cache. A view of what was between them is a copy there."""

    @staticmethod
    def forward(ctx: Any, fn: Callable, caches: bool, *args: Any) -> Any:
        out = fn(*args)
        several = isinstance(out, tuple)
        outputs = [x.clone() if x is not None and x.untyped_storage().nbytes() > x.nbytes else x for x in (out if several else (out,))]
        ctx.save_for_backward(*(x for x in (*args, *outputs[: len(outputs) - caches]) if torch.is_tensor(x)))
        return tuple(outputs) if several else outputs[0]


def has_kernel(op: str, config: Config, dtype: torch.dtype) -> bool:
    """Whether an operation will run in Triton: bf16 says that there is a GPU."""
    known = kernels.OPS[op]
    usable = known.triton is not None and (not known.per_head or config.model.head_dim in kernels.HEAD_DIMS)
    return dtype == torch.bfloat16 and usable and config.kernels in ("auto", "triton")


def stand_ins(config: Config, dtype: torch.dtype) -> dict[str, Callable]:
    """For every op, a function for the meta device that saves as much as what will run."""

    def stand_in(name: str) -> Callable:
        op = kernels.OPS[name]
        fused = (op.fused or has_kernel(name, config, dtype)) and op.saves == "inputs_outputs"
        return partial(Fused.apply, op.reference, op.cache_output) if fused else op.reference

    return {name: stand_in(name) for name in model.ops(config.model)}


def saved_bytes(config: Config, layer: int, dtype: torch.dtype) -> int:
    """Bytes that the forward pass of one block saves for its backward pass, its parameters aside."""
    cfg, b, n = config.model, config.train.batch_size, config.data.seq_len
    params = on_meta(model.declaration(cfg)["blocks"][layer], dtype)
    own = {p.untyped_storage()._cdata for p in params.values()}
    sizes: dict[int, int] = {}
    kept = []  # storages must stay alive, or their identities would be used again

    def pack(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in own:
            sizes[storage._cdata] = storage.nbytes()
            kept.append(x)
        return x

    x = torch.empty(b, n, cfg.d_model, device="meta", requires_grad=True)
    key = torch.empty((), dtype=torch.int64, device="meta") if cfg.dropout else None
    angles = torch.empty(n, cfg.head_dim // 2, device="meta")
    ctx = model.Context(stand_ins(config, dtype), dtype, angles, angles, 0, key)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        functional_call(model.skeleton(cfg).blocks[layer], params, (x, None, ctx), strict=True)
    return sum(sizes.values())


def everything(config: Config, dtype: torch.dtype) -> Plan:
    """The plan of the device residence."""
    cfg, t = config.model, config.train
    count, item = parameters(config), dtype.itemsize
    total = sum(count.values())
    params, opt_state = stored(config)
    boundary = t.batch_size * config.data.seq_len * cfg.d_model * FP32
    blocks = activations(config, dtype)
    head = head_bytes(config, dtype, t.batch_size * config.data.seq_len)
    return Plan(
        "device",
        weights=size(params) + (total * item if item == BF16 else 0),  # fp32 is computed with as it is
        gradients=total * (FP32 + item) if t.grad_accum > 1 or item == BF16 else total * FP32,
        optimizer=size(opt_state),
        activations=cfg.n_layers * boundary + max(head, max(blocks)) if t.recompute else sum(blocks) + head,
        host=0,
    )


def head_bytes(config: Config, dtype: torch.dtype, tokens: int) -> int:
    """Bytes that `loss.head_nats` takes of so many tokens: a chunk of logits, features and their gradients, and the gradient of the head."""
    cfg = config.model
    backend, each = (
        ("triton", dtype.itemsize) if has_kernel("cross_entropy_backward", config, dtype) else ("torch", FP32 + 2 * dtype.itemsize)
    )
    chunk = min(MAX_LOGITS[backend], tokens * cfg.vocab_size) * each
    of_features = tokens * (FP32 + 2 * dtype.itemsize) + min(TOKENS, tokens) * dtype.itemsize
    return chunk + cfg.d_model * (of_features + cfg.vocab_size * dtype.itemsize)


def size(x: Any) -> int:
    return sum(leaf.nbytes for leaf in tree.leaves(x))


def checkpoint_size(config: Config) -> int:
    """Bytes of a checkpoint: parameters and moments."""
    return sum(map(size, stored(config)))


@lru_cache
def activations(config: Config, dtype: torch.dtype) -> list[int]:
    """Bytes that each block saves of a micro-batch."""
    kinds = [config.model.layer_kind(layer) for layer in range(config.model.n_layers)]
    of_kind = {kind: saved_bytes(config, kinds.index(kind), dtype) for kind in dict.fromkeys(kinds)}
    return [of_kind[kind] for kind in kinds]


def goes_home_in_8_bits(config: Config, dtype: torch.dtype) -> bool:
    """Whether matrices' gradients are sent home as `kernels.reference.encode8` has them: where moments are no finer, and the bus is slower than
    the device."""
    return config.optim.state == "int8" and dtype == torch.bfloat16


def gradient_bytes(config: Config, dtype: torch.dtype, params: Tree) -> int:
    """Bytes of a slab of the gradients of these parameters as they go home; none where each stage is clipped by itself and updated at once."""
    if config.optim.clip_scope == "layer":
        return 0
    coded = goes_home_in_8_bits(config, dtype)
    each = (-(-p.numel() // QUANT_BLOCK) * CODED if coded and p.dim() > 1 else p.numel() * dtype.itemsize for p in tree.leaves(params))
    return sum(map(slab.padded, each))


def converts(config: Config, dtype: torch.dtype) -> bool:
    """Whether matrices are computed with as copies in another dtype."""
    return dtype != (torch.bfloat16 if config.optim.state == "int8" else torch.float32)


def free_once_copied(config: Config, dtype: torch.dtype) -> bool:
    """Whether a stage in the host residence is not needed on the device beside its copy."""
    return converts(config, dtype) and config.optim.state != "int8" and config.optim.clip_scope == "global"


def slot_count(config: Config, dtype: torch.dtype) -> int:
    """Stages that the host residence has room for on the device."""
    return SLOTS - free_once_copied(config, dtype)


def widths_read(cfg: ModelConfig, *, products: bool) -> tuple[int, ...]:
    """Of what the backward pass of the host residence reads of a block: its input, and products that are not found again (`mixers.frame.remembered`):
    narrow ones, for the rest of an FFN need not be found without its gradient then, and if `products` one that is as wide as the stream."""
    return (*([cfg.d_model] * (1 + products)), cfg.ffn_rank, cfg.ffn_rank)


def read_bytes(config: Config, dtype: torch.dtype, *, products: bool) -> int:
    """The bytes of that, of all micro-batches."""
    t = config.train
    return t.grad_accum * t.batch_size * config.data.seq_len * sum(widths_read(config.model, products=products)) * dtype.itemsize


def remembers(config: Config, dtype: torch.dtype) -> bool:
    """Whether the bus has time for wide products of blocks, which then are not found again in the backward pass: going home forward, and coming backward
    beside weights, moments and gradients."""
    cfg, t = config.model, config.train
    params, opt_state = stored(config)
    read = cfg.n_layers * read_bytes(config, dtype, products=True)
    beside = (
        size(params["blocks"]) + sum(size(part["blocks"]) for part in opt_state.values()) + gradient_bytes(config, dtype, params["blocks"])
    )
    operations = (
        2 * t.grad_accum * t.batch_size * config.data.seq_len * parameters(config)["blocks"]
    )  # forward; backward it is three times that
    return dtype == torch.bfloat16 and read * BALANCE < operations and (beside + read) * BALANCE < 3 * operations


def shelf_size(gradients: list[int], kept: int, read: int) -> int:
    """Bytes that hold what is read of `kept` blocks, `read` bytes each, and then the gradients of the first stages, each when its place is free: the
    backward pass reads blocks and finds gradients from the last to the first, and the embedding, the first stage, reads nothing."""
    unread = (min(kept, max(0, index - 1)) for index in range(len(gradients)))
    return max([kept * read, *(sum(gradients[index:]) + blocks * read for index, blocks in enumerate(unread))])


def staying(config: Config, dtype: torch.dtype, spare: int, kept: int, read: int, *, head: bool) -> tuple[int, int, int]:
    """Stages, from the first, whose gradients the device has room for when the backward pass ends: in `spare` bytes, and in the place of what it
    has read of `kept` blocks, `read` bytes each; and if `head` some more in the place of the head. All of these, those, and the bytes of `spare`
    that they take."""
    params, _ = stored(config)
    own = [gradient_bytes(config, dtype, stage) for stage in (params["embed"], *params["blocks"])]
    if not any(own):
        return 0, 0, 0
    count = max(count for count in range(len(own) + 1) if shelf_size(own[:count], kept, read) <= kept * read + max(0, spare))
    in_head = sum(size <= head * slab.size(params["head"]) for size in accumulate(own[count:]))
    return count + in_head, in_head, shelf_size(own[:count], kept, read) - kept * read


def visiting(
    config: Config, dtype: torch.dtype, group: int, kept: int, shared: bool = False, products: bool = False, more: int = 0
) -> Plan:
    """The plan of the host residence, with `group` micro-batches at a time, what is read of `kept` blocks left on the device, wide products
    among it if `products`, and the head in the place of all other stages but the last block if `shared`; with `more` bytes for logits at a time.

    On the device at the same time: the buffers of `residence.host`, and what either a block or the head needs.
    """
    cfg, t = config.model, config.train
    count, item = parameters(config), dtype.itemsize
    params, opt_state = stored(config)
    total, block = sum(count.values()), count["blocks"] // cfg.n_layers
    stage = max(size(params["embed"]), size(params["blocks"][0]))
    slots = slot_count(config, dtype)
    sent = {name: gradient_bytes(config, dtype, params[name]) for name in ("blocks", "head")}  # as they go home
    copy = item if converts(config, dtype) else 0
    boundary = t.batch_size * config.data.seq_len * cfg.d_model * FP32
    groups = t.grad_accum // group
    moving = (size(opt_state) + gradient_bytes(config, dtype, params)) / total  # bytes a number that come and go with the weights
    stream = t.grad_accum * boundary  # of all groups, into a stage; its gradient is as large
    # A stage's gradient on its way home, or until it is updated: that of the stage before, and what a block has for its own.
    leaving, own = (sent["head"], sent["blocks"] // cfg.n_layers) if any(sent.values()) else (max(block, count["head"]) * item, 0)
    saved = group * (max(activations(config, dtype)) - boundary)  # less a block's input, which is read where it lies
    pulled = max(saved, saved // 2 + block * item)  # a gradient takes the place of what was saved for it
    if groups == 1:
        in_block = stream + pulled + max(leaving, 2 * own)
    else:  # what left before is home when the second group comes
        apart = config.optim.clip_scope == "global" and goes_home_in_8_bits(config, dtype) and groups <= PARTS  # added up as they are coded
        summed = block * ((groups - 1) * item if apart else FP32)
        in_block = stream + stream // groups + max(saved + leaving, pulled + summed, summed + block * item + own)
    tokens = t.grad_accum * t.batch_size * config.data.seq_len
    in_block += block * copy
    in_head = 2 * stream + max(head_bytes(config, dtype, tokens), count["head"] * item + sent["head"]) + count["head"] * copy
    logits = 0
    spare = max(0, in_block - in_head) + more  # beside the head, for more logits
    if has_kernel("cross_entropy_backward", config, dtype) and spare:
        logits = min(MAX_LOGITS["triton"] + round(LOGITS * spare) // item, tokens * cfg.vocab_size)
        in_head += max(0, logits - MAX_LOGITS["triton"]) * item
    read = read_bytes(config, dtype, products=products)
    on_the_way = INPUTS * read * group // t.grad_accum if kept < cfg.n_layers else 0
    return Plan(
        "host",
        weights=stage + max((slots - 1) * stage, size(params["head"])) if shared else slots * stage + size(params["head"]),
        gradients=0,
        optimizer=min(PIECE, round(moving * max(block, count["head"], count["embed"]))) * PIECES,
        activations=on_the_way + kept * read + max(in_block, in_head) + (WORKSPACE if dtype == torch.bfloat16 else 0),
        host=size(params) + size(opt_state) + gradient_bytes(config, dtype, params) + (cfg.n_layers - kept) * read,
        group=group,
        remembers=products,
        kept=kept,
        shared=shared,
        working=max(in_block, in_head),
        logits=logits,
    )


def margin(size: int) -> int:
    """Bytes to leave for gaps, where so many are in use."""
    return max(MARGIN[0], round(MARGIN[1] * size))


def taken_at_once(planned: Plan, budget: int) -> int:
    """Bytes of device memory that a run in the host residence takes at its start, and cuts up."""
    return max(0, min(budget, planned.device + margin(planned.device)) - SMALL)


def visits(config: Config, dtype: torch.dtype, budget: int) -> Plan:
    """The plan of the host residence that makes the most of `budget` bytes of device memory: as many micro-batches at a time as fit, then as much of
    what is read of blocks, and then gradients. Dropout masks belong to a micro-batch, and a CPU gains nothing from more: there it is one at a time."""
    t, layers = config.train, config.model.n_layers
    alone = config.model.dropout or dtype != torch.bfloat16
    groups = [1] if alone else [g for g in range(t.grad_accum, 0, -1) if t.grad_accum % g == 0]
    room = budget - margin(budget)
    products = remembers(config, dtype)
    ways = [visiting(config, dtype, g, 0, shared, products) for g in groups for shared in (products, not products)]
    found = next((plan for plan in ways if plan.device <= room), ways[-1])
    more = (
        max(0, room - found.device) if products else 0
    )  # a step of many tokens: the fewer the chunks of logits, the fewer are found twice
    found = visiting(config, dtype, found.group, 0, found.shared, products, more)
    read = read_bytes(config, dtype, products=products)
    kept = max(0, min(layers, (room - found.device) // read))
    found = visiting(config, dtype, found.group, kept, found.shared, products, more)
    count, in_head, taken = staying(config, dtype, room - found.device, kept, read, head=not found.shared)
    return replace(found, activations=found.activations + taken, staying=count, in_head=in_head)


def evaluated(config: Config, dtype: torch.dtype, planned: Plan) -> int:
    """Micro-batches that evaluation takes at a time in the host residence: as many as fit where a block or the head has its place in a step, beside
    what `residence.streamed` has on the device and the last gradients of the step before. Without gradients, and with logits, they need less than
    a block saves of them."""
    params, _ = stored(config)
    copies = on_meta(model.declaration(config.model), dtype)
    blocks = STREAMED * size(params["blocks"][0]) + converts(config, dtype) * size(copies["blocks"][0])
    gradients = gradient_bytes(config, dtype, params["embed"]) + gradient_bytes(config, dtype, params["blocks"][0])
    room = planned.working - max(size(copies["embed"]), size(copies["head"])) - blocks - gradients
    return max(1, min(config.train.grad_accum, room // max(activations(config, dtype))))


def traffic(config: Config, dtype: torch.dtype, planned: Plan, *, clipped: bool) -> tuple[int, int]:
    """Bytes that a step of the host residence moves to the device, and home, after one that was `clipped`.

    Every stage comes once forward, once backward (but the head, where forward ends), and goes home updated; so do its moments, and unless each
    stage is clipped by itself its gradient, which comes back for the update if it did not stay. What is read of blocks goes and comes.
    """
    params, opt_state = stored(config)
    late = config.optim.clip_scope == "global" and (clipped or not goes_home_in_8_bits(config, dtype))  # updates are made forward
    read = (config.model.n_layers - planned.kept) * read_bytes(config, dtype, products=planned.remembers and not late)
    each = size(opt_state) + gradient_bytes(config, dtype, params) + read
    stayed = sum(gradient_bytes(config, dtype, stage) for stage in stages(params)[: planned.staying]) if late else 0
    return 2 * size(params) - size(params["head"]) + each - stayed, size(params) + each


def resident(config: Config, planned: Plan) -> str:
    """What of a step stays on the device in the host residence, in words."""
    products = "products" if planned.remembers else "narrow products"
    return f"inputs and {products} of {planned.kept} of {config.model.n_layers} blocks and gradients of {planned.staying} stages stay on it"


def fits(config: Config, dtype: torch.dtype, device: int, host: int) -> bool:
    """Whether a run whose residence and state are decided needs no more than `device` and `host` bytes."""
    planned = visits(config, dtype, device) if config.train.residence == "host" else everything(config, dtype)
    return planned.device <= device and planned.host <= host


def decided(config: Config, dtype: torch.dtype, device: int, host: int, *, gpu: bool) -> Config:
    """The configuration with residence and optimizer state decided where they are auto.

    Of what the settings leave open it is the first that fits: fp32 on the device, fp32 in host memory, int8 on the device, int8 in host
    memory; the last where nothing fits. A CPU is its own host: there all is on the device.

    Args:
        device, host: bytes that may be used of either.
    """
    residences = (("device", "host") if gpu else ("device",)) if config.train.residence == "auto" else (config.train.residence,)
    states = ("fp32", "int8") if config.optim.state == "auto" else (config.optim.state,)
    ways = [
        replace(config, train=replace(config.train, residence=residence), optim=replace(config.optim, state=state))
        for state in states
        for residence in residences
    ]
    return next((way for way in ways[:-1] if fits(way, dtype, device, host)), ways[-1])


def plans(config: Config, dtype: torch.dtype) -> list[Plan]:
    """The memory plan of each residence, computing in `dtype`."""
    budget = round((config.train.device_memory or EXAMPLE) * GIB) - CONTEXT
    return [everything(config, dtype), visits(config, dtype, budget)]
