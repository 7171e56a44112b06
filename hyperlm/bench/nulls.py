"""Suite `nulls`: is it geometry? Phase 7 trained beside its nulls (mixers/phase7.py), which share every parameter with it.

From the cosine of the directions to log cosh of the distance there are two steps that any dot-product attention can make, a bias of the keys and a gain;
what the whole has beyond both, the higher orders in the product of Klein coordinates, is geometry and nothing else is. All begin with the same values
and read the same batches for a seed, so that differences are taken seed by seed.
"""

import math
import os
import shutil
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch

from hyperlm import data
from hyperlm.bench import checks, training
from hyperlm.bench.pool import Failure, side_by_side
from hyperlm.bench.report import Bars, Result, Row, Table
from hyperlm.bench.training import Job, Outcome
from hyperlm.config import Config, ConfigError

# Labels, and the score that each is: up to a term of the query alone, which a softmax drops, N3 is N4 to first order.
ARMS = {
    "N0 cosine": ("cosine", "β cos: the twin"),
    "N1 bias": ("bias", "β cos − β log cosh r_k"),
    "N2 gain": ("gain", "β tanh r_q tanh r_k cos"),
    "N3 first order": ("first-order", "β tanh r_q tanh r_k cos − β log cosh r_k"),
    "N4 phase7": ("logcosh", "−β log cosh d"),
}
N0, N1, N2, N3, N4 = ARMS
PARTS = {"bias of keys": (N0, N1), "gain": (N0, N2), "both, first order": (N0, N3), "geometry": (N3, N4), "all of phase7": (N0, N4)}
# By how many standard errors the mean of n pairs is off in 5 % of cases at most: 97.5 % quantiles of Student's t with n - 1 degrees of freedom.
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}


@dataclass(frozen=True)
class Grid:
    """What was tried so far."""

    outcomes: dict[tuple[str, float, int], Outcome | Failure]  # by label, rate and seed
    seed: int  # on which rates are chosen

    def loss(self, label: str, rate: float, seed: int) -> float:
        """Nats a token of validation; nan where it diverged or failed, or is not there."""
        found = self.outcomes.get((label, rate, seed))
        return found.val["val_loss"] if isinstance(found, Outcome) else math.nan

    def rate(self, label: str) -> float | None:
        """The best rate of an arm."""
        losses = {rate: self.loss(label, rate, seed) for of, rate, seed in self.outcomes if (of, seed) == (label, self.seed)}
        return min((rate for rate in losses if math.isfinite(losses[rate])), key=losses.__getitem__, default=None)

    def at_best(self, label: str) -> dict[int, Outcome]:
        """By seed, those of an arm at its best rate that ended well."""
        best = self.rate(label)
        found = {seed: x for (of, rate, seed), x in self.outcomes.items() if (of, rate) == (label, best)}
        return {seed: x for seed, x in sorted(found.items()) if isinstance(x, Outcome) and math.isfinite(x.val["val_loss"])}


class Difference(NamedTuple):
    """Of two arms, seed by seed: nats a token by which the second is lower."""

    by_seed: dict[int, float]
    mean: float
    error: float  # standard error of the mean; nan of a single pair

    @property
    def margin(self) -> float:
        """Half of the 95 % interval around the mean."""
        pairs = len(self.by_seed)
        return self.error * STUDENT.get(pairs, STUDENT[max(STUDENT)]) if pairs > 1 else math.nan


def difference(grid: Grid, first: str, second: str) -> Difference:
    """Of the seeds that both arms have."""
    a, b = ({seed: x.val["val_loss"] for seed, x in grid.at_best(label).items()} for label in (first, second))
    by_seed = {seed: a[seed] - b[seed] for seed in a if seed in b}
    values = list(by_seed.values())
    mean = statistics.fmean(values) if values else math.nan
    return Difference(by_seed, mean, statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else math.nan)


# -- what is told of it ----------------------------------------------------------------------------------------------------------------


def name(first: str, second: str) -> str:
    return f"{first.split()[0]} − {second.split()[0]}"


def with_error(d: Difference) -> str:
    return f"{d.mean:+.4f} ± {d.error:.4f}" if len(d.by_seed) > 1 else f"{d.mean:+.4f}" if d.by_seed else ""


