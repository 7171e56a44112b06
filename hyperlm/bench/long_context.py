"""Suite `long-context`: what models do with more text than the N tokens that they were trained on: loss by position, and passkey retrieval.

Loss by position: a model reads windows of 16 N tokens from the first to the last. Beside the loss of a token stands its loss with N/2 to N
tokens before it alone, as in training: the difference, window by window, is what the text farther back is worth to the model, or costs it.
Axes: W windows, L their length, N the length of training.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hyperlm import data, env, passkey, trained
from hyperlm.bench import pool, scoring
from hyperlm.bench.result import Figure, Heatmap, Lines, Result, Row, Table
from hyperlm.bench.scoring import Scorer
from hyperlm.bench.statistics import mean_and_error
from hyperlm.config import DataConfig
from hyperlm.loss import IGNORE
from hyperlm.passkey import CHOICES, Reader

ENOUGH = 8  # windows within documents; where there are fewer, documents are joined
ALONE = ("from", "to", "loss", "standard error")  # what is told of positions with nothing farther back than in training
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)  # of a key in a text

check = scoring.check


# -- loss by position ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Windows:
    """Long texts."""

    tokens: Tensor  # (W, L) int64
    targets: Tensor  # (W, L)
    documents: int  # that they are from
    joined: bool  # whether they go on from one document to the next
    group: Tensor  # (W,) int64, from 0: windows of one document, which are not independent

    def __str__(self) -> str:
        count, length = self.tokens.shape
        what = "joined, as too few are that long" if self.joined else "at least that long"
        windows, documents = f"{count} window{'s' * (count > 1)}", f"{self.documents} document{'s' * (self.documents > 1)}"
        return f"{windows} of {length:,} tokens, from {documents} {what}"


def texts_of(corpus: data.Corpus) -> list[np.ndarray]:
    """Validation texts, conversations left out, in an order that mixes sources: the ids of each, between ends of texts."""
    texts = []
    for shard in corpus.shards:
        ends = np.cumsum(shard.val_documents[:, 0])
        for (size, _, _, is_talk), end in zip(shard.val_documents.tolist(), ends.tolist(), strict=True):
            if not is_talk:
                texts.append(shard.val[end - size : end + 1])
    return [texts[i] for i in np.random.default_rng(0).permutation(len(texts))]


def windows_of(texts: Sequence[np.ndarray], n: int, times: int, most: int) -> Windows:
    """At most `most` windows of `times` N tokens, or of half of that and so on where there is not as much text.

    Windows are parts of documents, the beginnings first; where there are fewer than ENOUGH, of documents that follow each other.

    Raises:
        DataError: if no window has 2 N tokens.
    """
    total = sum(len(text) - 1 for text in texts)
    while times >= 2 and total < times * n:
        times //= 2
    if times < 2:
        reason = f"{total:,} tokens of texts (conversations are none), fewer than twice the {n:,} of training"
        raise data.DataError(f"{reason}: name more by --data.sources")
    length = times * n
    places = sorted((i, k) for k, text in enumerate(texts) for i in range((len(text) - 1) // length))[:most]
    if joined := len(places) < min(ENOUGH, most, total // length):
        stream = np.concatenate([texts[0][:1], *(text[1:] for text in texts)])[: most * length + 1].astype(np.int64)
        chosen = [stream[start : start + length + 1] for start in range(0, len(stream) - length, length)]
        documents, group = int((np.concatenate([window[:-1] for window in chosen]) == stream[0]).sum()), np.arange(len(chosen))
    else:
        chosen = [texts[k][i * length : (i + 1) * length + 1].astype(np.int64) for i, k in places]
        used, group = np.unique([k for _, k in places], return_inverse=True)
        documents = len(used)
    windows = torch.from_numpy(np.stack(chosen))
    return Windows(windows[:, :-1], windows[:, 1:], documents, joined, torch.from_numpy(group))


def nats_by_place(score: Scorer, windows: Windows, n: int, batch_tokens: int) -> tuple[Tensor, Tensor]:
    """Nats of every target, (W, L) on the CPU: with all that stands before it in its window; and with N/2 to N tokens before it, but at the
    beginning.

    Args:
        at_once: tokens that are read together, but for windows that are longer.
    """
    count, length = windows.tokens.shape
    step = n // 2
    parts = 1 + -(-(length - n) // step)
    pad = (0, n + (parts - 1) * step - length)
    tokens, targets = F.pad(windows.tokens, pad), F.pad(windows.targets, pad, value=IGNORE)
    whole, recent = torch.zeros(count, length), torch.zeros(tokens.shape)
    batch_size = max(1, batch_tokens // n)
    with env.progress(desc="loss by position", total=2 * count, unit=" windows") as bar:
        for rows in torch.arange(count).split(max(1, batch_tokens // length)):
            whole[rows] = score(windows.tokens[rows], windows.targets[rows]).float().cpu()
            bar.update(len(rows))
        for row in range(count):
            inputs, learnt = tokens[row].unfold(0, n, step), targets[row].unfold(0, n, step).clone()  # (parts, N)
            learnt[1:, : n - step] = IGNORE
            part_nats = torch.cat(
                [score(*pair).float().cpu() for pair in zip(inputs.split(batch_size), learnt.split(batch_size), strict=True)]
            )
            for part, nats in enumerate(part_nats):
                recent[row, part * step : part * step + n] += nats
            bar.update()
    return whole, recent[:, :length]


def edges_of(n: int, length: int) -> list[int]:
    """Where buckets begin and end: powers of two times N, from N/16."""
    edges = {0, length, *(n >> i for i in range(5))}
    while n < length:
        edges.add(n)
        n *= 2
    return sorted(edges)


def buckets(whole: Tensor, recent: Tensor, group: Tensor, n: int) -> list[Row]:
    """Means over (W, L) nats of each part of the windows, with standard errors over groups (W,) of windows; nan where there is one."""
    rows = []
    for low, high in pairwise(edges_of(n, whole.shape[1])):
        loss, other = (nats[:, low:high].double().mean(1) for nats in (whole, recent))
        row: Row = {"from": low, "to": high}
        row["loss"], row["standard error"] = mean_and_error(loss, torch.ones_like(loss), group)
        row["loss of N"] = float(other.mean())
        row["gain"], row["error of gain"] = mean_and_error(other - loss, torch.ones_like(loss), group)
        rows.append(row)
    return rows


# -- passkeys --------------------------------------------------------------------------------------------------------------------------


def cells(read: Reader, words: passkey.Words, hay: np.ndarray, lengths: Sequence[int], trials: int, batch_tokens: int) -> list[Row]:
    """Shares of trials in which the key is said and chosen, for each length and depth; with keys and texts of its own."""
    rows = []
    with env.progress(desc="passkeys", total=len(DEPTHS) * sum(lengths), unit=" tokens a trial") as bar:
        for length in lengths:
            for number, depth in enumerate(DEPTHS):
                texts = passkey.trials(words, hay, length, [depth] * trials, seed=number)
                grades = passkey.graded(read, texts, max(1, batch_tokens // length))
                shares = {"said": float(grades.said.mean()), "chosen": float(grades.chosen.mean())}
                rows.append({"length": length, "depth": depth, "trials": trials, **shares})
                bar.update(length)
    return rows


def over_depths(rows: Sequence[Row]) -> list[Row]:
    """Means of cells over depths, with the standard error of `chosen`, that of so many trials."""
    means = []
    for length in dict.fromkeys(row["length"] for row in rows):
        of_length = [row for row in rows if row["length"] == length]
        trials = sum(row["trials"] for row in of_length)
        said, chosen = (float(np.mean([row[name] for row in of_length])) for name in ("said", "chosen"))
        error = (chosen * (1 - chosen) / trials) ** 0.5
        means.append({"length": length, "trials": trials, "said": said, "chosen": chosen, "standard error": error})
    return means


# -- the suite -------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job(scoring.Job):
    """A part of the suite, of one model."""

    part: Literal["positions", "passkeys"]
    weights: Literal["trained", "untrained"]
    times: int
    count: int  # windows, or trials of a cell


@dataclass(frozen=True)
class Outcome:
    rows: list[Row]
    fingerprints: tuple[str, str]  # of text and tokens
    note: str
    n: int  # tokens of a sequence of training


def measure(job: Job, device: torch.device) -> Outcome:
    """Raises what loading a run or its text raises; CheckFailed of a model whose numbers would mean nothing."""
    loaded = trained.load_model(job.run, "latest", str(device), job.kernels)
    if job.weights == "untrained":
        loaded = replace(loaded, params=scoring.untrained(loaded.config, device))
    corpus = scoring.text_for(loaded, job.run, job.text)
    fingerprints = scoring.fingerprints(corpus)
    score, n, batch_tokens = scoring.scorer(loaded), loaded.config.data.seq_len, scoring.tokens_at_once(device)
    if job.part == "positions":
        windows = windows_of(texts_of(corpus), n, job.times, job.count)
        rows = buckets(*nats_by_place(score, windows, n, batch_tokens), windows.group, n)
        rows = [row if row["to"] > n else {name: row[name] for name in ALONE if name in row} for row in rows]
        guessing = math.log(loaded.config.model.vocab_size)
        note = f"{job.label}: trained on {n:,} tokens at a time; {windows}; guessing costs {guessing:.2f} nats a token"
    else:
        words = passkey.words_of(corpus.tokenizer)
        lengths = [n // 2 * 2**i for i in range(1 + int(math.log2(2 * job.times))) if n // 2 * 2**i >= words.size]
        rows = cells(passkey.reader(loaded.params, loaded.config, device), words, passkey.hay_of(corpus), lengths, job.count, batch_tokens)
        note = f"{job.label}: lengths below {words.size} tokens have no room for a key and its question" if n // 2 < words.size else ""
    labels = {"model": job.label, "weights": job.weights} if job.part == "passkeys" else {"model": job.label, "text": fingerprints[0]}
    return Outcome([labels | row for row in rows], fingerprints, note, n)


def run(
    models: Mapping[str, Path],
    text: DataConfig | None,
    devices: Sequence[torch.device],
    *,
    kernels: str = "auto",
    times: int = 16,
    windows: int = 32,
    trials: int = 20,
) -> Iterator[Result]:
    """Loss by position and passkey retrieval of each run, the latter with its first weights as well. Yields what is measured so far.

    Args:
        models: label -> folder of a run.
        text: `sources` and how they are read; None for each run's own validation text.
        times: the longest text as a multiple of the length of training, a power of two.
        windows: of the longest text, at most.
        trials: of each length and depth.
    """
    kinds = [("positions", "trained", windows), ("passkeys", "trained", trials), ("passkeys", "untrained", trials)]
    jobs = [Job(label, run, text, kernels, part, weights, times, count) for part, weights, count in kinds for label, run in models.items()]
    measured: dict[Job, Outcome | pool.Failure] = {}
    for job, outcome in pool.side_by_side(measure, jobs, devices, desc="long-context"):
        measured[job] = outcome
        yield result({job: measured[job] for job in jobs if job in measured})


def result(measured: Mapping[Job, Outcome | pool.Failure]) -> Result:
    """Tables, notes and figures of what is found so far."""
    rows: dict[tuple[str, str], list[Row]] = {("positions", "trained"): [], ("passkeys", "trained"): [], ("passkeys", "untrained"): []}
    lengths: list[Row] = []
    for job, outcome in measured.items():
        job_rows = outcome.rows if isinstance(outcome, Outcome) else [{"model": job.label, "weights": job.weights, "failed": outcome.why}]
        rows[job.part, job.weights] += job_rows
        if job.part == "passkeys":
            labels = {"model": job.label, "weights": job.weights}
            lengths += [labels | row for row in over_depths(job_rows)] if isinstance(outcome, Outcome) else job_rows
    outcomes = [outcome for outcome in measured.values() if isinstance(outcome, Outcome)]
    notes = list(dict.fromkeys(outcome.note for outcome in outcomes if outcome.note))
    notes += scoring.comparable(outcome.fingerprints for outcome in outcomes)
    if lengths:
        depths = f"passkeys: means over depths of {', '.join(f'{depth:.0%}' for depth in DEPTHS)}"
        notes.append(depths + "; none was said" * (not said_any(lengths)))
    tables = [
        Table(
            "loss by position",
            rows["positions", "trained"],
            "Mean loss in nats a token at positions `from` to `to` of long windows, and its standard error over documents (windows, "
            "where these are joined); `loss of N`: of the same tokens with at most as many before them as in training; "
            "`gain`: what the text farther back is worth.",
            quiet=["text"],
        ),
        Table(
            "passkeys",
            passkeys(lengths),
            f"Share of trials, ± standard error, in which a key of {passkey.DIGITS} digits hidden in so many tokens of text is chosen "
            f"(more probable than {CHOICES - 1} other numbers; chance {1 / CHOICES}) or said (greedily, all digits; chance 0).",
        ),
        Table("passkey by length", lengths, "The same, a row for each length.", shown=False),
        Table("passkey by length and depth", rows["passkeys", "trained"], "The same by depth.", shown=False),
        Table("passkey by length and depth, untrained", rows["passkeys", "untrained"], "With the weights before training.", shown=False),
    ]
    n = {outcome.n for outcome in outcomes}
    return Result("long-context", [table for table in tables if table.rows], notes, figures(tables, n.pop() if len(n) == 1 else None))


def said_any(lengths: Sequence[Row]) -> bool:
    return any(row.get("said", 0) > 0 for row in lengths)


def passkeys(lengths: Sequence[Row]) -> list[Row]:
    """Rows to be read, with a column for each length; how many keys were said, where any was."""
    rows: dict[tuple[str, str, str], Row] = {}
    for row in lengths:
        for answer in ("chosen", "said") if said_any(lengths) else ("chosen",):
            key = row["model"], row["weights"], answer
            line = rows.setdefault(key, dict(zip(("model", "weights", "answer"), key, strict=True)))
            if "failed" in row:
                line["failed"] = row["failed"]
            else:
                error = (row[answer] * (1 - row[answer]) / row["trials"]) ** 0.5
                line[f"{row['length']:,}"] = f"{row[answer]:.2f} ± {error:.2f}"
    return list(rows.values())


def figures(tables: Sequence[Table], n: int | None) -> list[Figure]:
    """Of tables with rows; `n`, the length of training, if it is that of all."""
    rows = {table.name: table.rows for table in tables}
    trained_on = f"; trained on {n:,}" if n else ""
    position = {"table": "loss by position", "x": "to", "x_label": f"up to position (tokens{trained_on})", "log_x": True}
    length = {"table": "passkey by length", "x": "length", "x_label": f"length (tokens{trained_on})", "log_x": True}
    cell = {
        "table": "passkey by length and depth",
        "x": "length",
        "x_label": f"length (tokens{trained_on})",
        "y": "depth",
        "y_label": "depth of the key",
    }
    shares, both = {"y": "chosen", "y_label": "share of trials", "low": 0.0, "high": 1.0}, ("model", "weights")
    farther = "What text farther back than in training is worth"
    right = f"Pass keys told from {CHOICES - 1} other numbers, mean over depths"
    drawn: list[Figure] = [
        Lines("long_context_loss", "Loss by position", y="loss", y_label="loss (nats a token)", **position),
        Lines("long_context_gain", farther, y="gain", y_label="gain (nats a token)", levels={"no gain": 0.0}, **position),
        Lines("long_context_passkey", right, series=both, levels={"chance": 1 / CHOICES}, **shares, **length),
        Heatmap("long_context_passkey_chosen", f"Pass keys chosen among {CHOICES}", value="chosen", low=0, high=1, **cell),
    ]
    if said_any(rows["passkey by length"]):
        drawn.append(Heatmap("long_context_passkey_said", "Pass keys said", value="said", low=0, high=1, **cell))
    return [figure for figure in drawn if rows[figure.table]]
