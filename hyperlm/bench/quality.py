"""Suite `quality`: kinds and peers trained side by side on the same data, steps and seeds, each at its best learning rate (see grid.py).

Two questions are asked of their curves: which loss they have after the same tokens, and which after the same seconds.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import mean

import torch

from hyperlm import data, env, residence
from hyperlm.bench import comparison, grid
from hyperlm.bench.arms import KINDS, PEERS, of_kind
from hyperlm.bench.grid import Trial, Trials
from hyperlm.bench.result import Figure, Lines, Result, Row, Table
from hyperlm.bench.training import Outcome, Point
from hyperlm.config import Config, ConfigError

TWIN = "softmax"  # what geometry is compared with
PEERS_NOTE = (
    "nanogpt: learned positions, GELU, a tied head, as many layers as come nearest to the models' parameters; AdamW alone, or "
    "torch.optim.Muon for the matrices of blocks, its updates scaled to the size of AdamW's, so that one rate holds for both"
)


def arm(config: Config, label: str) -> Config:
    return of_kind(config, label) if label in KINDS else config


def check(
    labels: Sequence[str], config: Config, devices: Sequence[torch.device], rates: Sequence[float] = (), seeds: Sequence[int] = (0,)
) -> None:
    """Find out early what would be found out late, and tokenise the text, so that jobs find it in the cache.

    Raises:
        ConfigError: on an arm that does not exist, or has not the memory of a CPU; on rates and seeds.
        DataError, TokenizerError: on the text.
    """
    grid.check(rates, seeds)
    for label in labels:
        if label not in (*KINDS, *PEERS):
            raise ConfigError(f"{label}: neither a kind nor a peer; choose from {', '.join((*KINDS, *PEERS))}")
        variant, cpu = arm(config, label), torch.device("cpu")
        if cpu in devices and (need := residence.on_device.plan(variant, torch.float32, 0).device) > (have := env.total_memory(cpu)):
            sizes = f"{need / env.GIB:,.1f} GiB, and {have / env.GIB:,.1f} are there"
            raise ConfigError(f"--suite quality: training {label} needs {sizes}; lower the shape of the model, or --train.batch-size")
    data.batches(data.prepare(config), config)


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
        rates: peak learning rates to begin with; those of `grid.rates_of` if none are given.
        seeds: of which the first tries all rates.
        folder: where the models of the first seed at the best rate are left, each as the run `folder/<label>`; peers are none.

    Yields:
        What is measured so far.
    """
    arms = {label: arm(config, label) for label in labels}
    rates = tuple(rates) or grid.rates_of(config)
    for trials in grid.search(arms, devices, rates=rates, seeds=seeds, folder=folder, desc="quality"):
        yield result(trials, config, seeds)


# -- what it came to -------------------------------------------------------------------------------------------------------------------


def loss_at(curve: Sequence[Point], seconds: float) -> float | None:
    """Validation loss after so many seconds of training, interpolated; None before the first point, and the last one's after it."""
    for before, after in pairwise(curve):
        if before.seconds <= seconds <= after.seconds:
            share = (seconds - before.seconds) / max(after.seconds - before.seconds, 1e-9)
            return before.val_loss + share * (after.val_loss - before.val_loss)
    return curve[-1].val_loss if seconds >= curve[-1].seconds else None


def result(trials: Trials, config: Config, seeds: Sequence[int]) -> Result:
    """Tables, figures and notes of what there is."""
    best = {label: grid.at_best(of_arm) for label, of_arm in trials.items() if of_arm}
    seconds = min(
        (max(outcome.curve[-1].seconds for outcome in outcomes.values()) for outcomes in best.values() if outcomes), default=math.nan
    )
    t, n = config.train, config.data.seq_len
    caption = (
        "Each at its best learning rate: validation loss (nats a token) after the same tokens, its mean over seeds and the spread from the "
    )
    caption += (
        f"least to the largest; and after the same time, {seconds:.3g} s. {t.batch_size * t.grad_accum} sequences of {n:,} tokens a step. "
    )
    caption += "GiB: peak memory."
    at = {label: grid.best_rate(of_arm) for label, of_arm in trials.items()}
    differences = f"Validation loss less that of {TWIN} with the same seed, nats a token, below 0 is better; 95 % by Student's t."
    tables = [
        Table("quality", [row_of(label, trials[label], best[label], seconds, at[label]) for label in best], caption),
        Table("paired differences", paired(trials), differences, digits=3),
        Table("rates", comparison.rate_rows(trials), "Validation loss (nats a token) at every learning rate that was tried."),
        Table("rates of the first seed", [row for row in comparison.rate_rows(trials) if row["seed"] == seeds[0]], shown=False),
        Table("curves", comparison.curve_rows(trials), "Of every training.", shown=False),
        Table("best curves", comparison.curve_rows(trials, at), "Of those at the best rates.", shown=False),
    ]
    tables = [table for table in tables if table.rows]
    drawn = [figure for figure in figures(seeds) if any(figure.table == table.name for table in tables)]
    return Result("quality", tables, notes(trials, seeds[0], seconds), drawn)


def row_of(label: str, trials: Sequence[Trial], by_seed: Mapping[int, Outcome], seconds: float, rate: float | None) -> Row:
    """The row of an arm; why there is no number, where nothing that it was tried at has any."""
    if not by_seed:
        return comparison.why_none(label, trials)
    outcomes = list(by_seed.values())
    then = [loss_at(outcome.curve, seconds) for outcome in outcomes]
    row: Row = {"model": label, "parameters": outcomes[0].parameters, "best rate": rate, **comparison.common(outcomes)}
    row["tokens"] = outcomes[0].curve[-1].tokens
    return row if None in then else row | {"loss at equal seconds": mean(then)}


def paired(trials: Trials) -> list[Row]:
    """Differences to the twin, of the seeds that both have."""
    differences = {label: comparison.difference(trials, label, TWIN) for label in trials if label != TWIN} if TWIN in trials else {}
    return [{"model": label} | d.columns for label, d in differences.items() if d.by_seed]


def notes(trials: Trials, seed: int, seconds: float) -> list[str]:
    then = f"at equal seconds: after {seconds:.3g} s of training alone, the time of the quickest for all its steps, interpolated on curves "
    then += "whose schedule was made for all steps, so that slower arms have rates that are still high there"
    equal = [then] if math.isfinite(seconds) else []  # nothing was trained to its end
    return [*comparison.notes(trials, seed), *equal, *[PEERS_NOTE] * any(label in PEERS for label in trials)]


def figures(seeds: Sequence[int]) -> list[Figure]:
    y_label, over = "validation loss (nats a token)", "seed" if len(seeds) > 1 else ""
    band = f", mean and range of {len(seeds)} seeds" if over else ""

    def curves(file: str, title: str, x: str, x_label: str) -> Lines:
        return Lines(file, title, "best curves", x, "val_loss", over=over, x_label=x_label, y_label=y_label, within=1.0)

    return [
        curves("quality_tokens", f"Validation loss over tokens, each at its best rate{band}", "tokens", "tokens learnt"),
        curves("quality_seconds", f"Validation loss over time, each at its best rate{band}", "seconds", "seconds of training"),
        Lines(
            "quality_rates", f"Validation loss by learning rate, of seed {seeds[0]}",
            "rates of the first seed", "rate", "loss", x_label="peak learning rate", y_label=y_label, log_x=True, within=0.5,
        ),
    ]  # fmt: skip
