"""The weights of a run, to evaluate it or to talk to it."""

from pathlib import Path
from typing import Any, NamedTuple

import torch

from configs import Config
from hyperlm import checkpoint, plan, tree
from hyperlm.env import allowed_memory, compute_dtype
from hyperlm.precision import compute_copy
from hyperlm.residence.host import in_host_memory
from hyperlm.residence.streamed import streamed
from hyperlm.tree import Tree

ROOM = 1.25  # weights on a device leave a fifth of its memory to what is computed


class Trained(NamedTuple):
    weights: Tree  # for `model.hidden` and its like
    step: int
    tokens: int
    meta: dict[str, Any]


def load(run: Path, step: int, config: Config, device: torch.device) -> Trained:
    """Read a checkpoint's parameters: to the device if they fit it, else to host memory, from where blocks come to the device as they are used.

    Raises:
        CheckpointError: if it is missing or damaged.
    """
    dtype = compute_dtype(device)
    fits = device.type == "cpu" or ROOM * dtype.itemsize * sum(plan.parameters(config).values()) < allowed_memory(device, 0)

    def place(stage: Tree) -> Tree:
        return tree.map(lambda p: p.to(device), compute_copy(stage, dtype)) if fits else in_host_memory(stage, device)

    state, meta = checkpoint.restore(run, step, config, place, with_opt=False)
    params = state.params if fits else streamed(state.params, dtype, device, keep_ends=True)
    return Trained(params, state.step, state.tokens, meta)
