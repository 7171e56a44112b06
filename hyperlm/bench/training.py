"""One model trained from nothing by the same rules as every other: what suites that compare kinds have in common."""

import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from hyperlm import checkpoint, data, env, evals, memory, runs
from hyperlm import residence as residences
from hyperlm.batch import Batch
from hyperlm.bench.arms import PEERS
from hyperlm.bench.peers import gpt
from hyperlm.config import Config
from hyperlm.files import file_digest
from hyperlm.loss import IGNORE
from hyperlm.optim import Schedule, new_schedule
from hyperlm.step import init_state, make_flush, make_step, weights

EVALUATIONS = 10  # on the way
BAD_STEPS = 5  # without a finite gradient, in a row, after which a model has diverged


@dataclass(frozen=True)
class Job:
    """A model to train."""

    label: str  # phase7, hybrid, nanogpt-muon, ...: see arms.py
    config: Config  # resolved: rate, seed, steps, data and model's kind are its own
    keep: Path | None = None  # where the model is left as a folder of a run, for chat.py and other suites; no folder if None


@dataclass(frozen=True)
class Point:
    """A moment of a curve."""

    step: int
    tokens: int
    seconds: float  # of training alone: evaluations and the first step, in which kernels are compiled, are not counted
    train_loss: float  # mean since the point before, nats a token
    val_loss: float


@dataclass(frozen=True)
class Outcome:
    """What a job came to."""

    parameters: int
    val: dict[str, float]  # of the last step, as `evals.evaluate` returns it: val_loss, val_bpb, ...; nan where training diverged
    curve: list[Point]
    tokens_per_second: float  # of training alone
    gib: float  # peak memory of training


class Learner(NamedTuple):
    """What is trained: a model of hyperlm, or a peer."""

    parameters: int
    step: Callable[[Batch], tuple[Tensor, bool]]  # -> nats a learnt token, and whether it was skipped, not being finite
    evaluate: Callable[[], dict[str, float]]
    save: Callable[[Path, float], None]  # (folder, validation loss)


def train(job: Job, device: torch.device) -> Outcome:
    """Train the model of a job on the text of its configuration, on one device, and evaluate it ten times on the way.

    A model that diverges is an outcome with losses that are nan, and leaves no folder; nor does a peer, which is no run of hyperlm.

    Raises:
        DataError: if the text cannot be read.
    """
    config = job.config
    env.prepare(device)
    corpus = data.prepare(config, say=lambda line: None)
    order = data.batches(corpus, config, say=lambda line: None)
    total = config.train.total_steps(order.steps_per_epoch)
    env.reset_peak_memory(device)
    learner = (peer if job.label in PEERS else native)(job, corpus, new_schedule(config.optim, total), device)
    moments = {math.ceil(total * i / EVALUATIONS) for i in range(1, EVALUATIONS + 1)}

    curve: list[Point] = []
    val = dict.fromkeys(("val_loss", "val_ppl", "val_bpb"), math.nan)
    seconds, timed, tokens, bad, gib = 0.0, 0, 0, 0, 0.0
    nats, learnt = torch.zeros((), device=device), 0  # since the point before
    since = time.perf_counter()
    for now in range(1, total + 1):
        batch = order.at(now - 1)
        count = int((batch.targets != IGNORE).sum())
        loss, skipped = learner.step(batch)
        nats, learnt, tokens = nats + loss * count, learnt + count, tokens + count
        timed += batch.tokens.numel()
        bad = bad + 1 if skipped else 0
        if now == 1 and total > 1:  # kernels were compiled in it
            wait(device)
            timed, since = 0, time.perf_counter()
        if now not in moments and bad < BAD_STEPS:
            continue
        wait(device)
        seconds += time.perf_counter() - since
        gib = gib or env.peak_memory(device) / env.GIB
        diverged = bad == BAD_STEPS or not math.isfinite((losses := learner.evaluate())["val_loss"])
        val_loss = math.nan if diverged else losses["val_loss"]
        curve.append(Point(now, tokens, seconds, float(nats) / max(1, learnt), val_loss))
        if diverged:
            break
        if now == total:
            val = losses
        nats, learnt = torch.zeros_like(nats), 0
        since = time.perf_counter()

    if job.keep and math.isfinite(val["val_loss"]):
        learner.save(job.keep, val["val_loss"])
    return Outcome(learner.parameters, val, curve, timed / seconds if timed else math.nan, gib)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def native(job: Job, corpus: data.Corpus, schedule: Schedule, device: torch.device) -> Learner:
    """A model of hyperlm: what train.py makes of the same configuration."""
    config = job.config
    residence = residences.make(config, device)
    state, step, flush = init_state(residence), make_step(residence, schedule), make_flush(residence, schedule)

    def learn(batch: Batch) -> tuple[Tensor, bool]:
        nonlocal state
        state, metrics = step(state, batch)
        return metrics["loss"], metrics["skipped"]

    def evaluate() -> dict[str, float]:
        nonlocal state
        state = flush(state)
        return evals.evaluate(weights(residence, state), corpus, config, device)

    def save(run: Path, val_loss: float) -> None:
        shutil.rmtree(run, ignore_errors=True)
        run.mkdir(parents=True)
        runs.describe(run, config, corpus.tokenizer, corpus.chat, env.describe(device))
        facts = checkpoint.Facts(config, schedule, corpus.fingerprint, file_digest(run / "tokenizer.json"), corpus.chat)
        with checkpoint.writing(run, 1) as writer:
            checkpoint.save(writer, state, facts, val_loss, None, in_place=residence.plan.host > 0)

    return Learner(sum(memory.parameters(config).values()), learn, evaluate, save)


def peer(job: Job, corpus: data.Corpus, schedule: Schedule, device: torch.device) -> Learner:
    """A GPT of the size of the configuration's model."""
    config, shape = job.config, gpt.shape(job.config)
    torch.manual_seed(config.train.seed)  # of dropout
    model = gpt.GPT(shape, config.train.seed, device)
    step = gpt.make_step(model, config, schedule, device, muon=job.label.endswith("muon"))
    evaluate = partial(evals.validate, partial(gpt.token_nats, model), corpus, config, device, config.train.batch_size)
    return Learner(shape.parameters, step, evaluate, lambda run, val_loss: None)
