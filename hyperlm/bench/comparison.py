"""What trials of a grid (grid.py) say, alike for all suites that train: differences seed by seed with their errors, and notes."""

from collections.abc import Mapping, Sequence
from math import nan
from statistics import mean, stdev
from typing import NamedTuple

from hyperlm.bench import grid
from hyperlm.bench.grid import NO_LOSS, Trial, Trials
from hyperlm.bench.pool import Failure
from hyperlm.bench.result import Row
from hyperlm.bench.training import Outcome

# By how many standard errors the mean of n pairs is off in 5 % of cases: 97.5 % quantiles of Student's t with n - 1 degrees of freedom.
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}


class Difference(NamedTuple):
    """Of two arms, seed by seed: nats a token by which the second is lower."""

    by_seed: dict[int, float]
    mean: float  # nan without pairs
    error: float  # standard error of the mean; nan of a single pair

    @property
    def margin(self) -> float:
        """Half of the 95 % interval around the mean."""
        pairs = len(self.by_seed)
        return self.error * STUDENT.get(pairs, STUDENT[max(STUDENT)]) if pairs > 1 else nan

    @property
    def columns(self) -> Row:
        errors = {"standard error": self.error, "95 % ±": self.margin} if len(self.by_seed) > 1 else {}
        return {"mean": self.mean, **errors, **{f"seed {seed}": x for seed, x in self.by_seed.items()}}


def difference(trials: Trials, first: str, second: str) -> Difference:
    """Of the seeds that both arms have, each arm at its best rate."""
    a, b = ({of: x.val["val_loss"] for of, x in grid.at_best(trials[label]).items()} for label in (first, second))
    by_seed = {of: a[of] - b[of] for of in sorted(a) if of in b}
    values = list(by_seed.values())
    return Difference(by_seed, mean(values) if values else nan, stdev(values) / len(values) ** 0.5 if len(values) > 1 else nan)


# -- rows ------------------------------------------------------------------------------------------------------------------------------


def why_none(label: str, trials: Sequence[Trial]) -> Row:
    """The row of an arm that has no number at any rate."""
    whys = [trial.outcome.why for trial in trials if isinstance(trial.outcome, Failure)]
    return {"model": label, "failed": whys[0] if whys else "diverged at every rate"}


def common(outcomes: Sequence[Outcome]) -> Row:
    """Loss, speed and memory of the seeds of an arm: means, and what lies between the least and the largest loss; of memory the most."""
    losses = [x.val["val_loss"] for x in outcomes]
    spread = {"spread": max(losses) - min(losses)} if len(losses) > 1 else {}
    return {
        "loss": mean(losses), **spread, "bits per byte": mean(x.val["val_bpb"] for x in outcomes), "seeds": len(losses),
        "tok/s": mean(x.tokens_per_second for x in outcomes), "GiB": max(x.gib for x in outcomes),
    }  # fmt: skip


def rate_rows(trials: Trials) -> list[Row]:
    """A row for each training, with the three digits of its rate that a reader wants."""
    rows = []
    for label, of_arm in trials.items():
        for trial in sorted(of_arm, key=lambda trial: (trial.rate, trial.seed)):
            x = trial.outcome
            known = {"failed": x.why} if isinstance(x, Failure) else {"loss": x.val["val_loss"], "tok/s": x.tokens_per_second}
            rows.append({"model": label, "rate": float(f"{trial.rate:.3g}"), "seed": trial.seed, **known})
    return rows


def curve_rows(trials: Trials, at: Mapping[str, float | None] | None = None) -> list[Row]:
    """A row for each point of all trainings; or of those at one rate of each arm."""
    return [
        {"model": label, "rate": trial.rate, "seed": trial.seed} | vars(point)
        for label, of_arm in trials.items()
        for trial in of_arm
        if isinstance(trial.outcome, Outcome) and (at is None or trial.rate == at[label])
        for point in trial.outcome.curve
    ]


# -- notes -----------------------------------------------------------------------------------------------------------------------------


def notes(trials: Trials, seed: int) -> list[str]:
    """How rates were chosen, `seed` being the first, how far that can be trusted, and what is in no mean."""
    lines, single = [], True
    for label, of_arm in trials.items():
        rate, tried = grid.best_rate(of_arm), {trial.rate for trial in grid.of_seed(of_arm, seed)}
        single &= len(tried) < 2
        if rate is not None and len(tried) > 1 and grid.beyond(rate, list(tried)):
            lines.append(f"{label}: its best rate, {rate:.3g}, is at the edge of those tried: another may be better still")
        for trial in of_arm:
            if trial.loss == NO_LOSS:
                why = trial.outcome.why if isinstance(trial.outcome, Failure) else "diverged"
                lines.append(f"{label}, rate {trial.rate:.3g}, seed {trial.seed}: {why}; it is in no mean")
    if single:
        return ["one learning rate alone was tried: another may suit some of them better", *lines]
    chosen = f"learning rates: all were tried with seed {seed}"
    if len({trial.seed for of_arm in trials.values() for trial in of_arm}) > 1:
        chosen += f", the best {grid.FINALISTS} with all seeds"
    return [f"{chosen}; that of the lowest mean is told, which is a little lower for having been chosen", *lines]
