"""The suites of bench.py by name: which subjects and flags each takes, and how a command line becomes its arguments.

A suite checks first what would otherwise be found out late, and returns what measures: results that grow.
"""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import torch
import tyro

from hyperlm import cli, data, env, residence, runs, startup
from hyperlm.bench import (
    arms,
    decode,
    geometry,
    grid,
    kernels,
    long_context,
    memory,
    nulls,
    perplexity,
    pool,
    quality,
    recall,
    report,
    speed,
    training,
)
from hyperlm.bench.result import Result, Table
from hyperlm.config import Config, DataConfig, EvalConfig, ModelConfig, OptimConfig, TrainConfig, resolve
from hyperlm.kernels import HAVE_TRITON

Name = Literal[
    "speed",
    "decode",
    "memory",
    "quality",
    "perplexity",
    "long-context",
    "recall",
    "geometry",
    "nulls",
    "linear",
    "hyperbolic",
    "report",
    "all",
]


@dataclass(frozen=True)
class Command:
    subjects: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Kinds (phase7, phase8, softmax, hybrid), peers (nanogpt, nanogpt-muon) and folders of runs."""
    suite: tuple[Name, ...] = ()
    """What to measure, one or several; by default speed of kinds and perplexity of runs."""
    preset: str = ""
    """What the settings of models start from; by default what fits the suite and the machine, said when it begins."""
    lengths: tuple[int, ...] = ()
    """Sequence lengths (decode: context lengths); by default 512 to 16,384 on a GPU and 64 to 1,024 on a CPU."""
    tokens: int = 0
    """Tokens a step of speed, or that geometry looks at; by default as many as the longest sequence has, and 200,000 (2,000 on a CPU)."""
    seeds: int = 0
    """Of what is trained to be compared: 0, 1, ... up to so many; by default 3 on a GPU and 1 on a CPU."""
    rates: tuple[float, ...] = ()
    """Learning rates to choose each model's best from; by default half, once and twice --optim.lr, on a CPU that alone. Where the
    best of several is at the edge, the grid goes on."""
    name: str = ""
    """Folder of the results under runs/."""
    kernels: Literal["auto", "torch", "triton"] = "auto"
    """Kernel backend."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)


@dataclass(frozen=True)
class Bench:
    """What all suites of a command have in common."""

    argv: list[str]
    device: torch.device
    devices: list[torch.device]  # for what is trained side by side
    folder: Path  # of the results
    kinds: list[str]
    peers: list[str]
    runs: list[str]
    failed: dict[str, str] = field(default_factory=dict)  # kinds that could not be trained for suites of models, and why

    @property
    def gpu(self) -> bool:
        return self.device.type == "cuda"


def settings(command: Command) -> Config:
    return resolve(Config(**{name: getattr(command, name) for name in ("kernels", "model", "data", "train", "optim", "eval")}))


def shape(bench: Bench, command: Command, *, frugal: bool = False) -> Config:
    """The model to measure, but for its kind. Where the command leaves the residence open, the fastest or, if `frugal`, that which takes
    least of a device; and the optimizer's state decided as for a run.

    Raises:
        ConfigError: if a kind can have no such model.
    """
    config = settings(command)
    if config.train.residence == "auto":
        name = [*residence.RESIDENCES][-1 if frugal else 0]
        config = replace(config, train=replace(config.train, residence=name))
    for kind in bench.kinds:
        arms.of_kind(config, kind)
    device = bench.device
    memory = env.allowed_memory(device, config.train.device_memory), env.available_memory(torch.device("cpu"))
    return residence.decide(config, env.compute_dtype(device), *memory, gpu=device.type == "cuda")


Measuring = Iterator[Result]


def speed_suite(bench: Bench, command: Command) -> Measuring:
    lengths = list(command.lengths) or [1 << i for i in (range(9, 15) if bench.gpu else range(6, 11))]
    what = bench.kinds, shape(bench, command), bench.device, lengths, command.tokens or max(lengths)
    speed.check(*what)
    return speed.run(*what)


