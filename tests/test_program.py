"""A step as data: the program that is run, printed, and what must hold of every one."""

from dataclasses import replace
from itertools import product

import pytest

from hyperlm.residence.program import Kind, Op, Program, Shape, faults, training_step


def shapes() -> list[Shape]:
    """Every policy, at several sizes."""
    found = []
    for layers, groups, slots, aliases, blocks, gradients in product((1, 2, 5), (1, 3), (2, 3), (False, True), (0, 1, 9), (0, 2)):
        for learns, offloads in ((False, True), (True, True), (True, False)):
            found.append(Shape(layers, groups, slots, aliases, min(blocks, layers), gradients, learns=learns, offloads=offloads))
    return found


def steps(shape: Shape, count: int) -> list[tuple[Shape, Program]]:
    """Several steps after one another: updates pending, of all stages, of some, or of none, and weights that are still there."""
    run = []
    for number in range(count):
        pending = [frozenset(), frozenset(range(shape.head + 1)), frozenset(range(0, shape.head + 1, 2)), frozenset()][number % 4]
        program = training_step(replace(shape, pending=pending, held=run[-1][1].held if run else ()))
        run.append((replace(shape, pending=pending, held=run[-1][1].held if run else ()), program))
    return run


def test_every_program_may_be_run():
    for shape in shapes():
        for own, program in steps(shape, 5):
            assert faults(own, program) == [], own


def test_a_step_reads_as_documentation():
    """The first step of two blocks and two groups of micro-batches, three buffers for stages (0 to 2) and one for the head (3)."""
    program = training_step(Shape(layers=2, groups=2, slots=3))
    assert [str(op) for op in program.ops] == FIRST_STEP.strip().splitlines()
    assert program.held == (0, 1, 2)  # so that the next step fetches the head alone


FIRST_STEP = """
fetch 0 -> buffer 0
fetch 1 -> buffer 1
forward 0 group 0
forward 0 group 1
release 0
fetch 2 -> buffer 2
forward 1 group 0
save 1 group 0
forward 1 group 1
save 1 group 1
release 1
fetch 3 -> buffer 3
forward 2 group 0
save 2 group 0
forward 2 group 1
save 2 group 1
release 2
backward 3
load 2 group 0
load 2 group 1
gradient 3
offload 3
release 3
backward 2 group 0
load 1 group 0
backward 2 group 1
load 1 group 1
gradient 2
offload 2
release 2
backward 1 group 0
backward 1 group 1
gradient 1
offload 1
release 1
backward 0
gradient 0
clip 0
offload 0
release 0
"""


def fetches(program: Program) -> list[int]:
    return [op.stage for op in program.ops if op.kind in (Kind.FETCH, Kind.FETCH_UPDATE)]


def test_what_crosses_the_bus_is_counted_on_the_list():
    """Each stage comes once forward and once backward, but the head, and what is still there; with room for all, a second step fetches the head alone."""
    (_, first), (_, second) = steps(Shape(layers=5, groups=2, slots=3), 2)
    assert fetches(first) == [0, 1, 2, 3, 4, 5, 6, 2, 1, 0] and fetches(second) == [3, 4, 5, 6, 2, 1, 0]
    assert [op.stage for op in second.ops if op.kind == Kind.UPDATE] == [0, 1, 2]  # of those, the update alone
    (_, first), (_, second) = steps(Shape(layers=1, groups=1, slots=3), 2)
    assert fetches(first) == [0, 1, 2] and fetches(second) == [2]
    assert [op.stage for op in first.ops if op.kind == Kind.LOAD] == [1]
    resident = training_step(Shape(layers=1, groups=1, slots=3, resident_blocks=1))
    assert not [op for op in resident.ops if op.kind == Kind.LOAD]


def test_no_more_stages_are_wanted_at_a_time_than_there_are_buffers():
    for shape in shapes():
        wanted: set[int] = set()
        for op in training_step(shape).ops:
            if op.kind == Kind.FETCH or op.kind in (Kind.FORWARD, Kind.BACKWARD):
                wanted.add(op.stage)
            elif op.kind == Kind.RELEASE:
                wanted.discard(op.stage)
            assert len(wanted - {shape.head}) <= shape.slots, shape


def without(program: Program, op: Op) -> Program:
    return program._replace(ops=tuple(x for x in program.ops if x != op))


def moved(program: Program, op: Op, before: Op) -> Program:
    ops = [x for x in program.ops if x != op]
    ops.insert(ops.index(before), op)
    return program._replace(ops=tuple(ops))


SHAPE = Shape(layers=3, groups=2, slots=3, pending=frozenset(range(5)))


def first(program: Program, kind: Kind, stage: int, group: int = -1) -> Op:
    return next(op for op in program.ops if (op.kind, op.stage, op.group) == (kind, stage, group))


@pytest.mark.parametrize(
    ("harm", "fault"),
    [
        (lambda p: without(p, first(p, Kind.FETCH_UPDATE, 2)), "the stage is not there"),
        (lambda p: moved(p, first(p, Kind.FETCH_UPDATE, 3), first(p, Kind.FORWARD, 0, 0)), "has stage 0, which is wanted"),
        (lambda p: without(p, first(p, Kind.LOAD, 2, 1)), "its residuals are not there"),
        (lambda p: moved(p, first(p, Kind.LOAD, 1, 1), first(p, Kind.GRADIENT, 4)), "no buffer is free for it"),
        (lambda p: without(p, first(p, Kind.SAVE, 1, 0)), "it did not leave"),
        (lambda p: without(p, first(p, Kind.GRADIENT, 2)), "the stage after has no gradient yet"),
        (lambda p: moved(p, first(p, Kind.FORWARD, 2, 1), first(p, Kind.FORWARD, 1, 1)), "the stage before has not run"),
        (lambda p: moved(p, first(p, Kind.OFFLOAD, 1), first(p, Kind.GRADIENT, 1)), "its gradient is not whole"),
    ],
)
def test_what_is_wrong_with_a_program_is_found(harm, fault):
    assert any(fault in line for line in faults(SHAPE, harm(training_step(SHAPE))))


def test_an_update_that_is_forgotten_is_found():
    program = training_step(replace(SHAPE, pending=frozenset()))
    lines = faults(SHAPE, program)
    assert "forward 1 group 0: its update is pending" in lines and "stage 4 was never updated" in lines
