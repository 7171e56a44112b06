"""One model trained from nothing by the same rules as every other: what suites that compare kinds have in common."""

from dataclasses import dataclass, field
from pathlib import Path

import torch

from hyperlm.config import Config


@dataclass(frozen=True)
class Job:
    """A model to train."""

    label: str  # phase7, hybrid, nanogpt-muon, ...: see arms.py
    config: Config  # resolved: rate, seed, steps, data and model's kind are its own
    keep: Path | None = None  # where the model is left as a folder of a run, for chat.py and other suites; no folder if None


@dataclass(frozen=True)
class Point:
    """A moment of a curve."""

    step: int
    tokens: int
    seconds: float  # of training alone: evaluations and the first step, in which kernels are compiled, are not counted
    train_loss: float  # mean since the point before, nats a token
    val_loss: float


@dataclass(frozen=True)
class Outcome:
    """What a job came to."""

    parameters: int
    val: dict[str, float]  # of the last step, as `evals.evaluate` returns it: val_loss, val_bpb, ...
    curve: list[Point]
    tokens_per_second: float  # of training alone
    gib: float  # peak memory
    extra: dict[str, float] = field(default_factory=dict)


def train(job: Job, device: torch.device) -> Outcome:
    """Train the model of a job on the text of its configuration, on one device, and evaluate it ten times on the way.

    Raises:
        DataError: if the text cannot be read.
    """
    raise NotImplementedError
