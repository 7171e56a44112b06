"""What moves between host and device, and the order that it must keep: stages and their updates, gradients, inputs of blocks.

Six lanes work at the same time: copies in, copies home, the same of the inputs of blocks, updates, and everything else. What waits in a lane
holds up all that comes after it: inputs have lanes of their own because their copies wait for the computation of a block, and stages do not.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import reduce
from itertools import accumulate

import torch
from torch import Tensor

from hyperlm import kernels, model, tree
from hyperlm.config import Config
from hyperlm.kernels.reference.optimizer import COUNTERS, UpdatePart
from hyperlm.optim import Optimizer, Schedule, Update, copy_to_device, leaves_of, optimizer, signed, stream_bases
from hyperlm.plan import Plan, shelf_size
from hyperlm.random import STRIDE
from hyperlm.residence import INPUTS, PIECE, PIECES, slab
from hyperlm.residence.lanes import Event, Lane, Ring
from hyperlm.residence.pieces import Cut, Part, copy_in, cut, cut_up, pieces_of
from hyperlm.stages import stage_of, stages
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
    """Device memory for stages: one after the other in turn, so that each always has the same slot, and the last block the last. The head, where it
    has no memory of its own, takes the place of all slots but that one."""

    def __init__(self, count: int, size: int, last: int, head: int, device: torch.device) -> None:
        """count, size: of slots; last: the index of the last block; head: bytes of the head, if it has its place here."""
        others = max((count - 1) * size, head)
        whole = slab.allocate(others + size, device)
        self.memory = [whole[start : start + size] for start in (*range(0, (count - 1) * size, size), others)]
        self.of_head = whole[:others]
        self.free: list[tuple[Event, ...]] = [(Lane(device, own=False).mark(),)] * count  # what has to happen before each is overwritten
        self.held: dict[int, Visit] = {}  # by slot, the newest visit, whose stage is still there
        self.shift = count - 1 - last

    def slot_of(self, index: int) -> int:
        return (index + self.shift) % len(self.memory)

    def find(self, index: int) -> Visit | None:
        """The stage, if it is still there."""
        visit = self.held.get(self.slot_of(index))
        return visit if visit is not None and visit.index == index else None

    def take(self, index: int, lane: Lane) -> int:
        """The stage's slot, for `lane` to fill."""
        slot = self.slot_of(index)
        self.held.pop(slot, None)
        lane.wait(*self.free[slot])
        return slot

    def take_for_head(self, lane: Lane) -> None:
        for slot in range(len(self.memory) - 1):
            self.held.pop(slot, None)
            lane.wait(*self.free[slot])

    def free_from_head(self, when: tuple[Event, ...]) -> None:
        self.free[:-1] = [when] * (len(self.memory) - 1)


class Shelf:
    """Device memory for what stays there from one pass to the next: from its end, what the backward pass will read of the first blocks; from its
    start, where that has been read, gradients of the first stages, until their update; and more of these in the place of the head."""

    def __init__(self, planned: Plan, read: int, gradients: list[int], head: Tensor, device: torch.device) -> None:
        """read: bytes of a block; gradients: of the stages; head: where it comes to."""
        self.read, self.head, last = read, head, planned.staying - planned.in_head
        self.in_head = range(last, planned.staying)  # stages whose gradients lie there
        self.starts = [sum(gradients[index + 1 : last]) for index in range(last)] + [sum(gradients[last:index]) for index in self.in_head]
        self.memory = slab.allocate(shelf_size(gradients[:last], planned.kept, read), device)

    def of_block(self, layer: int) -> Tensor:
        start = len(self.memory) - (layer + 1) * self.read
        return self.memory[start : start + self.read]

    def of_gradient(self, index: int) -> Tensor:
        return (self.head if index in self.in_head else self.memory)[self.starts[index] :]


