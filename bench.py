"""Measure models and runs side by side: tables on the screen; results.json, report.md and plots under runs/.

    python bench.py phase7 phase8 softmax     speed and memory of untrained models at several lengths
    python bench.py runs/x runs/y             validation perplexity and bits per byte of runs
    python bench.py phase8 --suite decode     speed and memory of generation, against batch size and context
    python bench.py phase8 --suite memory --preset max --train.device-memory 5.81      memory and speed of training, by default from host memory
    python bench.py --suite linear            linear attention in Triton beside its peers and the memory's limit (needs a GPU)
    python bench.py --suite hyperbolic        exact hyperbolic attention in Triton beside softmax attention (needs a GPU)

Models are those of a preset, with the same settings on top of it as train.py takes, but for the kind.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal, get_args

import torch
import tyro

from configs import PRESETS, Config, ConfigError, Kind, ModelConfig, OptimConfig, TrainConfig, resolve
from hyperlm import cli, env, runs
from hyperlm.bench import decode, memory, quality, report, speed
from hyperlm.bench import kernels as kernel_suites
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


def shape(command: Command) -> Config:
    """The model to measure, but for its kind."""
    if command.lengths and min(command.lengths) < 1:
        raise ConfigError(f"--lengths {min(command.lengths)}: must be at least 1")
    own = {name: getattr(command, name) for name in ("kernels", "model", "train", "optim")}
    return resolve(replace(PRESETS[command.preset](), **own))


def run_speed(command: Command, device: torch.device) -> report.Result:
    lengths = list(command.lengths) or [1 << i for i in (range(9, 15) if device.type == "cuda" else range(6, 11))]
    return speed.run(kinds_of(command), shape(command), device, lengths, command.tokens or max(lengths))


def run_decode(command: Command, device: torch.device) -> report.Result:
    gpu = device.type == "cuda"
    contexts = list(command.lengths) or ([1024, 16384, 131072] if gpu else [64, 1024])
    return decode.run(kinds_of(command), shape(command), device, contexts, [1, 16, 256] if gpu else [1, 4])


def run_memory(command: Command, device: torch.device) -> report.Result:
    config = shape(command)
    if config.train.residence == "auto":
        config = replace(config, train=replace(config.train, residence="host"))
    return memory.run(kinds_of(command), config, device)


def run_quality(command: Command, device: torch.device) -> report.Result:
    return quality.run([Path(folder) for folder in folders_of(command)], device, command.kernels)


def run_kernels(command: Command, device: torch.device) -> report.Result:
    if device.type != "cuda" or not HAVE_TRITON:
        raise cli.UsageError(f"--suite {command.suite} needs a CUDA device and Triton; `python train.py --doctor` says what this machine has")
    return {"linear": kernel_suites.linear, "hyperbolic": kernel_suites.hyperbolic}[command.suite](device)


SUITES: dict[str, Callable[[Command, torch.device], report.Result]] = {
    "speed": run_speed,
    "decode": run_decode,
    "memory": run_memory,
    "quality": run_quality,
    "linear": run_kernels,
    "hyperbolic": run_kernels,
}
AUTO = ("speed", "quality")


def main(argv: list[str]) -> int:
    command, device = parse(argv)
    kinds, folders = kinds_of(command), folders_of(command)
    for folder in folders:
        if not Path(folder).is_dir():
            raise cli.UsageError(f"{folder}: neither a kind ({', '.join(get_args(Kind))}) nor the folder of a run")
    subjects = {"speed": kinds, "decode": kinds, "memory": kinds, "quality": folders, "linear": ["all"], "hyperbolic": ["all"]}
    if command.suite == "auto" and not command.subjects:
        raise cli.UsageError("name what to measure: phase7, phase8, softmax or folders of runs; or a --suite")
    if command.suite != "auto" and not subjects[command.suite]:
        raise cli.UsageError(f"--suite {command.suite} needs {'folders of runs' if command.suite == 'quality' else 'kinds'}, and none was named")
    chosen = [name for name in AUTO if subjects[name]] if command.suite == "auto" else [command.suite]

    env.prepare(device)
    results = []
    for name in chosen:
        results.append(SUITES[name](command, device))
        print(report.table(results[-1].rows))
        print("\n".join(results[-1].notes))
    folder = runs.ROOT / (command.name or f"bench-{time.strftime('%Y%m%d-%H%M%S')}")
    folder.mkdir(parents=True, exist_ok=True)
    report.write(folder, results, env.describe(device), " ".join(["python bench.py", *argv]))
    print(f"written to {folder}: report.md, results.json{', plots' if any(r.plots for r in results) else ''}")
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
