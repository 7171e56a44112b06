"""Parameters and optimizer state in host memory; stages visit the device one after the other, so that it holds two or three of them.

Layer-major: every micro-batch goes through one stage before the next stage is touched. Forward, only the input of every stage is kept, in the
dtype of the matrices, on the device or in host memory; narrow products; and wide ones where the bus has time (`plan.remembers`). Backward, stage
after stage in reverse, each is computed again with its graph, and its gradient, summed over the micro-batches in fp32, goes home; those found last stay
on the device as well, where there is room, for they are wanted first. Sums run in the order of the micro-batches: in fp32 on a CPU the result equals
that of `residence.device` bit for bit.

Clipping needs the norm of all gradients, which is known at the end. The update is therefore left pending and made when a stage next comes to the
device, by which it is exact and costs no visit of its own. Where gradients go home in 8 bits, the bus is spared further: forward it is the limit,
and backward the matrix units are. So if nothing was clipped in the step before, the weights move as soon as their gradient is there, as if nothing
will be, and forward they come alone; what is pending is the moments' part of the update, which is made backward, beside the next gradient. If
the norm was too large after all, the weights are corrected when they come forward. (Clipped by its own norm, a stage is updated at once.)

Traffic of a step in bytes a parameter, for weights in bf16, and moments and gradients in 8 bits: where nothing is clipped, forward in 2 (weights),
backward in 5 (weights 2, moments 2, gradient 1) and home 5; where it is, forward in 5 and home 4, backward in 2 and home 1; clipped by layer, in 6
and home 4.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hyperlm import kernels, model, tree
from hyperlm.batch import Batch
from hyperlm.config import Config
from hyperlm.env import allowed_memory, compute_dtype
from hyperlm.kernels.reference.optimizer import CODED, COUNTERS, PARTS, QUANT_BLOCK, UpdatePart
from hyperlm.loss import head_nats
from hyperlm.optim import Leaf, Schedule, Update, clip_factors, optimizer, signed, stream_bases
from hyperlm.plan import converts, free_once_copied, goes_home_in_8_bits, slot_count, taken_at_once, visits, widths_read
from hyperlm.precision import compute_copy
from hyperlm.residence import INPUTS, slab
from hyperlm.residence.device import Advance
from hyperlm.residence.lanes import Event, told
from hyperlm.residence.pieces import cut, pieces_of
from hyperlm.residence.traffic import Inputs, Traffic, Visit
from hyperlm.stages import moved, stage_of, stages
from hyperlm.state import Pending, State
from hyperlm.tree import Tree

SETTLED = 1 << 24  # numbers that `settle` updates at a time


def in_host_memory(stage: Tree, device: torch.device, *, copy: bool = True) -> Tree:
    """A stage in a slab of host memory, pinned if `device` is a GPU; only room for one where not to copy."""
    pin = device.type == "cuda"
    return slab.packed(stage, pin=pin) if copy else slab.views(slab.allocate(slab.size(stage), slab.CPU, pin=pin), stage)


def make_settle(cfg: Config, schedule: Schedule, device: torch.device) -> Callable[[State], State]:
    """settle(state) -> state, the update that is pending made."""
    rule = optimizer(cfg.optim, schedule, cfg.kernels)
    decays = tree.map(lambda spec: spec.decay, model.declaration(cfg.model))

    def settle(state: State) -> State:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if (pending := state.pending) is None:
            return state
        starts = stream_bases(tree.map_with_path(lambda path, _: path, state.params), cfg.train.seed)
        trees = (pending.grads, state.params, *state.opt_state.values(), decays, starts)
        for index, (stage, factor) in enumerate(zip(zip(*(stages(x) for x in trees), strict=True), pending.factors, strict=True)):
            if pending.what == UpdatePart.ROLLBACK and not pending.moved[index]:
                continue
            *leaves, acts, start = (tree.leaves(x) for x in stage)
            for part in (part for piece in pieces_of(leaves[1], SETTLED) for part in piece):
                at_home = [cut(x[part.leaf], part) for x in leaves]
                g, p, *moments = (x.to(device) for x in at_home)
                stream = torch.tensor(signed(start[part.leaf] + part.first * COUNTERS), device=device)
                leaf = Leaf(p, g, dict(zip(state.opt_state, moments, strict=True)), acts[part.leaf], stream)
                rule.update([leaf], Update(pending.updates, factor, pending.what))
                for to, x in zip(at_home[1:], (p, *moments), strict=True):
                    to.copy_(x)
        return replace(state, pending=None)

    return settle


def moves_ahead(config: Config, dtype: torch.dtype) -> bool:
    """Whether weights move as if nothing will be clipped, before it is known: it is not bit for bit what one update gives where they do not stay."""
    return goes_home_in_8_bits(config, dtype)


# -- the step --------------------------------------------------------------------------------------------------------------------------


def make_advance(cfg: Config, schedule: Schedule, device: torch.device) -> Advance:
    """Parameters, moments and gradients are packed stages in host memory (see `in_host_memory`); computation is on `device`."""
    dtype, blocks = compute_dtype(device), model.skeleton(cfg.model).blocks
    run = torch.compile(model.run_block) if cfg.train.compile else model.run_block
    ops = kernels.table(("accumulate", "norm", "copy_to_host"), device, cfg.kernels)
    allowed = allowed_memory(device, cfg.train.device_memory)
    plan = visits(cfg, dtype, allowed)
    grouping, slots = plan.group, slot_count(cfg, dtype)
    traffic: Traffic | None = None
    inputs: Inputs | None = None
    gradients: Tree = None  # of the newest step, in host memory
    newest: Pending | None = None  # what the newest step left pending
    in_place: dict[int, Tree] = {}  # the weights of stages that are computed with where they lie on the device
    held: deque[tuple[Event, Any]] = deque()  # what other lanes still read; of the last stage, into the next step
    at_once = cfg.optim.clip_scope == "layer"
    coded = not at_once and goes_home_in_8_bits(cfg, dtype)
    ahead = not at_once and moves_ahead(cfg, dtype)
    copied = free_once_copied(cfg, dtype)

    def room_for_gradient(p: Tensor) -> Tensor:
        if coded and p.dim() > 1:
            return torch.empty(-(-p.numel() // QUANT_BLOCK), CODED, dtype=torch.uint8, device="meta")
        return torch.empty(p.shape, dtype=dtype if p.dim() > 1 else torch.float32, device="meta")

    def prepare(state: State, batch: Batch) -> None:
        nonlocal traffic, inputs, gradients
        if traffic is None:
            if not at_once:
                gradients = moved(lambda part: in_host_memory(part, device, copy=False), tree.map(room_for_gradient, state.params))
            if device.type == "cuda":
                # All memory at once, to be cut up; and first from it what stays. Taken as it is wanted, it would have gaps that fit nothing.
                slab.allocate(taken_at_once(plan, allowed), device)
                number = torch.ones(1, 1, dtype=dtype, device=device, requires_grad=True)
                torch.autograd.grad(2 * (number @ number), number)  # cuBLAS takes memory to work in, once forward and once backward
            micro_batches, b, n = batch.tokens.shape
            read = sum(slab.padded(b * n * width * dtype.itemsize) for width in widths_read(cfg.model, products=plan.remembers))
            traffic = Traffic(cfg, schedule, device, state.params, state.opt_state, gradients, slots, plan, micro_batches * read)
            inputs = Inputs(traffic, plan.kept, grouping * read, dtype)
        traffic.expect(state, unchanged=newest is not None and state.pending is newest)

    def let_go(but: int) -> None:
        """Forget what other lanes still read, all `but` the newest, once they have read it."""
        while len(held) > but:
            event, _ = held.popleft()
            traffic.main.wait(event)

    def weights_of(visit: Visit) -> Tree:
        """A stage's weights to compute with, to be differentiated."""
        traffic.main.wait(visit.ready)
        traffic.staying.pop(visit.index, None)  # used, if it was there
        weights = in_place.get(visit.index)
        if weights is None:
            weights = compute_copy(visit.stored, dtype)
            if copied:
                weights = tree.map(lambda p: p.clone() if p.dim() < 2 else p, weights)  # matrices are copies already
                traffic.release(visit)
            weights = tree.map(lambda p: p.detach().requires_grad_(), weights)
            if not converts(cfg, dtype):
                in_place[visit.index] = weights
        return weights

    def leave(visit: Visit) -> None:
        if not copied:
            traffic.release(visit)

    def in_one_piece(grads: list[Tensor], *, widen: bool) -> list[Tensor]:
        """A copy, in fp32 if `widen`, of what stays until all is found. Matrices in one piece: in several they would lie between activations that come
        and go. Vectors apart: a view would keep the whole."""
        matrices = iter(slab.packed([g for g in grads if g.dim() > 1], device, dtype=torch.float32 if widen else None))
        return [next(matrices) if g.dim() > 1 else g.clone() for g in grads]

    def pulled(
        outputs: Iterable[tuple[Callable[..., Tensor], list[Tensor]]], weights: Tree, pull: list[Tensor | None]
    ) -> tuple[list[list[Tensor]], list[Tensor]]:
        """The gradient of a stage, of each leaf parts yet to be added up, and the gradient of each of its inputs; of each output, its function and the
        inputs of that. `pull` is emptied on the way."""
        leaves, parts, inner, last = tree.leaves(weights), [], [], len(pull) - 1
        apart = coded and last < PARTS  # what codes them adds them up
        for number, (output, x) in enumerate(outputs):
            grads = list(torch.autograd.grad(output(*x), [*leaves, *x], pull.pop(0)))
            inner += grads[len(leaves) :]
            del grads[len(leaves) :]
            if apart or number == 0:
                if number < last:
                    let_go(0)  # it is home by now, and its memory is wanted
                    grads = in_one_piece(grads, widen=not apart)
                parts.append(grads)
                grads = None
            else:  # one after the other, so that little is there twice
                for total in parts[0]:
                    ops["accumulate"](total, grads.pop(0))
        return [list(own) for own in zip(*parts, strict=True)], inner

    def advance(state: State, batch: Batch, keys: Sequence[Tensor], count: int) -> tuple[State, Tensor, Tensor, bool]:
        nonlocal newest
        prepare(state, batch)
        let_go(0)  # what left in the step before: every step finds memory alike, or gaps would move until something fits in none
        size = grouping if len(keys) % grouping == 0 else 1
        tokens, targets = (x.unflatten(0, (-1, size)).flatten(1, 2) for x in (batch.tokens, batch.targets))
        keys = keys[::size]
        shared = model.context(dtype, tokens[0], cfg.model, cfg.kernels)
        contexts = [shared._replace(key=key if cfg.model.dropout else None) for key in keys]
        layers, groups = len(blocks), range(len(tokens))
        together = [groups] if device.type == "cuda" else [[a] for a in groups]
        goes_ahead = ahead and not state.clipped
        narrow = not plan.remembers or not (goes_ahead or at_once)  # after a clipped step, updates are on their way home forward
        norms: list[Tensor] = [torch.zeros((), device=device)] * (layers + 2)

        def block_of(layer: int, weights: Tree, a: int, x: Tensor, *, products: list[Tensor], **how: Any) -> Tensor:
            ctx = model.layer_context(contexts[a], layer)._replace(products=products, narrow=narrow, **how)
            return run(blocks[layer], weights, x, None, ctx)[0]

        # The stages that come, and whether their pending update is made on the way; and what is read of blocks.
        rest = deque([(index, True) for index in range(layers + 2)] + [(index, False) for index in reversed(range(layers + 1))])
        wanted = iter([(layer, a) for layer in reversed(range(layers)) for a in groups])
        fetched: deque[Visit] = deque()

        def fetch_ahead() -> None:
            """Called when no stage is in use."""
            while rest and len(fetched) < slots - 1:
                index, update = rest[0]
                beside = {visit.index for visit in fetched} | {index}
                if (
                    plan.shared and layers + 1 in beside and not beside <= {layers, layers + 1}
                ):  # the head takes the place of all but the last block
                    break
                rest.popleft()
                fetched.append(traffic.fetch(state, index, update=update))

        def measured(visit: Visit, weights: Tree, found: list[list[Tensor]]) -> list[Tensor]:
            """A stage's gradient, as it leaves; its norm is known then."""
            if coded:
                sent, norms[visit.index] = traffic.encoded(visit.index, found)
                return sent
            sums = [total for (total,) in found]
            norms[visit.index] = ops["norm"](sums)
            return [g.to(leaf.dtype).contiguous() for g, leaf in zip(sums, tree.leaves(weights), strict=True)]

        def learn(visit: Visit, found: list[Tensor]) -> Visit:
            """What becomes of a stage's gradient."""
            norm = norms[visit.index]
            if at_once:
                factor = clip_factors(norm[None], cfg.optim.clip, "layer")[0][0]
                factor = torch.where(torch.isfinite(norm), factor, 0)  # if not, this stage alone has no gradient
                visit = traffic.at_once(state, replace(visit, ready=traffic.main.mark()), found, factor)
                held.append((visit.ready, [found, factor]))
            else:
                factor = None
                if goes_ahead:
                    factor = torch.isfinite(norm).float()
                    visit = traffic.ahead(state, replace(visit, ready=traffic.main.mark()), found, factor)
                traffic.bring_home(visit.index, found, stage_of(gradients, visit.index))
                if visit.index in traffic.stays and not goes_ahead:
                    traffic.stay(visit.index, found)
                held.append((traffic.home.mark(), [found, factor]))
            let_go(1 if visit.index else 2)  # at the end, no waiting for what is hardly on its way
            return visit

        # -- forward
        fetch_ahead()
        with torch.no_grad():
            visit = fetched.popleft()
            weights = weights_of(visit)
            x = [model.embed(weights, t, cfg.model, ctx) for t, ctx in zip(tokens, contexts, strict=True)]
            leave(visit)
            weights = None
            fetch_ahead()
            for layer in range(layers):
                visit = fetched.popleft()
                weights = weights_of(visit)
                for a in groups:
                    products = []
                    own, x[a] = x[a], block_of(layer, weights, a, x[a], products=products)
                    inputs.put(layer, a, own, products)
                own = products = None
                leave(visit)
                weights = None  # a copy, perhaps: not beside the next
                fetch_ahead()

        # -- the head, forward and backward
        total_nats = torch.zeros((), device=device)
        visit = fetched.popleft()
        weights = weights_of(visit)

        def loss_of(chosen: Sequence[int], *x: Tensor) -> Tensor:
            features = torch.cat([model.finish(weights, x_a, cfg.model, contexts[a]) for a, x_a in zip(chosen, x, strict=True)])
            own = targets[chosen[0] : chosen[-1] + 1].flatten()
            nats, _ = head_nats(features.flatten(0, 1), weights["weight"], own, kernels=cfg.kernels, max_logits=plan.logits)
            total_nats.add_(nats.detach())
            return nats / count

        # On a GPU of all groups together: the gradient of the head is large, and so it is found whole, with no sum beside it.
        ends = [(partial(loss_of, chosen), [x[a].requires_grad_() for a in chosen]) for chosen in together]
        found, d = pulled(ends, weights, [None] * len(together))
        x, ends, d = [], [], [g.clone() for g in d]  # clones: they may be parts of one tensor, and go one by one
        inputs.gone()
        for _ in range(INPUTS):
            inputs.prefetch(*next(wanted, (-1, 0)))
        found = measured(visit, weights, found)
        visit = learn(visit, found)
        leave(visit)
        weights = found = None
        fetch_ahead()

        # -- backward
        def again(layer: int, weights: Tree) -> Iterator[tuple[Callable[..., Tensor], list[Tensor]]]:
            for a in groups:
                (own, *products), number = inputs.take(layer, a)
                hollow = torch.zeros((), device=device).expand(own.shape).requires_grad_()
                yield partial(block_of, layer, weights, a, products=products, unread=True, values=own), [hollow]
                inputs.release(number)
                inputs.prefetch(*next(wanted, (-1, 0)))

        for layer in reversed(range(layers)):
            visit = fetched.popleft()
            weights = weights_of(visit)
            found, d = pulled(again(layer, weights), weights, d)
            found = measured(visit, weights, found)
            visit = learn(visit, found)
            leave(visit)
            weights = found = None
            fetch_ahead()
        visit = fetched.popleft()
        weights = weights_of(visit)
        if (
            not cfg.model.dropout
        ):  # whose masks belong to a micro-batch; else together again, since the gradient of a lookup sorts its tokens
            tokens = torch.stack([tokens[chosen[0] : chosen[-1] + 1].flatten(0, 1) for chosen in together])
            d = [torch.cat([d[a] for a in chosen]) for chosen in together]
        found, _ = pulled(
            [(partial(model.embed, weights, t, cfg.model, ctx), []) for t, ctx in zip(tokens, contexts, strict=False)], weights, d
        )
        found = measured(visit, weights, found)
        every_norm = torch.stack(norms)
        factors, norm = clip_factors(every_norm, cfg.optim.clip, cfg.optim.clip_scope)
        numbers = torch.cat([torch.stack([norm, total_nats, factors.min()]), every_norm])
        facts = told(numbers, traffic.main, ops["copy_to_host"])  # before the last gradient is on its way
        visit = learn(visit, found)
        leave(visit)

        norm_found, nats_found, least, *of_stages = facts()  # waits for the device
        finite = math.isfinite(norm_found) and math.isfinite(nats_found)
        clipped, newest = least != 1, None
        if goes_ahead:
            what = UpdatePart.ROLLBACK if not finite else UpdatePart.CORRECT if clipped else UpdatePart.MOMENTS
            newest = Pending(gradients, factors, state.updates, what, tuple(map(math.isfinite, of_stages)))
        elif finite and not at_once:
            newest = Pending(gradients, factors, state.updates)
        return replace(state, pending=newest, clipped=clipped), total_nats, norm, finite

    return advance