class Traffic:
    """Stages on their way."""

    def __init__(
        self,
        cfg: Config,
        schedule: Schedule,
        device: torch.device,
        params: Tree,
        opt_state: Tree,
        gradients: Tree | None,
        slots: int,
        planned: Plan,
        read: int,
    ) -> None:
        """slots: stages that there is room for on the device, the head aside unless it shares it; read: bytes that the backward pass reads of a block."""
        self.device, self.params = device, params
        self.main, self.into, self.home = Lane(device, own=False), Lane(device), Lane(device)
        self.work = Lane(device, priority=-1)
        self.optimizer: Optimizer = optimizer(cfg.optim, schedule, cfg.kernels)
        self.ops = kernels.table(("encode8", "norm"), device, cfg.kernels)
        parts = stages(params)
        self.head = len(parts) - 1
        self.shared, of_head = planned.shared, slab.size(parts[-1])
        self.slots = Slots(slots, max(slab.size(part) for part in parts[:-1]), self.head - 1, of_head if self.shared else 0, device)
        self.head_memory = self.slots.of_head if self.shared else slab.allocate(of_head, device)
        sizes = [] if gradients is None else [slab.size(part) for part in stages(gradients)]
        self.shelf = Shelf(planned, read, sizes, self.head_memory, device)
        self.stays = range(0 if gradients is None else planned.staying)  # stages whose gradients have a place there
        self.head_free: tuple[Event, ...] = (self.main.mark(),)
        self.written: list[Event] = [None] * len(parts)  # when each stage in host memory is up to date
        self.sent: list[Event] = [None] * len(parts)  # and each gradient
        self.staying: dict[int, list[Tensor]] = {}  # by stage, gradients that did not have to leave
        moving = [stages(x) for x in (*opt_state.values(), gradients) if x is not None]  # what comes and goes with the weights
        numbers = int(PIECE / (sum(slab.size(part) for own in moving for part in own) / tree.count(params)))
        self.pieces = [pieces_of(tree.leaves(part), numbers) for part in parts]
        decays = [tree.leaves(part) for part in stages(tree.map(lambda spec: spec.decay, model.declaration(cfg.model)))]
        self.decay = [[[own[p.leaf] for p in piece] for piece in pieces] for own, pieces in zip(decays, self.pieces, strict=True)]
        starts = [tree.leaves(part) for part in stages(stream_bases(tree.map_with_path(lambda path, _: path, params), cfg.train.seed))]
        self.leaf_origin = [list(torch.tensor([signed(start + GRADIENTS) for start in own], device=device)) for own in starts]
        self.shift: Tensor | None = None  # of random streams, at this step
        self.origin = [
            [list(torch.tensor([signed(own[p.leaf] + p.first * COUNTERS) for p in piece], device=device)) for piece in pieces]
            for own, pieces in zip(starts, self.pieces, strict=True)
        ]
        self.cuts: dict[
            tuple, tuple[Tree, list[Cut]]
        ] = {}  # of trees, by their identity: a stage has a hundred views, and they stay the same
        self.landed: dict[tuple, list[Cut]] = {}  # of buffers, by what comes into them
        self.stored: dict[int, Tree] = {}  # stages as they lie on the device, always at the same place
        sizes = [
            sum(slab.padded(own.memory.nbytes) for own in piece)
            for index, of_stage in enumerate(zip(*moving, strict=True))
            for piece in zip(*(self.cuts_of(index, part) for part in of_stage), strict=True)
        ]
        self.buffers = Ring(PIECES, max(sizes), device)

    def cuts_of(self, index: int, stage: Tree) -> list[Cut]:
        if (index, id(stage)) not in self.cuts:
            self.cuts[index, id(stage)] = (
                stage,
                cut_up(stage, self.pieces[index]),
            )  # with the tree, whose identity is its own while it lives
        return self.cuts[index, id(stage)][1]

    def landing(self, number: int, coming: list[Cut]) -> list[Cut]:
        """Room for pieces of several trees in a buffer."""
        key = (number, *(id(x.memory) for x in coming))
        if key not in self.landed:
            starts = accumulate((slab.padded(x.memory.nbytes) for x in coming), initial=0)
            self.landed[key] = [copy_in(self.buffers.buffers[number][at:], x) for at, x in zip(starts, coming, strict=False)]
        return self.landed[key]

    # -- stages

    def fetch(self, state: State, index: int, *, update: bool) -> Visit:
        """Bring a stage to the device, and where its weights wait for an update make that on the way, if `update`."""
        pending = state.pending if update else None
        late = pending is not None and pending.what != UpdatePart.MOMENTS and (pending.what != UpdatePart.ROLLBACK or pending.moved[index])
        if (held := self.slots.find(index)) is not None:
            visit = held
            self.work.wait(*self.slots.free[held.slot])
        else:
            host = stage_of(state.params, index)
            slot = None if index == self.head else self.slots.take(index, self.into)
            memory = self.head_memory if slot is None else self.slots.memory[slot]
            if slot is None and self.shared:
                self.slots.take_for_head(self.into)
            elif slot is None:
                self.into.wait(*self.head_free)
            self.into.wait(self.written[index])
            if not late:  # else piece by piece, so that the way home has work from the first on
                whole = slab.slab(host)
                with self.into.open():
                    memory[: len(whole)].copy_(whole, non_blocking=True)
            if index not in self.stored:
                self.stored[index] = slab.views(memory, host)
            visit = Visit(index, self.stored[index], slot, self.into.mark())
        return self.late(state, visit, pending, bring=held is None) if late else visit

    def release(self, visit: Visit) -> None:
        """The main lane has no more use of it."""
        free = (self.main.mark(), self.written[visit.index])
        if visit.slot is None and self.shared:
            self.slots.free_from_head(free)
        elif visit.slot is None:
            self.head_free = free
        else:
            self.slots.free[visit.slot] = free
            self.slots.held[visit.slot] = visit

    def expect(self, state: State, *, unchanged: bool) -> None:
        """A step begins. unchanged: parameters are as they were when stages last left for home; else what is on the device is not used."""
        self.shift = copy_to_device(signed(state.step * STRIDE), self.device)
        if not unchanged:
            self.slots.held.clear()
            self.staying.clear()
        if state.params is not self.params:
            self.cuts.clear()
            self.landed.clear()
            self.params = state.params

    # -- updates

    def through(
        self,
        visit: Visit,
        home: Tree,
        coming: list[Tree],
        kept: int,
        fn: Callable[[list[Part], list, list, list, list], None],
        *,
        bring: bool = False,
    ) -> Visit:
        """Bring what belongs to a stage piece by piece, and send home what becomes of it and of the weights.

        Args:
            home: the weights in host memory.
            coming: trees like the stage in host memory, the first `kept` of which do not change.
            fn: (piece, origins, what has come, weights, whether decay acts): makes the changes.
            bring: the weights as well.
        """
        index, done = visit.index, visit.ready
        self.into.wait(self.written[index])
        sources, weights, at_home = [self.cuts_of(index, x) for x in coming], self.cuts_of(index, visit.stored), self.cuts_of(index, home)
        pieces, origins_of, decays = self.pieces[index], self.origin[index], self.decay[index]
        for first in range(0, len(pieces), PIECES):  # as many as there are buffers: entering a lane takes time
            some, landed, changed = range(first, min(first + PIECES, len(pieces))), [], []
            with self.into.open():
                for i in some:
                    _, number = self.buffers.take(self.into)
                    own = [source[i] for source in sources]
                    here = self.landing(number, own)
                    if bring:
                        weights[i].memory.copy_(at_home[i].memory, non_blocking=True)
                    for to, source in zip(here, own, strict=True):
                        to.memory.copy_(source.memory, non_blocking=True)
                    landed.append((number, own, here, self.into.mark()))
            self.work.wait(visit.ready)
            with self.work.open():
                for i, (_, _, here, came) in zip(some, landed, strict=True):
                    self.work.wait(came)
                    fn(pieces[i], origins_of[i], [x.views for x in here], weights[i].views, decays[i])
                    changed.append(done := self.work.mark())
            with self.home.open():
                for i, (number, own, here, _), when in zip(some, landed, changed, strict=True):
                    self.home.wait(when)
                    for to, source in zip(own[kept:], here[kept:], strict=True):
                        to.memory.copy_(source.memory, non_blocking=True)
                    at_home[i].memory.copy_(weights[i].memory, non_blocking=True)
                    self.buffers.free[number] = (self.home.mark(),)
        self.written[index] = self.home.mark()
        return replace(visit, ready=done)

    def moments_of(self, state: State, index: int) -> tuple[list[str], list[Tree]]:
        return list(state.opt_state), [stage_of(part, index) for part in state.opt_state.values()]

    def late(self, state: State, visit: Visit, pending: Pending, *, bring: bool) -> Visit:
        """The part of the pending update that weights must not be used without. bring: they are not on the device yet."""
        names, moments = self.moments_of(state, visit.index)
        factor, here = pending.factors[visit.index], self.staying.get(visit.index)
        coming = moments if here else [stage_of(pending.grads, visit.index), *moments]

        def fn(piece: list[Part], origin: list, brought: list, weights: list, acts: list) -> None:
            grads = [cut(here[part.leaf], part) for part in piece] if here else brought[0]
            opt_state = dict(zip(names, brought[-len(names) :], strict=True))
            self.optimizer.update(leaves_of(grads, opt_state, weights, acts, origin), Update(pending.updates, factor, pending.what))

        self.into.wait(self.sent[visit.index])
        visit = self.through(visit, stage_of(state.params, visit.index), coming, len(coming) - len(moments), fn, bring=bring)
        if here and visit.index in self.shelf.in_head:
            self.head_free = (*self.head_free, visit.ready)
        return visit

    def at_once(self, state: State, visit: Visit, grads: list[Tensor], factor: Tensor) -> Visit:
        """The whole update, by a gradient that is on the device."""
        names, moments = self.moments_of(state, visit.index)

        def fn(piece: list[Part], origin: list, brought: list, weights: list, acts: list) -> None:
            own = [cut(grads[part.leaf], part) for part in piece]
            opt_state = dict(zip(names, brought, strict=True))
            self.optimizer.update(leaves_of(own, opt_state, weights, acts, origin), Update(state.updates, factor))

        return self.through(visit, stage_of(state.params, visit.index), moments, 0, fn)

    def ahead(self, state: State, visit: Visit, grads: list[Tensor], factor: Tensor) -> Visit:
        """The weights' part of the update, by a gradient that is on the device; and before it the moments' part of the one before, if pending."""
        names, moments = self.moments_of(state, visit.index)
        pending = state.pending if state.pending is not None and state.pending.what == UpdatePart.MOMENTS else None
        coming = moments if pending is None else [stage_of(pending.grads, visit.index), *moments]

        def fn(piece: list[Part], origin: list, brought: list, weights: list, acts: list) -> None:
            opt_state = dict(zip(names, brought[-len(names) :], strict=True))
            if pending is not None:
                late = Update(pending.updates, pending.factors[visit.index], UpdatePart.MOMENTS)
                self.optimizer.update(leaves_of(brought[0], opt_state, weights, acts, origin), late)
            own = [cut(grads[part.leaf], part) for part in piece]
            self.optimizer.update(leaves_of(own, opt_state, weights, acts, origin), Update(state.updates, factor, UpdatePart.WEIGHTS))

        if pending is not None:
            self.into.wait(self.sent[visit.index])
        return self.through(visit, stage_of(state.params, visit.index), coming, 1 if pending is not None else len(coming), fn)

    # -- gradients

    def encoded(self, index: int, found: list[list[Tensor]]) -> tuple[list[Tensor], Tensor]:
        """A stage's gradient, the sum of each leaf's parts, with its matrices in 8 bits (see `reference.encode8`); and its norm."""
        coded, squares, vectors = [], [], []
        for parts, origin in zip(found, self.leaf_origin[index], strict=True):
            if parts[0].dim() > 1:
                own, squares_of_own = self.ops["encode8"](parts, origin, self.shift)
                squares.append(squares_of_own)
            else:
                own = reduce(torch.add, parts)
                vectors.append(own)
            coded.append(own)
        if vectors:
            squares.append(self.ops["norm"](vectors).square()[None])
        return coded, torch.cat(squares).sum().sqrt()

    def stay(self, index: int, found: list[Tensor]) -> None:
        """Have a stage's gradient at hand when its pending update is made."""
        self.staying[index] = slab.views(self.shelf.of_gradient(index), found)
        if index in self.shelf.in_head:
            self.main.wait(*self.head_free)
        for to, x in zip(self.staying[index], found, strict=True):
            to.copy_(x)

    def bring_home(self, index: int, found: list[Tensor], to: Tree) -> None:
        """Send a stage's gradient home, where nothing needs the one before any more; `found` must outlive the copy."""
        self.home.wait(self.main.mark())
        with self.home.open():
            for x, y in zip(tree.leaves(to), found, strict=True):
                x.copy_(y, non_blocking=True)
        self.sent[index] = self.home.mark()


