"""Suite `recall`: what small models of each kind can keep and find again, on synthetic tasks (see synthetic.py), beside chance.

Each task is learnt from nothing by two layers at every rate of a grid, and the model whose answers cost the fewest nats on a validation
set is tested, on fresh sequences. Every kind is checked first to look back only.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import mean

import torch

from hyperlm import env
from hyperlm.bench import grid, pool, synthetic
from hyperlm.bench.answering import Job, Outcome, Score, measure, state_bytes
from hyperlm.bench.arms import KINDS, of_kind
from hyperlm.bench.result import Figure, Lines, Result, Row, Table
from hyperlm.bench.synthetic import SMALLEST, Draw, Setting, Task
from hyperlm.cli import UsageError
from hyperlm.config import Config, ConfigError, DataConfig, ModelConfig, OptimConfig, TrainConfig, resolve

LAYERS = 2
HYBRID_EVERY = 2  # of two layers: phase8, then phase7
EACH = 3  # models that learn on one GPU at a time: a single one leaves it idle
TASKS = ("recall", "scopes", "dyck", "parity", "modulo 5")
CHANCE = {"scopes": 1 / synthetic.VALUES, "dyck": 1 / synthetic.TYPES, "parity": 1 / 2, "modulo 5": 1 / 5}


Outcomes = list[tuple[Job, Outcome | pool.Failure]]
Seeds = list[tuple[Job, Outcome]]  # of one model at one rate
Line = dict[int, Score]  # by depth or position


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    tasks: tuple[str, ...] = TASKS
    widths: tuple[int, ...] = (64, 128, 256)  # of recall
    width: int = 128  # of the other tasks
    rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    steps: int = 4000  # of recall
    other_steps: int = 2000  # of the other tasks
    tokens: int = 16384  # a step
    pairs: tuple[tuple[int, int], ...] = ((64, 4), (128, 8), (256, 16), (512, 64))  # length and pairs of recall
    vocabulary: int = 8192  # of recall
    length: int = 256  # of the other tasks
    test: int = 1024  # sequences of each setting; of validation a quarter
    seeds: tuple[int, ...] = (0,)  # the first chooses the rate


FULL = Sizes()
TOY = Sizes(
    tasks=("recall", "parity"), widths=(64,), width=64, rates=(1e-2,), steps=300, other_steps=300, tokens=1024, pairs=((32, 4), (64, 8)),
    vocabulary=64, length=64, test=128,
)  # fmt: skip


def easy_first(settings: tuple[Setting, ...]) -> tuple[Setting, ...]:
    """Settings a, b, c, d as a b a c a b a d: whoever recalls few pairs soon recalls many.

    At width 64, vocabulary 1,024, 2,048 tokens a step, rate 3e-3, softmax finds 15 % of 4 pairs in 64 tokens after 500 steps, and with all
    settings in equal parts 11 % after 900.
    """
    first, *rest = settings
    return (first,) if not rest else tuple(x for other in easy_first(tuple(rest)) for x in (first, other))


def tasks(sizes: Sizes) -> list[Task]:
    """Those to be measured. All but recall are tested on sequences as they were learnt, and on deeper or longer ones."""

    def small(name: str, draw: Draw, learnt: Setting, deeper: Setting) -> Task:
        return Task(name, draw, SMALLEST, (learnt,), (learnt, deeper))

    n, pairs = sizes.length, tuple(Setting(*pair) for pair in sizes.pairs)
    known = [
        Task("recall", synthetic.recall, sizes.vocabulary, easy_first(pairs), pairs),
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
    vocabulary = max(SMALLEST, task.vocabulary)
    shape = ModelConfig(d_model=width, n_layers=LAYERS, head_dim=min(64, width), vocab_size=vocabulary, exact_every=every)
    length = max(setting.length for setting in task.learnt)
    steps = sizes.steps if task.name == "recall" else sizes.other_steps
    training = TrainConfig(max(1, sizes.tokens // length), 1, steps, seed=seed, residence="device")
    config = Config(shape, DataConfig(seq_len=length), training, OptimConfig(rate, state="fp32"), kernels=kernels)
    return resolve(of_kind(config, label))


def grid_of(labels: Sequence[str], sizes: Sizes, kernels: str = "auto") -> list[Job]:
    """Every model at every rate with the first seed, the longest first."""
    return [
        Job(task, label, config_of(task, label, width, rate, sizes.seeds[0], sizes, kernels), sizes.test)
        for task in tasks(sizes)
        for width in (sorted(sizes.widths, reverse=True) if task.name == "recall" else [sizes.width])
        for label in labels
        for rate in sizes.rates
    ]


def repeats_of(outcomes: Outcomes, sizes: Sizes) -> list[Job]:
    """The models at their best rates with the other seeds."""
    chosen = [seeds[0][0] for task in TASKS for seeds in best([pair for pair in outcomes if pair[0].task.name == task])[0]]
    return [
        replace(job, config=replace(job.config, train=replace(job.config.train, seed=seed)))
        for job in chosen
        for seed in sizes.seeds[1:]
    ]  # fmt: skip


def check(labels: Sequence[str], sizes: Sizes) -> None:
    """Raises ConfigError or UsageError on what cannot be measured."""
    for label in labels:
        if label not in KINDS:
            raise UsageError(f"--suite recall: {label} is none of {', '.join(KINDS)}, which it trains from nothing")
    if unknown := set(sizes.tasks) - set(TASKS):
        raise UsageError(f"--suite recall: no task is called {' or '.join(sorted(unknown))}; choose from {', '.join(TASKS)}")
    for length, pairs in sizes.pairs:
        if length < 4 * pairs or length % 2:
            raise ConfigError(f"recall of {pairs} pairs: needs an even length of at least {4 * pairs}, and not {length}")
        if pairs >= sizes.vocabulary // 2:
            raise ConfigError(f"recall of {pairs} pairs: needs a vocabulary above {2 * pairs + 1}, and not {sizes.vocabulary}")
    grid.check(sizes.rates, sizes.seeds)
    grid_of(labels, sizes)


# -- from outcomes to tables -----------------------------------------------------------------------------------------------------------


def best(outcomes: Outcomes) -> tuple[list[Seeds], list[Row]]:
    """Of one task, for each width and model the outcomes at the rate with the fewest nats an answer on the validation set, with the seed
    that came first; and for each that has no outcome a row that says why."""
    rates: dict[tuple[int, int], dict[float, Seeds]] = {}
    failed: dict[tuple[int, int], Row] = {}
    for job, outcome in outcomes:
        width = job.config.model.d_model
        key = width, KINDS.index(job.label)
        if isinstance(outcome, pool.Failure):
            failed[key] = {"model": job.label, "width": width, "failed": outcome.why}
        else:
            rates.setdefault(key, {}).setdefault(job.config.optim.lr, []).append((job, outcome))

    def nats(seeds: Seeds) -> float:
        first = seeds[0][1].nats
        return first if math.isfinite(first) else math.inf

    chosen = [min(rates[key].values(), key=nats) for key in sorted(rates)]
    return chosen, [failed[key] for key in sorted(failed) if key not in rates]


def accuracy(scores: Sequence[Score]) -> float:
    return sum(score.right for score in scores) / max(1, sum(score.total for score in scores))


def shown(values: Sequence[float]) -> float | str:
    """Of seeds: the mean, and with several of them half of what lies between the least and the largest."""
    return values[0] if len(values) == 1 else f"{mean(values):.3f} ± {(max(values) - min(values)) / 2:.3f}"


def recall_tables(outcomes: Outcomes, task: Task, dtype: torch.dtype) -> tuple[list[Table], list[Figure]]:
    chosen, failed = best(outcomes)
    longest = max(setting.length for setting in task.tested)
    hardest = max(task.tested, key=lambda setting: setting.size)
    rows: list[Row] = []
    points: list[Row] = []
    for seeds in chosen:
        label, config = seeds[0][0].label, seeds[0][0].config
        labels: Row = {"model": label, "width": config.model.d_model, "state KiB": state_bytes(config.model, longest, dtype) / 1024}
        row = labels | {"rate": config.optim.lr}
        for setting in task.tested:
            values = [accuracy(list(outcome.tests[setting].values())) for _, outcome in seeds]
            row[f"{setting.size} in {setting.length}"] = shown(values)
            for (job, _), value in zip(seeds, values, strict=True):
                points.append(labels | {"seed": job.config.train.seed, "length": setting.length, "pairs": setting.size, "accuracy": value})
        rows.append(row)
    rows.append({"model": "chance"} | {f"{setting.size} in {setting.length}": 1 / setting.size for setting in task.tested})
    caption = (
        f"Multi-query associative recall, vocabulary {task.vocabulary:,}: share of queries answered rightly, of so many pairs in so many "
        f"tokens. State: what decoding keeps of a sequence of {longest} tokens. Chance: any value of the sequence."
    )
    most = [point for point in points if point["pairs"] == hardest.size]
    tables = [
        Table("recall", failed + rows, caption, digits=3, quiet=["rate"]),
        Table("recall by setting", points, shown=False),
        Table("recall of the most pairs", most, shown=False),
    ]
    label = f"state after {longest} tokens (KiB a sequence)"
    title, levels = f"Recall of {hardest.size} pairs in {hardest.length} tokens, by size of the state", {"chance": 1 / hardest.size}
    figure = Lines("recall_state", title, tables[-1].name, "state KiB", "accuracy", over="seed", x_label=label, log_x=True, levels=levels)
    return tables, [figure]


def lines_of(task: str, scores: dict[int, Score]) -> dict[str, Line]:
    """What groups say, by kind of answer: depth or position (from 1) -> score."""
    if task == "scopes":
        both = {group // 2: [scores.get(group // 2 * 2 + shadowed, Score(0, 0)) for shadowed in (0, 1)] for group in sorted(scores)}
        every = {depth: Score(plain.right + hidden.right, plain.total + hidden.total) for depth, (plain, hidden) in both.items()}
        return {"all": every, "shadowed": {depth: hidden for depth, (_, hidden) in both.items() if hidden.total}}
    return {"all": scores if task == "dyck" else {position + 1: score for position, score in scores.items()}}


def bins_of(task: Task) -> list[tuple[int, int]]:
    """First and last of the depths or positions that a column takes together; none has both what was learnt and what was not."""
    deepest = task.tested[-1]
    if task.draw is not synthetic.counting:
        outermost = 0 if task.draw is synthetic.scopes else 1
        return [(outermost, 2), *((low + 1, low + 2) for low in range(2, deepest.size, 2))]
    edges = [0, 8]
    while edges[-1] < deepest.length:
        edges.append(2 * edges[-1])
    return [(low + 1, high) for low, high in pairwise(edges)]


def line_rows(outcomes: Outcomes, task: Task) -> tuple[list[Row], list[Row]]:
    """Rows to be read, with a column for each of `bins_of`; and points of figures, a row for each seed and depth, or bin of positions."""
    chosen, failed = best(outcomes)
    bins, what = bins_of(task), "position" if task.draw is synthetic.counting else "depth"
    names = [f"{what} {low}-{high}" for low, high in bins]
    rows: list[Row] = []
    points: list[Row] = []

    def within(line: Line, low: int, high: int) -> list[Score]:
        return [score for x, score in line.items() if low <= x <= high]

    def columns(lines: Sequence[Line]) -> Row:
        return {name: shown([accuracy(within(line, *ends)) for line in lines]) for name, ends in zip(names, bins, strict=True)}

    for seeds in chosen:
        familiar, deeper = ([lines_of(task.name, outcome.tests[setting]) for _, outcome in seeds] for setting in task.tested)
        for kind in deeper[0]:
            row: Row = {"model": seeds[0][0].label, "task": task.name, "answers": kind}
            first = {"rate": seeds[0][0].config.optim.lr, "as learnt": shown([accuracy(list(lines[kind].values())) for lines in familiar])}
            rows.append(row | first | columns([lines[kind] for lines in deeper]))
            for (job, _), lines in zip(seeds, deeper, strict=True):
                for low, high in bins if what == "position" else [(depth, depth) for depth in sorted(lines[kind])]:
                    value = accuracy(within(lines[kind], low, high))
                    points.append(row | {"seed": job.config.train.seed, what: high, "accuracy": value})
    if task.draw is synthetic.scopes and chosen:  # what to name the newest value comes to, on the same questions
        asked = chosen[0][0][1].tests[task.tested[-1]]
        newest = lines_of(task.name, {group: Score(0 if group % 2 else total, total) for group, (_, total) in asked.items()})
        rows += [{"model": "newest value", "task": task.name, "answers": kind} | columns([line]) for kind, line in newest.items()]
    chance = dict.fromkeys(["as learnt", *names], CHANCE[task.name])
    last: Row = {"model": "chance", "task": task.name, "answers": "all"} | chance
    return [*({"model": row["model"], "task": task.name} | row for row in failed), *rows, last], points


def without(rows: list[Row], *names: str) -> list[Row]:
    return [{name: value for name, value in row.items() if name not in names} for row in rows]


def over_depth(file: str, title: str, table: str, task: Task) -> Lines:
    label = f"depth (learnt up to {task.learnt[0].size})"
    return Lines(file, title, table, "depth", "accuracy", over="seed", x_label=label, levels={"chance": CHANCE[task.name]})


def scopes_tables(outcomes: Outcomes, task: Task) -> tuple[list[Table], list[Figure]]:
    rows, points = line_rows(outcomes, task)
    learnt = task.learnt[0].size
    caption = (
        f"Share of names answered with their value in the nearest enclosing scope, of {synthetic.VALUES} values, by depth, in programs "
        f"deeper than those learnt, up to depth {learnt} (as learnt). Shadowed: where that is not the newest value of the name, because a "
        "scope has closed since."
    )
    shadowed = [point for point in points if point["answers"] == "shadowed"]
    tables = [
        Table("scopes by depth", without(rows, "task"), caption, digits=3, quiet=["rate"]),
        Table("scopes at each depth", points, shown=False),
        Table("shadowed names at each depth", shadowed, shown=False),
    ]
    return tables, [over_depth("recall_scopes", "Shadowed names answered with their value, by depth", tables[-1].name, task)]


def dyck_tables(outcomes: Outcomes, task: Task) -> tuple[list[Table], list[Figure]]:
    rows, points = line_rows(outcomes, task)
    learnt = task.learnt[0].size
    caption = (
        f"Share of closing brackets whose type, of {synthetic.TYPES}, is told, by depth, in sequences deeper than "
        f"those learnt, up to depth {learnt} (as learnt). Those that close what has only just opened are not counted."
    )
    by_depth = Table("dyck by depth", without(rows, "task", "answers"), caption, digits=3, quiet=["rate"])
    tables = [by_depth, Table("dyck at each depth", points, shown=False)]
    return tables, [over_depth("recall_dyck", "Closing brackets of which the type is told, by depth", tables[-1].name, task)]


def counting_tables(outcomes: dict[str, Outcomes], counted: list[Task]) -> tuple[list[Table], list[Figure]]:
    both = [line_rows(outcomes[task.name], task) for task in counted]
    rows, points = ([row for part in parts for row in part] for parts in zip(*both, strict=True))
    learnt = counted[0].learnt[0].length
    caption = f"Share of right answers by position: how many ones there were so far, modulo 2 (parity) and 5; learnt on {learnt} positions."
    by_task = Table("parity and counting", without(rows, "answers"), caption, digits=3, quiet=["rate"])
    tables = [by_task, Table("counts by position", points, shown=False)]
    figure = Lines(
        "recall_counting", "Running counts told, by position", tables[-1].name, "position", "accuracy", ("model", "task"), "seed",
        log_x=True, x_label=f"position (learnt up to {learnt})", levels={f"chance, {task.name}": CHANCE[task.name] for task in counted},
    )  # fmt: skip
    return tables, [figure]


def rate_row(job: Job, outcome: Outcome | pool.Failure) -> Row:
    config = job.config
    row: Row = {"model": job.label, "task": job.task.name, "width": config.model.d_model}
    row |= {"rate": config.optim.lr, "seed": config.train.seed}
    return row | ({"failed": outcome.why} if isinstance(outcome, pool.Failure) else {"validation nats": outcome.nats})


def notes_of(outcomes: Outcomes, sizes: Sizes) -> list[str]:
    rates, seeds = ", ".join(f"{rate:g}" for rate in sizes.rates), ", ".join(map(str, sizes.seeds))
    steps = f"{sizes.steps:,} steps (of other tasks than recall {sizes.other_steps:,})"
    notes = [f"{LAYERS} layers, {steps} of about {sizes.tokens:,} tokens, of which answers alone are learnt; all batches are fresh"]
    chosen = f"rates {rates}, the best by nats on {max(1, sizes.test // 4):,} sequences of each setting, tested on {sizes.test:,} others"
    notes.append(f"{chosen}; seeds {seeds}")
    if "recall" in sizes.tasks:
        notes.append(
            "recall: sequences are made as for figure 2 of Arora et al. 2023; there, each setting has its own model, without feed-forward "
            "layers, and 64 epochs of 100,000 sequences; here, one model, with these and short convolutions, learns all settings, "
            "the first half of the time"
        )
    if any(job.label == "hybrid" for job, _ in outcomes):
        notes.append("hybrid: a layer of phase8, then one of phase7")
    for job, outcome in outcomes:
        if isinstance(outcome, pool.Failure):
            notes.append(f"{job.task.name}, {job.label}, width {job.config.model.d_model}, rate {job.config.optim.lr:g}: {outcome.why}")
    return notes


def result(outcomes: Outcomes, sizes: Sizes, dtype: torch.dtype) -> Result:
    """What is measured so far, of states in `dtype`."""
    by_task = {name: [pair for pair in outcomes if pair[0].task.name == name] for name in TASKS}
    known = {task.name: task for task in tasks(sizes) if by_task[task.name]}
    parts = []
    if "recall" in known:
        parts.append(recall_tables(by_task["recall"], known["recall"], dtype))
    if "scopes" in known:
        parts.append(scopes_tables(by_task["scopes"], known["scopes"]))
    if "dyck" in known:
        parts.append(dyck_tables(by_task["dyck"], known["dyck"]))
    if counted := [known[name] for name in ("parity", "modulo 5") if name in known]:
        parts.append(counting_tables(by_task, counted))
    tables = [table for group, _ in parts for table in group] + [Table("recall rates", [rate_row(*pair) for pair in outcomes], shown=False)]
    return Result("recall", tables, notes_of(outcomes, sizes), [figure for _, group in parts for figure in group])


def run(labels: Sequence[str], devices: Sequence[torch.device], sizes: Sizes, kernels: str = "auto") -> Iterator[Result]:
    """Train and test every kind on every task.

    Args:
        labels: of `arms.KINDS`.
        devices: models learn side by side on all of them, EACH at a time on a GPU.
        sizes: FULL for a GPU, TOY for a CPU.

    Yields:
        What is measured so far.
    """
    outcomes: Outcomes = []
    each = EACH if devices[0].type == "cuda" else 1
    jobs = grid_of(labels, sizes, kernels)
    grid = len(jobs)
    for pair in pool.side_by_side(measure, jobs, devices, each=each, desc="recall"):
        outcomes.append(pair)
        if len(outcomes) == grid:  # what the other seeds are trained with depends on all of it
            jobs += repeats_of(outcomes, sizes)
        yield result(outcomes, sizes, env.compute_dtype(devices[0]))
