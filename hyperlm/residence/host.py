"""Parameters and optimizer state in host memory; stages visit the device one after the other, so that it holds two or three of them.

Layer-major: every micro-batch goes through one stage before the next stage is touched. Forward, only the input of every stage is kept, on the
device or in host memory. Backward, stage after stage in reverse, each is computed again with its graph, and its gradient, summed over the
micro-batches in fp32, goes home. Clipping needs the norm of all of them, which is known at the end; the update is therefore left pending and
made when a stage next comes to the device, by which it is exact and costs no visit of its own. (Clipped by its own norm, a stage is updated at
once.) Sums run in the order of the micro-batches: in fp32 on a CPU the result equals that of `residence.device` bit for bit.

Four lanes work at the same time: copies in, copies home, updates, and everything else. Traffic of a step in bytes a parameter, for weights in
bf16, and moments and gradients in 8 bits: in 7 (forward: weights 2, moments 2, gradient 1; backward: weights 2), home 5 (weights 2, moments 2,
gradient 1); clipped by layer, in 6 and home 4.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from configs import Config
from hyperlm import kernels, model, tree
from hyperlm.env import allowed_memory, compute_dtype
from hyperlm.kernels.reference import APART, BLOCK, CODED
from hyperlm.loss import head_nats
from hyperlm.optim import Optimizer, clip_factors, optimizer, origins, signed
from hyperlm.plan import goes_home_in_8_bits, visits
from hyperlm.precision import accumulate, compute_copy
from hyperlm.residence import INPUTS, PIECE, PIECES, SLOTS, slab
from hyperlm.residence.device import Advance
from hyperlm.residence.lanes import Event, Lane, Ring
from hyperlm.stages import moved, stages
from hyperlm.state import Pending, State
from hyperlm.tree import Tree


GRADIENTS = 0x5DEECE66D << 20  # from where the random stream of a leaf's update starts to where that of its gradient does


# -- pieces of a stage -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """Blocks first .. last of a leaf, of BLOCK numbers each."""

    leaf: int
    first: int
    last: int
    whole: bool  # they are all of the leaf


def pieces_of(leaves: list[Tensor]) -> list[list[Part]]:
    """The leaves of a stage, in order, in pieces of at most PIECE numbers."""
    pieces: list[list[Part]] = [[]]
    room = most = PIECE // BLOCK
    for index, leaf in enumerate(leaves):
        first, end = 0, -(-leaf.numel() // BLOCK)
        while first < end:
            if room == 0 or (leaf.dim() < 2 and end > room):  # vectors stay whole
                pieces.append([])
                room = most
            last = min(end, first + room) if leaf.dim() > 1 else end
            pieces[-1].append(Part(index, first, last, (first, last) == (0, end)))
            room, first = max(0, room - (last - first)), last
    return pieces


def cut(leaf: Tensor, part: Part) -> Tensor:
    """The numbers of a part; of moments in 8 bits, its rows."""
    if part.whole:
        return leaf
    return leaf[part.first : part.last] if leaf.dtype == torch.uint8 else leaf.view(-1)[part.first * BLOCK : part.last * BLOCK]


def place(view: Tensor) -> tuple[int, int]:
    """Where in its storage a view begins and ends, in bytes."""
    start = view.storage_offset() * view.element_size()
    return start, start + view.nbytes


# -- a stage on its visit --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Visit:
    """A stage on the device."""

    index: int
    stored: Tree  # its parameters
    slot: int | None  # of the ring; None: memory of its own
    ready: Event


class Traffic:
    """What moves between host and device, and the order that it must keep."""

    def __init__(self, cfg: Config, total: int, device: torch.device, params: Tree, opt_state: Tree) -> None:
        self.device = device
        self.main, self.into, self.home = Lane(device, own=False), Lane(device), Lane(device)
        self.work = Lane(device, priority=-1)
        self.optimizer: Optimizer = optimizer(cfg.optim, total, cfg.kernels)
        parts = stages(params)
        self.head = len(parts) - 1
        self.slots = Ring(SLOTS, max(slab.size(part) for part in parts[:-1]), device)
        self.head_memory = slab.allocate(slab.size(parts[-1]), device)
        self.head_free: tuple[Event, ...] = ()
        self.written: list[Event] = [None] * len(parts)  # when each stage in host memory is up to date
        self.sent: list[Event] = [None] * len(parts)  # and each gradient
        self.pieces = [pieces_of(tree.leaves(part)) for part in parts]
        decays = stages(tree.map(lambda spec: spec.decay, model.declaration(cfg.model)))
        self.decay = [tree.leaves(part) for part in decays]
        starts = [tree.leaves(part) for part in stages(origins(tree.map_with_path(lambda path, _: path, params), cfg.train.seed))]
        self.leaf_origin = [torch.tensor([signed(start + GRADIENTS) for start in own], device=device) for own in starts]
        self.encode = kernels.table(("encode8",), device, cfg.kernels)["encode8"]
        self.origin = [
            [torch.tensor([signed(own[p.leaf] + p.first * BLOCK) for p in piece], device=device) for piece in pieces]
            for own, pieces in zip(starts, self.pieces, strict=True)
        ]
        per_number = 4 + sum(leaf.nbytes for leaf in tree.leaves(opt_state)) / tree.count(params)  # a gradient has at most 4 bytes
        vectors = max(sum(leaf.nbytes for leaf in tree.leaves(part) if leaf.dim() < 2) for part in parts)
        most = min(PIECE, max(tree.count(part) for part in parts))
        # Clipped by layer, an update waits for its gradient: its moments wait here meanwhile, so that the weights of the next stage can pass.
        count = PIECES if cfg.optim.clip_scope == "global" else PIECES + max(len(pieces) for pieces in self.pieces[:-1])
        self.buffers = Ring(count, int(most * per_number * 1.02) + 12 * vectors + (1 << 16), device)

    def fetch(self, state: State, index: int, *, update: bool) -> Visit:
        """Bring a stage to the device, and make its pending update on the way if `update`."""
        host = stages(state.params)[index]
        if index == self.head:
            memory, slot = self.head_memory, None
            self.into.wait(*self.head_free)
        else:
            memory, slot = self.slots.take(self.into)
        self.into.wait(self.written[index])
        whole = slab.slab(host)
        with self.into.open():
            memory[: len(whole)].copy_(whole, non_blocking=True)
        visit = Visit(index, slab.views(memory, host), slot, self.into.mark())
        if update and state.pending is not None:
            pending = state.pending
            self.into.wait(self.sent[index])
            visit = self.update(state, visit, stages(pending.grads)[index], pending.factors[index], pending.updates)
        return visit

    def update(self, state: State, visit: Visit, grads: Tree, factor: Tensor, updates: int, *, here: bool = False) -> Visit:
        """Update a stage on the device, in pieces, and send it home. here: its gradients are on the device, and not at home."""
        index, done = visit.index, visit.ready
        moments = {name: stages(part)[index] for name, part in state.opt_state.items()}
        hosts = [tree.leaves(x) for x in (grads, *moments.values())]
        at_home, stored, decay = tree.leaves(stages(state.params)[index]), tree.leaves(visit.stored), self.decay[index]
        for piece, origin in zip(self.pieces[index], self.origin[index], strict=True):
            buffer, number = self.buffers.take(self.into)
            brought, ranges, at = [], [], 0
            with self.into.open():
                for source, leaves in enumerate(hosts):
                    cuts = [cut(leaves[part.leaf], part) for part in piece]
                    if here and source == 0:
                        brought.append(cuts)
                        continue
                    first, end = place(cuts[0])[0], place(cuts[-1])[1]
                    memory = slab.slab(cuts)[first:end]
                    copy = buffer[at : at + end - first]
                    copy.copy_(memory, non_blocking=True)
                    own = [copy[place(x)[0] - first : place(x)[1] - first].view(x.dtype).view(x.shape) for x in cuts]
                    brought.append(own)
                    ranges.append((memory, copy))
                    at += slab.padded(end - first)
            self.work.wait(visit.ready, self.into.mark())
            weights = [cut(stored[part.leaf], part) for part in piece]
            with self.work.open():
                acts = [decay[part.leaf] for part in piece]
                self.optimizer.update(
                    brought[0], dict(zip(moments, brought[1:], strict=True)), weights, updates, decay=acts, origin=origin, factor=factor
                )
            done = self.work.mark()
            self.home.wait(done)
            with self.home.open():
                for memory, copy in ranges if here else ranges[1:]:
                    memory.copy_(copy, non_blocking=True)
                first, end = place(weights[0])[0], place(weights[-1])[1]
                slab.slab(at_home)[first:end].copy_(slab.slab(stored)[first:end], non_blocking=True)
            self.buffers.free[number] = (self.home.mark(),)
        self.written[index] = self.home.mark()
        return replace(visit, ready=done)

    def release(self, visit: Visit) -> None:
        """The main lane has no more use of it."""
        free = (self.main.mark(), self.written[visit.index])
        if visit.slot is None:
            self.head_free = free
        else:
            self.slots.free[visit.slot] = free

    def encoded(self, index: int, found: list[Tensor], step: int) -> list[Tensor]:
        """A stage's gradient with its matrices in 8 bits; see `reference.encode8`."""
        origin = self.leaf_origin[index] + signed(step * APART)
        return [self.encode(g, origin[leaf]) if g.dim() > 1 else g for leaf, g in enumerate(found)]

    def bring_home(self, index: int, found: list[Tensor], to: Tree) -> None:
        """Send a stage's gradient home; `found` must outlive the copy."""
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


