"""Suite `nulls`: is it geometry? Phase 7 trained beside its nulls (mixers/phase7.py), which share every parameter with it.

From the cosine of the directions to log cosh of the distance there are two steps that any dot-product attention can make, a bias of the
keys and a gain; what the whole has beyond both, the higher orders in the product of Klein coordinates, is geometry and nothing else is. All
begin with the same values and read the same batches for a seed, so that differences are taken seed by seed.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean

import torch

from hyperlm import data
from hyperlm.bench import comparison, grid
from hyperlm.bench.comparison import Difference, difference
from hyperlm.bench.grid import Trials
from hyperlm.bench.result import Bars, Result, Row, Table
from hyperlm.config import Config

# Labels, and the score that each is: up to a term of the query alone, which a softmax drops, N3 is N4 to first order.
ARMS = {
    "N0-cosine": ("cosine", "β cos: the twin"),
    "N1-bias": ("bias", "β cos − β log cosh r_k"),
    "N2-gain": ("gain", "β tanh r_q tanh r_k cos"),
    "N3-first-order": ("first-order", "β tanh r_q tanh r_k cos − β log cosh r_k"),
    "N4-phase7": ("logcosh", "−β log cosh d"),
}
N0, N1, N2, N3, N4 = ARMS
PARTS = {"bias of keys": (N0, N1), "gain": (N0, N2), "both, first order": (N0, N3), "geometry": (N3, N4), "all of phase7": (N0, N4)}


# -- what is told of it ----------------------------------------------------------------------------------------------------------------


def names(first: str, second: str) -> str:
    return f"{first[:2]} − {second[:2]}"


def with_error(d: Difference) -> str:
    return f"{d.mean:+.4f} ± {d.error:.4f}" if len(d.by_seed) > 1 else f"{d.mean:+.4f}" if d.by_seed else ""


def verdict(what: str, d: Difference) -> str:
    """A difference in words, for what it is worth."""
    pairs = len(d.by_seed)
    if pairs < 2:
        return (
            f"{what} {with_error(d) or 'not measured'}{' nats a token' * pairs}: without two paired "
            "seeds there is no error, and nothing is decided"
        )
    low, high = d.mean - d.margin, d.mean + d.margin
    measured = (
        f"{what} {with_error(d)} nats a token ({pairs} paired seeds, mean and standard error; 95 % interval {low:+.4f} to {high:+.4f})"
    )
    if low > 0:
        return f"{measured}: it lowers the loss"
    if high < 0:
        return f"{measured}: it raises the loss"
    return f"{measured}: no difference can be told from chance; one of up to {max(-low, high):.4f} would fit these runs as well"


def row_of(trials: Trials, label: str) -> Row:
    outcomes = list(grid.at_best(trials[label]).values())
    if not outcomes:
        return comparison.why_none(label, trials[label])
    row: Row = {"model": label, "score": ARMS[label][1], "best rate": grid.best_rate(trials[label]), **comparison.common(outcomes)}
    return row | {f"{other[:2]} − this": with_error(difference(trials, other, label)) if other != label else "" for other in (N0, N4)}


def result(trials: Trials, seed: int) -> Result:
    """All that is known so far; `seed` is the first."""
    tried = [label for label in ARMS if trials[label]]
    parts = {part: (pair, d) for part, pair in PARTS.items() if (d := difference(trials, *pair)).by_seed}
    at_best = {label: grid.at_best(trials[label]) for label in tried}
    caption = "Validation loss, nats a token, each at its best rate; differences, of pairs, are above 0 where this one is lower; "
    caption += "± is the standard error."
    of_parts = "Nats a token by which the loss falls when a part is added to the score, for each seed the same initial values and batches; "
    of_parts += "95 % by Student's t."
    tables = [
        Table("nulls", [row_of(trials, label) for label in tried], caption),
        Table("parts", [{"part": part, "difference": names(*pair)} | d.columns for part, (pair, d) in parts.items()], of_parts, digits=3),
        Table(
            "seeds",
            [{"model": label, "seed": of, "loss": x.val["val_loss"]} for label in tried for of, x in at_best[label].items()],
            shown=False,
        ),
        Table(
            "pairs",
            [{"part": part, "seed": of, "nats": nats} for part, (_, d) in parts.items() for of, nats in d.by_seed.items()],
            shown=False,
        ),
        Table("rates", comparison.rate_rows(trials), "Every training.", shown=False),
        Table("curves", comparison.curve_rows(trials), "Of every training.", shown=False),
    ]
    each = "a mark for each seed, and their mean"
    figures = [
        Bars("nulls", f"Phase 7 and its nulls: {each}", "seeds", "model", "loss", "validation loss (nats a token)"),
        Bars("nulls_parts", f"What each part of the score brings: {each}", "pairs", "part", "nats", "fall of the loss (nats a token)"),
    ]
    return Result("nulls", tables, notes(trials, seed), figures)


def notes(trials: Trials, seed: int) -> list[str]:
    geometry = difference(trials, N3, N4)
    lines = [verdict(f"geometry, what exact scores have beyond their first order ({names(N3, N4)}):", geometry)]
    others = {"the bias of keys alone": (N0, N1), "the gain alone": (N0, N2), "both, the first order": (N0, N3), "all of phase7": (N0, N4)}
    lines += [
        verdict(f"{words} ({names(*pair)}):", d) for words, pair in others.items() if len((d := difference(trials, *pair)).by_seed) > 1
    ]
    speeds = [mean(x.tokens_per_second for x in outcomes.values()) for label in (N3, N4) if (outcomes := grid.at_best(trials[label]))]
    if len(speeds) == 2:
        lines.append(f"{N3} trains at {speeds[0] / speeds[1]:.2f} times the tokens/s of {N4}")
        if geometry.mean - geometry.margin <= 0:
            lines[-1] += ": nothing here says that exact scores are worth more than that plain attention"
    return lines + comparison.notes(trials, seed)


# -- the suite -------------------------------------------------------------------------------------------------------------------------


def arms(config: Config) -> dict[str, Config]:
    models = {label: replace(config.model, kind="phase7", score=score, exact_every=0) for label, (score, _) in ARMS.items()}
    return {label: replace(config, model=model) for label, model in models.items()}


def check(config: Config, rates: Sequence[float] = (), seeds: Sequence[int] = (0,)) -> None:
    """Find out early what would be found out late, and tokenise the text, so that jobs find it in the cache.

    Raises:
        ConfigError: on rates and seeds that cannot be trained with.
        DataError, TokenizerError: on the text.
    """
    grid.check(rates, seeds)
    data.batches(data.prepare(config), config)


def run(
    config: Config, devices: Sequence[torch.device], rates: Sequence[float] = (), seeds: Sequence[int] = (0,), folder: Path | None = None
) -> Iterator[Result]:
    """Train every arm at its best rate with each of `seeds`, as `grid.search` does; `check` comes before.

    Args:
        config: size, text and steps, resolved; kind and score are each arm's own.
        rates: peak learning rates to begin with; those of `grid.rates_of` if none are given.
        folder: where the first seed's model of each arm at its best rate is left, as the run `folder/<label>`; nowhere if None.

    Yields:
        What is measured so far.
    """
    for trials in grid.search(arms(config), devices, rates=tuple(rates) or grid.rates_of(config), seeds=seeds, folder=folder, desc="nulls"):
        yield result(trials, seeds[0])
