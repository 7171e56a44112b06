"""Folders of runs: names, atomic small files, and the newest of them."""

import json
import os
import time
from pathlib import Path
from typing import Any

from configs import Config, ConfigError, from_dict, to_dict

ROOT = Path("runs")


class RunError(ValueError):
    """A run that cannot be made or found; the message says what to do."""


def write_json(path: Path, values: Any) -> None:
    """Write a small file whole or not at all."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(values, indent=2) + "\n")
    os.replace(part, path)


def create(config: Config, preset: str) -> Path:
    """Make the folder of a new run.

    Raises:
        RunError: if the name is taken; an existing run is never overwritten.
    """
    run = ROOT / (config.name or f"{preset}-{config.model.kind}-{time.strftime('%Y%m%d-%H%M%S')}")
    try:
        run.mkdir(parents=True)
    except FileExistsError as e:
        raise RunError(f"{run} exists: continue it with --resume {run}, or choose another --name") from e
    except OSError as e:
        raise RunError(f"cannot make {run} ({e.strerror})") from e
    write_json(run / "config.json", to_dict(config))
    return run


def read_config(run: Path) -> Config:
    """The configuration that a run was started with.

    Raises:
        RunError: if the run is missing or its config.json is damaged.
    """
    if not run.is_dir():
        raise RunError(f"{run}: no such run; `ls {ROOT}` shows those that exist")
    try:
        return from_dict(json.loads((run / "config.json").read_text()))
    except FileNotFoundError as e:
        raise RunError(f"{run} is not a run: it has no config.json") from e
    except (json.JSONDecodeError, ConfigError, TypeError, AttributeError) as e:
        raise RunError(f"{run / 'config.json'} is damaged ({e}); restore it, or start again under another --name") from e


def newest() -> Path:
    """The run that saved last.

    Raises:
        RunError: if no run has a checkpoint yet.
    """
    found = [p for p in ROOT.glob("*/checkpoints/step_*") if p.name.removeprefix("step_").isdigit()]
    if not found:
        raise RunError(f"no run with a checkpoint under {ROOT}/; train one with: python train.py --preset small")
    return max(found, key=lambda p: p.stat().st_mtime).parent.parent
