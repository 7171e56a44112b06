"""What training changes, and who may still use it."""

from dataclasses import dataclass, field, replace
from itertools import count

from torch import Tensor

from hyperlm.kernels.reference.optimizer import UpdatePart
from hyperlm.tree import Tree


@dataclass(frozen=True)
class Pending:
    """An update, or a part of one, that is decided and not made yet."""

    grads: Tree  # like the parameters, in host memory
    factors: Tensor  # of the gradient of each stage, from clipping
    updates: int  # that were made before
    part: UpdatePart = UpdatePart.FULL  # of it that is left; see `kernels.reference.adamw8`
    moved: tuple[bool, ...] = ()  # of each stage, whether its weights have moved already


class StaleState(RuntimeError):
    """A state was used whose tensors have been updated since, or from which an update is still pending."""


class Uses:
    """How often the tensors that successive states share were updated in place."""

    numbers = count()

    def __init__(self) -> None:
        self.count, self.lineage = 0, next(self.numbers)


@dataclass(frozen=True)
class State:
    """All that training changes. Data order and randomness are functions of (seed, step), so nothing else needs saving.

    Its tensors are updated in place: `consumed` makes a state that was used up an error, as donated buffers are in JAX.
    """

    params: Tree
    opt_state: Tree
    step: int  # steps done
    updates: int  # steps whose update was applied; the rest had a non-finite gradient
    tokens: int  # targets learnt from
    seed: int
    clipped: bool = True  # whether the newest gradient was, or there is none yet
    pending: Pending | None = None  # the newest of these updates, if `step.make_flush` has yet to make it
    uses: Uses = field(default_factory=Uses, compare=False, repr=False)
    use: int = 0  # `uses.count` when this state was made

    def version(self, later: int = 0) -> tuple[int, int]:
        """Which states it shares its tensors with, and after how many updates of these; of one so many updates later."""
        return self.uses.lineage, self.use + later


def consumed(state: State) -> State:
    """`state`, to be updated in place by the caller alone: the one given, and copies of it, cannot be used again.

    Raises:
        StaleState: if it was consumed before.
    """
    require_current(state)
    state.uses.count += 1
    return replace(state, use=state.uses.count)


def require_flushed(state: State) -> None:
    """Before anything but a step reads parameters or moments.

    Raises:
        StaleState: if they were updated since, or are yet to be.
    """
    require_current(state)
    if state.pending is not None:
        raise StaleState(f"an update of step {state.step} is pending: flush the state before its weights are read or saved")


def require_current(state: State) -> None:
    if state.use != state.uses.count:
        raise StaleState(
            f"the state of step {state.step} was consumed: a step updates its tensors in place; use the state that it returned"
        )
