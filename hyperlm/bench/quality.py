"""Suite `quality`: kinds and peers trained side by side on the same data, steps and seeds, each at the best of a grid of learning rates.

Every arm trains at each rate with the first seed. Where its best is at an edge of what was tried, the grid goes on from there by factors of two;
then it trains with the other seeds at its best. Two questions are asked of the curves: the loss after the same tokens, and after the same seconds.
"""

import math
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import mean

import torch

from hyperlm import data, env, plan
from hyperlm.bench import checks
from hyperlm.bench.arms import KINDS, PEERS, of_kind
from hyperlm.bench.peers import gpt
from hyperlm.bench.pool import Failure, side_by_side
from hyperlm.bench.report import Figure, Lines, Result, Row, Table
from hyperlm.bench.training import Job, Outcome, Point, train
from hyperlm.config import Config, ConfigError, peak_rate, resolve

TWIN = "softmax"  # what geometry is compared with
GRID = (0.5, 1.0, 2.0)  # rates to begin with, as multiples of the rule's
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
    """The grid to begin with: around what `config.peak_rate` gives the width."""
    return tuple(multiple * peak_rate(config.model) for multiple in GRID)


def check(labels: Sequence[str], config: Config, devices: Sequence[torch.device]) -> None:
    """Find out early what would be found out late, and tokenise the text, so that jobs find it in the cache.

    Raises:
        ConfigError: on an arm that does not exist, or has not the memory of a CPU.
        DataError, TokenizerError: on the text.
    """
    for label in labels:
        if label not in (*KINDS, *PEERS):
            raise ConfigError(f"{label}: is neither a kind nor a peer; choose from {', '.join((*KINDS, *PEERS))}")
        cfg = of_kind(config, label) if label in KINDS else config
        if label == "hybrid" and cfg.model.exact_every > cfg.model.n_layers:
            raise ConfigError(f"--model.n-layers {cfg.model.n_layers}: a hybrid has a layer of phase7 in every {cfg.model.exact_every}; ask for as many")
        if devices[0].type == "cpu" and (need := plan.everything(cfg, torch.float32).device) > (have := env.total_memory(devices[0])):
            sizes = f"{need / env.GIB:,.1f} GiB, and {have / env.GIB:,.1f} are there"
            raise ConfigError(f"--suite quality: training {label} needs {sizes}; lower the shape of the model, or --train.batch-size")
    corpus = data.prepare(config)
    data.batches(corpus, config)


# -- what to train ---------------------------------------------------------------------------------------------------------------------


def best_rate(trials: Sequence[Trial], seed: int) -> float | None:
    """The rate with the lowest loss for `seed`; None where none has any."""
    finite = [trial for trial in trials if trial.seed == seed and trial.loss < NO_LOSS]
    return min(finite, key=lambda trial: trial.loss).rate if finite else None


def wanted(trials: Sequence[Trial], rates: Sequence[float], seeds: Sequence[int]) -> list[tuple[float, int]]:
    """The (rate, seed) that an arm is to be trained at next, given what was: the grid with the first seed; where the best is at its edge one rate
    beyond; then the other seeds at the best. Nothing where all is known, or nothing works."""
    done = {(trial.rate, trial.seed) for trial in trials}
    if grid := [(rate, seeds[0]) for rate in rates if (rate, seeds[0]) not in done]:
        return grid
    best, tried = best_rate(trials, seeds[0]), sorted(rate for rate, seed in done if seed == seeds[0])
    if best is None:
        return []
    if (beyond := at_edge(best, tried)) and len(tried) < len(set(rates)) + EXTENSIONS:
        return [(beyond, seeds[0])]
    return [(best, seed) for seed in seeds if (best, seed) not in done]


def at_edge(best: float, tried: Sequence[float]) -> float | None:
    """The rate beyond, where `best` is the least or the largest of those tried."""
    if best == max(tried):
        return 2 * best
    return best / 2 if best == min(tried) else None


def measure(job: Job, device: torch.device) -> Outcome:
    """Train, after a check that what is trained looks back only, and that its kernels are right."""
    if job.label in PEERS:
        shape = gpt.shape(job.config)
        untrained = gpt.GPT(replace(shape, layers=2), 0, device)
        checks.causal(partial(gpt.token_nats, untrained), shape.vocabulary, device, min(shape.length, checks.LENGTH))
        del untrained
    else:
        checks.model(job.config, device)
    return train(job, device)


