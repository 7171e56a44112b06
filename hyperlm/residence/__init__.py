"""Where parameters live during a step: `make` gives a `Residence`, and nothing outside knows which.

A residence is a module of `plan(config, dtype, budget) -> Plan` and `make(config, device, plan) -> Residence`, named in RESIDENCES.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Literal, NamedTuple

import torch

from hyperlm import env, memory, tree
from hyperlm.config import Config
from hyperlm.precision import compute_copy
from hyperlm.residence import device as on_device
from hyperlm.residence import host as in_host
from hyperlm.residence.base import Name, Plan, PlanError, Residence, Result, require_planned
from hyperlm.tree import Tree

READING = 1.25  # weights on a device leave a fifth of its memory to what is computed
RESIDENCES: dict[Name, Any] = {"device": on_device, "host": in_host}
EXAMPLE = 5.81  # GiB of device memory to plan for where no budget is set

__all__ = [
    "EXAMPLE",
    "RESIDENCES",
    "Plan",
    "PlanError",
    "Reader",
    "Residence",
    "Result",
    "decide",
    "make",
    "plan",
    "plans",
    "plans_before",
    "reader",
    "require_planned",
]


def plan(config: Config, dtype: torch.dtype, budget: int) -> Plan:
    """The plan of a run that may take `budget` bytes of device memory; on the device, where the residence is still to be decided."""
    name = config.train.residence
    return RESIDENCES["device" if name == "auto" else name].plan(config, dtype, budget)


def plans(config: Config, dtype: torch.dtype) -> list[Plan]:
    """Those of all residences, computing in `dtype`."""
    budget = round((config.train.device_memory or EXAMPLE) * env.GIB) - env.CONTEXT
    return [residence.plan(config, dtype, budget) for residence in RESIDENCES.values()]


def decide(config: Config, dtype: torch.dtype, device: int, host: int, *, gpu: bool) -> Config:
    """The configuration with residence and optimizer state decided where they are auto.

    Of what the settings leave open it is the first that fits: fp32 on the device, fp32 in host memory, int8 on the device, int8 in host
    memory; the last where nothing fits. A CPU is its own host: there all is on the device.

    Args:
        device, host: bytes that may be used of the device's and of the host's.
    """
    open_to: list[Name] = [*RESIDENCES] if gpu else ["device"]
    residences = open_to if config.train.residence == "auto" else [config.train.residence]
    states: list[Literal["fp32", "int8"]] = ["fp32", "int8"] if config.optim.state == "auto" else [config.optim.state]
    ways = [
        replace(config, train=replace(config.train, residence=residence), optim=replace(config.optim, state=state))
        for state in states
        for residence in residences
    ]

    def fits(way: Config) -> bool:
        planned = plan(way, dtype, device)
        return planned.device <= device and planned.host <= host

    return next((way for way in ways[:-1] if fits(way)), ways[-1])


def plans_before(asked: Config, chosen: Plan, dtype: torch.dtype, device: int) -> list[Plan]:
    """The plans in fp32 that `decide` tried for what was asked before it chose one in int8, of `device` bytes."""
    names = [*RESIDENCES][: [*RESIDENCES].index(chosen.residence) + 1] if asked.train.residence == "auto" else [chosen.residence]
    wide = replace(asked, optim=replace(asked.optim, state="fp32"))
    return [RESIDENCES[name].plan(replace(wide, train=replace(wide.train, residence=name)), dtype, device) for name in names]


class Reader(NamedTuple):
    """How weights alone are kept and read."""

    store: Callable[[Tree], Tree]  # a stage of a checkpoint -> as it is kept
    weights: Callable[[Tree], Tree]  # these -> what `model.hidden` and its like compute with


def reader(config: Config, device: torch.device) -> Reader:
    """Weights on the device if they fit it, else in host memory, from where blocks come to the device as they are used."""
    dtype = env.compute_dtype(device)
    count = sum(memory.parameters(config).values())
    if device.type == "cpu" or READING * dtype.itemsize * count < env.allowed_memory(device, 0):
        return Reader(lambda stage: tree.map(lambda p: p.to(device), compute_copy(stage, dtype)), lambda params: params)
    return Reader(partial(in_host.store_stage, device), lambda params: in_host.streamed(params, dtype, device, keep_ends=True))


def make(config: Config, device: torch.device, budget: int | None = None) -> Residence:
    """The residence of a run, planned for `budget` bytes of the device's memory, by default for what may be used of it now."""
    budget = env.allowed_memory(device, config.train.device_memory) if budget is None else budget
    planned = plan(config, env.compute_dtype(device), budget)
    return RESIDENCES[planned.residence].make(config, device, planned)
