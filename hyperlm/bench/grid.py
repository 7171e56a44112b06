"""The learning rate that suits each arm: all of a grid with one seed, on from there where the best is at an edge; then other seeds at the best."""

import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from hyperlm.bench import checks
from hyperlm.bench.arms import PEERS
from hyperlm.bench.peers import gpt
from hyperlm.bench.pool import Failure, side_by_side
from hyperlm.bench.training import Job, Outcome, train
from hyperlm.config import Config, ConfigError, peak_rate

MULTIPLES = (0.5, 1.0, 2.0)  # of the rule's rate, to begin with
EXTENSIONS = 3  # factors of two that a grid goes on by, at most
NO_LOSS = math.inf  # of what failed or diverged


@dataclass(frozen=True)
class Trial:
    """One training of an arm, and what came of it."""

    rate: float
    seed: int
    found: Outcome | Failure

    @property
    def loss(self) -> float:
        """Validation loss at the end, nats a token; NO_LOSS where there is none."""
        loss = NO_LOSS if isinstance(self.found, Failure) else self.found.val["val_loss"]
        return loss if math.isfinite(loss) else NO_LOSS


Trials = dict[str, list[Trial]]  # of each arm, in the order in which they ended


def rates_of(config: Config) -> tuple[float, ...]:
    """A grid to begin with: around what `config.peak_rate` gives the width."""
    return tuple(multiple * peak_rate(config.model) for multiple in MULTIPLES)


def check(rates: Sequence[float], seeds: Sequence[int]) -> None:
    """Raises ConfigError on what cannot be trained with."""
    if not all(0 < rate < math.inf for rate in rates) or len(set(rates)) < len(rates):
        raise ConfigError(f"--rates {' '.join(f'{rate:g}' for rate in rates)}: must be different rates above 0")
    if not seeds or min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise ConfigError(f"--seeds {' '.join(map(str, seeds))}: must be one or more different numbers from 0 on")


# -- what to train ---------------------------------------------------------------------------------------------------------------------


def best_rate(trials: Sequence[Trial], seed: int) -> float | None:
    """The rate with the lowest loss for `seed`; None where none has any."""
    finite = [trial for trial in trials if trial.seed == seed and trial.loss < NO_LOSS]
    return min(finite, key=lambda trial: trial.loss).rate if finite else None


def at_best(trials: Sequence[Trial], seed: int) -> dict[int, Outcome]:
    """By seed, what an arm came to at the rate that is best for `seed`; what failed or diverged there is left out."""
    own = [trial for trial in trials if trial.rate == best_rate(trials, seed) and trial.loss < NO_LOSS]
    return {trial.seed: trial.found for trial in own if isinstance(trial.found, Outcome)}


def beyond(best: float, tried: Sequence[float]) -> float | None:
    """The next rate, where `best` is the least or the largest of those tried."""
    if best == max(tried):
        return 2 * best
    return best / 2 if best == min(tried) else None


def wanted(trials: Sequence[Trial], rates: Sequence[float], seeds: Sequence[int]) -> list[tuple[float, int]]:
    """The (rate, seed) that an arm is to be trained with next, given what was: the grid with the first seed; where the best is at its edge,
    one rate beyond; then the other seeds at the best. Nothing where all is known, or nothing works."""
    done = {(trial.rate, trial.seed) for trial in trials}
    if missing := [(rate, seeds[0]) for rate in rates if (rate, seeds[0]) not in done]:
        return missing
    best, tried = best_rate(trials, seeds[0]), [rate for rate, seed in done if seed == seeds[0]]
    if best is None:
        return []
    if len(rates) > 1 and (further := beyond(best, tried)) and len(tried) < len(rates) + EXTENSIONS:
        return [(further, seeds[0])]
    return [(best, seed) for seed in seeds if (best, seed) not in done]


def measure(job: Job, device: torch.device) -> Outcome:
    """Train, after a check that what is trained looks back only, and that its kernels are right."""
    if job.label in PEERS:
        shape = replace(gpt.shape(job.config), layers=2)
        nats = partial(gpt.token_nats, gpt.GPT(shape, 0, device))
        checks.causal(nats, shape.vocabulary, device, min(shape.length, checks.LENGTH))
    else:
        checks.model(job.config, device)
    return train(job, device)


def search(
    arms: Mapping[str, Config],
    devices: Sequence[torch.device],
    *,
    rates: Sequence[float],
    seeds: Sequence[int],
    folder: Path | None = None,
    desc: str = "",
) -> Iterator[Trials]:
    """Train every arm at its best rate with each of `seeds`; the first of them chooses the rate.

    Args:
        arms: label -> resolved configuration, but for rate and seed. The text is tokenised already: see `data.prepare`.
        rates: peak learning rates to begin with.
        folder: where models of the first seed at the best rate are left, each as the run `folder/<label>`; peers are none.

    Yields:
        All trials so far, the same dictionary each time, once for each that ended.
    """
    trials: Trials = {label: [] for label in arms}
    while True:
        jobs = []
        for label, config in arms.items():
            for rate, seed in wanted(trials[label], rates, seeds):
                own = replace(config, optim=replace(config.optim, lr=rate), train=replace(config.train, seed=seed))
                jobs.append(Job(label, own, folder / f".{label} at {rate:g}" if folder and seed == seeds[0] else None))
        if not jobs:
            return
        for job, found in side_by_side(measure, jobs, devices, desc=desc):
            trials[job.label].append(Trial(job.config.optim.lr, job.config.train.seed, found))
            if job.keep and job.keep.exists():
                keep_best(job, job.keep, trials[job.label])
            yield trials


def keep_best(job: Job, kept: Path, trials: Sequence[Trial]) -> None:
    """Put what a job left in the place of the arm's model if it is the best so far; else remove it."""
    place = kept.with_name(job.label)
    if best_rate(trials, job.config.train.seed) == job.config.optim.lr:
        shutil.rmtree(place, ignore_errors=True)
        os.replace(kept, place)
    else:
        shutil.rmtree(kept)
