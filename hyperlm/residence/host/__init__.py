"""Parameters and optimizer state in host memory; stages come to the device one after the other, so that it holds two or three of them.

Only residuals of blocks stay between the passes: the input of every block in the dtype of the matrices, and what else is cheap to keep, on
the device or away in host memory; a gradient goes home as soon as it is whole. `policy` says what is decided of a run, `search` decides it,
`buffers` are what it takes; `store` is what `layerwise` runs a step's program over.
"""

from functools import partial

import torch

from hyperlm.config import Config
from hyperlm.env import compute_dtype
from hyperlm.residence import flat, layerwise
from hyperlm.residence.base import Plan, Residence
from hyperlm.residence.host.search import plan
from hyperlm.residence.host.store import HostStore
from hyperlm.residence.host.streamed import streamed
from hyperlm.residence.host.update import make_flush
from hyperlm.tree import Tree

__all__ = ["make", "plan", "store_stage", "streamed"]


def store_stage(device: torch.device, stage: Tree) -> Tree:
    """A stage in a flat buffer of host memory, pinned if `device` is a GPU."""
    return flat.flatten(stage, pin=device.type == "cuda")


def make(config: Config, device: torch.device, planned: Plan) -> Residence:
    return Residence(
        config,
        device,
        home=flat.CPU,
        plan=planned,
        store=partial(store_stage, device),
        weights=lambda params: streamed(params, compute_dtype(device), device, keep_ends=False),
        advance=lambda schedule: layerwise.make_advance(config, device, HostStore(config, schedule, device, planned)),
        flush=lambda schedule: make_flush(config, schedule, device),
    )
