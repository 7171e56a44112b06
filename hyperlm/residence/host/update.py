"""Updates of stages: moments come chunk by chunk, weights learn on the device, and what has changed goes home.

When a stage learns is the policy's. Clipping needs the norm of all gradients, which is known at the end, so the update is left pending and
made when the stage is next fetched ("deferred"), by which it is exact and costs no fetch of its own. Where gradients are quantised the bus
is spared further: forward it is the limit, and backward the matrix units are. So if nothing was clipped in the step before, weights move as
soon as their gradient is there, as if nothing will be ("speculative"), and forward they come alone; what is pending is the moments' part of
the update, which is made backward, beside the next gradient. If the norm was too large after all, the weights are corrected when they come
forward. Clipped by its own norm, a stage is updated at once ("immediate").

Traffic of a step in bytes a parameter, for weights in bf16, and moments and gradients in 8 bits: where nothing is clipped, forward in 2
(weights), backward in 5 (weights 2, moments 2, gradient 1) and home 5; where it is, forward in 5 and home 4, backward in 2 and home 1;
clipped by layer, in 6 and home 4.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from hyperlm import model, tree
from hyperlm.config import Config
from hyperlm.kernels.reference.optimizer import COUNTERS, UpdatePart
from hyperlm.optim import Leaf, Optimizer, Schedule, Update, optimizer, signed, stream_bases, zip_leaves
from hyperlm.residence import flat
from hyperlm.residence.host.buffers import CHUNKS
from hyperlm.residence.host.chunks import Chunk, Part, chunks_of, cut, split, view_in
from hyperlm.residence.host.streams import Event, Ring, Stream
from hyperlm.residence.host.transfer import Home, Transfer
from hyperlm.stages import stages
from hyperlm.state import Pending, State
from hyperlm.tree import Tree

FLUSHED = 1 << 24  # numbers that `make_flush` updates at a time


@dataclass(frozen=True)
class Change:
    """A part of a stage's update, by gradients that are on the device, or (None) those in host memory."""

    update: Update
    grads: list[Tensor] | None = None


