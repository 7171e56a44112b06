"""Suite `recall`: what small models of each kind can keep and find again, on synthetic tasks (see synthetic.py), beside chance.

Each task is learnt from nothing by two layers, at every rate of a grid; the rate whose answers cost the fewest nats on a validation set of its
own is tested, on fresh sequences. No task says its answers as text, so a model that sees what comes later gains nothing but in dyck; that none
does is checked for every model all the same.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from statistics import mean
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hyperlm import env, model, tree
from hyperlm.batch import Batch
from hyperlm.bench import checks, pool, synthetic
from hyperlm.bench.arms import KINDS, of_kind
from hyperlm.bench.report import Figure, Lines, Result, Row, Table
from hyperlm.bench.synthetic import SMALLEST, TEST, VALIDATION, Draw, Sample, Setting
from hyperlm.cli import UsageError
from hyperlm.config import Config, ConfigError, DataConfig, ModelConfig, OptimConfig, TrainConfig, resolve
from hyperlm.loss import IGNORE
from hyperlm.mixers import MIXERS
from hyperlm.optim import new_schedule
from hyperlm.step import init_state, make_step, weights

LAYERS = 2
HYBRID_EVERY = 2  # of two layers: phase8, then phase7
FIXED = ("tail", "ssm")  # entries of a cache that are as large for any length, whatever the kind
EACH = 3  # models that learn on one GPU at a time: a single one leaves it idle

Logits = Callable[[Tensor, Tensor], Tensor]  # (tokens (B, N), where to answer (B, N) bool) -> (answers, V), in the order of rows


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    tasks: tuple[str, ...] = ("recall", "scopes", "dyck", "parity", "modulo 5")
    widths: tuple[int, ...] = (64, 128, 256)  # of recall
    width: int = 128  # of the other tasks
    rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    steps: int = 2000
    tokens: int = 16384  # a step
    pairs: tuple[tuple[int, int], ...] = ((64, 4), (128, 8), (256, 16), (512, 64))  # length and pairs of recall
    vocabulary: int = 8192  # of recall
    length: int = 256  # of the other tasks
    test: int = 1024  # sequences of each setting; of validation a quarter
    seeds: tuple[int, ...] = (0,)


FULL = Sizes()
TOY = Sizes(("recall", "parity"), (64,), 64, (1e-2,), 300, 2048, ((64, 4), (128, 8)), 512, 128, 128)


@dataclass(frozen=True)
class Task:
    """Settings to learn from, a batch of one after a batch of another, and to be tested on."""

    name: str
    draw: Draw
    vocabulary: int
    learnt: tuple[Setting, ...]
    tested: tuple[Setting, ...]


@dataclass(frozen=True)
class Job:
    task: Task
    label: str
    config: Config  # resolved
    test: int  # sequences of each setting


class Score(NamedTuple):
    """Of answers that are alike: how many there were, and how many were right."""

    right: int
    total: int


@dataclass(frozen=True)
class Outcome:
    validation: float  # nats an answer
    tests: dict[Setting, dict[int, Score]]  # by group


def tasks(sizes: Sizes) -> list[Task]:
    """Those to be measured. All but recall are tested on what is deeper or longer than what was learnt."""

    def small(name: str, draw: Draw, learnt: Setting, tested: Setting) -> Task:
        return Task(name, draw, SMALLEST, (learnt,), (tested,))

    n, pairs = sizes.length, tuple(Setting(*pair) for pair in sizes.pairs)
    known = [
        Task("recall", synthetic.recall, sizes.vocabulary, pairs, pairs),
        small("scopes", synthetic.scopes, Setting(n, 6), Setting(n, 12)),
        small("dyck", synthetic.dyck, Setting(n, 8), Setting(n, 16)),
        small("parity", synthetic.counting, Setting(n // 4, 2), Setting(n, 2)),
        small("modulo 5", synthetic.counting, Setting(n // 4, 5), Setting(n, 5)),
    ]
    return [task for task in known if task.name in sizes.tasks]


def config_of(task: Task, label: str, width: int, rate: float, seed: int, sizes: Sizes, kernels: str = "auto") -> Config:
    """The model of one job and how it learns.

    Raises:
        ConfigError: if there can be no such model.
    """
    every = HYBRID_EVERY if label == "hybrid" else 0
    shape = ModelConfig(d_model=width, n_layers=LAYERS, head_dim=min(64, width), vocab_size=task.vocabulary, exact_every=every)
    length = max(setting.length for setting in task.learnt)
    own = Config(
        shape, DataConfig(seq_len=length), TrainConfig(max(1, sizes.tokens // length), 1, sizes.steps, seed=seed, residence="device"),
        OptimConfig(rate, state="fp32"), kernels=kernels,
    )  # fmt: skip
    return resolve(of_kind(own, label))


def jobs_of(labels: Sequence[str], sizes: Sizes, kernels: str) -> list[Job]:
    """The longest first."""
    return [
        Job(task, label, config_of(task, label, width, rate, seed, sizes, kernels), sizes.test)
        for task in tasks(sizes)
        for width in (sorted(sizes.widths, reverse=True) if task.name == "recall" else [sizes.width])
        for label in labels
        for rate in sizes.rates
        for seed in sizes.seeds
    ]


def check(labels: Sequence[str], sizes: Sizes) -> None:
    """Raises ConfigError or UsageError on what cannot be measured."""
    for label in labels:
        if label not in KINDS:
            raise UsageError(f"--suite recall: {label} is none of {', '.join(KINDS)}, which it trains from nothing")
    unknown = set(sizes.tasks) - {task.name for task in tasks(sizes)}
    if unknown:
        raise UsageError(f"--suite recall: no task is called {', '.join(sorted(unknown))}; choose from {', '.join(FULL.tasks)}")
    for length, pairs in sizes.pairs:
        if length < 4 * pairs or length % 2:
            raise ConfigError(f"recall of {pairs} pairs: needs an even length of at least {4 * pairs}, and not {length}")
        if pairs >= sizes.vocabulary // 2:
            raise ConfigError(f"recall of {pairs} pairs: needs a vocabulary above {2 * pairs + 1}, and not {sizes.vocabulary}")
    jobs_of(labels, sizes, "auto")


# -- one model ---------------------------------------------------------------------------------------------------------------------------


def answers(logits: Logits, sample: Sample, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of each answer whether it is the most likely token, its nats, and its group, `tokens` read at a time; on the CPU."""
    right, nats, groups = [], [], []
    size = max(1, tokens // sample.group.shape[1])
    for start in range(0, len(sample.group), size):
        part = sample[start : start + size]
        where = part.batch.targets != IGNORE
        found, wanted = logits(part.batch.tokens, where).float(), part.batch.targets[where]
        right.append(found.argmax(-1).cpu() == wanted)
        nats.append(F.cross_entropy(found, wanted.to(found.device), reduction="none").cpu())
        groups.append(part.group[where])
    return torch.cat(right), torch.cat(nats), torch.cat(groups)


def scores(right: Tensor, groups: Tensor) -> dict[int, Score]:
    total, hits = torch.bincount(groups), torch.bincount(groups, right.long())
    return {group: Score(int(hits[group]), int(total[group])) for group in range(len(total)) if total[group]}


def logits_of(params: tree.Tree, config: Config, device: torch.device) -> Logits:
    """The logits of a model, of answers alone."""

    @torch.no_grad()
    def logits(tokens: Tensor, where: Tensor) -> Tensor:
        features = model.hidden(params, tokens.to(device), config.model, kernels=config.kernels)
        return F.linear(features[where.to(device)], params["head"]["weight"])

    return logits


def learnt(job: Job, device: torch.device) -> Logits:
    """Train the model of a job: a batch of each setting in turn, all of about as many tokens."""
    config, settings = job.config, job.task.learnt
    tokens = config.train.batch_size * config.data.seq_len
    step = make_step(config, new_schedule(config.optim, config.train.steps), device)
    state = init_state(config, device)
    for number in env.progress(range(config.train.steps), f"{job.label}, {job.task.name}"):
        setting = settings[number % len(settings)]
        size = max(1, tokens // setting.length)
        sample = synthetic.at_step(job.task.draw, config.train.seed, number // len(settings), size, setting, job.task.vocabulary)
        state, _ = step(state, Batch(sample.batch.tokens[None], sample.batch.targets[None]))
    return logits_of(weights(config, state, device), config, device)


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

    def found(stream: int, setting: Setting, count: int) -> tuple[Tensor, Tensor, Tensor]:
        return answers(logits, job.task.draw((0, stream), count, setting, job.task.vocabulary), tokens)

    nats = mean(float(found(VALIDATION, setting, max(1, job.test // 4))[1].mean()) for setting in job.task.learnt)
    tests = {setting: found(TEST, setting, job.test) for setting in job.task.tested}
    return Outcome(nats, {setting: scores(right, groups) for setting, (right, _, groups) in tests.items()})


def state_bytes(cfg: ModelConfig, length: int, dtype: torch.dtype) -> int:
    """What decoding keeps of a sequence of `length` tokens: keys and values of each, of kinds whose cache grows, and otherwise a state."""
    total = 0
    for layer, entries in enumerate(model.init_cache(cfg, 1, device="meta", dtype=dtype).layers):
        grows = MIXERS[cfg.layer_kind(layer)].cache_grows
        for name, x in entries.items():
            total += x[:, :, 0].nbytes * length if grows and name not in FIXED else x.nbytes
    return total


# -- tables ------------------------------------------------------------------------------------------------------------------------------

Found = list[tuple[Job, Outcome | pool.Failure]]
Line = dict[int, Score]  # by depth or position

CHANCE = {"scopes": 1 / synthetic.VALUES, "dyck": 1 / synthetic.TYPES, "parity": 1 / 2, "modulo 5": 1 / 5}


def best(found: Found, task: str) -> tuple[dict[tuple[str, int], list[tuple[Job, Outcome]]], list[Row]]:
    """By model and width the outcomes, one for each seed, of the rate with the fewest nats an answer on the validation set; rows of those of which
    there are none, because all failed."""
    rates: dict[tuple[str, int], dict[float, list[tuple[Job, Outcome]]]] = {}
    failed: dict[tuple[str, int], str] = {}
    for job, outcome in found:
        key = job.label, job.config.model.d_model
        if job.task.name != task:
            continue
        if isinstance(outcome, pool.Failure):
            failed[key] = outcome.why
        else:
            rates.setdefault(key, {}).setdefault(job.config.optim.lr, []).append((job, outcome))

    def nats(outcomes: list[tuple[Job, Outcome]]) -> float:
        value = mean(outcome.validation for _, outcome in outcomes)
        return value if math.isfinite(value) else math.inf

    chosen = {key: min(own.values(), key=nats) for key, own in rates.items()}
    return chosen, [{"model": key[0], "width": key[1], "failed": why} for key, why in failed.items() if key not in rates]


def accuracy(scores: Sequence[Score]) -> float:
    return sum(score.right for score in scores) / max(1, sum(score.total for score in scores))


def shown(values: Sequence[float]) -> float | str:
    """Of seeds: the mean, and with several of them half of what lies between the least and the largest."""
    return values[0] if len(values) == 1 else f"{mean(values):.3f} ± {(max(values) - min(values)) / 2:.3f}"


def recall_tables(found: Found, task: Task, dtype: torch.dtype) -> tuple[list[Table], list[Figure]]:
    chosen, failed = best(found, "recall")
    longest = max(setting.length for setting in task.tested)
    hardest = max(task.tested, key=lambda setting: setting.size)
    state = f"state KiB at {longest}"
    rows: list[Row] = []
    points: list[Row] = []
    for (label, width), outcomes in sorted(chosen.items(), key=lambda item: item[0][1]):
        config = outcomes[0][0].config
        row: Row = {"model": label, "width": width, state: state_bytes(config.model, longest, dtype) / 1024, "rate": config.optim.lr}
        for setting in task.tested:
            values = [accuracy(list(outcome.tests[setting].values())) for _, outcome in outcomes]
            row[f"{setting.length}, {setting.size}"] = shown(values)
            for (job, _), value in zip(outcomes, values, strict=True):
                points.append({**row, "seed": job.config.train.seed, "length": setting.length, "pairs": setting.size, "accuracy": value})
        rows.append(row)
    rows.append({"model": "chance", **{f"{setting.length}, {setting.size}": 1 / setting.size for setting in task.tested}})
    of_hardest = [point for point in points if point["pairs"] == hardest.size]
    kept = ("model", "width", "seed", "length", "pairs", state, "accuracy")
    caption = (
        f"Multi-query associative recall: share of queries answered with the right one of {task.vocabulary:,} tokens, by length and pairs; "
        "chance is to name one of the sequence's own values."
    )
    name = "recall of the most pairs"
    tables = [
        Table("recall", [*failed, *rows], caption),
        Table("recall by setting", [{key: point[key] for key in kept} for point in points], shown=False),
        Table(name, [{key: point[key] for key in kept} for point in of_hardest], shown=False),
    ]
    title = f"Recall of {hardest.size} pairs within {hardest.length} tokens"
    label = f"state of a sequence after {longest} tokens (KiB)"
    figure = Lines(
        "recall_state", title, name, state, "accuracy", over="seed", x_label=label, log_x=True, levels={"chance": 1 / hardest.size}
    )  # fmt: skip
    return tables, [figure]


def lines_of(task: str, scores: dict[int, Score]) -> dict[str, Line]:
    """What groups say, by kind of answer: depth or position (from 1) -> score."""
    if task == "scopes":
        both = {depth: [scores.get(2 * depth + own, Score(0, 0)) for own in (0, 1)] for depth in {group // 2 for group in scores}}
        merged = {depth: Score(a.right + b.right, a.total + b.total) for depth, (a, b) in both.items()}
        return {"all": merged, "shadowed": {depth: b for depth, (_, b) in both.items() if b.total}}
    return {"all": scores if task == "dyck" else {position + 1: score for position, score in scores.items()}}


def bins_of(task: Task) -> list[tuple[int, int]]:
    """First and last of the depths or positions that a column takes together; a column never joins what was learnt with what was not."""
    tested = task.tested[0]
    if task.name in ("scopes", "dyck"):
        return [(2 * i + 1 if i or task.name == "dyck" else 0, 2 * i + 2) for i in range(tested.size // 2)]
    edges = [0, 8]
    while edges[-1] < tested.length:
        edges.append(2 * edges[-1])
    return [(low + 1, high) for low, high in pairwise(edges)]


def line_rows(found: Found, task: Task) -> tuple[list[Row], list[Row]]:
    """Rows for people, with a column for each bin, and for figures: a row for each bin (positions) or each depth, and seed."""
    chosen, failed = best(found, task.name)
    bins, what = bins_of(task), "position" if task.draw is synthetic.counting else "depth"
    rows: list[Row] = []
    points: list[Row] = []

    def columns(lines: Sequence[Line]) -> Row:
        within = [[[score for x, score in line.items() if low <= x <= high] for line in lines] for low, high in bins]
        return {f"{what} {low}-{high}": shown([accuracy(own) for own in of_bin]) for (low, high), of_bin in zip(bins, within, strict=True)}

    for (label, _), outcomes in chosen.items():
        of_seeds = [lines_of(task.name, outcome.tests[task.tested[0]]) for _, outcome in outcomes]
        for kind in of_seeds[0]:
            row: Row = {"model": label, "task": task.name, "answers": kind, "rate": outcomes[0][0].config.optim.lr}
            rows.append(row | columns([lines[kind] for lines in of_seeds]))
            for (job, _), lines in zip(outcomes, of_seeds, strict=True):
                for low, high in bins if what == "position" else [(x, x) for x in sorted(lines[kind])]:
                    own = [score for x, score in lines[kind].items() if low <= x <= high]
                    points.append({**row, "seed": job.config.train.seed, what: high, "accuracy": accuracy(own), "questions": sum(s.total for s in own)})
    if task.name == "scopes" and chosen:  # what to name the newest value would come to, on the same questions
        scores = next(iter(chosen.values()))[0][1].tests[task.tested[0]]
        newest = {group: Score(0 if group % 2 else score.total, score.total) for group, score in scores.items()}
        rows += [{"model": "newest value", "task": task.name, "answers": kind} | columns([line]) for kind, line in lines_of(task.name, newest).items()]
    chance = {f"{what} {low}-{high}": CHANCE[task.name] for low, high in bins}
    return [*failed, *rows, {"model": "chance", "task": task.name, "answers": "all"} | chance], points


def without(rows: list[Row], *names: str) -> list[Row]:
    return [{name: value for name, value in row.items() if name not in names} for row in rows]


def line_tables(found: Found, known: dict[str, Task]) -> tuple[list[Table], list[Figure]]:
    tables: list[Table] = []
    figures: list[Figure] = []
    if task := known.get("scopes"):
        rows, points = line_rows(found, task)
        learnt = task.learnt[0].size
        caption = (
            f"Share of questions for a name that are answered with its value in the nearest enclosing scope, of {synthetic.VALUES} values, by depth of the "
            f"question; learnt up to depth {learnt}. Shadowed: the newest value of the name is that of a scope that has closed."
        )
        tables.append(Table("scopes by depth", without(rows, "task"), caption))
        shadowed = [point for point in points if point["answers"] == "shadowed"]
        tables += [Table("scopes by depth, points", points, shown=False), Table("shadowed names by depth", shadowed, shown=False)]
        title = f"Shadowed names in nested scopes, learnt up to depth {learnt}"
        figures.append(Lines("recall_scopes", title, "shadowed names by depth", "depth", "accuracy", over="seed", levels={"chance": CHANCE["scopes"]}))
    if task := known.get("dyck"):
        rows, points = line_rows(found, task)
        learnt = task.learnt[0].size
        caption = (
            f"Share of closing brackets of {synthetic.TYPES} types that are told, by their depth; learnt up to depth {learnt}. "
            "Those that close what has only just opened are not counted."
        )
        tables += [Table("dyck by depth", without(rows, "task", "answers"), caption), Table("dyck by depth, points", points, shown=False)]
        title = f"Closing brackets, learnt up to depth {learnt}"
        figures.append(Lines("recall_dyck", title, "dyck by depth, points", "depth", "accuracy", over="seed", levels={"chance": CHANCE["dyck"]}))
    counted = [known[name] for name in ("parity", "modulo 5") if name in known]
    if counted:
        both = [line_rows(found, task) for task in counted]
        rows, points = ([row for part in parts for row in part] for parts in zip(*both, strict=True))
        learnt = counted[0].learnt[0].length
        caption = f"Share of right answers at each position: how many ones there were so far, modulo 2 (parity) or 5; learnt on {learnt} positions."
        tables += [Table("parity and counting", without(rows, "answers"), caption), Table("parity and counting, points", points, shown=False)]
        levels = {f"chance, {task.name}": CHANCE[task.name] for task in counted}
        figures.append(
            Lines(
                "recall_counting", f"Running counts, learnt on {learnt} positions", "parity and counting, points", "position", "accuracy", ("model", "task"),
                "seed", log_x=True, levels=levels,
            )
        )  # fmt: skip
    return tables, figures


def result(found: Found, sizes: Sizes, dtype: torch.dtype) -> Result:
    """What is measured so far."""
    known = {task.name: task for task in tasks(sizes) if any(job.task.name == task.name for job, _ in found)}
    tables, figures = line_tables(found, known)
    if task := known.get("recall"):
        more = recall_tables(found, task, dtype)
        tables, figures = more[0] + tables, more[1] + figures
    rates, seeds = ", ".join(f"{rate:g}" for rate in sizes.rates), ", ".join(map(str, sizes.seeds))
    notes = [
        f"{LAYERS} layers; {sizes.steps:,} steps of about {sizes.tokens:,} tokens, of which answers alone are learnt, no sequence twice; rates {rates}, the best by "
        f"the nats of answers on {max(1, sizes.test // 4):,} sequences of each setting, tested on {sizes.test:,} others; seeds {seeds}"
    ]
    if "recall" in known:
        notes.append(
            "recall: sequences, vocabulary, widths and settings are those of Arora et al. 2023, figure 2; there each setting has a model of its own, 64 epochs of "
            "100,000 sequences, and no feed-forward layer; here one model learns all settings, and has a short convolution and a feed-forward layer"
        )
    if any(job.label == "hybrid" for job, _ in found):
        notes.append("hybrid: a layer of phase8, then one of phase7")
    failures = [(job, outcome.why) for job, outcome in found if isinstance(outcome, pool.Failure)]
    notes += [f"{job.task.name}, {job.label}, width {job.config.model.d_model}, rate {job.config.optim.lr:g}: {why}" for job, why in failures]
    return Result("recall", tables, notes, figures)


def run(labels: Sequence[str], devices: Sequence[torch.device], sizes: Sizes, kernels: str = "auto") -> Iterator[Result]:
    """Train and test every kind on every task.

    Args:
        labels: of `arms.KINDS`.
        devices: models learn side by side on all of them, EACH at a time on a GPU.
        sizes: FULL for a GPU, TOY for a CPU.

    Yields:
        What is measured so far.
    """
    found: Found = []
    each = EACH if devices[0].type == "cuda" else 1
    for pair in pool.side_by_side(measure, jobs_of(labels, sizes, kernels), devices, each=each, desc="recall"):
        found.append(pair)
        yield result(found, sizes, env.compute_dtype(devices[0]))
