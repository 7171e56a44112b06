"""Is what was trained worth keeping? A checkpoint takes the place of an older one, so weights that diverged must not become one.

A step's loss is that of the weights before it; what the weights after it are worth is not known until they are used. So before a state is
saved, its loss on a fixed sample of training text is measured, the same one each time: it rises where a run diverges, and not where it
overfits.
"""

import math

import torch

from hyperlm import evals, tree
from hyperlm.batch import Batch, joined
from hyperlm.config import Config
from hyperlm.data import Batches
from hyperlm.state import State
from hyperlm.tree import Tree

SAMPLE = 2048  # tokens that the loss is measured on
MARGIN = 2.0  # nats a token: a loss that is farther above the lowest of the checkpoints there are, or above that of guessing, is far above


def sample_of(order: Batches, config: Config) -> Batch:
    """The first sequences that a run learns from, (S, N): at least SAMPLE tokens are read."""
    n, a_step = config.data.seq_len, config.train.batch_size * config.train.grad_accum
    wanted = -(-SAMPLE // n)
    return joined([order.at(step).map(lambda x: x.flatten(0, 1)) for step in range(-(-wanted // a_step))]).map(lambda x: x[:wanted])


def loss_of(weights: Tree, sample: Batch, config: Config, device: torch.device, batch: int) -> float:
    """Nats a learnt token on `sample`; `batch` sequences at a time."""
    nats, tokens, *_ = evals.nats_of(weights, sample, config, device, batch)
    return nats / tokens


def flaw(state: State, loss: float, before: list[float], config: Config) -> str:
    """Why `state` must not be saved, in words; empty if it may.

    Args:
        loss: as `loss_of` measures it.
        before: that of the checkpoints that there are.
    """
    if not math.isfinite(loss):
        return f"its loss is {loss}"
    best = min([*before, math.log(config.model.vocab_size)])
    if loss > best + MARGIN:
        return f"its loss, {loss:.2f}, is far above " + (
            f"{min(before):.2f}, where it was" if before and min(before) == best else f"that of guessing, {best:.2f}"
        )
    if not all_finite(state):
        return "weights or moments are not finite"
    return ""


def all_finite(state: State) -> bool:
    """Whether parameters and moments are; codes of 8-bit moments are taken as they are."""
    floating = [x for x in tree.leaves((state.params, state.opt_state)) if x.is_floating_point() and x.numel()]
    return all(bool(torch.isfinite(torch.stack(torch.aminmax(x))).all()) for x in floating)
