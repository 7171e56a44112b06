"""What moves between host and device, and the order that it must keep: stages and their updates, gradients, inputs of blocks.

Four lanes work at the same time: copies in, copies home, updates, and everything else.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from configs import Config
from hyperlm import kernels, model, tree
from hyperlm.kernels.reference import APART, BLOCK, MOMENTS, UNDO, WEIGHTS
from hyperlm.optim import Optimizer, optimizer, origins, signed
from hyperlm.residence import INPUTS, PIECES, SLOTS, slab
from hyperlm.residence.lanes import Event, Lane, Ring
from hyperlm.residence.pieces import Part, cut, most_of, pieces_of, place
from hyperlm.stages import stages
from hyperlm.state import Pending, State
from hyperlm.tree import Tree

GRADIENTS = 0x5DEECE66D << 20  # from where the random stream of a leaf's update starts to where that of its gradient does


@dataclass(frozen=True)
class Visit:
    """A stage on the device."""

    index: int
    stored: Tree  # its parameters
    slot: int | None  # None: memory of its own
    ready: Event


class Slots:
    """Device memory for stages; the one that has not been used for longest is taken next."""

    def __init__(self, count: int, size: int, device: torch.device) -> None:
        self.memory = [slab.allocate(size, device) for _ in range(count)]
        self.free: list[tuple[Event, ...]] = [()] * count  # what has to happen before each is overwritten
        self.order = list(range(count))
        self.held: dict[int, Visit] = {}  # by slot, the newest visit, whose stage is still there

    def take(self, lane: Lane) -> int:
        number = self.order.pop(0)
        self.order.append(number)
        self.held.pop(number, None)
        lane.wait(*self.free[number])
        return number

    def find(self, index: int) -> Visit | None:
        """The stage, if it is still there."""
        for number, visit in self.held.items():
            if visit.index == index:
                self.order.remove(number)
                self.order.append(number)
                return visit
        return None


class Traffic:
    """Stages on their way."""

    def __init__(self, cfg: Config, total: int, device: torch.device, params: Tree, opt_state: Tree, gradients: Tree | None) -> None:
        self.device = device
        self.main, self.into, self.home = Lane(device, own=False), Lane(device), Lane(device)
        self.work = Lane(device, priority=-1)
        self.optimizer: Optimizer = optimizer(cfg.optim, total, cfg.kernels)
        self.encode = kernels.table(("encode8",), device, cfg.kernels)["encode8"]
        parts = stages(params)
        self.head = len(parts) - 1
        self.slots = Slots(SLOTS, max(slab.size(part) for part in parts[:-1]), device)
        self.head_memory = slab.allocate(slab.size(parts[-1]), device)
        self.head_free: tuple[Event, ...] = ()
        self.written: list[Event] = [None] * len(parts)  # when each stage in host memory is up to date
        self.sent: list[Event] = [None] * len(parts)  # and each gradient
        self.pieces = [pieces_of(tree.leaves(part)) for part in parts]
        self.decay = [tree.leaves(part) for part in stages(tree.map(lambda spec: spec.decay, model.declaration(cfg.model)))]
        starts = [tree.leaves(part) for part in stages(origins(tree.map_with_path(lambda path, _: path, params), cfg.train.seed))]
        self.leaf_origin = [torch.tensor([signed(start + GRADIENTS) for start in own], device=device) for own in starts]
        self.origin = [
            [torch.tensor([signed(own[p.leaf] + p.first * BLOCK) for p in piece], device=device) for piece in pieces]
            for own, pieces in zip(starts, self.pieces, strict=True)
        ]
        moving = [stages(x) for x in (*opt_state.values(), gradients) if x is not None]
        self.buffers = Ring(PIECES, max(most_of(own, pieces) for own, pieces in zip(zip(*moving, strict=True), self.pieces, strict=True)), device)

    # -- stages

    def fetch(self, state: State, index: int, *, update: bool) -> Visit:
        """Bring a stage to the device, and where its weights wait for an update make that on the way, if `update`."""
        if (held := self.slots.find(index)) is not None:
            visit = held
            self.work.wait(*self.slots.free[held.slot])
        else:
            host = stages(state.params)[index]
            slot = None if index == self.head else self.slots.take(self.into)
            memory = self.head_memory if slot is None else self.slots.memory[slot]
            if slot is None:
                self.into.wait(*self.head_free)
            self.into.wait(self.written[index])
            whole = slab.slab(host)
            with self.into.open():
                memory[: len(whole)].copy_(whole, non_blocking=True)
            visit = Visit(index, slab.views(memory, host), slot, self.into.mark())
        if update and (pending := state.pending) is not None and pending.what != MOMENTS:
            if pending.what != UNDO or pending.moved[index]:
                visit = self.late(state, visit, pending)
        return visit

    def release(self, visit: Visit) -> None:
        """The main lane has no more use of it."""
        free = (self.main.mark(), self.written[visit.index])
        if visit.slot is None:
            self.head_free = free
        else:
            self.slots.free[visit.slot] = free
            self.slots.held[visit.slot] = visit

    def forget(self) -> None:
        """Host memory may have changed: what is on the device is no longer what is there."""
        self.slots.held.clear()

    # -- updates

    def through(self, visit: Visit, home: Tree, coming: list[Tree], kept: int, fn: Callable[[list[Part], Tensor, list, list, list], None]) -> Visit:
        """Bring what belongs to a stage piece by piece, and send home what becomes of it and of the weights.

        Args:
            home: the weights in host memory.
            coming: trees like the stage in host memory, the first `kept` of which do not change.
            fn: (piece, origin, what has come, weights, whether decay acts): makes the changes.
        """
        index, done = visit.index, visit.ready
        self.into.wait(self.written[index])
        hosts, at_home, stored, decay = [tree.leaves(x) for x in coming], tree.leaves(home), tree.leaves(visit.stored), self.decay[visit.index]
        for piece, origin in zip(self.pieces[index], self.origin[index], strict=True):
            buffer, number = self.buffers.take(self.into)
            brought, ranges, at = [], [], 0
            with self.into.open():
                for leaves in hosts:
                    cuts = [cut(leaves[part.leaf], part) for part in piece]
                    first, end = place(cuts[0])[0], place(cuts[-1])[1]
                    memory = slab.slab(cuts)[first:end]
                    copy = buffer[at : at + end - first]
                    copy.copy_(memory, non_blocking=True)
                    brought.append([copy[place(x)[0] - first : place(x)[1] - first].view(x.dtype).view(x.shape) for x in cuts])
                    ranges.append((memory, copy))
                    at += slab.padded(end - first)
            self.work.wait(visit.ready, self.into.mark())
            weights = [cut(stored[part.leaf], part) for part in piece]
            with self.work.open():
                fn(piece, origin, brought, weights, [decay[part.leaf] for part in piece])
                done = self.work.mark()
            self.home.wait(done)
            with self.home.open():
                for memory, copy in ranges[kept:]:
                    memory.copy_(copy, non_blocking=True)
                first, end = place(weights[0])[0], place(weights[-1])[1]
                slab.slab(at_home)[first:end].copy_(slab.slab(stored)[first:end], non_blocking=True)
            self.buffers.free[number] = (self.home.mark(),)
        self.written[index] = self.home.mark()
        return replace(visit, ready=done)

    def moments_of(self, state: State, index: int) -> tuple[list[str], list[Tree]]:
        return list(state.opt_state), [stages(part)[index] for part in state.opt_state.values()]

    def late(self, state: State, visit: Visit, pending: Pending) -> Visit:
        """The part of the pending update that weights must not be used without."""
        names, moments = self.moments_of(state, visit.index)
        factor = pending.factors[visit.index]

        def fn(piece: list[Part], origin: Tensor, brought: list, weights: list, acts: list) -> None:
            grads, *own = brought
            self.optimizer.update(
                grads, dict(zip(names, own, strict=True)), weights, pending.updates, decay=acts, origin=origin, factor=factor, what=pending.what
            )

        self.into.wait(self.sent[visit.index])
        return self.through(visit, stages(state.params)[visit.index], [stages(pending.grads)[visit.index], *moments], 1, fn)

    def at_once(self, state: State, visit: Visit, grads: list[Tensor], factor: Tensor) -> Visit:
        """The whole update, by a gradient that is on the device."""
        names, moments = self.moments_of(state, visit.index)

        def fn(piece: list[Part], origin: Tensor, brought: list, weights: list, acts: list) -> None:
            own = [cut(grads[part.leaf], part) for part in piece]
            self.optimizer.update(own, dict(zip(names, brought, strict=True)), weights, state.updates, decay=acts, origin=origin, factor=factor)

        return self.through(visit, stages(state.params)[visit.index], moments, 0, fn)

    def ahead(self, state: State, visit: Visit, grads: list[Tensor], factor: Tensor) -> Visit:
        """The weights' part of the update, by a gradient that is on the device; and before it the moments' part of the one before, if pending."""
        names, moments = self.moments_of(state, visit.index)
        pending = state.pending if state.pending is not None and state.pending.what == MOMENTS else None
        coming = moments if pending is None else [stages(pending.grads)[visit.index], *moments]

        def fn(piece: list[Part], origin: Tensor, brought: list, weights: list, acts: list) -> None:
            opt_state = dict(zip(names, brought[-len(names) :], strict=True))
            if pending is not None:
                by = pending.factors[visit.index]
                self.optimizer.update(brought[0], opt_state, weights, pending.updates, decay=acts, origin=origin, factor=by, what=MOMENTS)
            own = [cut(grads[part.leaf], part) for part in piece]
            self.optimizer.update(own, opt_state, weights, state.updates, decay=acts, origin=origin, factor=factor, what=WEIGHTS)

        if pending is not None:
            self.into.wait(self.sent[visit.index])
        return self.through(visit, stages(state.params)[visit.index], coming, 1 if pending is not None else len(coming), fn)

    # -- gradients

    def encoded(self, index: int, found: list[Tensor], step: int) -> list[Tensor]:
        """A stage's gradient with its matrices in 8 bits; see `reference.encode8`."""
        origin = self.leaf_origin[index] + signed(step * APART)
        return [self.encode(g, origin[leaf]) if g.dim() > 1 else g for leaf, g in enumerate(found)]

    def bring_home(self, index: int, found: list[Tensor], to: Tree) -> None:
        """Send a stage's gradient home, where nothing needs the one before any more; `found` must outlive the copy."""
        self.home.wait(self.main.mark())
        with self.home.open():
            for x, y in zip(tree.leaves(to), found, strict=True):
                x.copy_(y, non_blocking=True)
        self.sent[index] = self.home.mark()


