"""Measure models and runs side by side: tables, figures and a report under runs/.

    python bench.py phase7 phase8 softmax  speed and memory, several lengths
    python bench.py runs/x runs/y          perplexity, as far as comparable
    python bench.py runs/x --suite perplexity --data.sources book.txt
                                           of any text
    python bench.py phase7 phase8 softmax hybrid nanogpt --suite quality
                                           trained side by side, each at its
                                           best rate, on all GPUs
    python bench.py runs/x --suite long-context geometry
                                           loss by position, passkeys; radii,
                                           and what the model uses them for
    python bench.py phase7 phase8 --suite recall nulls
                                           what small models can keep; what of
                                           Phase 7 is geometry
    python bench.py phase8 --suite decode memory --preset max
                                           generation; training from host memory
    python bench.py --suite linear hyperbolic
                                           kernels beside their peers (GPU)
    python bench.py phase8 --suite all     whatever this machine can do
    python bench.py runs/a runs/b --suite report
                                           benchmarks joined in one report

Models are those of a preset, with train.py's settings on top, but for the kind.
"""

if __name__ == "__main__":
    from hyperlm import startup

    startup.quiet()  # before the slow imports

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import torch
import tyro

from configs import PRESETS
from hyperlm import cli, data, env, plan, runs, startup
from hyperlm.bench import (
    arms,
    decode,
    geometry,
    grid,
    long_context,
    memory,
    nulls,
    perplexity,
    pool,
    quality,
    recall,
    report,
    speed,
    tables,
    training,
)
from hyperlm.bench import kernels as kernel_suites
from hyperlm.bench.result import Result, Table
from hyperlm.config import Config, ConfigError, DataConfig, EvalConfig, ModelConfig, OptimConfig, TrainConfig, peak_rate, resolve
from hyperlm.kernels import HAVE_TRITON