def decode_suite(bench: Bench, command: Command) -> Measuring:
    contexts = list(command.lengths) or ([1024, 16384, 131072] if bench.gpu else [64, 1024])
    what = bench.kinds, shape(bench, command), bench.device, contexts, [1, 16, 256] if bench.gpu else [1, 4]
    decode.check(*what)
    return decode.run(*what)


def memory_suite(bench: Bench, command: Command) -> Measuring:
    config = shape(bench, command, frugal=True)
    memory.check(bench.kinds, config, bench.device)
    return memory.run(bench.kinds, config, bench.device)


def kernel_suite(name: str, bench: Bench, command: Command) -> Measuring:
    if not bench.gpu or not HAVE_TRITON:
        raise cli.UsageError(
            f"--suite {name} needs a CUDA device and Triton; `{startup.command('train')} --doctor` says what this machine has"
        )
    return {"linear": kernels.linear, "hyperbolic": kernels.hyperbolic}[name](bench.device)


def quality_suite(bench: Bench, command: Command) -> Measuring:
    labels, config = [*bench.kinds, *bench.peers], learning(bench, command)
    chosen = {"rates": rates(bench, command, config), "seeds": seeds(bench, command)}
    quality.check(labels, config, bench.devices, **chosen)
    return quality.run(labels, config, bench.devices, **chosen, folder=bench.folder)


def nulls_suite(bench: Bench, command: Command) -> Measuring:
    config = learning(bench, command)
    chosen = {"rates": rates(bench, command, config), "seeds": seeds(bench, command)}
    nulls.check(config, **chosen)
    return nulls.run(config, bench.devices, **chosen, folder=bench.folder / "nulls")


def recall_suite(bench: Bench, command: Command) -> Measuring:
    sizes = recall.FULL if bench.gpu else recall.TOY
    sizes = replace(
        sizes, **({"rates": command.rates} if command.rates else {}), **({"seeds": tuple(range(command.seeds))} if command.seeds else {})
    )
    recall.check(bench.kinds, sizes)
    return recall.run(bench.kinds, bench.devices, sizes, command.kernels)


def perplexity_suite(bench: Bench, command: Command) -> Measuring:
    if not command.suite:  # kinds that were named are there for their speed
        bench = replace(bench, kinds=[])
    what = {"text": text_of(bench, command)}
    return of_models(
        bench, command, partial(perplexity.check, **what), partial(perplexity.run, **what, devices=bench.devices, kernels=command.kernels)
    )


def long_context_suite(bench: Bench, command: Command) -> Measuring:
    what = {"text": text_of(bench, command)}
    sizes = {} if bench.gpu else {"times": 4, "windows": 4, "trials": 2}
    return of_models(
        bench,
        command,
        partial(long_context.check, **what),
        partial(long_context.run, **what, **sizes, devices=bench.devices, kernels=command.kernels),
    )


def geometry_suite(bench: Bench, command: Command) -> Measuring:
    tokens = command.tokens or (200_000 if bench.gpu else 2000)
    if text_of(bench, command):
        raise cli.UsageError(
            "--data.sources: suite geometry looks at runs on their own validation text; leave it out, or name other suites"
        )
    check, run = (
        partial(geometry.check, tokens=tokens),
        partial(geometry.run, devices=bench.devices, tokens=tokens, kernels=command.kernels),
    )
    return of_models(bench, command, check, run)


def report_suite(bench: Bench, command: Command) -> Measuring:
    return iter(report.join([Path(folder) for folder in bench.runs]))


class Suite(NamedTuple):
    measured: Literal[
        "kinds", "peers", "models", "nothing", "reports"
    ]  # what is named with it: kinds; kinds and peers; kinds and runs; ...
    gpu: str  # preset
    cpu: str
    start: Callable[[Bench, Command], Measuring]
    flags: tuple[str, ...] = ()  # that it takes, of those that are not for all; "settings": of models, from the preset on