def verdict(what: str, d: Difference) -> str:
    """A difference in words, for what it is worth."""
    pairs = len(d.by_seed)
    if pairs < 2:
        return f"{what} {with_error(d) or 'not measured'}{' nats a token' * pairs}: without two paired seeds there is no error, and nothing is decided"
    low, high = d.mean - d.margin, d.mean + d.margin
    found = f"{what} {with_error(d)} nats a token ({pairs} paired seeds, mean and standard error; 95 % interval {low:+.4f} to {high:+.4f})"
    if low > 0:
        return f"{found}: it lowers the loss"
    if high < 0:
        return f"{found}: it raises the loss"
    return f"{found}: no difference can be told from chance; one of up to {max(-low, high):.4f} would fit these runs as well"


def row_of(grid: Grid, label: str) -> Row | None:
    found, best = grid.at_best(label), grid.rate(label)
    if not found or best is None:
        failures = [f"{x.why}" if isinstance(x, Failure) else "diverged" for (of, _, _), x in grid.outcomes.items() if of == label]
        return {"model": label, "failed": failures[0]} if failures else None
    losses = [x.val["val_loss"] for x in found.values()]
    row: Row = {"model": label, "score": ARMS[label][1], "loss": statistics.fmean(losses)}
    row |= {"spread": max(losses) - min(losses) if len(losses) > 1 else "", "seeds": len(losses), "rate": best}
    row |= {f"{other.split()[0]} − this": with_error(difference(grid, other, label)) if other != label else "" for other in (N0, N4)}
    return row | {"tok/s": statistics.fmean(x.tokens_per_second for x in found.values()), "GiB": max(x.gib for x in found.values())}


def row_of_part(grid: Grid, part: str, first: str, second: str) -> Row:
    d = difference(grid, first, second)
    row: Row = {"part": part, "difference": name(first, second), "mean": d.mean, "standard error": d.error, "95 % ±": d.margin}
    return {name: x for name, x in row.items() if x == x} | {f"seed {seed}": x for seed, x in d.by_seed.items()}


def result(grid: Grid, rates: Sequence[float], seeds: Sequence[int]) -> Result:
    """All that is known so far."""
    parts = {part: pair for part, pair in PARTS.items() if difference(grid, *pair).by_seed}
    tried = [
        {"model": label, "rate": rate, "seed": seed}
        | ({"failed": x.why} if isinstance(x, Failure) else {**x.val, "tok/s": x.tokens_per_second, "GiB": x.gib, "parameters": x.parameters})
        for (label, rate, seed), x in grid.outcomes.items()
    ]
    curves = [
        {"model": label, "rate": rate, "seed": seed, "step": p.step, "tokens": p.tokens, "loss": p.val_loss}
        for (label, rate, seed), x in grid.outcomes.items() if isinstance(x, Outcome) for p in x.curve
    ]  # fmt: skip
    chosen = f"each at the best of the rates {', '.join(f'{rate:g}' for rate in rates)}, chosen on seed {seeds[0]}"
    of_parts = "Nats a token by which the loss falls when a part is added to the score, for each seed the same initial values and batches"
    tables = [
        Table("nulls", [row for label in ARMS if (row := row_of(grid, label))], f"Validation loss, nats a token, {chosen}; differences, of pairs, are above 0 where this one is lower; ± is the standard error."),
        Table("parts", [row_of_part(grid, part, *pair) for part, pair in parts.items()], f"{of_parts}; 95 % by Student's t."),
        Table("seeds", [{"model": label, "seed": seed, "loss": x.val["val_loss"]} for label in ARMS for seed, x in grid.at_best(label).items()], shown=False),
        Table("pairs", [{"part": part, "seed": s, "nats": x} for part, pair in parts.items() for s, x in difference(grid, *pair).by_seed.items()], shown=False),
        Table("tried", tried, shown=False),
        Table("curves", curves, shown=False),
    ]
    figures = [
        Bars("nulls", "Phase 7 and its nulls", "seeds", "model", "loss", "validation loss, nats a token"),
        Bars("nulls_parts", "What each part of the score brings", "pairs", "part", "nats", "fall of the loss, nats a token"),
    ]
    return Result("nulls", tables, notes(grid, rates, seeds), figures)


