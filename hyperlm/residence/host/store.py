"""The store of host memory: what a step reads and writes through `layerwise`. Buffers, streams and events are here and below."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import reduce

import torch
from torch import Tensor

from hyperlm import kernels, tree
from hyperlm.config import Config
from hyperlm.env import compute_dtype
from hyperlm.kernels.reference.optimizer import PARTS, UpdatePart
from hyperlm.optim import Schedule, Update, clip_factors, copy_to_device, signed, stream_bases
from hyperlm.precision import compute_copy
from hyperlm.random import STRIDE
from hyperlm.residence import flat
from hyperlm.residence.base import Plan
from hyperlm.residence.host import buffers, residuals
from hyperlm.residence.host.policy import NARROW, Policy
from hyperlm.residence.host.streams import Event, InFlight, read_async
from hyperlm.residence.host.transfer import Home, Transfer
from hyperlm.residence.host.update import Change, Updates, concerns
from hyperlm.residence.program import Kind, Op, Program, Shape, groups_of, training_step
from hyperlm.stages import map_stages, stages
from hyperlm.state import Pending, State
from hyperlm.tree import Tree

GRADIENT_NOISE = 0x5DEECE66D << 20  # from where the random stream of a leaf's update starts to where that of its quantised gradient does


class HostStore:
    """Parameters, moments and gradients as flat stages in host memory; of a step, what its program names."""

    def __init__(self, config: Config, schedule: Schedule, device: torch.device, plan: Plan) -> None:
        policy: Policy = plan.policy
        self.config, self.schedule, self.device, self.policy, self.dtype = config, schedule, device, policy, compute_dtype(device)
        self.ops = kernels.table(("encode8", "norm", "copy_to_host"), device, config.kernels)
        self.group, self.together, self.max_logits = policy.group, device.type == "cuda", policy.max_logits
        self.max_parts = PARTS if policy.quantised else 0
        self.allocated = False  # from the first step on
        self.in_place: dict[int, Tree] = {}  # weights of stages that are computed with where they lie on the device
        self.resident: dict[int, list[Tensor]] = {}  # gradients that stayed, by stage
        self.held: tuple[int, ...] = ()  # the stages that slots have
        self.grads: list[Tensor] = []  # of the stage whose gradient is whole
        self.factor: Tensor | None = None  # that it has learnt by
        self.kept: Event = None  # when the gradients that stayed last were there
        self.left = (-1, -1)  # the version of the state that the newest step returned

    def allocate(self, state: State) -> None:
        """What stays: all device memory at once, to be cut up: taken as it is wanted, it would have gaps that fit nothing. And host memory
        for gradients."""
        config, policy, device = self.config, self.policy, self.device
        pin = device.type == "cuda"
        like = buffers.gradients_like(policy, self.dtype, state.params)
        self.gradients = None if like is None else map_stages(lambda stage: flat.empty(stage, pin=pin), like)
        if device.type == "cuda":
            flat.allocate(policy.arena, device)
            number = torch.ones(1, 1, dtype=self.dtype, device=device, requires_grad=True)
            torch.autograd.grad(2 * (number @ number), number)  # cuBLAS takes memory to work in, once forward and once backward
        size = buffers.chunk_bytes(config, policy, self.dtype)
        sizes, parts = buffers.declared(config, policy, self.dtype, size), stages(state.params)
        self.shape = Shape(
            len(parts) - 2, 1, policy.slots, policy.head_aliases_slots, policy.resident_blocks, policy.resident_gradients, buffers.LOADS,
            learns=policy.update != "deferred", offloads=policy.update != "immediate",
        )  # fmt: skip
        slots = buffers.Slots(sizes, self.shape, parts, device)
        self.transfer = Transfer(slots, self.shape, device)
        of_block = buffers.residual_bytes(config, policy, self.dtype, config.train.grad_accum)
        of_gradients = [buffers.gradient_bytes(policy, self.dtype, part) for part in parts]
        self.shelf = buffers.Shelf(sizes, policy, of_block, of_gradients, slots.of_head, device)
        chunks = buffers.chunks_of(config, policy, self.dtype)
        self.updates = Updates(config, self.schedule, self.transfer, chunks, size, device)
        self.residuals = residuals.Store(self.transfer.main, self.shelf, policy.resident_blocks, sizes["loads"], self.dtype, device)
        self.in_flight, self.allocated = InFlight(self.transfer.main), True
        starts = [tree.leaves(part) for part in stages(stream_bases(state.params, config.train.seed))]
        self.noise = [list(torch.tensor([signed(start + GRADIENT_NOISE) for start in of_stage], device=device)) for of_stage in starts]

    def begin(self, state: State, shape: torch.Size) -> Program:
        """A step begins: its program. Nothing that is on the device is used where the state is not the one that the newest step returned,
        or has nothing pending."""
        if not self.allocated:
            self.allocate(state)
        goes_on = self.left == state.version(-1)
        if not goes_on and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # another step, or a flush, may still be writing to what is read here
        if state.pending is None or not goes_on:
            self.held = ()
            self.resident.clear()
        # What left in the step before: every step finds memory alike. And before its state, which updates read, is forgotten.
        self.in_flight.drain()
        self.state, self.pending = state, state.pending
        self.shift = copy_to_device(signed(state.step * STRIDE), self.device)
        self.home: Home = {"params": stages(state.params), **{name: stages(part) for name, part in state.opt_state.items()}}
        if self.gradients is not None:  # those that are pending may be another step's
            self.home["grads"] = stages(state.pending.grads if state.pending is not None else self.gradients)
            self.home["new grads"] = stages(self.gradients)
        self.speculates = self.policy.update == "speculative" and not state.clipped
        program = training_step(self.shape_of(shape[0]))
        self.held = program.held
        return program

    def shape_of(self, micro_batches: int) -> Shape:
        learns, due = self.speculates or self.policy.update == "immediate", frozenset[int]()
        if self.pending is not None and self.pending.part != UpdatePart.MOMENTS:
            due = frozenset(stage for stage in range(self.shape.head + 1) if concerns(self.pending, stage))
        return replace(self.shape, groups=groups_of(micro_batches, self.group), learns=learns, pending=due, held=self.held)

    # -- stages

    def fetch(self, op: Op) -> None:
        t, stage = self.transfer, op.stage
        if op.kind == Kind.FETCH:
            t.fetch(self.home, stage)
            return
        if op.kind == Kind.FETCH_UPDATE:
            t.reserve(stage, t.h2d)
            t.h2d.wait(t.written[stage])
            t.ready[stage] = t.h2d.record()
        else:
            t.reserve(stage, self.updates.work)
        change = Change(pending_update(self.pending, stage), self.resident.get(stage))
        if change.grads is not None:
            self.updates.work.wait(self.kept)
        self.updates.apply(self.home, stage, list(self.state.opt_state), [change], fetch=op.kind == Kind.FETCH_UPDATE)
        if change.grads is not None and stage in self.shelf.in_head:
            (buffer,) = self.shape.buffers(self.shape.head)
            t.slots.free[buffer] = (*t.slots.free[buffer], t.ready[stage])

    def weights(self, stage: int) -> Tree:
        """What a stage computes with, to be differentiated."""
        self.transfer.main.wait(self.transfer.ready[stage])
        self.resident.pop(stage, None)  # used, if it was there
        if stage in self.in_place:
            return self.in_place[stage]
        weights = compute_copy(self.transfer.slots.stages[stage], self.dtype)
        if self.policy.releases_early:
            weights = tree.map(lambda p: p.clone() if p.dim() < 2 else p, weights)  # matrices are copies already
            self.transfer.release(stage)
        weights = tree.map(lambda p: p.detach().requires_grad_(), weights)
        if not self.policy.converts:
            self.in_place[stage] = weights
        return weights

    def release(self, stage: int) -> None:
        self.in_flight.drain(keep=1 if stage else 2)  # at the end, no waiting for what is hardly on its way
        self.grads, self.factor = [], None
        if not self.policy.releases_early:
            self.transfer.release(stage)

    # -- residuals

    def saved_names(self) -> frozenset[str]:
        """After a clipped step updates are on their way home forward, and wide residuals have no room beside them."""
        return self.policy.residuals if self.speculates or self.policy.update == "immediate" else self.policy.residuals & NARROW

    # -- gradients

    def drain(self) -> None:
        self.in_flight.drain()

    def gradient(self, stage: int, parts: list[list[Tensor]], weights: Tree) -> Tensor:
        """The norm of a stage's gradient, the sum of each leaf's parts; what leaves of it is kept until then."""
        if self.policy.quantised:
            self.grads, self.norm = self.quantise(stage, parts)
        else:
            sums = [total for (total,) in parts]
            self.norm = self.ops["norm"](sums)
            self.grads = [g.to(leaf.dtype).contiguous() for g, leaf in zip(sums, tree.leaves(weights), strict=True)]
        return self.norm

    def quantise(self, stage: int, parts: list[list[Tensor]]) -> tuple[list[Tensor], Tensor]:
        """A stage's gradient with its matrices in 8 bits (see `reference.encode8`), and its norm."""
        grads, squares, vectors = [], [], []
        for of_leaf, origin in zip(parts, self.noise[stage], strict=True):
            if of_leaf[0].dim() > 1:
                grad, squares_of_leaf = self.ops["encode8"](of_leaf, origin, self.shift)
                squares.append(squares_of_leaf)
            else:
                grad = reduce(torch.add, of_leaf)
                vectors.append(grad)
            grads.append(grad)
        if vectors:
            squares.append(self.ops["norm"](vectors).square()[None])
        return grads, torch.cat(squares).sum().sqrt()

    def learn(self, stage: int) -> None:
        """Update a stage by the gradient that is there: wholly, or its weights; and these after the moments, if their part of the last one
        is pending."""
        t, changes = self.transfer, []
        if self.speculates:
            self.factor, part = torch.isfinite(self.norm).float(), UpdatePart.WEIGHTS
            if self.pending is not None and self.pending.part == UpdatePart.MOMENTS:
                changes.append(Change(pending_update(self.pending, stage)))
            changes.append(Change(Update(self.state.updates, self.factor, part), self.grads))
        else:
            factor = clip_factors(self.norm[None], self.config.optim.clip, "layer")[0][0]
            self.factor = torch.where(torch.isfinite(self.norm), factor, 0)  # if not, this stage alone has no gradient
            changes.append(Change(Update(self.state.updates, self.factor), self.grads))
        t.ready[stage] = t.main.record()
        self.updates.apply(self.home, stage, list(self.state.opt_state), changes)
        if not self.speculates:
            self.in_flight.add(t.ready[stage], [self.grads, self.factor])

    def offload(self, stage: int) -> None:
        self.in_flight.add(self.transfer.offload(self.home, stage, self.grads), [self.grads, self.factor])

    def keep(self, stage: int) -> None:
        """Have a stage's gradient at hand when its pending update is made."""
        self.resident[stage] = flat.views(self.shelf.of_gradient(stage), self.grads)
        if stage in self.shelf.in_head:
            self.transfer.reserve(self.shape.head, self.transfer.main)
        for to, grad in zip(self.resident[stage], self.grads, strict=True):
            to.copy_(grad)
        self.kept = self.transfer.main.record()

    # -- the end

    def clip(self, numbers: Tensor) -> None:
        """(norm, nats, least factor, each stage's norm): on their way home before the last gradient is."""
        self.numbers: Callable[[], list[float]] = read_async(numbers, self.transfer.main, self.ops["copy_to_host"])

    def finish(self, state: State, factors: Tensor) -> tuple[State, bool]:
        """The state with what is pending, and whether the step was finite; waits for the device."""
        norm, nats, least, *norms = self.numbers()
        finite = math.isfinite(norm) and math.isfinite(nats)
        clipped, pending = least != 1, None
        if self.speculates:
            part = UpdatePart.ROLLBACK if not finite else UpdatePart.CORRECT if clipped else UpdatePart.MOMENTS
            pending = Pending(self.gradients, factors, state.updates, part, tuple(map(math.isfinite, norms)))
        elif finite and self.policy.update != "immediate":
            pending = Pending(self.gradients, factors, state.updates)
        self.left, self.pending = state.version(), None
        return replace(state, pending=pending, clipped=clipped), finite


def pending_update(pending: Pending | None, stage: int) -> Update:
    assert pending is not None  # or the program would not ask for it
    return Update(pending.updates, pending.factors[stage], pending.part)