class Inputs:
    """The input of every block for every group of micro-batches, from the forward pass until the backward pass takes it."""

    def __init__(self, traffic: Traffic, kept: int) -> None:
        self.traffic, self.kept = traffic, kept  # blocks whose inputs stay on the device
        self.here: dict[tuple[int, int], Tensor] = {}
        self.away: dict[tuple[int, int], Tensor] = {}  # in host memory
        self.left: dict[tuple[int, int], Event] = {}
        self.leaving: deque[tuple[Event, Tensor]] = deque()
        self.coming: dict[tuple[int, int], tuple[Tensor, int, Event]] = {}
        self.ring: Ring | None = None

    def put(self, layer: int, group: int, x: Tensor) -> None:
        if layer < self.kept:
            self.here[layer, group] = x
            return
        t = self.traffic
        if (layer, group) not in self.away:
            memory = slab.allocate(x.nbytes, torch.device("cpu"), pin=t.device.type == "cuda")
            self.away[layer, group] = memory.view(x.dtype).view(x.shape)
        t.home.wait(t.main.mark())
        with t.home.open():
            self.away[layer, group].copy_(x, non_blocking=True)
        self.left[layer, group] = t.home.mark()
        self.leaving.append((self.left[layer, group], x))  # whose memory may only be used again after that
        self.gone(but=2)

    def gone(self, but: int = 0) -> None:
        """Forget the inputs that have been put, but for the newest, which may still be on their way."""
        while len(self.leaving) > but:
            event, _ = self.leaving.popleft()
            self.traffic.main.wait(event)

    def prefetch(self, layer: int, group: int) -> None:
        if layer < self.kept or layer < 0:
            return
        t, x = self.traffic, self.away[layer, group]
        if self.ring is None or len(self.ring.buffers[0]) < x.nbytes:
            self.ring = Ring(INPUTS, x.nbytes, t.device)
        buffer, number = self.ring.take(t.into)
        t.into.wait(self.left[layer, group])
        with t.into.open():
            own = buffer[: x.nbytes].view(x.dtype).view(x.shape)
            own.copy_(x, non_blocking=True)
        self.coming[layer, group] = own, number, t.into.mark()

    def take(self, layer: int, group: int) -> tuple[Tensor, int | None]:
        """The input, and the buffer to give back."""
        if layer < self.kept:
            return self.here.pop((layer, group)), None
        x, number, ready = self.coming.pop((layer, group))
        self.traffic.main.wait(ready)
        return x, number

    def release(self, number: int | None) -> None:
        if number is not None:
            self.ring.free[number] = (self.traffic.main.mark(),)
