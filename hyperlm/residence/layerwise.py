"""Runs the program of a step over a store, from which stages come to the device and to which gradients leave.

Sums run in the order of the micro-batches: in fp32 on a CPU the result equals that of `residence.device` bit for bit. What a tensor's last
use is matters here as much as what is computed: memory is handed on at the same places in every step, or gaps would move until something
fits in none.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from hyperlm import kernels, model, tree
from hyperlm.batch import Batch
from hyperlm.config import Config
from hyperlm.env import compute_dtype
from hyperlm.loss import head_nats
from hyperlm.mixers.frame import Residuals
from hyperlm.optim import clip_factors
from hyperlm.residence import flat
from hyperlm.residence.base import Advance, Result
from hyperlm.residence.program import Kind, Op, Program, groups_of
from hyperlm.state import State
from hyperlm.tree import Tree


class ResidualStore(Protocol):
    """Residuals by (block, group of micro-batches), from the forward pass until the backward pass."""

    def save(self, key: tuple[int, int], residuals: dict[str, Tensor]) -> None: ...
    def drain(self) -> None: ...  # the forward pass has ended: what was saved is where it is to be
    def load(self, key: tuple[int, int]) -> None: ...
    def take(self, key: tuple[int, int]) -> dict[str, Tensor]: ...
    def release(self) -> None: ...  # what was taken last has been read


class Store(Protocol):
    """What a residence gives to a step; streams and events are its own."""

    group: int  # micro-batches at a time
    together: bool  # whether the head and the embedding take all groups at once
    max_logits: int  # of the head at a time; 0 for the default
    max_parts: int  # gradients of groups that it adds up itself

    @property
    def residuals(self) -> ResidualStore: ...

    def begin(self, state: State, shape: torch.Size) -> Program: ...
    def fetch(self, op: Op) -> None: ...
    def weights(self, stage: int) -> Tree: ...
    def saved_names(self) -> frozenset[str]: ...
    def drain(self) -> None: ...
    def gradient(self, stage: int, parts: list[list[Tensor]], weights: Tree) -> Tensor: ...
    def clip(self, numbers: Tensor) -> None: ...
    def learn(self, stage: int) -> None: ...
    def offload(self, stage: int) -> None: ...
    def keep(self, stage: int) -> None: ...
    def release(self, stage: int) -> None: ...
    def finish(self, state: State, factors: Tensor) -> tuple[State, bool]: ...


class Step:
    """A step while it runs: what has been computed and is still wanted."""

    def __init__(self, config: Config, device: torch.device, store: Store) -> None:
        self.config, self.device, self.store = config, device, store
        self.dtype, self.blocks = compute_dtype(device), model.skeleton(config.model).blocks
        self.run = model.compiled_block() if config.train.compile else model.run_block
        self.accumulate = kernels.table(("accumulate",), device, config.kernels)["accumulate"]

    def begin(self, batch: Batch, keys: Sequence[Tensor], count: int) -> None:
        size = len(keys) // groups_of(len(keys), self.store.group)
        self.tokens, self.targets = (x.unflatten(0, (-1, size)).flatten(1, 2) for x in (batch.tokens, batch.targets))
        shared = model.context(self.dtype, self.tokens[0], self.config.model, self.config.kernels)
        self.contexts = [shared._replace(key=key if self.config.model.dropout else None) for key in keys[::size]]
        self.groups, self.count = range(len(self.tokens)), count
        self.together = [self.groups] if self.store.together else [[group] for group in self.groups]
        self.nats = torch.zeros((), device=self.device)
        self.norms: list[Tensor] = [torch.zeros((), device=self.device)] * (len(self.blocks) + 2)
        self.hidden: list[Tensor] = []  # of each group, into the next stage
        self.cotangents: list[Tensor] = []  # and its gradient
        self.saving: dict[str, Tensor] = {}  # residuals of the block that ran last
        self.weights: Tree = None  # of the stage in use
        self.parts: list[list[Tensor]] = []  # of its gradient, yet to be added up

    def weights_of(self, stage: int) -> Tree:
        if self.weights is None:
            self.weights = self.store.weights(stage)
        return self.weights

    # -- forward

    @torch.no_grad()
    def forward(self, op: Op) -> None:
        weights, ctx = self.weights_of(op.stage), self.contexts[op.group]
        if op.stage == 0:
            self.hidden.append(model.embed(weights, self.tokens[op.group], self.config.model, ctx))
            return
        x = self.hidden[op.group]
        residuals: dict[str, Tensor] = {}
        self.hidden[op.group] = self.block(op.stage, op.group, x, Residuals(self.store.saved_names(), residuals))
        self.saving = {"input": x, **residuals}

    def block(self, stage: int, group: int, x: Tensor, residuals: Residuals) -> Tensor:
        ctx = model.layer_context(self.contexts[group], stage - 1)._replace(residuals=residuals)
        return self.run(self.blocks[stage - 1], self.weights, x, None, ctx)[0]

    def save(self, op: Op) -> None:
        self.store.residuals.save((op.stage - 1, op.group), self.saving)
        self.saving = {}

    def load(self, op: Op) -> None:
        self.store.residuals.load((op.stage - 1, op.group))

    # -- backward

    def backward(self, op: Op) -> None:
        self.weights_of(op.stage)
        if op.stage == len(self.blocks) + 1:
            self.backward_of_head()
        elif op.stage == 0:
            self.backward_of_embedding()
        else:
            self.backward_of_block(op.stage, op.group)

    def backward_of_head(self) -> None:
        """Of all groups together, where the store wants that: the gradient of the head is large, and so it is computed whole, with no sum
        beside it."""
        cotangents: list[Tensor] = []
        for number, chosen in enumerate(self.together):
            x = [self.hidden[group].requires_grad_() for group in chosen]
            cotangents += self.differentiate(partial(self.loss, chosen), x, lambda: None, number, len(self.together))
            del x
        self.hidden = []
        self.cotangents = [cotangent.clone() for cotangent in cotangents]  # they may be parts of one tensor, and go one by one
        del cotangents
        self.store.residuals.drain()

    def loss(self, chosen: Sequence[int], *x: Tensor) -> Tensor:
        weights, cfg = self.weights, self.config
        features = torch.cat([model.finish(weights, x_a, cfg.model, self.contexts[a]) for a, x_a in zip(chosen, x, strict=True)])
        targets = self.targets[chosen[0] : chosen[-1] + 1].flatten()
        nats, _ = head_nats(features.flatten(0, 1), weights["weight"], targets, kernels=cfg.kernels, max_logits=self.store.max_logits)
        self.nats.add_(nats.detach())
        return nats / self.count

    def backward_of_block(self, stage: int, group: int) -> None:
        """The block again, from its residuals: x has no values then, and receives its gradient alone, as nobody reads what comes out."""
        values = dict(self.store.residuals.take((stage - 1, group)))
        x = torch.zeros((), device=self.device).expand(values["input"].shape).requires_grad_()
        values["output"] = x.detach()
        again = partial(self.block, stage, group, residuals=Residuals(frozenset(), values))
        (self.cotangents[group],) = self.differentiate(again, [x], lambda: self.take_cotangent(group), group, len(self.groups))
        self.store.residuals.release()

    def take_cotangent(self, group: int) -> Tensor:
        """Given up: what a group's backward pass reads is nobody else's."""
        cotangent, self.cotangents[group] = self.cotangents[group], torch.empty(0)
        return cotangent

    def backward_of_embedding(self) -> None:
        tokens, cotangents = self.tokens, self.cotangents
        self.cotangents = []
        if not self.config.model.dropout:
            # Masks belong to a micro-batch; without them all are together again, since the gradient of a lookup sorts its tokens.
            tokens = torch.stack([tokens[chosen[0] : chosen[-1] + 1].flatten(0, 1) for chosen in self.together])
            cotangents = [torch.cat([cotangents[group] for group in chosen]) for chosen in self.together]
        for number, part in enumerate(tokens):
            again = partial(model.embed, self.weights, part, self.config.model, self.contexts[number])
            self.differentiate(again, [], lambda: cotangents.pop(0), number, len(tokens))

    def differentiate(
        self, fn: Callable[..., Tensor], x: list[Tensor], cotangent: Callable[[], Tensor | None], number: int, of: int
    ) -> list[Tensor]:
        """Add the stage's gradient of output `number` of so many to its parts; returns that of the inputs x. cotangent: gives up the
        output's."""
        leaves = tree.leaves(self.weights)
        grads = list(torch.autograd.grad(fn(*x), [*leaves, *x], cotangent()))
        inputs = grads[len(leaves) :]
        del grads[len(leaves) :]
        separate = of <= self.store.max_parts
        if separate or number == 0:
            if number < of - 1:
                self.store.drain()  # what left before is home by now, and its memory is wanted
                grads = in_one_piece(grads, None if separate else torch.float32)
            self.parts.append(grads)
        else:  # one after the other, so that little is there twice
            for total in self.parts[0]:
                self.accumulate(total, grads.pop(0))
        return inputs

    # -- what becomes of a gradient

    def gradient(self, op: Op) -> None:
        parts, self.parts = [list(of_leaf) for of_leaf in zip(*self.parts, strict=True)], []
        self.norms[op.stage] = self.store.gradient(op.stage, parts, self.weights)

    def clip(self, op: Op) -> None:
        norms, limits = torch.stack(self.norms), self.config.optim
        self.factors, self.norm = clip_factors(norms, limits.clip, limits.clip_scope)
        self.store.clip(torch.cat([torch.stack([self.norm, self.nats, self.factors.min()]), norms]))

    def release(self, op: Op) -> None:
        self.store.release(op.stage)
        self.weights = None  # a copy, perhaps: not beside the next