# -- state in host memory --------------------------------------------------------------------------------------------------------------


def in_host_memory(stage: Tree, device: torch.device, *, copy: bool = True) -> Tree:
    """A stage in a slab of host memory, pinned if `device` is a GPU; only room for one where not to copy."""
    pin = device.type == "cuda"
    return slab.packed(stage, pin=pin) if copy else slab.views(slab.allocate(slab.size(stage), torch.device("cpu"), pin=pin), stage)


def make_settle(cfg: Config, total: int, device: torch.device) -> Callable[[State], State]:
    """settle(state) -> state, the update that is pending made."""
    rule = optimizer(cfg.optim, total, cfg.kernels)
    decays = tree.map(lambda spec: spec.decay, model.declaration(cfg.model))

    def settle(state: State) -> State:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if (pending := state.pending) is None:
            return state
        starts = origins(tree.map_with_path(lambda path, _: path, state.params), cfg.train.seed)
        trees = (pending.grads, state.params, *state.opt_state.values(), decays, starts)
        for stage, factor in zip(zip(*(stages(x) for x in trees), strict=True), pending.factors, strict=True):
            *leaves, acts, start = (tree.leaves(x) for x in stage)
            for part in (part for piece in pieces_of(leaves[1]) for part in piece):
                at_home = [cut(x[part.leaf], part) for x in leaves]
                g, p, *moments = (x.to(device) for x in at_home)
                origin = torch.tensor([signed(start[part.leaf] + part.first * BLOCK)], device=device)
                opt_state = {name: [x] for name, x in zip(state.opt_state, moments, strict=True)}
                rule.update([g], opt_state, [p], pending.updates, decay=[acts[part.leaf]], origin=origin, factor=factor)
                for to, x in zip(at_home[1:], (p, *moments), strict=True):
                    to.copy_(x)
        return replace(state, pending=None)

    return settle


