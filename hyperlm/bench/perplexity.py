"""Suite `perplexity`: loss, perplexity and bits per byte of trained runs on a text, or on their own validation text, by source and whole.

Windows have the length N of a run's training. Side by side (stride N) a token has from one to N tokens before it, as in training; at stride
N/2 it counts in the second half of a window alone, with more than N/2 tokens before it, which is nearer to what the model can do.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from hyperlm import data, evals, log, trained
from hyperlm.bench import pool, scoring
from hyperlm.bench.result import Lines, Result, Row, Table
from hyperlm.config import DataConfig
from hyperlm.loss import IGNORE

WHOLE = "all"  # of several sources

check = scoring.check


@dataclass(frozen=True)
class Job(scoring.Job):
    max_tokens: int  # of each source; 0 for all


@dataclass(frozen=True)
class Outcome:
    rows: list[Row]
    curve: list[Row]  # what its training recorded, nothing where it recorded nothing
    fingerprints: tuple[str, str]  # of text and tokens


def measure(job: Job, device: torch.device) -> Outcome:
    """Rows of a run: for each stride, of every source and of all.

    Raises:
        DataError: if its text is gone; and what loading it raises.
        CheckFailed: of a model whose numbers would mean nothing.
    """
    model = trained.load_model(job.run, "latest", str(device), job.kernels)
    score = scoring.scorer(model)  # before any number: it looks back only
    corpus = scoring.text_for(model, job.run, job.text)
    fingerprints = scoring.fingerprints(corpus)
    labels = {"model": job.label, "step": model.step, "text": fingerprints[0]}
    n = model.config.data.seq_len
    rows = [labels | row for stride in (n, n // 2) for row in at_stride(model, score, corpus, stride, job.max_tokens)]
    return Outcome(rows, curve_of(job), fingerprints)


def curve_of(job: Job) -> list[Row]:
    """Loss of training, and at evaluations of validation, over the tokens that were learnt."""
    wanted = {"training": "loss", "validation": "val_loss"}
    return [
        {"model": job.label, "tokens": record["tokens"], "loss": record[name], "of": of}
        for record in log.history(job.run)
        for of, name in wanted.items()
        if "tokens" in record and isinstance(record.get(name), float)
    ]


def at_stride(model: trained.Model, score: scoring.Scorer, corpus: data.Corpus, stride: int, max_tokens: int) -> list[Row]:
    """A row for each source, if there are several, and one for all of the text."""
    config, batch = model.config, max(1, scoring.tokens_at_once(model.device) // model.config.data.seq_len)
    sources = evals.by_source(score, corpus, config, model.device, batch, max_tokens, stride)
    if not sources:
        raise data.DataError(
            "nothing in this text is what the model was trained to say: it has conversations alone, without an assistant's turns"
        )
    parts = [(sums.nats, sums.tokens, sums.special, size) for _, size, sums in sources.values()]
    targets = [source.sequences.targets for source in sources.values()]
    counts = [torch.bincount(x[x != IGNORE], minlength=config.model.vocab_size) for x in targets]
    rows = [row_of(name, stride, *part, count) for name, part, count in zip(sources, parts, counts, strict=True)]
    return [*rows, row_of(WHOLE, stride, *map(sum, zip(*parts, strict=True)), sum(counts))] if len(rows) > 1 else rows


def row_of(source: str, stride: int, nats: float, tokens: int, special: float, size: int, counts: torch.Tensor) -> Row:
    """What sums over targets come to.

    Args:
        nats, special: of all targets, and of those that stand for no text.
        size: bytes of what is learnt.
        counts: (V,) how often each token is a target.
    """
    loss, p = nats / tokens, counts[counts > 0].double() / counts.sum()
    return {
        "source": source,
        "stride": stride,
        "tokens": tokens,
        "loss": loss,
        "perplexity": math.exp(min(loss, 80)),
        "bits per byte": (nats - special) / math.log(2) / size,
        "no context": -float((p * p.log()).sum()),
    }


def run(
    models: Mapping[str, Path], text: DataConfig | None, devices: Sequence[torch.device], *, kernels: str = "auto", max_tokens: int = 0
) -> Iterator[Result]:
    """Evaluate the newest checkpoint of each run. Yields what is measured so far.

    Args:
        models: label -> folder of a run.
        text: `sources` and how they are read; None for each run's own validation text.
        max_tokens: of each source, in whole documents; 0 for all.
    """
    jobs = [Job(label, folder, text, kernels, max_tokens) for label, folder in models.items()]
    measured: dict[str, Outcome | pool.Failure] = {}
    for job, outcome in pool.side_by_side(measure, jobs, devices, desc="perplexity"):
        measured[job.label] = outcome
        yield result({label: measured[label] for label in models if label in measured}, own_text=text is None)


def result(measured: Mapping[str, Outcome | pool.Failure], *, own_text: bool) -> Result:
    """The table of what is found so far, models in their order."""
    rows: list[Row] = []
    for label, outcome in measured.items():
        rows += outcome.rows if isinstance(outcome, Outcome) else [{"model": label, "failed": outcome.why}]
    diverged = dict.fromkeys(row["model"] for row in rows if "loss" in row and not math.isfinite(row["loss"]))
    notes = [f"{label}: its loss is not finite: the run diverged" for label in diverged]
    notes += scoring.comparable(outcome.fingerprints for outcome in measured.values() if isinstance(outcome, Outcome))
    caption = (
        f"Loss in nats a token on {'the validation text of each run' if own_text else 'the text given, all of it'}, in windows as long "
        "as in training, side by side or (texts, not conversations) half a window apart; `no context`: of guessing by this "
        "text's own token frequencies. Bits per byte leave out tokens that stand for no text."
    )
    curves = [row for outcome in measured.values() if isinstance(outcome, Outcome) for row in outcome.curve]
    losses = Table("perplexity", rows, caption, quiet=["step", "text"])
    tables = [losses, *[Table("curves", curves, "As the runs recorded them.", shown=False)] * bool(curves)]
    return Result("perplexity", tables, notes, [overlaid(curves)] if curves else [])


def overlaid(curves: list[Row]) -> Lines:
    """The losses of runs, without the first, beside which the last would all look the same: from a nat above the worst run's best on."""
    least: dict[tuple[str, str], float] = {}
    for row in curves:
        key = row["model"], row["of"]
        least[key] = min(least.get(key, math.inf), row["loss"])
    high = math.ceil(max(least.values()) + 1) if math.isfinite(max(least.values())) else math.inf
    return Lines(
        "perplexity_curves", "Losses of the runs as they were trained, each on its own text", "curves", "tokens", "loss", ("model", "of"),
        x_label="tokens learnt", y_label="loss (nats a token)", high=high if high < max(row["loss"] for row in curves) < math.inf else None,
    )  # fmt: skip
