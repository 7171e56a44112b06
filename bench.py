"""Measure models and runs side by side: tables, and a report under runs/.

    python bench.py phase7 phase8 softmax  speed and memory, several lengths
    python bench.py runs/x runs/y          validation loss and bits per byte
    python bench.py phase8 --suite decode  generation, by batch and context
    python bench.py phase8 --suite memory --preset max --train.device-memory 5.81
                                           memory and speed of training, by
                                           default from host memory
    python bench.py --suite linear         linear attention in Triton beside its
                                           peers and the memory's limit (GPU)
    python bench.py --suite hyperbolic     exact hyperbolic attention in Triton
                                           beside softmax attention (GPU)

Models are those of a preset, with train.py's settings on top, but for the kind.
"""

if __name__ == "__main__":
    from hyperlm import startup

    startup.quiet()  # before the slow imports

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal, get_args

import torch
import tyro

from configs import PRESETS
from hyperlm import cli, env, plan, runs, startup
from hyperlm.bench import decode, memory, quality, report, speed
from hyperlm.bench import kernels as kernel_suites
from hyperlm.config import Config, ConfigError, Kind, ModelConfig, OptimConfig, TrainConfig, resolve
from hyperlm.kernels import HAVE_TRITON


@dataclass(frozen=True)
class Command:
    subjects: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Kinds (phase7, phase8, softmax) and folders of runs."""
    suite: Literal["auto", "speed", "quality", "decode", "memory", "linear", "hyperbolic"] = "auto"
    """speed, decode and memory (of kinds), quality (of runs), linear and hyperbolic (kernels); auto takes speed for kinds and quality for runs."""
    preset: str = ""
    """What the settings of models start from; by default standard on a GPU and small on a CPU."""
    lengths: tuple[int, ...] = ()
    """Sequence lengths (decode: context lengths); by default 512 to 16,384 on a GPU and 64 to 1,024 on a CPU."""
    tokens: int = 0
    """Tokens a step; by default as many as the longest sequence has."""
    name: str = ""
    """Folder of the results under runs/."""
    kernels: Literal["auto", "torch", "triton"] = "auto"
    """Kernel backend."""
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)


def parse(argv: list[str]) -> tuple[Command, torch.device]:
    """The command, and the device that its default preset depends on."""
    device = env.pick_device(cli.peek("train.device", argv) or "auto")
    preset = cli.peek("preset", argv) or ("standard" if device.type == "cuda" else "small")
    if preset not in PRESETS:
        raise ConfigError(f"--preset {preset}: choose from {', '.join(PRESETS)}")
    config = PRESETS[preset]()
    default = Command(preset=preset, model=config.model, train=config.train, optim=config.optim)
    return cli.parse(Command, argv, default, description=__doc__), device


def kinds_of(command: Command) -> list[Kind]:
    return [subject for subject in command.subjects if subject in get_args(Kind)]


def folders_of(command: Command) -> list[str]:
    return [subject for subject in command.subjects if subject not in get_args(Kind)]


def shape(command: Command, device: torch.device, residence: Literal["device", "host"] = "device") -> Config:
    """The model to measure, but for its kind; `residence` where the command leaves it open, and the optimizer's state decided as for a run."""
    own = {name: getattr(command, name) for name in ("kernels", "model", "train", "optim")}
    config = resolve(replace(PRESETS[command.preset](), **own))
    if config.train.residence == "auto":
        config = replace(config, train=replace(config.train, residence=residence))
    memory = env.allowed_memory(device, config.train.device_memory), env.available_memory(torch.device("cpu"))
    return plan.decided(config, env.compute_dtype(device), *memory, gpu=device.type == "cuda")


# A suite checks first what would otherwise be found out late, and returns what measures: results that grow.
Measuring = Iterator[report.Result]


def speed_suite(command: Command, device: torch.device) -> Measuring:
    lengths = list(command.lengths) or [1 << i for i in (range(9, 15) if device.type == "cuda" else range(6, 11))]
    what = kinds_of(command), shape(command, device), device, lengths, command.tokens or max(lengths)
    speed.check(*what)
    return speed.run(*what)


