"""One small model learns to answer, from nothing, and is tested: trained by the step of train.py on a task of synthetic.py.

Axes: B sequences, N tokens, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from statistics import mean
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hyperlm import env, model
from hyperlm import residence as residences
from hyperlm.batch import Batch
from hyperlm.bench import checks
from hyperlm.bench.decode import GROWING
from hyperlm.bench.synthetic import TEST, VALIDATION, Sample, Setting, Task, at_step
from hyperlm.config import Config, ModelConfig
from hyperlm.loss import IGNORE
from hyperlm.optim import new_schedule
from hyperlm.step import init_state, make_step, weights
from hyperlm.tree import Tree

Logits = Callable[[Tensor, Tensor], Tensor]  # (tokens (B, N), where to answer (B, N) bool) -> (answers, V), row after row


@dataclass(frozen=True)
class Job:
    task: Task
    label: str
    config: Config  # resolved; a step has about batch_size x seq_len tokens
    test: int  # sequences of each setting; of validation a quarter


class Score(NamedTuple):
    """Of answers that are alike."""

    right: int
    total: int


@dataclass(frozen=True)
class Outcome:
    nats: float  # an answer, on the validation set: mean over settings
    tests: dict[Setting, dict[int, Score]]  # by group


def answers(logits: Logits, sample: Sample, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of each answer whether it is the most likely token, its nats, and its group, on the CPU; `tokens` are read at a time."""
    right, nats, groups = [], [], []
    size = max(1, tokens // sample.group.shape[1])
    for start in range(0, len(sample.group), size):
        part = sample[start : start + size]
        where = part.batch.targets != IGNORE
        predicted, wanted = logits(part.batch.tokens, where).float(), part.batch.targets[where]
        right.append(predicted.argmax(-1).cpu() == wanted)
        nats.append(F.cross_entropy(predicted, wanted.to(predicted.device), reduction="none").cpu())
        groups.append(part.group[where])
    return torch.cat(right), torch.cat(nats), torch.cat(groups)


def scores(right: Tensor, groups: Tensor) -> dict[int, Score]:
    total, hits = torch.bincount(groups), torch.bincount(groups, right.long())
    return {group: Score(int(hits[group]), int(total[group])) for group in range(len(total)) if total[group]}


def logits_of(params: Tree, config: Config, device: torch.device) -> Logits:
    """Those of a model, at answers alone."""

    @torch.no_grad()
    def logits(tokens: Tensor, where: Tensor) -> Tensor:
        features = model.hidden(params, tokens.to(device), config.model, kernels=config.kernels)
        return F.linear(features[where.to(device)], params["head"]["weight"])

    return logits


def learnt(job: Job, device: torch.device) -> Logits:
    """The model of a job, trained."""
    config = job.config
    tokens = config.train.batch_size * config.data.seq_len
    residence = residences.make(config, device)
    step, state = make_step(residence, new_schedule(config.optim, config.train.steps)), init_state(residence)
    for number in env.progress(range(config.train.steps), f"{job.label}, {job.task.name}"):
        batch = at_step(job.task, config.train.seed, number, tokens).batch
        state, _ = step(state, Batch(batch.tokens[None], batch.targets[None]))
    return logits_of(weights(residence, state), config, device)


@lru_cache
def checked(config: ModelConfig, kernels: str, device: torch.device) -> None:
    """Once a process. Raises CheckFailed if such a model does not compute what it claims to."""
    checks.model(Config(config, kernels=kernels), device)


def measure(job: Job, device: torch.device) -> Outcome:
    """Train, validate and test one model.

    Raises:
        CheckFailed: if it does not compute what it claims to.
    """
    checked(job.config.model, job.config.kernels, device)
    logits, tokens = learnt(job, device), job.config.train.batch_size * job.config.data.seq_len

    def answers_on(stream: int, setting: Setting, count: int) -> tuple[Tensor, Tensor, Tensor]:
        return answers(logits, job.task.draw((0, stream), count, setting, job.task.vocabulary), tokens)

    nats = mean(float(answers_on(VALIDATION, setting, max(1, job.test // 4))[1].mean()) for setting in set(job.task.learnt))
    tests = {setting: answers_on(TEST, setting, job.test) for setting in job.task.tested}
    return Outcome(nats, {setting: scores(right, groups) for setting, (right, _, groups) in tests.items()})


def state_bytes(cfg: ModelConfig, length: int, dtype: torch.dtype) -> int:
    """What decoding keeps of a sequence of `length` tokens: of what grows an entry for each, and otherwise a state."""
    layers = model.init_cache(cfg, 1, device="meta", dtype=dtype).layers
    return sum(x[:, :, 0].nbytes * length if name in GROWING else x.nbytes for entries in layers for name, x in entries.items())
