"""Device memory of the host residence: declared once, from which a plan sums it and a step allocates it."""

import torch
from torch import Tensor

from hyperlm import memory, model, tree
from hyperlm.config import Config
from hyperlm.kernels.reference.optimizer import CODED, QUANT_BLOCK
from hyperlm.residence import flat
from hyperlm.residence.host import chunks
from hyperlm.residence.host.policy import Policy
from hyperlm.residence.host.streams import Event, Stream
from hyperlm.residence.program import Shape
from hyperlm.stages import stages
from hyperlm.tree import Tree

CHUNK = 40 << 20  # bytes of moments and gradients that come at a time, for an update
CHUNKS, LOADS = 3, 2  # buffers for these, and for residuals on their way back


def gradients_like(policy: Policy, dtype: torch.dtype, params: Tree) -> Tree | None:
    """Gradients of these parameters as they go home, on the meta device; none where each stage is updated at once."""
    if policy.update == "immediate":
        return None

    def like(p: Tensor) -> Tensor:
        if policy.quantised and p.dim() > 1:
            return torch.empty(-(-p.numel() // QUANT_BLOCK), CODED, dtype=torch.uint8, device="meta")
        return torch.empty(p.shape, dtype=dtype if p.dim() > 1 else torch.float32, device="meta")

    return tree.map(like, params)


def gradient_bytes(policy: Policy, dtype: torch.dtype, params: Tree) -> int:
    """Bytes of a flat buffer of these gradients."""
    return flat.size(gradients_like(policy, dtype, params) or {})


def residual_bytes(config: Config, policy: Policy, dtype: torch.dtype, micro_batches: int) -> int:
    """Bytes of the residuals of a block and so many micro-batches, each in a flat buffer of its own."""
    tokens, widths = config.train.batch_size * config.data.seq_len, model.residual_widths(config.model)
    return micro_batches * sum(flat.padded(tokens * widths[name] * dtype.itemsize) for name in policy.residuals)


def moving(config: Config, policy: Policy, dtype: torch.dtype) -> list[Tree]:
    """Trees that come and go with the weights for an update, on the meta device: moments, and gradients."""
    params, opt_state = memory.stored(config)
    gradients = gradients_like(policy, dtype, params)
    return [*opt_state.values()] if gradients is None else [*opt_state.values(), gradients]


def chunks_of(config: Config, policy: Policy, dtype: torch.dtype) -> list[list[list[chunks.Part]]]:
    """Each stage in chunks for its update, of about CHUNK bytes of what moves."""
    params, _ = memory.stored(config)
    each = sum(flat.size(stage) for x in moving(config, policy, dtype) for stage in stages(x)) / tree.count(params)
    return [chunks.chunks_of(tree.leaves(stage), int(CHUNK / each)) for stage in stages(params)]


def chunk_bytes(config: Config, policy: Policy, dtype: torch.dtype) -> int:
    """The most bytes that come at a time for an update."""
    trees = [stages(x) for x in moving(config, policy, dtype)]
    sizes: dict[tuple, int] = {}  # of stages that differ: most blocks are alike
    for like, parts in zip(zip(*trees, strict=True), chunks_of(config, policy, dtype), strict=True):
        kind = (*((leaf.shape, leaf.dtype) for leaf in tree.leaves(like)), *map(tuple, parts))
        if kind not in sizes:
            coming = zip(*(chunks.split(flat.empty(stage, flat.META), parts) for stage in like), strict=True)
            sizes[kind] = max(sum(flat.padded(chunk.memory.nbytes) for chunk in together) for together in coming)
    return max(sizes.values())


def shelf_bytes(gradients: list[int], resident_blocks: int, residuals: int) -> int:
    """Bytes that hold the residuals of so many blocks, `residuals` bytes each, and then the gradients of the first stages, each when its
    place is free: the backward pass reads blocks and computes gradients from the last to the first, and the embedding, the first stage,
    reads nothing."""
    unread = (min(resident_blocks, max(0, index - 1)) for index in range(len(gradients)))
    return max([resident_blocks * residuals, *(sum(gradients[index:]) + blocks * residuals for index, blocks in enumerate(unread))])


def declared(config: Config, policy: Policy, dtype: torch.dtype, chunk: int) -> dict[str, int]:
    """Bytes of every buffer that a run has from its first step to its last, by name; chunk: `chunk_bytes`, which take a while to find."""
    params, _ = memory.stored(config)
    *others, head = (flat.size(stage) for stage in stages(params))
    gradients = [gradient_bytes(policy, dtype, stage) for stage in stages(params)]
    slot, on_shelf = max(others), policy.resident_gradients - policy.in_head
    streaming = policy.resident_blocks < config.model.n_layers
    return {
        "slots": slot + max((policy.slots - 1) * slot, head) if policy.head_aliases_slots else policy.slots * slot,
        "head": 0 if policy.head_aliases_slots else head,
        "shelf": shelf_bytes(gradients[:on_shelf], policy.resident_blocks, residual_bytes(config, policy, dtype, config.train.grad_accum)),
        "chunks": CHUNKS * chunk,
        "loads": LOADS * residual_bytes(config, policy, dtype, policy.group) if streaming else 0,
    }


# -- allocated -------------------------------------------------------------------------------------------------------------------------


class Slots:
    """Device memory for stages, in buffers as `program.Shape` numbers them, and what has to happen before each is overwritten."""

    def __init__(self, sizes: dict[str, int], shape: Shape, like: list[Tree], device: torch.device) -> None:
        """sizes: `declared`; like: the stages, as they are stored."""
        size = max(map(flat.size, like[:-1]))
        whole = flat.allocate(sizes["slots"], device)
        starts = [*range(0, (shape.slots - 1) * size, size), sizes["slots"] - size]
        memory = [whole[start : start + size] for start in starts]
        self.of_head = whole[: starts[-1]] if shape.head_aliases_slots else flat.allocate(sizes["head"], device)
        places = [self.of_head if stage == shape.head else memory[shape.buffers(stage)[0]] for stage in range(shape.head + 1)]
        self.stages = [flat.views(place, stage) for place, stage in zip(places, like, strict=True)]  # always at the same place
        self.memory = [place[: flat.size(stage)] for place, stage in zip(places, like, strict=True)]
        self.free: list[tuple[Event, ...]] = [(Stream(device, separate=False).record(),)] * (shape.slots + 1)


class Shelf:
    """Device memory for what stays there from one pass to the next: from its end, residuals of the first blocks; from its start, where
    these have been read, gradients of the first stages, until their update; and more of these in the place of the head."""

    def __init__(
        self, sizes: dict[str, int], policy: Policy, residuals: int, gradients: list[int], of_head: Tensor, device: torch.device
    ) -> None:
        """residuals: bytes of a block's; gradients: bytes of each stage's, as they go home; of_head: where the head comes to."""
        self.residuals, self.of_head, last = residuals, of_head, policy.resident_gradients - policy.in_head
        self.in_head = range(last, policy.resident_gradients)  # stages whose gradients lie there
        self.starts = [sum(gradients[stage + 1 : last]) for stage in range(last)] + [sum(gradients[last:stage]) for stage in self.in_head]
        self.memory = flat.allocate(sizes["shelf"], device)

    def of_block(self, layer: int) -> Tensor:
        start = len(self.memory) - (layer + 1) * self.residuals
        return self.memory[start : start + self.residuals]

    def of_gradient(self, stage: int) -> Tensor:
        return (self.of_head if stage in self.in_head else self.memory)[self.starts[stage] :]
