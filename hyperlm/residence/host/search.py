"""The plan of the host residence: the policy that makes the most of a budget, and the bytes that it takes.

On the device at the same time are the buffers of `buffers.declared`, and what either a block or the head needs. As many micro-batches at a
time as fit, then as many blocks whose residuals stay, then gradients.
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate

import torch

from hyperlm import memory
from hyperlm.config import Config
from hyperlm.kernels.reference.optimizer import PARTS
from hyperlm.loss import MAX_LOGITS
from hyperlm.memory import FP32
from hyperlm.model import declaration
from hyperlm.residence import flat
from hyperlm.residence.base import Plan
from hyperlm.residence.host import buffers
from hyperlm.residence.host.policy import NARROW, WIDE, Policy, fixed
from hyperlm.residence.host.streamed import STREAMED
from hyperlm.stages import stages

# Bytes that cuBLAS keeps of what torch allocates, on a Hopper GPU: half for the backward pass, which has a thread of its own.
WORKSPACE = 64 << 20
MARGIN = 224 << 20, 0.05  # bytes of device memory, and share of it, that a plan leaves for gaps between allocations: the larger
SEPARATE = 48 << 20  # bytes of that for tensors that torch keeps apart, below 1 MiB or of other streams
LOGITS = 0.6  # of the room that a block leaves for more logits of the head: it is in pieces
# Operations of matrix products that a GPU makes in blocks, with all else that these do, while a byte crosses the bus. On an H200 460e12 a
# second to 49e9; a GPU for games on a narrower bus makes fewer.
BALANCE = 9400


@dataclass(frozen=True)
class Run:
    """A run to plan for."""

    config: Config
    dtype: torch.dtype
    policy: Policy  # what the settings alone decide
    chunk: int  # `buffers.chunk_bytes`

    @property
    def gpu(self) -> bool:
        return self.dtype == torch.bfloat16

    def of_gradients(self, params: object) -> int:
        return buffers.gradient_bytes(self.policy, self.dtype, params)

    def of_residuals(self, policy: Policy, micro_batches: int) -> int:
        return buffers.residual_bytes(self.config, policy, self.dtype, micro_batches)


@dataclass(frozen=True)
class Way:
    """A policy, and what it takes."""

    policy: Policy
    buffers: dict[str, int]
    working: int  # bytes of activations that a block or the head has, one after the other
    workspace: int

    @property
    def device(self) -> int:
        return sum(self.buffers.values()) + self.working + self.workspace


def margin(size: int) -> int:
    """Bytes to leave for gaps, where so many are in use."""
    return max(MARGIN[0], round(MARGIN[1] * size))


def way(run: Run, policy: Policy, more: int = 0) -> Way:
    """What a policy takes; with `more` bytes for logits at a time."""
    working, logits = working_bytes(run, policy, more)
    policy = replace(policy, max_logits=logits)
    declared = buffers.declared(run.config, policy, run.dtype, run.chunk)
    return Way(policy, declared, working, WORKSPACE if run.gpu else 0)


def working_bytes(run: Run, policy: Policy, more: int) -> tuple[int, int]:
    """The most bytes of activations, gradients and copies of weights that a block or the head has; and logits of the head at a time, 0 for
    the default."""
    cfg, t, item = run.config.model, run.config.train, run.dtype.itemsize
    head = memory.parameters(run.config)["head"]
    params, _ = memory.stored(run.config)
    tokens = t.grad_accum * t.batch_size * run.config.data.seq_len
    stream = tokens * cfg.d_model * FP32  # of all groups, into a stage; its gradient is as large
    in_block = block_bytes(run, policy, stream)
    converted = head * item if policy.converts else 0
    in_head = 2 * stream + max(memory.head_bytes(run.config, run.dtype, tokens), head * item + run.of_gradients(params["head"])) + converted
    logits, spare = 0, max(0, in_block - in_head) + more  # beside the head, for more logits
    if memory.has_kernel("cross_entropy_backward", run.config, run.dtype) and spare:
        logits = min(MAX_LOGITS["triton"] + round(LOGITS * spare) // item, tokens * cfg.vocab_size)
        in_head += max(0, logits - MAX_LOGITS["triton"]) * item
    return max(in_block, in_head), logits


def block_bytes(run: Run, policy: Policy, stream: int) -> int:
    """Bytes that the backward pass of a block has beside its weights: all groups' stream, what a group saves, and gradients on their
    way."""
    cfg, t, item = run.config.model, run.config.train, run.dtype.itemsize
    count, groups = memory.parameters(run.config), t.grad_accum // policy.group
    block, boundary = count["blocks"] // cfg.n_layers, stream // t.grad_accum
    params, _ = memory.stored(run.config)
    # A stage's gradient on its way home, or until it is updated: that of the stage before, and what a block has for its own.
    leaving, gradient = run.of_gradients(params["head"]), run.of_gradients(params["blocks"]) // cfg.n_layers
    if policy.update == "immediate":
        leaving, gradient = max(block, count["head"]) * item, 0
    saved = policy.group * (max(memory.activations(run.config, run.dtype)) - boundary)  # less a block's input, which is read where it lies
    pulled = max(saved, saved // 2 + block * item)  # a gradient takes the place of what was saved for it
    copy = block * item if policy.converts else 0
    if groups == 1:
        return stream + pulled + max(leaving, 2 * gradient) + copy
    separate = policy.quantised and groups <= PARTS  # added up as they are quantised
    summed = block * ((groups - 1) * item if separate else FP32)
    return stream + stream // groups + max(saved + leaving, pulled + summed, summed + block * item + gradient) + copy


def residuals(run: Run) -> frozenset[str]:
    """Whether the bus has time for wide residuals of blocks, which then are not computed again: going home forward, and coming backward
    beside weights, moments and gradients."""
    t, cfg = run.config.train, run.config.model
    params, opt_state = memory.stored(run.config)
    read = cfg.n_layers * run.of_residuals(replace(run.policy, residuals=WIDE), t.grad_accum)
    beside = (
        memory.size(params["blocks"]) + sum(memory.size(part["blocks"]) for part in opt_state.values()) + run.of_gradients(params["blocks"])
    )
    # Operations; backward three times that.
    forward = 2 * t.grad_accum * t.batch_size * run.config.data.seq_len * memory.parameters(run.config)["blocks"]
    return WIDE if run.gpu and read * BALANCE < forward and (beside + read) * BALANCE < 3 * forward else NARROW


def with_resident_gradients(run: Run, policy: Policy, spare: int) -> Policy:
    """The policy with as many gradients, from the first, as the device has room for when the backward pass ends: in `spare` bytes and in
    the place of the residuals of resident blocks; and some more in the place of the head, where it has one of its own."""
    params, _ = memory.stored(run.config)
    gradients = [run.of_gradients(stage) for stage in (params["embed"], *params["blocks"])]
    if not any(gradients):
        return policy
    kept, read = policy.resident_blocks, run.of_residuals(policy, run.config.train.grad_accum)
    count = max(
        count for count in range(len(gradients) + 1) if buffers.shelf_bytes(gradients[:count], kept, read) <= kept * read + max(0, spare)
    )
    head = 0 if policy.head_aliases_slots else flat.size(params["head"])
    in_head = sum(size <= head for size in accumulate(gradients[count:]))
    return replace(policy, resident_gradients=count + in_head, in_head=in_head)


def best(run: Run, budget: int) -> Way:
    """The way that makes the most of `budget` bytes of device memory; the most frugal one, if none fits. Dropout masks belong to a
    micro-batch, and a CPU gains nothing from more at a time."""
    t, room = run.config.train, budget - margin(budget)
    groups = [1] if run.config.model.dropout or not run.gpu else [g for g in range(t.grad_accum, 0, -1) if t.grad_accum % g == 0]
    names = residuals(run)
    policies = [
        replace(run.policy, group=group, residuals=names, head_aliases_slots=aliases)
        for group in groups
        for aliases in (names == WIDE, names != WIDE)
    ]
    ways = (way(run, policy) for policy in policies)
    chosen = next((x for x in ways if x.device <= room), None) or way(run, policies[-1])
    # Of a step of many tokens: the fewer the chunks of logits, the fewer are computed twice.
    more = max(0, room - chosen.device) if names == WIDE else 0
    chosen = way(run, chosen.policy, more)
    kept = max(0, min(run.config.model.n_layers, (room - chosen.device) // run.of_residuals(chosen.policy, t.grad_accum)))
    chosen = way(run, replace(chosen.policy, resident_blocks=kept), more)
    return way(run, with_resident_gradients(run, chosen.policy, room - chosen.device), more)


@lru_cache(maxsize=256)
def plan(config: Config, dtype: torch.dtype, budget: int) -> Plan:
    """The plan of a run that may take `budget` bytes of device memory."""
    policy = fixed(config, dtype)
    run = Run(config, dtype, policy, buffers.chunk_bytes(config, policy, dtype))
    return planned(run, best(run, budget), budget)


def planned(run: Run, chosen: Way, budget: int) -> Plan:
    """A way as the plan of a residence."""
    params, opt_state = memory.stored(run.config)
    policy, sizes = chosen.policy, chosen.buffers
    away = run.config.model.n_layers - policy.resident_blocks
    whole = Plan(
        "host",
        weights=sizes["slots"] + sizes["head"],
        gradients=0,
        optimizer=sizes["chunks"],
        activations=sizes["shelf"] + sizes["loads"] + chosen.working + chosen.workspace,
        host=memory.size(params)
        + memory.size(opt_state)
        + run.of_gradients(params)
        + away * run.of_residuals(policy, run.config.train.grad_accum),
        group=policy.group,
        eval_micro_batches=eval_micro_batches(run, chosen),
        largest=(run.config.train.grad_accum, run.config.train.batch_size, run.config.data.seq_len),
        words=f"{policy.group} of {run.config.train.grad_accum} micro-batches at a time; {words(run, policy)}",
        bytes_moved=(bytes_moved(run, policy, clipped=True), bytes_moved(run, policy, clipped=False)),
    )
    arena = max(0, min(budget, whole.device + margin(whole.device)) - SEPARATE)
    return replace(whole, policy=replace(policy, arena=arena))


def words(run: Run, policy: Policy) -> str:
    """What of a step stays on the device."""
    products = "products" if policy.residuals == WIDE else "narrow products"
    blocks = f"{policy.resident_blocks} of {run.config.model.n_layers}"
    return f"inputs and {products} of {blocks} blocks and gradients of {policy.resident_gradients} stages stay on it"


def eval_micro_batches(run: Run, chosen: Way) -> int:
    """Micro-batches that evaluation takes at a time: as many as fit where a block or the head has its place in a step, beside what
    `streamed` has on the device and the last gradients of the step before. Without gradients, and with logits, they need less than a block
    saves of them."""
    params, _ = memory.stored(run.config)
    copies = memory.on_meta(declaration(run.config.model), run.dtype)
    blocks = STREAMED * memory.size(params["blocks"][0]) + chosen.policy.converts * memory.size(copies["blocks"][0])
    gradients = run.of_gradients(params["embed"]) + run.of_gradients(params["blocks"][0])
    room = chosen.working - max(memory.size(copies["embed"]), memory.size(copies["head"])) - blocks - gradients
    return max(1, min(run.config.train.grad_accum, room // max(memory.activations(run.config, run.dtype))))


def bytes_moved(run: Run, policy: Policy, *, clipped: bool) -> tuple[int, int]:
    """Bytes that a step moves to the device, and home, after one that was `clipped`.

    Every stage comes once forward, once backward (but the head, where forward ends), and goes home updated; so do its moments, and unless
    each stage is updated at once its gradient, which comes back for the update if it did not stay. Residuals of blocks that are not
    resident go and come.
    """
    params, opt_state = memory.stored(run.config)
    late = policy.update == "deferred" or (policy.update == "speculative" and clipped)  # updates are made forward
    read = run.of_residuals(replace(policy, residuals=policy.residuals & NARROW) if late else policy, run.config.train.grad_accum)
    each = memory.size(opt_state) + run.of_gradients(params) + (run.config.model.n_layers - policy.resident_blocks) * read
    stayed = sum(run.of_gradients(stage) for stage in stages(params)[: policy.resident_gradients]) if late else 0
    return 2 * memory.size(params) - memory.size(params["head"]) + each - stayed, memory.size(params) + each