def in_one_piece(grads: list[Tensor], dtype: torch.dtype | None) -> list[Tensor]:
    """A copy of what stays until all is computed, matrices in `dtype`. These in one piece: in several they would lie between activations
    that come and go. Vectors apart: a view would keep the whole."""
    matrices = [g for g in grads if g.dim() > 1]
    copies = iter(flat.flatten(matrices, matrices[0].device, dtype=dtype))
    return [next(copies) if g.dim() > 1 else g.clone() for g in grads]


def make_advance(config: Config, device: torch.device, store: Store) -> Advance:
    """Parameters, moments and gradients are in `store`; computation is on `device`."""
    now = Step(config, device, store)
    handlers: Mapping[Kind, Callable[[Op], Any]] = {
        Kind.FETCH: store.fetch,
        Kind.FETCH_UPDATE: store.fetch,
        Kind.UPDATE: store.fetch,
        Kind.FORWARD: now.forward,
        Kind.SAVE: now.save,
        Kind.LOAD: now.load,
        Kind.BACKWARD: now.backward,
        Kind.GRADIENT: now.gradient,
        Kind.CLIP: now.clip,
        Kind.LEARN: lambda op: store.learn(op.stage),
        Kind.OFFLOAD: lambda op: store.offload(op.stage),
        Kind.KEEP: lambda op: store.keep(op.stage),
        Kind.RELEASE: now.release,
    }

    def advance(state: State, batch: Batch, keys: Sequence[Tensor], count: int) -> tuple[State, Result]:
        program = store.begin(state, batch.tokens.shape)
        now.begin(batch, keys, count)
        for op in program.ops:
            handlers[op.kind](op)
        state, finite = store.finish(state, now.factors)
        return state, Result(now.nats, now.norm, finite)

    return advance
