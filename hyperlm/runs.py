"""Folders of runs: names, who trains there, settings and history, and the newest of them."""

import json
import os
import platform
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from tokenizers import Tokenizer

from hyperlm import tokenizer as tok
from hyperlm.config import Config, from_dict, resolve, to_dict
from hyperlm.errors import HyperlmError
from hyperlm.files import digest, read_json
from hyperlm.startup import command

ROOT = Path("runs")


class RunError(HyperlmError, ValueError):
    """A run that cannot be made, found, read or written; the message says what to do."""


# -- small files -----------------------------------------------------------------------------------------------------------------------


def write_json(path: Path, values: Any) -> None:
    """`write_text` of values as JSON."""
    write_text(path, json.dumps(values, indent=2, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a small file whole or not at all, whatever lies there.

    Raises:
        RunError: if it cannot be written; what was there stays.
    """
    part = path.with_suffix(".part")
    try:
        part.write_bytes(text.encode())
        os.replace(part, path)
    except OSError as e:
        with suppress(OSError):
            part.unlink()
        raise RunError(f"{path} could not be written ({e.strerror}); nothing that was saved is lost") from e


# -- folders ---------------------------------------------------------------------------------------------------------------------------


def require_new(name: str) -> None:
    """Found out before text is read.

    Raises:
        RunError: if there is a run called `name`; an existing one is never overwritten.
    """
    run = ROOT / name
    if not name or not os.path.lexists(run):
        return
    if any((run / "checkpoints").glob("step_*")) or is_owned(run):
        raise RunError(f"{run} exists: continue it with --resume {run}, or choose another --name")
    raise RunError(f"{run} exists, but never saved anything: remove it (rm -r {run}), or choose another --name")


def create(config: Config, preset: str) -> Path:
    """Make the folder of a new run.

    Raises:
        RunError: if the name is taken.
    """
    run = ROOT / (config.name or f"{preset}-{config.model.kind}-{time.strftime('%Y%m%d-%H%M%S')}")
    require_new(run.name)
    try:
        run.mkdir(parents=True)
    except FileExistsError as e:
        raise RunError(f"{run} exists: continue it with --resume {run}, or choose another --name") from e
    except OSError as e:
        raise RunError(f"cannot make {run} ({e.strerror})") from e
    return run


def remove(run: Path) -> None:
    """What a new run leaves that ended before its first step: nothing."""
    shutil.rmtree(run, ignore_errors=True)
    with suppress(OSError):
        ROOT.rmdir()  # if this run made it


def newest() -> Path:
    """The run that saved last.

    Raises:
        RunError: if no run has a checkpoint yet.
    """
    checkpoints = [p for p in ROOT.glob("*/checkpoints/step_*") if p.name.removeprefix("step_").isdigit()]
    if not checkpoints:
        raise RunError(f"no run with a checkpoint under {ROOT}/; train one with: {command('train')} --preset small")
    return max(checkpoints, key=lambda p: p.stat().st_mtime).parent.parent


# -- one run, one writer ---------------------------------------------------------------------------------------------------------------


@contextmanager
def owned(run: Path) -> Iterator[None]:
    """Inside, this process alone trains `run`, by a lock of the operating system, which is gone when the process is.

    Raises:
        RunError: if another one does, or the folder cannot be written to.
    """
    require_run(run)
    lock = FileLock(run / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as e:
        raise RunError(f"{run} is being trained by {owner(run) or 'another process'}; wait for its end, or stop it first") from e
    except OSError as e:
        raise RunError(f"cannot write to {run} ({e.strerror})") from e
    note = run / ".owner"
    try:
        write_json(note, dict(pid=os.getpid(), host=platform.node(), since=time.strftime("%Y-%m-%d %H:%M:%S")))
        yield
    finally:
        with suppress(OSError):
            note.unlink()
        lock.release()


def is_owned(run: Path) -> bool:
    """Whether a process trains `run`."""
    lock = FileLock(run / ".lock")
    try:
        if os.path.exists(lock.lock_file):
            lock.acquire(timeout=0)
            lock.release()
    except (Timeout, OSError):
        return True
    return False


def owner(run: Path) -> str:
    """Who trains `run`, in words; empty if nobody left word."""
    try:
        values = read_json(run / ".owner")
        return f"process {values['pid']} on {values['host']} since {values['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return ""


# -- settings and history --------------------------------------------------------------------------------------------------------------


def write_config(run: Path, config: Config) -> None:
    """Store the settings of a run, with a digest."""
    values = to_dict(config)
    write_json(run / "config.json", {**values, "digest": digest(values)})


def describe(run: Path, config: Config, tokenizer: Tokenizer, chat: bool, facts: dict[str, Any]) -> None:
    """Write what a new run says of itself beside its checkpoints: settings, tokenizer (with what other libraries ask of it; `chat` if the
    text had conversations), and facts of the machine."""
    write_config(run, config)
    write_text(run / "tokenizer.json", tokenizer.to_str(pretty=True))
    write_json(run / "tokenizer_config.json", tok.settings(tokenizer, chat=chat))
    write_json(run / "env.json", facts)


def read_config(run: Path) -> Config:
    """The settings of a run, checked.

    Raises:
        RunError: if the run is missing or its config.json is damaged.
    """
    require_run(run)
    path = run / "config.json"
    try:
        values = read_json(path)
        if not isinstance(values, dict):
            raise ValueError("not a group of settings")
        expected = values.pop("digest", None)  # earlier versions wrote none
        if expected is not None and expected != digest(values):
            raise ValueError("its digest does not match: it was changed after it was written")
        return resolve(from_dict(values))
    except FileNotFoundError as e:
        raise RunError(f"{run} is not a run: it has no config.json") from e
    except OSError as e:
        raise RunError(f"{path} cannot be read ({e.strerror})") from e
    except ValueError as e:  # JSON, UTF-8, and settings that do not exist
        raise RunError(f"{path} is damaged ({' '.join(str(e).split())[:160]})") from e


def require_run(run: Path) -> None:
    """Raises RunError if there is no such folder."""
    if not run.is_dir():
        raise RunError(f"{run}: no such run; `ls {ROOT}` shows those that exist")


def remember(run: Path, event: dict[str, Any]) -> None:
    """Add to history.jsonl, which tells when a run was started and resumed, how, and what was changed."""
    line = json.dumps({"time": time.strftime("%Y-%m-%d %H:%M:%S"), **event}, allow_nan=False)
    path = run / "history.jsonl"
    try:
        with open(path, "ab+") as file:
            if file.seek(0, os.SEEK_END):
                file.seek(-1, os.SEEK_END)
                line = line if file.read() == b"\n" else "\n" + line  # half a line, from a killed process
            file.write(line.encode() + b"\n")
    except OSError as e:
        raise RunError(f"{path} could not be written ({e.strerror}); nothing that was saved is lost") from e