def job_of(label: str, config: Config, rate: float, seed: int, keep: Path | None) -> Job:
    own = of_kind(config, label) if label in KINDS else config
    return Job(label, resolve(replace(own, optim=replace(own.optim, lr=rate), train=replace(own.train, seed=seed))), keep)


def run(
    labels: Sequence[str],
    config: Config,
    devices: Sequence[torch.device],
    *,
    rates: Sequence[float] = (),
    seeds: Sequence[int] = (0,),
    folder: Path | None = None,
) -> Iterator[Result]:
    """Train every arm; `check` comes before.

    Args:
        labels: of KINDS and PEERS.
        config: resolved, but for kind, rate and seed.
        rates: peak learning rates to begin with; those of `rates_of` if none are given.
        seeds: of which the first chooses the rate.
        folder: where the models of the first seed at the best rate are left, each as the run `folder/<label>`; peers are none.

    Yields:
        What is measured so far.
    """
    rates = tuple(rates) or rates_of(config)
    trials: Trials = {label: [] for label in labels}
    while True:
        jobs = [
            job_of(label, config, rate, seed, folder / f".{label} at {rate:g}" if folder and seed == seeds[0] else None)
            for label in labels
            for rate, seed in wanted(trials[label], rates, seeds)
        ]
        if not jobs:
            return
        for job, found in side_by_side(measure, jobs, devices, desc="quality"):
            trials[job.label].append(Trial(job.config.optim.lr, job.config.train.seed, found))
            if job.keep and job.keep.exists():
                keep_best(job, trials[job.label])
            yield result(trials, config, seeds)


def keep_best(job: Job, trials: Sequence[Trial]) -> None:
    """Leave what a job kept in the place of the arm's model if it is the best so far; else remove it."""
    assert job.keep
    place = job.keep.parent / job.label
    if best_rate(trials, job.config.train.seed) == job.config.optim.lr:
        shutil.rmtree(place, ignore_errors=True)
        os.replace(job.keep, place)
    else:
        shutil.rmtree(job.keep)


# -- what it came to -------------------------------------------------------------------------------------------------------------------


def loss_at(curve: Sequence[Point], seconds: float) -> float | None:
    """Validation loss after so many seconds of training, interpolated; None before the first point, and the last one's after it."""
    for before, after in pairwise(curve):
        if before.seconds <= seconds <= after.seconds:
            share = (seconds - before.seconds) / max(after.seconds - before.seconds, 1e-9)
            return before.val_loss + share * (after.val_loss - before.val_loss)
    return curve[-1].val_loss if curve and seconds >= curve[-1].seconds else None


def at_best(trials: Sequence[Trial], seeds: Sequence[int]) -> dict[int, Outcome]:
    """What an arm came to at its best rate, by seed; what diverged there is none of it."""
    best = best_rate(trials, seeds[0])
    return {trial.seed: trial.found for trial in trials if trial.rate == best and not isinstance(trial.found, Failure) and trial.loss < NO_LOSS}


def result(trials: Trials, config: Config, seeds: Sequence[int]) -> Result:
    """Tables, figures and notes of what there is."""
    best = {label: at_best(own, seeds) for label, own in trials.items()}
    seconds = min((mean(o.curve[-1].seconds for o in own.values()) for own in best.values() if own), default=math.nan)
    t = config.train
    what = f"{config.data.seq_len:,} tokens a sequence, {t.batch_size * t.grad_accum} sequences a step"
    tables = [
        Table(
            "quality",
            [row_of(label, trials[label], best[label], seconds) for label in trials if trials[label]],
            "Each at its best learning rate: validation loss (nats a token) after the same tokens, its mean over seeds, and the spread from the least to "
            f"the largest; and after the same time, {seconds:.3g} s. {what}.",
        ),
        Table("paired differences", paired(best, seeds), f"Validation loss less that of {TWIN} with the same seed, nats a token: below 0 is better."),
        Table("rates", rate_rows(trials), "Validation loss (nats a token) at every learning rate that was tried."),
        Table("curves", curve_rows(trials), "Every training.", shown=False),
        Table("best curves", curve_rows(trials, at={label: best_rate(own, seeds[0]) for label, own in trials.items()}), "Those at the best rates.", shown=False),
    ]
    return Result("quality", [table for table in tables if table.rows], notes(trials, best, seeds, seconds), figures(len(seeds)))


