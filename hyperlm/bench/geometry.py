"""Suite `geometry`: what the radii of a run are, what they go with, how much of the scores they make, and what it costs to take them away.

Of runs of any kind, on their own validation text, each number beside its nulls: radii shifted along the text, a model that was not trained,
and of a softmax twin, which has no radii, the norms of queries and keys before they are normalised.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch

from hyperlm import checkpoint, runs
from hyperlm.bench import scoring
from hyperlm.bench.pool import Failure, side_by_side
from hyperlm.bench.radii import NO_RADII, SHIFTS, Job, Tables, look_into
from hyperlm.bench.result import Bars, Disk, Figure, Heatmap, Lines, Result, Row, Table
from hyperlm.config import ConfigError

CAPTIONS = {
    "radii": (
        "Distances from the origin (0.05 to 4) of queries and keys, over tokens of the validation text; std: over a head's tokens, mean "
        "over heads. Half-life: tokens after which a head of phase8 has forgotten half, at its mean decay."
    ),
    "correlations": (
        "Spearman's rho of the radii of queries and keys (softmax: norms) with log frequency, next-token entropy and bracket depth of "
        "tokens, over heads; beside it nulls: an untrained model, and radii shifted along the text."
    ),
    "variance of scores": (
        "Share of the variance of a query's scores over keys that a function of the angle alone explains, the same for all queries of a "
        "head, or of the key's radius alone: mean over heads."
    ),
    "ablations": (
        "Nats a token of validation text that are lost where radii are replaced at test time in all layers at once, and standard error "
        "over the documents in which sequences begin."
    ),
}
DIGITS = {"radii": 3, "correlations": 2, "variance of scores": 2}
EXPLAINED = {  # what a table means to the letter
    "correlations": (
        "frequency is that in the training text, depth that of brackets open before the token, in documents that have any; depth, partial: "
        "without what ranks of frequency and position explain of either, linearly; intervals: bootstrap over the documents in which "
        "sequences begin; radii of the untrained model are random functions of its stream; shifted: largest |rho| of any head in "
        f"{SHIFTS} shifts, in which what is alike over a document or a source stays so; norms of the "
        "twin's queries and keys are not seen by its scores"
    ),
    "variance of scores": (
        "each query's mean is taken out, as softmax does; functions of the angle have 64 steps; scores of phase7 are functions of angle "
        "and radii, so that the rest is theirs; those of phase8 are log phi(q) . phi(k), which is no function of the angle even where all "
        "radii are equal, as they are before training"
    ),
    "ablations": (
        "tokens as frequent are others of the text with the same whole part of log2 (1 + frequency): if radii were functions of frequency "
        "alone, theirs would cost nothing"
    ),
}
HIDDEN = ("text", "radii by head", "correlations by head", "correlations by layer", "key correlations by layer", "variance by head", "disk")


def check(models: Mapping[str, Path], tokens: int) -> None:
    """Raises ConfigError, RunError, CheckpointError, TokenizerError or DataError where a run or its text cannot be read."""
    if tokens < 1:
        raise ConfigError(f"{tokens} tokens: needs at least 1")
    scoring.check(models, None)
    for path in models.values():  # here, and not by several processes at once
        scoring.own_text(path, runs.read_config(path), checkpoint.latest(path))


def result(models: Mapping[str, Path], measured: Mapping[str, Tables | Failure]) -> Result:
    """Tables, notes and figures of the runs measured so far, in the order in which they were named."""
    rows: dict[str, list[Row]] = {name: [] for name in (*CAPTIONS, *HIDDEN)}
    for label in models:
        outcome = measured.get(label)
        if isinstance(outcome, Failure):
            for name in CAPTIONS:
                rows[name].append({"model": label, "failed": outcome.why})
        for name, some in outcome.items() if isinstance(outcome, dict) else ():
            rows[name] += [{"model": label} | row for row in some]
    rows["key correlations by layer"] = [row for row in rows["correlations by layer"] if row["of"].startswith("key")]
    shown = {row["model"]: row["in the disk"].split(" (")[0] for row in rows["text"] if "in the disk" in row}
    rows["disk"] = [row | {"panel": f"{row['model']}, {shown[row['model']]}"} for row in rows["disk"]]
    for row in rows["variance by head"]:
        several = len({other["mixer"] for other in rows["variance by head"] if other["model"] == row["model"]}) > 1
        row["layers"] = f"{row['model']}: {row['mixer']}" if several else row["model"]
    tables = [
        Table(name, rows[name], CAPTIONS.get(name, ""), name in CAPTIONS, DIGITS.get(name, 4), ["half-life of heads, tokens"])
        for name in rows
        if rows[name]
    ]
    return Result("geometry", tables, notes_on(models, rows), figures(rows))


def figures(rows: Mapping[str, list[Row]]) -> list[Figure]:
    drawn: list[Figure] = []
    if rows["correlations by layer"]:
        before: dict[str, float] = {}
        for row in rows["correlations"]:
            if row.get("of", "").startswith("key") and math.isfinite(row["untrained |rho|"]):
                before[row["with"]] = max(before.get(row["with"], 0.0), row["untrained |rho|"])
        title = "Spearman's |rho| of keys' radii (softmax: of their norms), mean over heads"
        title += "; before training at most " * bool(before) + ", ".join(f"{most:.2f} ({what})" for what, most in before.items())
        drawn.append(
            Heatmap(
                "geometry_correlations", title, "key correlations by layer", "layer", "with", "mean |rho|",
                y_label="keys' radii with", low=0,
            )
        )  # fmt: skip
    if rows["radii by head"]:
        title, share = "Radii by layer, mean and range over heads; 4 is the largest possible", "share of the variance of scores"
        for model in dict.fromkeys(row["model"] for row in rows["radii"] if row.get("mixer") == "phase8"):
            if exact := [str(row["layer"]) for row in rows["radii"] if row["model"] == model and row["mixer"] == "phase7"]:
                title += f"; layers {', '.join(exact)} of {model} are of phase7"
        drawn += [
            Lines(
                "geometry_radii", title, "radii by head", "layer", "radius", ("model", "of"), over="head",
                y_label="distance from the origin",
            ),
            Bars(
                "geometry_variance", "Share of the variance of scores that the angle alone explains: mean of heads, and each",
                "variance by head", "layers", "angle alone", share, null="untrained, angle alone",
            ),
            Disk("geometry_disk", "Keys of one head in the Poincaré disk", "disk", panels="panel"),
        ]  # fmt: skip
    return drawn


def notes_on(models: Mapping[str, Path], rows: Mapping[str, list[Row]]) -> list[str]:
    """What the tables say, in words."""
    texts: dict[str, list[str]] = {}
    for row in rows["text"]:
        size = (
            f"{row['tokens']:,} tokens in {row['sequences']:,} sequences, of documents {row['documents']:,}; "
            f"{row['in documents with brackets']:,} tokens in documents with brackets"
        )
        texts.setdefault(size, []).append(row["model"])
    notes = [f"{', '.join(labels)}: {size}" for size, labels in texts.items()]
    notes += [goes_with(what, rows["correlations"]) for what in dict.fromkeys(row["with"] for row in rows["correlations"] if "with" in row)]
    for label in models:
        null, *effects = [row for row in rows["ablations"] if row["model"] == label and "nats lost" in row] or [None]
        if null is None:
            continue
        notes.append(f"{label}: replaced by themselves, radii lose {null['nats lost']:.2g} nats, which should be 0; {verdict(effects)}")
    for row in rows["variance of scores"]:
        if "angle alone" in row:
            before = f"{row['untrained, angle alone']:.0%} before training"
            share = f"{row['angle alone']:.0%} of the variance of scores within queries is the angle's alone ({before})"
            notes.append(f"{row['model']}, {row['mixer']}: {share}")
    if rows["disk"]:
        notes.append(
            "disk: " + "; ".join(f"{row['model']}: {row['in the disk']}" for row in rows["text"] if "in the disk" in row)
            + ". Distances from the centre are tanh(r/2) of true radii; angles alone are projected, to two principal directions of "
            "the keys shown, before their rotation by position"
        )  # fmt: skip
    notes += [f"{name}: {words}" for name, words in EXPLAINED.items() if rows[name]]
    twins = [row for row in rows["radii"] if row.get("mixer") == NO_RADII]
    if rows["correlations"] and not twins:
        notes.append("no softmax run was named: the norms of a twin's keys, which correlate too, are not beside")
    return notes


def goes_with(what: str, rows: list[Row]) -> str:
    """How strongly keys go with something, of all models, beside those that were not trained."""
    matching = [row for row in rows if row.get("with") == what and row["of"].startswith("key")]
    each = ", ".join(
        f"{row['model']} {row['mean |rho|']:.2f} ({row['of'].removeprefix('key ')}; untrained {row['untrained |rho|']:.2f})"
        for row in matching
    )
    return f"{what}, mean |rho| of keys over heads: {each}"


def verdict(effects: list[Row]) -> str:
    """What ablations cost, in words; within two standard errors of nothing is nothing."""
    said = []
    for row in (row for row in effects if row["radii of"] == "both"):
        lost, error = row["nats lost"], row["± standard error"]
        how = f"{lost:+.4f} ± {error:.4f} nats" + (" (nothing, within two standard errors)" if abs(lost) <= 2 * error else "")
        how = how if math.isfinite(error) else f"{lost:+.4f} nats (of one document, without an error)"
        said.append(f"by {row['replaced by']}, {how}")
    return "; ".join(said)


def run(
    models: Mapping[str, Path],
    devices: Sequence[torch.device],
    *,
    tokens: int = 200_000,
    kernels: Literal["auto", "torch", "triton"] = "auto",
) -> Iterator[Result]:
    """Look into each run on about so many tokens of its validation text, one run a device. Yields what is measured so far.

    Args:
        models: label -> folder of a run, of any kind.
    """
    jobs = [Job(label, path, tokens, kernels) for label, path in models.items()]
    measured: dict[str, Tables | Failure] = {}
    for job, of_run in side_by_side(look_into, jobs, devices, desc="geometry"):
        measured[job.label] = of_run
        yield result(models, measured)
