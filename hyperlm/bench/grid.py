"""The learning rate that suits each arm: all of a grid with one seed, on from there where the best is at an edge; then the FINALISTS of
them with all seeds, of which the mean decides. One seed alone would choose what is lucky with it, such as a rate at which others nearly
diverge."""

import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean

import torch

from hyperlm.bench import checks
from hyperlm.bench.arms import PEERS
from hyperlm.bench.peers import gpt
from hyperlm.bench.pool import Failure, side_by_side
from hyperlm.bench.training import Job, Outcome, train
from hyperlm.config import Config, ConfigError, resolve

MULTIPLES = (0.5, 1.0, 2.0)  # of the run's rate, to begin with
EXTENSIONS = 3  # factors of two that a grid goes on by, at most
FINALISTS = 2  # rates that are tried with all seeds
NO_LOSS = math.inf  # of what failed or diverged


@dataclass(frozen=True)
class Trial:
    """One training of an arm, and what came of it."""

    rate: float
    seed: int
    outcome: Outcome | Failure

    @property
    def loss(self) -> float:
        """Validation loss at the end, nats a token; NO_LOSS where there is none."""
        loss = NO_LOSS if isinstance(self.outcome, Failure) else self.outcome.val["val_loss"]
        return loss if math.isfinite(loss) else NO_LOSS


Trials = dict[str, list[Trial]]  # of each arm, in the order in which they ended


def rates_of(config: Config) -> tuple[float, ...]:
    """A grid to begin with: around the rate of the run, which is that of `config.peak_rate` where it has none of its own."""
    return tuple(multiple * resolve(config).optim.lr for multiple in MULTIPLES)


def check(rates: Sequence[float], seeds: Sequence[int]) -> None:
    """Raises ConfigError on what cannot be trained with."""
    if not all(0 < rate < math.inf for rate in rates) or len(set(rates)) < len(rates):
        raise ConfigError(f"--rates {' '.join(f'{rate:g}' for rate in rates)}: must be different rates above 0")
    if not seeds or min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise ConfigError(f"--seeds {' '.join(map(str, seeds))}: must be one or more different numbers from 0 on")


# -- what to train ---------------------------------------------------------------------------------------------------------------------


def ranked(trials: Sequence[Trial]) -> list[float]:
    """The rates at which there is a loss, the best first: of as many seeds as any, the lowest mean."""
    losses: dict[float, list[float]] = {}
    for trial in trials:
        if trial.loss < NO_LOSS:
            losses.setdefault(trial.rate, []).append(trial.loss)
    return sorted(losses, key=lambda rate: (-len(losses[rate]), mean(losses[rate])))


def best_rate(trials: Sequence[Trial]) -> float | None:
    """None where there is no loss."""
    return next(iter(ranked(trials)), None)


def at_best(trials: Sequence[Trial]) -> dict[int, Outcome]:
    """By seed, what an arm came to at its best rate; what failed or diverged there is left out."""
    best = best_rate(trials)
    return {
        trial.seed: trial.outcome for trial in trials if trial.rate == best and isinstance(trial.outcome, Outcome) and trial.loss < NO_LOSS
    }


def of_seed(trials: Sequence[Trial], seed: int) -> list[Trial]:
    return [trial for trial in trials if trial.seed == seed]


def beyond(best: float, tried: Sequence[float]) -> float | None:
    """The next rate, where `best` is the least or the largest of those tried."""
    if best == max(tried):
        return 2 * best
    return best / 2 if best == min(tried) else None


def wanted(trials: Sequence[Trial], rates: Sequence[float], seeds: Sequence[int]) -> list[tuple[float, int]]:
    """The (rate, seed) that an arm is to be trained with next, given what was: the grid with the first seed; where the best is at its edge,
    one rate beyond; then the other seeds at the best few. Nothing where all is known, or nothing works."""
    done, first = {(trial.rate, trial.seed) for trial in trials}, of_seed(trials, seeds[0])
    if missing := [(rate, seeds[0]) for rate in rates if (rate, seeds[0]) not in done]:
        return missing
    best, tried = ranked(first)[:FINALISTS], [trial.rate for trial in first]
    if len(rates) > 1 and best and (further := beyond(best[0], tried)) and len(tried) < len(rates) + EXTENSIONS:
        return [(further, seeds[0])]
    return [(rate, seed) for rate in best for seed in seeds if (rate, seed) not in done]


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
    """Train every arm at its best rate with each of `seeds`: see `wanted`.

    Args:
        arms: label -> resolved configuration, but for rate and seed. The text is tokenised already: see `data.prepare`.
        rates: peak learning rates to begin with.
        folder: where the first seed's models at the best rates are left, each as the run `folder/<label>`; peers are none.

    Yields:
        All trials so far, the same dictionary each time, once for each that ended.
    """
    trials: Trials = {label: [] for label in arms}
    models = {label: Kept(folder, label) for label in arms} if folder else {}
    jobs: list[Job] = []

    def ask(label: str) -> None:
        for rate, seed in wanted(trials[label], rates, seeds):
            config = arms[label]
            variant = replace(config, optim=replace(config.optim, lr=rate), train=replace(config.train, seed=seed))
            jobs.append(Job(label, variant, models[label].at(rate) if models and seed == seeds[0] else None))

    try:
        for label in arms:
            ask(label)
        for job, outcome in side_by_side(measure, jobs, devices, desc=desc):
            trials[job.label].append(Trial(job.config.optim.lr, job.config.train.seed, outcome))
            if models:
                models[job.label].choose(trials[job.label], seeds[0])
            if len(trials[job.label]) == sum(other.label == job.label for other in jobs):  # what is next depends on all of them
                ask(job.label)
            yield trials
    finally:
        for arm_models in models.values():
            arm_models.close()


class Kept:
    """The models of an arm that one seed left: that of the best rate in its place, and those of others, while they may become it,
    hidden."""

    def __init__(self, folder: Path, label: str) -> None:
        self.place, self.rate = folder / label, 0.0

    def at(self, rate: float) -> Path:
        """Where the model of a rate is left, until it is known to be the best."""
        return self.place.with_name(f".{self.place.name} at {rate:g}")

    def choose(self, trials: Sequence[Trial], seed: int) -> None:
        best = best_rate(trials)
        if best is not None and best != self.rate and self.at(best).exists():
            if self.place.exists():
                os.replace(self.place, self.at(self.rate))
            os.replace(self.at(best), self.place)
            self.rate = best
        ended = of_seed(trials, seed)  # what is not may be writing its model
        for rate in {trial.rate for trial in ended}.difference(ranked(ended)[:FINALISTS]):
            shutil.rmtree(self.at(rate), ignore_errors=True)

    def close(self) -> None:
        """Remove what is hidden."""
        for path in self.place.parent.glob(f".{self.place.name} at *"):
            shutil.rmtree(path, ignore_errors=True)