class Inputs:
    """What the backward pass reads of every block and every group of micro-batches, from the forward pass until then: the block's input, and
    products that are not to be found again."""

    def __init__(self, traffic: Traffic, kept: int, of_group: int, dtype: torch.dtype) -> None:
        """kept: blocks of which all this stays on the device; of_group: the most bytes of a block and a group; dtype: what it is kept in."""
        self.main, self.into, self.home = traffic.main, Lane(traffic.device), Lane(traffic.device)
        self.device, self.shelf, self.kept, self.dtype = traffic.device, traffic.shelf, kept, dtype
        self.here: dict[tuple[int, int], list[Tensor]] = {}
        self.room: dict[tuple[int, int], Tensor] = {}  # in host memory
        self.away: dict[tuple[int, int], tuple[list[Tensor], Event]] = {}  # what of it is in use, and since when
        self.leaving: deque[tuple[Event, list[Tensor]]] = deque()
        self.coming: dict[tuple[int, int], tuple[list[Tensor], int, Event]] = {}
        self.ring = Ring(INPUTS, of_group if kept < traffic.head - 1 else 0, self.device)

    def put(self, layer: int, group: int, x: Tensor, products: list[Tensor]) -> None:
        like = [torch.empty_like(x, dtype=self.dtype, device="meta"), *products]
        size = slab.size(like)
        if layer < self.kept:
            self.here[layer, group] = slab.views(self.shelf.of_block(layer)[group * size :], like)
            for to, y in zip(self.here[layer, group], (x, *products), strict=True):
                to.copy_(y)
            return
        if len(self.room.get((layer, group), ())) < size:
            self.room[layer, group] = slab.allocate(size, slab.CPU, pin=self.device.type == "cuda")
        room, read = slab.views(self.room[layer, group], like), [x.to(self.dtype), *products]
        self.home.wait(self.main.mark())
        with self.home.open():
            for to, y in zip(room, read, strict=True):
                to.copy_(y, non_blocking=True)
        self.away[layer, group] = room, self.home.mark()
        self.leaving.append((self.away[layer, group][1], read))  # whose memory may only be used again after that
        self.gone(but=2)

    def gone(self, but: int = 0) -> None:
        """Forget what has been put, but for the newest, which may still be on its way."""
        while len(self.leaving) > but:
            event, _ = self.leaving.popleft()
            self.main.wait(event)

    def prefetch(self, layer: int, group: int) -> None:
        if layer < self.kept or layer < 0:
            return
        room, left = self.away[layer, group]
        size = slab.size(room)
        buffer, number = self.ring.take(self.into)
        self.into.wait(left)
        with self.into.open():
            buffer[:size].copy_(self.room[layer, group][:size], non_blocking=True)
        self.coming[layer, group] = slab.views(buffer, room), number, self.into.mark()

    def take(self, layer: int, group: int) -> tuple[list[Tensor], int | None]:
        """What was put, and the buffer to give back."""
        if layer < self.kept:
            return self.here.pop((layer, group)), None
        read, number, ready = self.coming.pop((layer, group))
        self.main.wait(ready)
        return read, number

    def release(self, number: int | None) -> None:
        if number is not None:
            self.ring.free[number] = (self.main.mark(),)
