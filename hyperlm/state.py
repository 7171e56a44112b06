"""What training changes."""

from dataclasses import dataclass

from torch import Tensor

from hyperlm.kernels.reference import ALL
from hyperlm.tree import Tree


@dataclass(frozen=True)
class Pending:
    """An update, or a part of one, that is decided and not made yet."""

    grads: Tree  # like the parameters, in host memory
    factors: Tensor  # of the gradient of each stage, from clipping
    updates: int  # that were made before
    what: int = ALL  # the part; see `kernels.reference.adamw8`
    moved: tuple[bool, ...] = ()  # of each stage, whether its weights have moved already


@dataclass(frozen=True)
class State:
    """All that training changes. Data order and randomness are functions of (seed, step), so nothing else needs saving."""

    params: Tree
    opt_state: Tree
    step: int  # steps done
    updates: int  # steps whose update was applied; the rest had a non-finite gradient
    tokens: int  # target tokens seen
    seed: int
    clipped: bool = True  # whether the newest gradient was, or there is none yet
    pending: Pending | None = None  # the newest of these updates, if `step.settle` has yet to make it