# -- the step --------------------------------------------------------------------------------------------------------------------------


def make_advance(cfg: Config, total: int, device: torch.device) -> Advance:
    """Parameters, moments and gradients are packed stages in host memory (see `in_host_memory`); computation is on `device`."""
    dtype, blocks = compute_dtype(device), model.skeleton(cfg.model).blocks
    run = torch.compile(model.run_block) if cfg.train.compile else model.run_block
    plan = visits(cfg, dtype, allowed_memory(device, cfg.train.device_memory))
    grouping = plan.group
    traffic: Traffic | None = None
    inputs: Inputs | None = None
    gradients: Tree = None  # of the newest step, in host memory
    at_once, coded = cfg.optim.clip_scope == "layer", goes_home_in_8_bits(cfg, dtype)

    def room_for_gradient(p: Tensor) -> Tensor:
        if coded and p.dim() > 1:
            return torch.empty(-(-p.numel() // BLOCK), CODED, dtype=torch.uint8, device="meta")
        return torch.empty(p.shape, dtype=dtype if p.dim() > 1 else torch.float32, device="meta")

    def prepare(state: State) -> None:
        nonlocal traffic, inputs, gradients
        if traffic is None:
            traffic = Traffic(cfg, total, device, state.params, state.opt_state)
            inputs = Inputs(traffic, plan.kept)
            if not at_once:
                gradients = moved(lambda part: in_host_memory(part, device, copy=False), tree.map(room_for_gradient, state.params))

    def weights_of(visit: Visit) -> Tree:
        """A stage's weights to compute with, to be differentiated."""
        traffic.main.wait(visit.ready)
        return tree.map(lambda p: p.detach().requires_grad_(), compute_copy(visit.stored, dtype))

    def pulled(
        outputs: list[Callable[..., Tensor]], into: Iterator[list[Tensor]], weights: Tree, pull: list[Tensor | None]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The summed gradient of a stage, and the gradient of each of its inputs; each output is a function of some of these."""
        leaves, sums, inner = tree.leaves(weights), None, []
        for x, output, d in zip(into, outputs, pull, strict=True):  # `into` first: it ends with what follows its last item
            grads = torch.autograd.grad(output(*x), [*leaves, *x], d)
            inner += grads[len(leaves) :]
            sums = list(grads[: len(leaves)]) if len(outputs) == 1 else accumulate(sums, grads[: len(leaves)])
        return sums, inner

    def advance(state: State, batch: Tensor, keys: Sequence[Tensor], count: int) -> tuple[State, Tensor, Tensor, bool]:
        prepare(state)
        size = grouping if len(keys) % grouping == 0 else 1
        batch = batch.view(len(batch) // size, size * batch.shape[1], batch.shape[2])
        keys = keys[::size]
        tokens, targets = batch[:, :, :-1].clamp(min=0), batch[:, :, 1:]
        contexts = [model.context(dtype, t, cfg.model, cfg.kernels, key=key) for t, key in zip(tokens, keys, strict=True)]
        layers, groups = len(blocks), range(len(batch))
        norms: list[Tensor] = [torch.zeros((), device=device)] * (layers + 2)
        held: deque[tuple[Event, Any]] = deque()  # what other lanes still read

        def block_of(layer: int, weights: Tree, a: int, x: Tensor) -> Tensor:
            return run(blocks[layer], weights, x, None, model.layer_context(contexts[a], layer))[0]

        # The stages that come, and whether their pending update is made on the way; and inputs of blocks.
        rest = iter([(index, True) for index in range(layers + 2)] + [(index, False) for index in reversed(range(layers + 1))])
        wanted = iter([(layer, a) for layer in reversed(range(layers)) for a in groups])
        fetched: deque[Visit] = deque()

        def fetch_next() -> None:
            if (following := next(rest, None)) is not None:
                fetched.append(traffic.fetch(state, following[0], update=following[1]))

        def learn(visit: Visit, weights: Tree, found: list[Tensor]) -> Visit:
            """What becomes of a stage's gradient."""
            norms[visit.index] = tree.norm(found)
            found = [g.to(leaf.dtype) for g, leaf in zip(found, tree.leaves(weights), strict=True)]
            if not at_once:
                found = traffic.encoded(visit.index, found, state.step) if coded else found
                traffic.bring_home(visit.index, found, stages(gradients)[visit.index])
                held.append((traffic.home.mark(), [found]))
            else:
                factor = clip_factors(norms[visit.index][None], cfg.optim.clip, "layer")[0][0]
                factor = torch.where(torch.isfinite(norms[visit.index]), factor, 0)  # if not, this stage alone has no gradient
                found = [torch.nan_to_num_(g, 0, 0, 0).contiguous() for g in found]
                visit = traffic.update(state, replace(visit, ready=traffic.main.mark()), found, factor, state.updates, here=True)
                held.append((visit.ready, [found, factor]))
            let_go(but=1)
            return visit

        def let_go(but: int = 0) -> None:
            while len(held) > but:
                event, _ = held.popleft()
                traffic.main.wait(event)

        # -- forward
        for _ in range(SLOTS - 1):
            fetch_next()
        with torch.no_grad():
            visit = fetched.popleft()
            weights = weights_of(visit)
            x = [model.embed(weights, t, cfg.model, ctx) for t, ctx in zip(tokens, contexts, strict=True)]
            traffic.release(visit)
            fetch_next()
            for layer in range(layers):
                visit = fetched.popleft()
                weights = weights_of(visit)
                for a in groups:
                    inputs.put(layer, a, x[a])
                    x[a] = block_of(layer, weights, a, x[a])
                traffic.release(visit)
                fetch_next()

        # -- the head, forward and backward
        total_nats = torch.zeros((), device=device)
        visit = fetched.popleft()
        weights = weights_of(visit)

        def loss_of(chosen: Sequence[int], *x: Tensor) -> Tensor:
            features = [model.finish(weights, own, cfg.model, contexts[a]) for a, own in zip(chosen, x, strict=True)]
            nats, _ = head_nats(torch.cat(features).flatten(0, 1), weights["weight"], targets[chosen[0] : chosen[-1] + 1].flatten())
            total_nats.add_(nats.detach())
            return nats / count

        # Of all groups together: the gradient of the head is large, and so it is found whole, with no sum beside it.
        together = [groups] if grouping > 1 else [[a] for a in groups]
        ends = ([x[a].requires_grad_() for a in chosen] for chosen in together)
        found, d = pulled([partial(loss_of, chosen) for chosen in together], ends, weights, [None] * len(together))
        x = []
        inputs.gone()
        for _ in range(INPUTS):
            inputs.prefetch(*next(wanted, (-1, 0)))
        visit = learn(visit, weights, found)
        traffic.release(visit)
        fetch_next()

        # -- backward
        def inputs_of(layer: int) -> Iterator[list[Tensor]]:
            for a in groups:
                own, number = inputs.take(layer, a)
                yield [own.detach().requires_grad_()]
                inputs.release(number)
                inputs.prefetch(*next(wanted, (-1, 0)))

        for layer in reversed(range(layers)):
            visit = fetched.popleft()
            weights = weights_of(visit)
            found, d = pulled([partial(block_of, layer, weights, a) for a in groups], inputs_of(layer), weights, d)
            visit = learn(visit, weights, found)
            traffic.release(visit)
            fetch_next()
        visit = fetched.popleft()
        weights = weights_of(visit)
        found, _ = pulled([partial(model.embed, weights, tokens[a], cfg.model, contexts[a]) for a in groups], iter([[]] * len(d)), weights, d)
        visit = learn(visit, weights, found)
        traffic.release(visit)

        let_go()
        factors, norm = clip_factors(torch.stack(norms), cfg.optim.clip, cfg.optim.clip_scope)
        finite = bool(torch.isfinite(norm + total_nats))
        pending = Pending(gradients, factors, state.updates) if finite and not at_once else None
        return replace(state, pending=pending), total_nats, norm, finite

    return advance