def notes(grid: Grid, rates: Sequence[float], seeds: Sequence[int]) -> list[str]:
    told = [verdict(f"geometry, what exact scores have beyond their first order ({name(N3, N4)}):", difference(grid, N3, N4))]
    others = {"the bias of keys alone": (N0, N1), "the gain alone": (N0, N2), "both, the first order": (N0, N3), "all of phase7": (N0, N4)}
    told += [verdict(f"{words} ({name(*pair)}):", d) for words, pair in others.items() if (d := difference(grid, *pair)).by_seed]
    speeds = [statistics.fmean(x.tokens_per_second for x in found.values()) for label in (N3, N4) if (found := grid.at_best(label))]
    if len(speeds) == 2:
        told.append(f"{N3} trains at {speeds[0] / speeds[1]:.2f} times the tokens/s of {N4}")
        if (d := difference(grid, N3, N4)).mean - d.margin <= 0:
            told[-1] += ": nothing here says that exact scores are worth more than that plain attention"
    at_end = [label for label in ARMS if len(rates) > 1 and grid.rate(label) in (min(rates), max(rates))]
    if at_end:
        told.append(f"best at an end of the rates tried, so that one beyond may be better: {', '.join(at_end)}")
    for (label, rate, seed), x in grid.outcomes.items():
        if isinstance(x, Failure) or not math.isfinite(x.val["val_loss"]):
            told.append(f"{label}, rate {rate:g}, seed {seed}: {x.why if isinstance(x, Failure) else 'diverged'}; it is in no mean")
    return told


# -- the suite -------------------------------------------------------------------------------------------------------------------------


def of_arm(config: Config, label: str, rate: float, seed: int) -> Config:
    model = replace(config.model, kind="phase7", score=ARMS[label][0], exact_every=0)
    return replace(config, model=model, optim=replace(config.optim, lr=rate), train=replace(config.train, seed=seed))


def learnt(job: Job, device: torch.device) -> Outcome:
    checks.model(job.config, device)
    return training.train(job, device)


def check(rates: Sequence[float], seeds: Sequence[int]) -> None:
    """Raises ConfigError on what cannot be trained with."""
    if not rates or not all(0 < rate < math.inf for rate in rates) or len(set(rates)) < len(rates):
        raise ConfigError(f"--rates {' '.join(f'{rate:g}' for rate in rates)}: must be one or more different rates above 0")
    if not seeds or min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise ConfigError(f"--seeds {' '.join(map(str, seeds))}: must be one or more different numbers from 0 on")


def run(
    config: Config, devices: Sequence[torch.device], rates: Sequence[float], seeds: Sequence[int], folder: Path | None = None
) -> Iterator[Result]:
    """Train every arm at each of `rates` with the first of `seeds`, then at its best rate with the others. Yields what is measured so far.

    Args:
        config: size, text and steps, resolved; the kind is Phase 7's and the score each arm's own.
        folder: where the first seed's best model of each arm is left as a folder of a run, named by its score; nowhere if None.

    Raises:
        DataError: if the text cannot be read.
    """
    data.prepare(config, say=lambda line: None)  # once, and not by several processes at the same time
    grid = Grid({}, seeds[0])
    first = [Job(label, of_arm(config, label, rate, seeds[0]), folder and folder / f".{ARMS[label][0]}-{rate:g}") for rate in rates for label in ARMS]
    try:
        for job, found in side_by_side(learnt, first, devices, desc="nulls, rates"):
            grid.outcomes[key_of(job)] = found
            if job.keep and folder and job.keep.exists():
                settle(job.keep, folder / job.config.model.score, best=grid.rate(job.label) == job.config.optim.lr)
            yield result(grid, rates, seeds)
    finally:  # whatever ended it
        for job in first:
            if job.keep:
                shutil.rmtree(job.keep, ignore_errors=True)
    best = {label: rate for label in ARMS if (rate := grid.rate(label)) is not None}
    others = [Job(label, of_arm(config, label, rate, seed)) for seed in seeds[1:] for label, rate in best.items()]
    for job, found in side_by_side(learnt, others, devices, desc="nulls, seeds"):
        grid.outcomes[key_of(job)] = found
        yield result(grid, rates, seeds)


def key_of(job: Job) -> tuple[str, float, int]:
    return job.label, job.config.optim.lr, job.config.train.seed


def settle(made: Path, final: Path, *, best: bool) -> None:
    """Of a model that was just made: the best of its arm so far takes the place of the one before, another is removed."""
    if best:
        shutil.rmtree(final, ignore_errors=True)
        os.replace(made, final)
    else:
        shutil.rmtree(made, ignore_errors=True)
