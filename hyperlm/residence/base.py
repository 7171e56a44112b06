"""What every residence is, and what it promises."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from hyperlm.batch import Batch
from hyperlm.config import Config
from hyperlm.optim import Schedule
from hyperlm.state import State
from hyperlm.tree import Tree

Name = Literal["device", "host"]


@dataclass(frozen=True)
class Plan:
    """Bytes that a run needs, by what they are for, and what a residence decided of it. Made once for a run, printed, and executed."""

    residence: Name
    weights: int  # this and the next three on the device
    gradients: int
    optimizer: int
    activations: int
    host: int
    group: int = 1  # micro-batches at a time
    eval_micro_batches: int = 1  # that evaluation takes at a time
    words: str = ""  # what stays where, for people
    # Of a step to the device, and home: after one that was clipped, and after one that was not.
    bytes_moved: tuple[tuple[int, int], tuple[int, int]] = ((0, 0), (0, 0))
    largest: tuple[int, int, int] | None = None  # micro-batches (A, B, N) that there is memory for; None where a step takes what it needs
    policy: Any = None  # what the residence itself decided

    @property
    def device(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations


class PlanError(ValueError):
    """What is to be executed is not what was planned."""


def require_planned(plan: Plan, shape: torch.Size) -> None:
    """Before a step of micro-batches (A, B, N).

    Raises:
        PlanError: if they are more, or larger, than what memory was planned for.
    """
    if plan.largest is not None and (shape[0] > plan.largest[0] or shape[1] * shape[2] > plan.largest[1] * plan.largest[2]):
        planned, given = (" x ".join(map(str, sizes)) for sizes in (plan.largest, shape))
        raise PlanError(f"a batch of {given} tokens, where memory was planned for {planned}")


class Result(NamedTuple):
    """What a step found."""

    nats: Tensor  # summed over all targets that are learnt
    norm: Tensor  # of the gradient of nats / count, before clipping
    finite: bool  # whether both are; if not, nothing was learnt, but by stages that are updated before all norms are known


# (state, batch (A, B, N), the micro-batches' dropout keys (A), learnt targets in all of them (at least 1)) -> the state with its parameters
# learned (or, if the result is not finite, as `Result` says). The state is consumed: its tensors are updated in place, now or when they are
# next used.
Advance = Callable[[State, Batch, Sequence[Tensor], int], tuple[State, Result]]


class Residence(NamedTuple):
    """Where parameters and optimizer state live, and how a step reaches them: all that anything outside knows of it."""

    config: Config
    device: torch.device  # that computes
    home: torch.device  # where stages are made, before they are stored
    plan: Plan
    store: Callable[[Tree], Tree]  # a stage of tensors -> as it lives here
    weights: Callable[[Tree], Tree]  # parameters -> what `model.hidden` and its like compute with
    advance: Callable[[Schedule], Advance]  # the step of a run whose learning rate follows the schedule
    flush: Callable[[Schedule], Callable[[State], State]]  # what is pending of an update is made, and all is written

    @property
    def eval_batch(self) -> int:
        """Sequences that are evaluated at a time."""
        return self.plan.eval_micro_batches * self.config.train.batch_size