Name = Literal["speed", "decode", "memory", "quality", "perplexity", "long-context", "recall", "geometry", "nulls", "linear", "hyperbolic", "report", "all"]


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
    """Learning rates to choose each model's best from; by default half, once and twice the rate that follows from the width, on a CPU that alone. Where the
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


def parse(argv: list[str], preset: str) -> Command:
    """The command, on top of the preset that it names, or else this one."""
    preset = cli.peek("preset", argv) or preset
    if preset not in PRESETS:
        raise ConfigError(f"--preset {preset}: choose from {', '.join(PRESETS)}")
    config = PRESETS[preset]()
    default = Command(preset=preset, model=config.model, data=config.data, train=config.train, optim=config.optim, eval=config.eval)
    return cli.parse(Command, argv, default, description=__doc__)


def settings(command: Command) -> Config:
    own = {name: getattr(command, name) for name in ("kernels", "model", "data", "train", "optim", "eval")}
    return resolve(replace(PRESETS[command.preset](), **own))


def shape(bench: Bench, command: Command, residence: Literal["device", "host"] = "device") -> Config:
    """The model to measure, but for its kind; `residence` where the command leaves it open, and the optimizer's state decided as for a run.

    Raises:
        ConfigError: if a kind can have no such model.
    """
    config = settings(command)
    if config.train.residence == "auto":
        config = replace(config, train=replace(config.train, residence=residence))
    for kind in bench.kinds:
        arms.of_kind(config, kind)
    device = bench.device
    memory = env.allowed_memory(device, config.train.device_memory), env.available_memory(torch.device("cpu"))
    return plan.decided(config, env.compute_dtype(device), *memory, gpu=device.type == "cuda")


# -- suites: each checks first what would otherwise be found out late, and returns what measures: results that grow ---------------------

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
    config = shape(bench, command, "host")
    memory.check(bench.kinds, config, bench.device)
    return memory.run(bench.kinds, config, bench.device)


def kernel_suite(name: str, bench: Bench, command: Command) -> Measuring:
    if not bench.gpu or not HAVE_TRITON:
        raise cli.UsageError(f"--suite {name} needs a CUDA device and Triton; `{startup.command('train')} --doctor` says what this machine has")
    return {"linear": kernel_suites.linear, "hyperbolic": kernel_suites.hyperbolic}[name](bench.device)


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
    sizes = replace(sizes, **({"rates": command.rates} if command.rates else {}), **({"seeds": tuple(range(command.seeds))} if command.seeds else {}))
    recall.check(bench.kinds, sizes)
    return recall.run(bench.kinds, bench.devices, sizes, command.kernels)


def perplexity_suite(bench: Bench, command: Command) -> Measuring:
    if not command.suite:  # kinds that were named are there for their speed
        bench = replace(bench, kinds=[])
    what = {"text": text_of(bench, command)}
    return of_models(bench, command, partial(perplexity.check, **what), partial(perplexity.run, **what, devices=bench.devices, kernels=command.kernels))


def long_context_suite(bench: Bench, command: Command) -> Measuring:
    what = {"text": text_of(bench, command)}
    sizes = {} if bench.gpu else {"times": 4, "windows": 4, "trials": 2}
    return of_models(bench, command, partial(long_context.check, **what), partial(long_context.run, **what, **sizes, devices=bench.devices, kernels=command.kernels))


def geometry_suite(bench: Bench, command: Command) -> Measuring:
    tokens = command.tokens or (200_000 if bench.gpu else 2000)
    if text_of(bench, command):
        raise cli.UsageError("--data.sources: suite geometry looks at runs on their own validation text; leave it out, or name other suites")
    check, run = partial(geometry.check, tokens=tokens), partial(geometry.run, devices=bench.devices, tokens=tokens, kernels=command.kernels)
    return of_models(bench, command, check, run)


def report_suite(bench: Bench, command: Command) -> Measuring:
    return iter(report.join([Path(folder) for folder in bench.runs]))


class Suite(NamedTuple):
    measured: Literal["kinds", "peers", "models", "nothing", "reports"]  # what is named with it: kinds; kinds and peers; kinds and runs; ...
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
    return command.rates or (grid.rates_of(config) if bench.gpu else (peak_rate(config.model),))


def seeds(bench: Bench, command: Command) -> tuple[int, ...]:
    return tuple(range(command.seeds or (3 if bench.gpu else 1)))


def text_of(bench: Bench, command: Command) -> DataConfig | None:
    """The text that runs are evaluated on; None for their own validation text, of which kinds trained here have one too."""
    return command.data if bench.runs and not bench.kinds and cli.peek("data.sources", bench.argv) else None


def named_runs(folders: list[str]) -> dict[str, Path]:
    """Runs by what tables call them: runs/study/phase8 is study/phase8; but a name that could be a kind keeps its runs/."""
    found = {}
    for folder in folders:
        short = Path(folder).relative_to(runs.ROOT) if Path(folder).is_relative_to(runs.ROOT) else Path()
        found[str(short) if len(short.parts) > 1 and str(short) not in folders else folder] = Path(folder)
    return found


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


# -- the command -----------------------------------------------------------------------------------------------------------------------

MOST = 1 << 26  # tokens of a sequence or a step; to make them takes a moment
OFTEN = 60  # seconds after which what a suite has measured so far is written


def check(command: Command, argv: list[str], device: torch.device) -> Bench:
    """What is to be measured.

    Raises:
        ConfigError, UsageError: on what cannot be measured or written.
    """
    for flag, values, low, high in (("lengths", command.lengths, 1, MOST), ("tokens", (command.tokens,), 0, MOST), ("seeds", (command.seeds,), 0, 1000)):
        for value in values:
            if not low <= value <= high:
                raise ConfigError(f"--{flag} {value}: must be at least {low} and at most {high:,}")
    for rate in command.rates:
        if not 0 < rate < 1e3:
            raise ConfigError(f"--rates {rate:g}: must be above 0")
    if "/" in command.name or "\0" in command.name or command.name in (".", ".."):
        raise ConfigError(f"--name {command.name!r}: must be a plain folder name")
    folder = runs.ROOT / (command.name or f"bench-{time.strftime('%Y%m%d-%H%M%S')}")
    if folder.exists():
        raise cli.UsageError(f"{folder} exists: choose another --name")
    subjects = list(dict.fromkeys(subject.rstrip("/") or subject for subject in command.subjects))
    for subject in subjects:
        if subject not in arms.KINDS + arms.PEERS and not Path(subject).is_dir():
            names = ", ".join(arms.KINDS + arms.PEERS)
            raise cli.UsageError(f"{subject}: neither a kind or peer ({names}) nor the folder of a run")
    kinds, peers = ([s for s in subjects if s in known] for known in (arms.KINDS, arms.PEERS))
    others = [s for s in subjects if s not in arms.KINDS + arms.PEERS]
    return Bench(argv, device, pool.devices(device, command.train.device), folder, kinds, peers, others)


def chosen(command: Command, bench: Bench) -> list[str]:
    """The suites to run.

    Raises:
        UsageError: if one has nothing to measure, or what is named has none.
    """
    available = {
        "kinds": bench.kinds, "peers": bench.kinds + bench.peers, "models": bench.kinds + bench.runs, "nothing": ["all"], "reports": bench.runs,
    }  # fmt: skip
    asked = list(dict.fromkeys(command.suite))
    if "all" in asked:
        if not bench.kinds + bench.runs:
            raise cli.UsageError("--suite all needs kinds or runs, and none was named")
        kernels = ("linear", "hyperbolic") if bench.gpu and HAVE_TRITON else ()
        asked = [name for name in ("speed", "memory", "decode", *kernels, "quality", "perplexity", "long-context", "geometry", "recall", "nulls")
                 if available[SUITES[name].measured] and (bench.kinds or SUITES[name].measured == "models")]  # fmt: skip
    if not asked:
        if not bench.kinds + bench.runs:
            what = "has suite quality alone: add --suite quality" if bench.peers else ""
            raise cli.UsageError(f"{bench.peers[0]}: {what}" if what else "name what to measure: phase7, phase8, softmax, hybrid or folders of runs; or a --suite")
        asked = ["speed"] * bool(bench.kinds) + ["perplexity"] * bool(bench.runs)
    wanted = {"kinds": "kinds", "peers": "kinds or peers", "models": "kinds or folders of runs", "reports": "folders of benchmarks"}
    for name in asked:
        if not available[SUITES[name].measured]:
            raise cli.UsageError(f"--suite {name} needs {wanted[SUITES[name].measured]}, and none was named")
    measured = {subject for name in asked for subject in available[SUITES[name].measured]}
    if idle := [subject for subject in bench.kinds + bench.peers + bench.runs if subject not in measured]:
        raise cli.UsageError(f"{idle[0]}: nothing that suite {' or '.join(asked)} measures; leave it out, or name another --suite")
    return asked


def makes_models(bench: Bench, name: str) -> bool:
    """Whether a suite measures models that are made for it, by the settings of the command, and not runs alone."""
    return "settings" in SUITES[name].flags and (SUITES[name].measured != "models" or bool(bench.kinds))


def takes(bench: Bench, name: str, flag: str) -> bool:
    """Whether a suite depends on a flag."""
    group = flag.partition(".")[0]
    if group not in SETTINGS:
        return flag in SUITES[name].flags
    return makes_models(bench, name) or (group == "data" and name in ("perplexity", "long-context"))


def check_flags(bench: Bench, names: list[str]) -> None:
    """Raises UsageError on a flag that would change nothing."""
    for flag in (a.partition("=")[0][2:].replace("_", "-") for a in bench.argv if a.startswith("--")):
        takers = [name for name, suite in SUITES.items() if flag in suite.flags]
        if (takers or flag.partition(".")[0] in SETTINGS) and flag != "train.device" and not any(takes(bench, name, flag) for name in names):
            why = "runs have settings of their own" if bench.runs else "it has sizes of its own"
            why = f"that is for {', '.join(takers)}" if takers else why
            raise cli.UsageError(f"--{flag} would change nothing in suite {' and '.join(names)} ({why}): leave it out")


def main(argv: list[str]) -> int:
    device = env.pick_device(cli.peek("train.device", argv) or "auto")
    command = parse(argv, "standard" if device.type == "cuda" else "small")
    bench = check(command, argv, device)
    names = chosen(command, bench)
    check_flags(bench, names)
    env.prepare(device)
    suites = {}
    for name in names:
        own = parse(argv, SUITES[name].gpu if bench.gpu else SUITES[name].cpu)
        suites[name] = SUITES[name].start(bench, own)
        if name != "report":
            where = ", ".join(map(str, bench.devices)) if SUITES[name].measured != "kinds" else device
            print(f"{name}: {f'preset {own.preset} on ' * makes_models(bench, name)}{where}")
    runs.ROOT.mkdir(exist_ok=True)
    try:  # found out now, not when there is something to write
        with tempfile.TemporaryDirectory(prefix=".", dir=runs.ROOT):
            pass
    except OSError as e:
        where = runs.ROOT.absolute()
        raise cli.UsageError(f"{where}, where results go, cannot be written to ({e.strerror}): mend that, or go to another folder") from e

    results: dict[str, Result] = {}
    written = time.monotonic()

    def write() -> None:
        nonlocal written
        report.write(bench.folder, list(results.values()), env.describe(device), " ".join([startup.command("bench"), *argv]))
        written = time.monotonic()

    try:
        for name, measuring in suites.items():
            result = None
            for result in measuring:
                results[result.suite] = result
                if time.monotonic() - written > OFTEN:
                    write()
                if name == "report":
                    print(tables.text(result), flush=True)
            if name != "report" and result:
                print(tables.text(result), flush=True)
                write()
    finally:  # whatever ended it: what was measured is not lost
        if results:
            write()
            print(f"written to {bench.folder}: report.md, report.tex, results.json{', figures' if any(r.figures for r in results.values()) else ''}")
    rows = ((name, row) for name, result in results.items() for table in result.tables for row in table.rows)
    failed = dict.fromkeys(f"{row.get('model', 'one')} ({name})" for name, row in rows if "failed" in row)
    if failed:
        raise cli.UsageError(f"{len(failed)} failed, and the tables say why: {', '.join(failed)}")
    return 0


if __name__ == "__main__":
    cli.end(cli.run(main))
