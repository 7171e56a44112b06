"""Measure models and runs side by side: tables on the screen; results.json, report.md and plots under runs/.

    python bench.py phase7 phase8 softmax     speed and memory of untrained models at several lengths
    python bench.py runs/x runs/y             validation perplexity and bits per byte of runs
"""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal, get_args

import torch
import tyro

from configs import PRESETS, ConfigError, Kind, resolve
from hyperlm import cli, env, runs
from hyperlm.bench import quality, report, speed


@dataclass(frozen=True)
class Command:
    subjects: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Kinds (phase7, phase8, softmax) and folders of runs."""
    suite: Literal["auto", "speed", "quality"] = "auto"
    """speed (of kinds), quality (of runs); auto does what fits the subjects."""
    preset: str = ""
    """Shape of the models; by default standard on a GPU and small on a CPU."""
    lengths: tuple[int, ...] = ()
    """Sequence lengths; by default 512 to 16,384 on a GPU and 64 to 1,024 on a CPU."""
    tokens: int = 0
    """Tokens a step; by default as many as the longest sequence has."""
    name: str = ""
    """Folder of the results under runs/."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:n."""
    kernels: Literal["auto", "torch", "triton"] = "auto"
    """Kernel backend."""


def run_speed(command: Command, device: torch.device) -> report.Result:
    kinds: list[Kind] = [subject for subject in command.subjects if subject in get_args(Kind)]
    gpu = device.type == "cuda"
    preset = command.preset or ("standard" if gpu else "small")
    if preset not in PRESETS:
        raise ConfigError(f"--preset {preset}: choose from {', '.join(PRESETS)}")
    lengths = list(command.lengths) or [1 << i for i in (range(9, 15) if gpu else range(6, 11))]
    if min(lengths) < 1:
        raise ConfigError(f"--lengths {min(lengths)}: must be at least 1")
    config = replace(resolve(PRESETS[preset]()), kernels=command.kernels)
    return speed.run(kinds, config, device, lengths, command.tokens or max(lengths))


def run_quality(command: Command, device: torch.device) -> report.Result:
    return quality.run([Path(subject) for subject in command.subjects if subject not in get_args(Kind)], device, command.kernels)


SUITES: dict[str, Callable[[Command, torch.device], report.Result]] = {"speed": run_speed, "quality": run_quality}


def main(argv: list[str]) -> int:
    command = cli.parse(Command, argv, description=__doc__)
    if not command.subjects:
        raise cli.UsageError("name what to measure: phase7, phase8, softmax or folders of runs")
    kinds = [subject for subject in command.subjects if subject in get_args(Kind)]
    folders = [subject for subject in command.subjects if subject not in get_args(Kind)]
    for folder in folders:
        if not Path(folder).is_dir():
            raise cli.UsageError(f"{folder}: neither a kind ({', '.join(get_args(Kind))}) nor the folder of a run")
    fitting = {"speed": kinds, "quality": folders}
    if command.suite != "auto" and not fitting[command.suite]:
        raise cli.UsageError(f"--suite {command.suite} needs {'kinds' if command.suite == 'speed' else 'folders of runs'}, and none was named")
    chosen = [name for name in SUITES if (command.suite in ("auto", name) and fitting[name])]

    device = env.pick_device(command.device)
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
