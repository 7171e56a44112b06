"""What a run says: a line a person can read, and the same record in metrics.jsonl and TensorBoard."""

import json
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from torch.utils.tensorboard import SummaryWriter

from hyperlm.env import GIB
from hyperlm.files import finite
from hyperlm.runs import RunError
from hyperlm.state import State
from hyperlm.step import Metrics
from hyperlm.tokenizer import clean


def silent(event: Any, default: Callable = threading.excepthook) -> None:
    """Leave out what a thread of TensorBoard says before its failure reaches us as an exception."""
    if not type(event.thread).__module__.startswith("tensorboard"):
        default(event)


threading.excepthook = silent


class Log(NamedTuple):
    records: TextIO
    board: SummaryWriter


def open_log(run: Path, step: int) -> Log:
    """Append to a run's records from `step` on. Records of later steps, left by a run that was killed, are dropped: they will be made again.

    Raises:
        RunError: if they cannot be written.
    """
    path = run / "metrics.jsonl"
    try:
        if path.exists():
            lines = path.read_bytes().splitlines(keepends=True)
            kept = [line for line in lines if (at := record_step(line)) is not None and at <= step]
            damaged = [line for line in lines[:-1] if record_step(line) is None]  # the last may be half a line, from a killed process
            if damaged:
                with open(path.with_suffix(".damaged"), "ab") as file:
                    file.writelines(damaged)
                print(f"log        {len(damaged)} lines of {path} cannot be read: they are in {path.with_suffix('.damaged').name} now")
            part = path.with_suffix(".part")
            part.write_bytes(b"".join(line.rstrip(b"\r\n") + b"\n" for line in kept))
            os.replace(part, path)
        records = open(path, "a", buffering=1, encoding="utf-8")
        return Log(records, SummaryWriter(str(run), purge_step=step + 1 if step else None))
    except OSError as e:
        raise RunError(f"{path} could not be written ({e.strerror or e})") from e


def record_step(line: bytes) -> int | None:
    """The step of a record; None if it is none."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return step if type(step) is int else None


def record(log: Log, step: int, values: dict[str, Any]) -> None:
    """Write one record, in which numbers that are not finite are null; numbers become scalars of TensorBoard, strings its texts.

    Raises:
        RunError: if it cannot be written.
    """
    try:
        log.records.write(json.dumps(finite({"step": step, **values}), allow_nan=False) + "\n")
        for name, value in values.items():
            if isinstance(value, str):
                log.board.add_text(name, "    " + clean(value).replace("\n", "\n    "), step)  # four spaces: verbatim in Markdown
            else:
                log.board.add_scalar(name if "/" in name else f"{'val' if name.startswith('val') else 'train'}/{name}", value, step)
    except OSError as e:
        raise RunError(f"{log.records.name} could not be written ({e.strerror or e})") from e


def newest(run: Path) -> dict[str, Any]:
    """The newest value of what steps and evaluations recorded, but for gauges and samples."""
    values: dict[str, Any] = {}
    with open(run / "metrics.jsonl", "rb") as file:
        for line in file:
            if record_step(line) is not None:
                values |= {name: value for name, value in json.loads(line).items() if name != "sample" and not name.startswith("radius/")}
    values.pop("step", None)
    return values


@contextmanager
def recording(run: Path, step: int) -> Iterator[Log]:
    """The records of a run from `step` on, closed at the end."""
    records = open_log(run, step)
    try:
        yield records
    except BaseException:
        with suppress(RunError):
            close(records)
        raise
    close(records)


def close(log: Log) -> None:
    """Raises RunError if the last records cannot be written."""
    try:
        log.records.close()
        log.board.close()
    except OSError as e:
        raise RunError(f"{log.records.name} could not be written ({e.strerror or e})") from e


def count(n: float) -> str:
    """1234567 -> 1.23M"""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if n >= size:
            return f"{n / size:.3g}{unit}"
    return f"{n:.3g}"


def duration(seconds: float) -> str:
    """3725 -> 1:02:05"""
    minutes, s = divmod(int(seconds), 60)
    h, m = divmod(minutes, 60)
    return f"{h}:{m:02d}:{s:02d}" if h else f"{m}:{s:02d}"


def step_record(state: State, metrics: Metrics, total: int, seconds: float, peak_memory: int) -> dict[str, Any]:
    """What is logged of a step that took `seconds`, `total` being the last step and `peak_memory` in bytes."""
    return {
        "tokens": state.tokens,
        "loss": float(metrics["loss"]),
        "lr": metrics["lr"],
        "grad_norm": float(metrics["grad_norm"]),
        "tokens_per_second": metrics["positions"] / seconds,
        "peak_memory_gib": peak_memory / GIB,
        "seconds_left": (total - state.step) * seconds,
        "skipped": state.step - state.updates,
    }


def step_line(step: int, total: int, r: dict[str, Any]) -> str:
    return (
        f"step {step:>{len(str(total))}}/{total}  {count(r['tokens']):>6} tokens  loss {r['loss']:.4f}  lr {r['lr']:.2e}"
        f"  norm {r['grad_norm']:.2f}  {count(r['tokens_per_second'])} tok/s  {r['peak_memory_gib']:.2f} GiB  left {duration(r['seconds_left'])}"
    )


def eval_line(step: int, total: int, r: dict[str, Any]) -> str:
    sources = "".join(f"  {name.removeprefix('val_bpb/')} {value:.3f}" for name, value in r.items() if name.startswith("val_bpb/"))
    return f"eval {step:>{len(str(total))}}/{total}  loss {r['val_loss']:.4f}  perplexity {r['val_ppl']:.1f}  bits per byte {r['val_bpb']:.3f}{sources}"


def summary_line(r: dict[str, Any]) -> str:
    return (
        f"{count(r['parameters'])} parameters, {count(r['tokens'])} tokens in {duration(r['seconds'])}; validation loss {r['val_loss']:.4f}, "
        f"perplexity {r['val_ppl']:.1f}, {r['val_bpb']:.3f} bits per byte; {r['peak_memory_gib']:.2f} GiB"
    )