class Updates:
    """Changes stages that are on the device, or on their way there."""

    def __init__(
        self, config: Config, schedule: Schedule, transfer: Transfer, chunks: list[list[list[Part]]], size: int, device: torch.device
    ) -> None:
        """chunks: the parts of each stage's; size: the most bytes that come with one."""
        self.transfer, self.chunks = transfer, chunks
        self.work = Stream(device, priority=-1)
        self.optimizer: Optimizer = optimizer(config.optim, schedule, config.kernels)
        self.ring = Ring(CHUNKS, size, device)
        declared = model.declaration(config.model)
        decays = [tree.leaves(part) for part in stages(tree.map(lambda spec: spec.decay, declared))]
        starts = [tree.leaves(part) for part in stages(stream_bases(declared, config.train.seed))]
        self.decays = [
            [[leaves[part.leaf] for part in chunk] for chunk in of_stage] for leaves, of_stage in zip(decays, chunks, strict=True)
        ]
        self.streams = [
            [list(torch.tensor([signed(leaves[part.leaf] + part.first * COUNTERS) for part in chunk], device=device)) for chunk in of_stage]
            for leaves, of_stage in zip(starts, chunks, strict=True)
        ]
        # Views by what they are of, and the address of that: a stage has a hundred, and while they are kept its memory is nobody else's.
        self.views: dict[tuple[str, int], tuple[int, list[Chunk]]] = {}
        self.landings: dict[tuple, list[Chunk]] = {}

    def chunks_at(self, name: str, index: int, stage: Tree) -> list[Chunk]:
        """A flat stage in its chunks."""
        address = tree.leaves(stage)[0].data_ptr()
        known = self.views.get((name, index))
        if known is None or known[0] != address:
            self.views[name, index] = known = address, split(stage, self.chunks[index])
        return known[1]

    def landing(self, buffer: int, index: int, number: int, names: Sequence[str], sources: list[Chunk]) -> list[Chunk]:
        """Room for a chunk of several trees in a buffer."""
        key = (buffer, index, number, *names)
        if key not in self.landings:
            starts = accumulate((flat.padded(x.memory.nbytes) for x in sources), initial=0)
            self.landings[key] = [view_in(self.ring.buffers[buffer][at:], x) for at, x in zip(starts, sources, strict=False)]
        return self.landings[key]

    def apply(self, home: Home, index: int, moments: list[str], changes: list[Change], *, fetch: bool = False) -> None:
        """Make changes to a stage. fetch: its weights come too, chunk by chunk, so that the way home has work from the first on."""
        t, read = self.transfer, ["grads"] if any(change.grads is None for change in changes) else []
        names = [*read, *moments]
        returns = any(change.update.part != UpdatePart.WEIGHTS for change in changes)  # whether moments change
        if read:
            t.h2d.wait(t.sent[index])
        t.h2d.wait(t.written[index])
        sources = [self.chunks_at(name, index, home[name][index]) for name in names]
        weights, at_home = self.chunks_at("device", index, t.slots.stages[index]), self.chunks_at("params", index, home["params"][index])
        done: Event = t.ready[index]
        for first in range(0, len(weights), CHUNKS):  # as many as there are buffers: entering a stream takes time
            some = range(first, min(first + CHUNKS, len(weights)))
            landed = self.bring(index, some, names, sources, [(weights[i], at_home[i]) for i in some] if fetch else [])
            changed = self.change(index, some, names, landed, weights, changes)
            done = changed[-1]
            with t.d2h.use():
                for i, (buffer, coming, _), when in zip(some, landed, changed, strict=True):
                    t.d2h.wait(when)
                    for source, chunk in zip(sources[len(read) :], coming[len(read) :], strict=True):
                        if returns:
                            source[i].memory.copy_(chunk.memory, non_blocking=True)
                    at_home[i].memory.copy_(weights[i].memory, non_blocking=True)
                    self.ring.free[buffer] = (t.d2h.record(),)
        t.written[index], t.ready[index] = t.d2h.record(), done

    def bring(
        self, index: int, some: range, names: list[str], sources: list[list[Chunk]], weights: list[tuple[Chunk, Chunk]]
    ) -> list[tuple[int, list[Chunk], Event]]:
        """Chunks to the device: for each its buffer, what has come, and when."""
        t, landed = self.transfer, []
        with t.h2d.use():
            for at, i in enumerate(some):
                _, buffer = self.ring.take(t.h2d)
                chunks = [source[i] for source in sources]
                coming = self.landing(buffer, index, i, names, chunks)
                if weights:
                    to, source = weights[at]
                    to.memory.copy_(source.memory, non_blocking=True)
                for to, source in zip(coming, chunks, strict=True):
                    to.memory.copy_(source.memory, non_blocking=True)
                landed.append((buffer, coming, t.h2d.record()))
        return landed

    def change(
        self,
        index: int,
        some: range,
        names: list[str],
        landed: list[tuple[int, list[Chunk], Event]],
        weights: list[Chunk],
        changes: list[Change],
    ) -> list[Event]:
        """When each chunk has learnt."""
        changed = []
        self.work.wait(self.transfer.ready[index])
        with self.work.use():
            for i, (_, coming, came) in zip(some, landed, strict=True):
                self.work.wait(came)
                brought = {name: chunk.views for name, chunk in zip(names, coming, strict=True)}
                moments = {name: views for name, views in brought.items() if name != "grads"}
                for change in changes:
                    parts = self.chunks[index][i]
                    grads = brought["grads"] if change.grads is None else [cut(change.grads[part.leaf], part) for part in parts]
                    leaves = zip_leaves(grads, moments, weights[i].views, self.decays[index][i], self.streams[index][i])
                    self.optimizer.update(leaves, change.update)
                changed.append(self.work.record())
        return changed


def make_flush(config: Config, schedule: Schedule, device: torch.device) -> Callable[[State], State]:
    """flush(state) -> state, the update that is pending made, some numbers at a time, outside a step."""
    rule = optimizer(config.optim, schedule, config.kernels)
    decays = tree.map(lambda spec: spec.decay, model.declaration(config.model))

    def update_stage(leaves: list[list], moments: list[str], update: Update) -> None:
        grads, params, *opt_state, acts, starts = leaves
        for part in (part for chunk in chunks_of(params, FLUSHED) for part in chunk):
            at_home = [cut(x[part.leaf], part) for x in (grads, params, *opt_state)]
            g, p, *values = (x.to(device) for x in at_home)
            stream = torch.tensor([signed(starts[part.leaf] + part.first * COUNTERS)], device=device)
            rule.update([Leaf(p, g, dict(zip(moments, values, strict=True)), acts[part.leaf], stream)], update)
            for to, x in zip(at_home[1:], (p, *values), strict=True):
                to.copy_(x)

    def flush(state: State) -> State:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if (pending := state.pending) is None:
            return state
        starts = stream_bases(state.params, config.train.seed)
        trees = (pending.grads, state.params, *state.opt_state.values(), decays, starts)
        for index, stage in enumerate(zip(*(stages(x) for x in trees), strict=True)):
            if concerns(pending, index):
                update = Update(pending.updates, pending.factors[index], pending.part)
                update_stage([tree.leaves(x) for x in stage], list(state.opt_state), update)
        return replace(state, pending=None)

    return flush


def concerns(pending: Pending, index: int) -> bool:
    """Whether a pending update changes this stage: what has not moved need not move back."""
    return pending.part != UpdatePart.ROLLBACK or pending.moved[index]