def decode_suite(command: Command, device: torch.device) -> Measuring:
    gpu = device.type == "cuda"
    contexts = list(command.lengths) or ([1024, 16384, 131072] if gpu else [64, 1024])
    what = kinds_of(command), shape(command, device), device, contexts, [1, 16, 256] if gpu else [1, 4]
    decode.check(*what)
    return decode.run(*what)


def memory_suite(command: Command, device: torch.device) -> Measuring:
    config = shape(command, device, "host")
    memory.check(kinds_of(command), config, device)
    return memory.run(kinds_of(command), config, device)


def quality_suite(command: Command, device: torch.device) -> Measuring:
    folders = [Path(folder) for folder in folders_of(command)]
    quality.check(folders)
    return quality.run(folders, device, command.kernels)


def kernel_suite(command: Command, device: torch.device) -> Measuring:
    if device.type != "cuda" or not HAVE_TRITON:
        raise cli.UsageError(f"--suite {command.suite} needs a CUDA device and Triton; `{startup.command('train')} --doctor` says what this machine has")
    return {"linear": kernel_suites.linear, "hyperbolic": kernel_suites.hyperbolic}[command.suite](device)


SUITES: dict[str, Callable[[Command, torch.device], Measuring]] = {
    "speed": speed_suite,
    "decode": decode_suite,
    "memory": memory_suite,
    "quality": quality_suite,
    "linear": kernel_suite,
    "hyperbolic": kernel_suite,
}
AUTO = ("speed", "quality")
MOST = 1 << 26  # tokens of a sequence or a step; to make them takes a moment


def check(command: Command) -> Path:
    """Where the results will be.

    Raises:
        ConfigError, UsageError: on what cannot be measured or written.
    """
    for flag, values, low in (("lengths", command.lengths, 1), ("tokens", (command.tokens,), 0)):
        for value in values:
            if not low <= value <= MOST:
                raise ConfigError(f"--{flag} {value}: must be at least {low} and at most {MOST:,}")
    if "/" in command.name or "\0" in command.name or command.name in (".", ".."):
        raise ConfigError(f"--name {command.name!r}: must be a plain folder name")
    folder = runs.ROOT / (command.name or f"bench-{time.strftime('%Y%m%d-%H%M%S')}")
    if folder.exists():
        raise cli.UsageError(f"{folder} exists: choose another --name")
    for subject in folders_of(command):
        if not Path(subject).is_dir():
            raise cli.UsageError(f"{subject}: neither a kind ({', '.join(get_args(Kind))}) nor the folder of a run")
    return folder


def main(argv: list[str]) -> int:
    command, device = parse(argv)
    folder = check(command)
    kinds, folders = kinds_of(command), folders_of(command)
    subjects = {"speed": kinds, "decode": kinds, "memory": kinds, "quality": folders, "linear": ["all"], "hyperbolic": ["all"]}
    if command.suite == "auto" and not command.subjects:
        raise cli.UsageError("name what to measure: phase7, phase8, softmax or folders of runs; or a --suite")
    if command.suite != "auto" and not subjects[command.suite]:
        raise cli.UsageError(f"--suite {command.suite} needs {'folders of runs' if command.suite == 'quality' else 'kinds'}, and none was named")
    chosen = [name for name in AUTO if subjects[name]] if command.suite == "auto" else [command.suite]

    env.prepare(device)
    suites = {name: SUITES[name](command, device) for name in chosen}
    runs.ROOT.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".", dir=runs.ROOT):  # found out now, not when there is something to write
        pass
    results: dict[str, report.Result] = {}
    try:
        for name, measuring in suites.items():
            for results[name] in measuring:
                pass
            print(report.table(results[name].rows), *results[name].notes, sep="\n", flush=True)
    finally:  # whatever ended it: what was measured is not lost
        if results:
            report.write(folder, list(results.values()), env.describe(device), " ".join([startup.command("bench"), *argv]))
            print(f"written to {folder}: report.md, results.json{', plots' if any(r.plots for r in results.values()) else ''}")
    return 0


if __name__ == "__main__":
    cli.end(cli.run(main))