def row_of(label: str, trials: Sequence[Trial], found: dict[int, Outcome], seconds: float) -> Row:
    """The row of an arm; why there is no number, where nothing that it was tried at has any."""
    if not found:
        whys = [trial.found.why for trial in trials if isinstance(trial.found, Failure)]
        return {"model": label, "failed": whys[0] if whys else "diverged at every rate"}
    outcomes = list(found.values())
    losses, then = [outcome.val["val_loss"] for outcome in outcomes], [loss_at(outcome.curve, seconds) for outcome in outcomes]
    row: Row = {
        "model": label,
        "parameters": outcomes[0].parameters,
        "best rate": best_rate(trials, next(iter(found))),
        "loss": mean(losses),
        "spread": max(losses) - min(losses) if len(losses) > 1 else None,
        "bits per byte": mean(outcome.val["val_bpb"] for outcome in outcomes),
        "seeds": len(outcomes),
        "tokens": outcomes[0].curve[-1].tokens,
        "tok/s": mean(outcome.tokens_per_second for outcome in outcomes),
        "GiB": max(outcome.gib for outcome in outcomes),
        "loss at equal seconds": None if None in then else mean(then),
    }
    return {name: value for name, value in row.items() if value is not None}


def paired(best: dict[str, dict[int, Outcome]], seeds: Sequence[int]) -> list[Row]:
    twin, rows = best.get(TWIN, {}), []
    for label, own in best.items():
        both = [seed for seed in seeds if seed in own and seed in twin]
        if label != TWIN and both:
            each = {f"seed {seed}": own[seed].val["val_loss"] - twin[seed].val["val_loss"] for seed in both}
            rows.append({"model": label, "mean": mean(each.values()), **each})
    return rows


def rate_rows(trials: Trials) -> list[Row]:
    rows = []
    for label, own in trials.items():
        for trial in sorted(own, key=lambda trial: (trial.rate, trial.seed)):
            row: Row = {"model": label, "rate": trial.rate, "seed": trial.seed}
            if isinstance(trial.found, Failure):
                rows.append(row | {"failed": trial.found.why})
            else:
                rows.append(row | {"loss": trial.found.val["val_loss"]})
    return rows


def curve_rows(trials: Trials, at: dict[str, float | None] | None = None) -> list[Row]:
    """A row for each point of all trainings; or of those at one rate of each arm."""
    return [
        {"model": label, "rate": trial.rate, "seed": trial.seed} | vars(point)
        for label, own in trials.items()
        for trial in own
        if not isinstance(trial.found, Failure) and (at is None or trial.rate == at[label])
        for point in trial.found.curve
    ]


def notes(trials: Trials, best: dict[str, dict[int, Outcome]], seeds: Sequence[int], seconds: float) -> list[str]:
    chosen = f"each learning rate was chosen by the validation loss of seed {seeds[0]}, which is told as well: a little lower for it, for all arms alike"
    then = f"at equal seconds: after {seconds:.3g} s of training alone, the time of the quickest for all its steps, interpolated on the others' curves; "
    found = [chosen, then + "their schedules were made for all steps, so that their rates are still high there"]
    for label, own in trials.items():
        tried = sorted({trial.rate for trial in own if trial.seed == seeds[0]})
        rate = best_rate(own, seeds[0])
        if rate is not None and at_edge(rate, tried):
            found.append(f"{label}: its best rate, {rate:.3g}, is at the edge of those tried: another may be better still")
        diverged = sorted({trial.rate for trial in own if not isinstance(trial.found, Failure) and trial.loss == NO_LOSS})
        if diverged:
            found.append(f"{label} diverged at {', '.join(f'{rate:.3g}' for rate in diverged)}")
    if any(label in PEERS for label in best):
        found.append(
            "nanogpt: learned positions, GELU, a tied head, as many layers as come nearest to the models' parameters; AdamW alone, or torch.optim.Muon "
            "for the matrices of blocks, its updates scaled to the size of AdamW's, so that one rate holds for both"
        )
    return found


def figures(seeds: int) -> list[Figure]:
    loss = {"y": "val_loss", "y_label": "validation loss (nats a token)"}
    over = "seed" if seeds > 1 else ""
    return [
        Lines("quality_tokens", "Validation loss over tokens, each at its best rate", "best curves", "tokens", **loss, over=over, x_label="tokens learnt"),
        Lines("quality_seconds", "Validation loss over seconds of training", "best curves", "seconds", **loss, over=over, x_label="seconds of training"),
        Lines(
            "quality_rates", "Validation loss by learning rate", "rates", "rate", "loss", x_label="peak learning rate",
            y_label=loss["y_label"], log_x=True,
        ),
    ]  # fmt: skip