SUITES: dict[str, Suite] = {
    "speed": Suite("kinds", "standard", "small", speed_suite, ("settings", "lengths", "tokens")),
    "memory": Suite("kinds", "standard", "small", memory_suite, ("settings",)),
    "decode": Suite("kinds", "standard", "small", decode_suite, ("settings", "lengths")),
    "quality": Suite("peers", "study", "glance", quality_suite, ("settings", "seeds", "rates")),
    "perplexity": Suite("models", "study", "glance", perplexity_suite, ("settings",)),
    "long-context": Suite("models", "study", "glance", long_context_suite, ("settings",)),
    "geometry": Suite("models", "study", "glance", geometry_suite, ("settings", "tokens")),
    "recall": Suite("kinds", "study", "glance", recall_suite, ("seeds", "rates")),
    "nulls": Suite("nothing", "study", "glance", nulls_suite, ("settings", "seeds", "rates")),
    "linear": Suite("nothing", "standard", "small", partial(kernel_suite, "linear")),
    "hyperbolic": Suite("nothing", "standard", "small", partial(kernel_suite, "hyperbolic")),
    "report": Suite("reports", "standard", "small", report_suite),
}
SETTINGS = ("preset", "model", "data", "train", "optim", "eval")  # groups of flags


# -- what suites that train have in common ---------------------------------------------------------------------------------------------


def learning(bench: Bench, command: Command) -> Config:
    """The run that models are trained by, but for their kind, rate and seed."""
    return data.with_vocabulary(shape(bench, command))


def rates(bench: Bench, command: Command, config: Config) -> tuple[float, ...]:
    """Learning rates to choose from; a CPU has no time for more than one."""
    return command.rates or (grid.rates_of(config) if bench.gpu else (config.optim.lr,))


def seeds(bench: Bench, command: Command) -> tuple[int, ...]:
    return tuple(range(command.seeds or (3 if bench.gpu else 1)))


def text_of(bench: Bench, command: Command) -> DataConfig | None:
    """The text that runs are evaluated on; None for their own validation text, of which kinds trained here have one too."""
    return command.data if bench.runs and not bench.kinds and cli.peek("data.sources", bench.argv) else None


def named_runs(folders: list[str]) -> dict[str, Path]:
    """Runs by what tables call them: runs/study/phase8 is study/phase8; but a name that could be a kind keeps its runs/."""
    paths = {}
    for folder in folders:
        short = Path(folder).relative_to(runs.ROOT) if Path(folder).is_relative_to(runs.ROOT) else Path()
        paths[str(short) if len(short.parts) > 1 and str(short) not in folders else folder] = Path(folder)
    return paths


def of_models(bench: Bench, command: Command, check: Callable, run: Callable[..., Measuring]) -> Measuring:
    """The results of a suite on runs, and on kinds that are trained for it, once for all suites of a command."""
    named = named_runs(bench.runs)
    check(named)
    if bench.kinds:
        data.prepare(config := learning(bench, command))

    def measuring() -> Measuring:
        failed = bench.failed
        wanted = {kind: bench.folder / kind for kind in bench.kinds}
        missing = [kind for kind, folder in wanted.items() if not folder.exists() and kind not in failed]
        jobs = [training.Job(kind, arms.of_kind(config, kind), wanted[kind]) for kind in missing]
        for job, outcome in pool.side_by_side(training.train, jobs, bench.devices, desc="training") if jobs else ():
            if isinstance(outcome, pool.Failure) or not (job.keep and job.keep.exists()):
                failed[job.label] = outcome.why if isinstance(outcome, pool.Failure) else "its training diverged"
                shutil.rmtree(wanted[job.label], ignore_errors=True)  # half a run
        models = {**{kind: folder for kind, folder in wanted.items() if kind not in failed}, **named}
        rows = [{"model": kind, "failed": f"could not be trained: {why}"} for kind, why in failed.items()]
        for result in run(models) if models else [Result("training", [])]:
            yield replace(result, tables=[*result.tables, *[Table("failed", rows)] * bool(rows)])

    return measuring()
