"""A training step as data: what is done with which stage, in order.

Layer-major: every micro-batch goes through one stage before the next stage is touched, so that few stages are on the device at a time.
Forward, a block saves residuals; backward, stage after stage in reverse, each is computed again from them with its graph. The embedding is
stage 0, the head the last.

A residence builds the program of a step and runs it (`layerwise`). What must hold of it, that no buffer is overwritten while it is wanted
and no stage used before its update, is read off the list: see `faults`.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum, auto
from functools import lru_cache
from typing import NamedTuple


class Kind(StrEnum):
    FETCH = auto()  # a stage's weights come to the device, into its buffers
    FETCH_UPDATE = auto()  # they come with what their pending update needs, chunk by chunk, and are updated
    UPDATE = auto()  # a stage that is still there is updated
    FORWARD = auto()  # of a stage and a group of micro-batches, without gradients
    SAVE = auto()  # a block's residuals are kept for the backward pass
    LOAD = auto()  # they come back, where they left the device
    BACKWARD = auto()  # of a stage and a group: forward again, and gradients; of the head with the loss
    GRADIENT = auto()  # a stage's gradient is whole: its norm, and what of it leaves
    CLIP = auto()  # all norms are known
    LEARN = auto()  # the stage is updated by that gradient, now
    OFFLOAD = auto()  # the gradient leaves for host memory
    KEEP = auto()  # and stays, too, for the update that is pending
    RELEASE = auto()  # the stage's buffers may be overwritten


class Op(NamedTuple):
    kind: Kind
    stage: int
    group: int = -1
    buffers: tuple[int, ...] = ()  # that are written

    def __str__(self) -> str:
        group = f" group {self.group}" if self.group >= 0 else ""
        into = f" -> buffer {', '.join(map(str, self.buffers))}" if self.buffers else ""
        return f"{self.kind.replace('_', ' and ')} {self.stage}{group}{into}"


@dataclass(frozen=True)
class Shape:
    """What a program follows from."""

    layers: int
    groups: int  # of micro-batches
    slots: int  # buffers for stages, the head aside
    head_aliases_slots: bool = False  # whether the head takes the place of all of them but the last, and has none of its own
    resident_blocks: int = 0  # from the first, whose residuals stay on the device
    resident_gradients: int = 0  # stages, from the first, whose gradients stay
    loads: int = 2  # buffers for residuals on their way back
    learns: bool = False  # whether a stage is updated when its gradient is there
    offloads: bool = True  # whether gradients go to host memory
    pending: frozenset[int] = frozenset()  # stages that must not be used before an update that the step before left
    held: tuple[int, ...] = ()  # the stage whose weights each slot still has; -1 for none

    @property
    def head(self) -> int:
        return self.layers + 1

    def buffers(self, stage: int) -> tuple[int, ...]:
        """Where a stage comes to: always the same, the last block to the last slot."""
        if stage == self.head:
            return tuple(range(self.slots - 1)) if self.head_aliases_slots else (self.slots,)
        return ((stage + self.slots - 1 - self.layers) % self.slots,)


def groups_of(micro_batches: int, size: int) -> int:
    """Into how many groups micro-batches fall: of `size` each, or one by one where that does not divide them."""
    return micro_batches // size if micro_batches % size == 0 else micro_batches


class Program(NamedTuple):
    ops: tuple[Op, ...]
    held: tuple[int, ...]  # what slots have when it ends


class Fetching:
    """Which stages come when: as many at a time as there is room for, while none is in use."""

    def __init__(self, shape: Shape) -> None:
        self.shape, self.held = shape, list(shape.held) or [-1] * shape.slots
        forward, backward = range(shape.head + 1), reversed(range(shape.head))
        self.coming = deque([*((stage, True) for stage in forward), *((stage, False) for stage in backward)])
        self.fetched: deque[int] = deque()

    def ahead(self) -> Iterator[Op]:
        shape = self.shape
        while self.coming and len(self.fetched) < shape.slots - 1:
            stage, first = self.coming[0]
            beside = {*self.fetched, stage}
            if shape.head_aliases_slots and shape.head in beside and not beside <= {shape.head - 1, shape.head}:
                return
            self.coming.popleft()
            self.fetched.append(stage)
            buffers, update = shape.buffers(stage), first and stage in shape.pending
            if stage != shape.head and self.held[buffers[0]] == stage:
                if update:
                    yield Op(Kind.UPDATE, stage)
                continue
            for slot in buffers:
                if slot < shape.slots:
                    self.held[slot] = stage
            yield Op(Kind.FETCH_UPDATE if update else Kind.FETCH, stage, buffers=buffers)

    def use(self, stage: int) -> None:
        assert self.fetched.popleft() == stage


@lru_cache(maxsize=8)
def training_step(shape: Shape) -> Program:
    """The program of one step."""
    head, groups, fetching = shape.head, range(shape.groups), Fetching(shape)
    loads = iter([(stage, group) for stage in reversed(range(1, head)) for group in groups])

    def load() -> Iterator[Op]:
        stage, group = next(loads, (0, 0))
        if stage > shape.resident_blocks:
            yield Op(Kind.LOAD, stage, group)

    def learn(stage: int) -> Iterator[Op]:
        if shape.learns:
            yield Op(Kind.LEARN, stage)
        if shape.offloads:
            yield Op(Kind.OFFLOAD, stage)
        if shape.offloads and not shape.learns and stage < shape.resident_gradients:
            yield Op(Kind.KEEP, stage)

    def forward(stage: int) -> Iterator[Op]:
        for group in groups:
            yield Op(Kind.FORWARD, stage, group)
            if stage:
                yield Op(Kind.SAVE, stage, group)

    def backward(stage: int) -> Iterator[Op]:
        is_block = 0 < stage < head
        for group in groups if is_block else (-1,):
            yield Op(Kind.BACKWARD, stage, group)
            for _ in range(1 if is_block else shape.loads if stage == head else 0):
                yield from load()
        yield Op(Kind.GRADIENT, stage)
        if stage == 0:
            yield Op(Kind.CLIP, stage)
        yield from learn(stage)

    def steps() -> Iterator[Op]:
        yield from fetching.ahead()
        passes = [(forward, stage) for stage in range(head)] + [(backward, stage) for stage in reversed(range(head + 1))]
        for run, stage in passes:
            fetching.use(stage)
            yield from run(stage)
            yield Op(Kind.RELEASE, stage)
            yield from fetching.ahead()

    ops = tuple(steps())
    return Program(ops, tuple(-1 if stage == head else stage for stage in fetching.held))


def faults(shape: Shape, program: Program) -> list[str]:
    """What is wrong with a program; nothing, if it may be run."""
    problems: list[str] = []
    holds: dict[int, int] = {slot: stage for slot, stage in enumerate(shape.held) if stage >= 0}  # the stage in each buffer
    wanted: set[int] = set()  # stages that were fetched and not yet released
    due, saved, loaded, forwards = set(shape.pending), set(), set(), set()
    gradients: set[int] = set()

    def require(holding: bool, op: Op, why: str) -> None:
        if not holding:
            problems.append(f"{op}: {why}")

    for op in program.ops:
        stage, group = op.stage, op.group
        match op.kind:
            case Kind.FETCH | Kind.FETCH_UPDATE:
                for buffer in op.buffers:
                    require(holds.get(buffer) not in wanted, op, f"buffer {buffer} has stage {holds.get(buffer)}, which is wanted")
                    holds[buffer] = stage
                wanted.add(stage)
        if op.kind in (Kind.UPDATE, Kind.FETCH_UPDATE):
            require(stage in due, op, "nothing is pending")
            due.discard(stage)
        if op.kind in (Kind.UPDATE, Kind.FORWARD, Kind.BACKWARD, Kind.LEARN):
            require(all(holds.get(buffer) == stage for buffer in shape.buffers(stage)), op, "the stage is not there")
            wanted.add(stage)
        if op.kind in (Kind.FORWARD, Kind.BACKWARD):
            require(stage not in due, op, "its update is pending")
        match op.kind:
            case Kind.FORWARD:
                require(stage == 0 or (stage - 1, group) in forwards, op, "the stage before has not run")
                forwards.add((stage, group))
            case Kind.SAVE:
                saved.add((stage, group))
            case Kind.LOAD:
                require((stage, group) in saved and stage > shape.resident_blocks, op, "it did not leave")
                loaded.add((stage, group))
                require(len(loaded) <= shape.loads, op, "no buffer is free for it")
            case Kind.BACKWARD if 0 < stage < shape.head:
                require((stage, group) in (loaded if stage > shape.resident_blocks else saved), op, "its residuals are not there")
                loaded.discard((stage, group))
                require(stage + 1 in gradients, op, "the stage after has no gradient yet")
            case Kind.GRADIENT:
                gradients.add(stage)
            case Kind.LEARN | Kind.OFFLOAD | Kind.KEEP:
                require(stage in gradients, op, "its gradient is not whole")
            case Kind.RELEASE:
                wanted.discard(stage)
    problems += [f"stage {stage} was never updated" for stage in sorted(due)]
    problems += [f"stage {stage} has no gradient" for stage in range(shape.head + 1) if stage not in gradients]
    return problems
