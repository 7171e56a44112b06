"""What a run says: a line a person can read, and the same record in metrics.jsonl and TensorBoard."""

import json
import math
import os
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np
from torch.utils.tensorboard import SummaryWriter

from hyperlm.config import Config, flag_of, flat, to_dict
from hyperlm.env import GIB
from hyperlm.files import finite
from hyperlm.geometry import R_MAX
from hyperlm.passkey import CHOICES
from hyperlm.runs import RunError
from hyperlm.state import State
from hyperlm.step import Metrics
from hyperlm.tokenizer import clean


def silent(event: Any, default: Callable = threading.excepthook) -> None:
    """Leave out what a thread of TensorBoard says before its failure reaches us as an exception."""
    if not type(event.thread).__module__.startswith("tensorboard"):
        default(event)


threading.excepthook = silent


COLUMNS = 80  # that a line fits

# What TensorBoard shows of a record, and where: it draws one chart of what has one name, whichever run it is of, and sorts charts by
# their names. What is measured on validation text is a run of its own beside what a step tells, so that both losses are in one chart.
TRAINING = {
    "loss": "loss/nats a token",
    "mfu": "machine/model FLOPs utilisation",
    "peak_memory_gib": "machine/GiB at the peak",
    "tokens_per_second": "machine/tokens a second",
    "grad_norm": "optimizer/gradient norm",
    "lr": "optimizer/learning rate",
    "skipped": "optimizer/steps skipped",
}
VALIDATION = {
    "val_loss": "loss/nats a token",
    "val_bpb": "loss/validation, bits a byte",
    "val_passkey": "passkey/share of trials, said",
    "val_passkey_choice": f"passkey/share of trials, chosen among {CHOICES}",
}
PER_SOURCE = "per source"
BY_POSITION = "loss by position"
HISTOGRAMS = {"radius/q_counts": "radius/queries", "radius/k_counts": "radius/keys"}
FLUSH = 20  # seconds after which TensorBoard sees what was recorded


class Board(NamedTuple):
    """TensorBoard's files of a run: two of its own "runs"."""

    training: SummaryWriter
    validation: SummaryWriter


class Log(NamedTuple):
    records: TextIO
    board: Board


def open_log(run: Path, step: int) -> Log:
    """Append to a run's records from `step` on. Records of later steps, left by a run that was killed, are dropped: they will be made
    again.

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
        purged = {"purge_step": step + 1 if step else None, "flush_secs": FLUSH}
        return Log(records, Board(SummaryWriter(str(run), **purged), SummaryWriter(str(run / "validation"), **purged)))
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
    """Write one record, in which numbers that are not finite are null; of these TensorBoard shows what the tables above name, and texts.

    Raises:
        RunError: if it cannot be written.
    """
    try:
        log.records.write(json.dumps(finite({"step": step, **values}), allow_nan=False) + "\n")
        for name, value in values.items():
            if name in TRAINING:
                log.board.training.add_scalar(TRAINING[name], value, step)
            elif name in VALIDATION:
                log.board.validation.add_scalar(VALIDATION[name], value, step)
            elif name.startswith("val_bpb/"):
                log.board.validation.add_scalar(f"{PER_SOURCE}/{name.removeprefix('val_bpb/')}, bits a byte", value, step)
            elif name.startswith("val_loss/positions_"):
                low, high = map(int, name.removeprefix("val_loss/positions_").split("_"))
                log.board.validation.add_scalar(f"{BY_POSITION}/{low:06d} to {high:06d}, nats a token", value, step)
            elif name in HISTOGRAMS:
                add_counts(log.board.training, HISTOGRAMS[name], value, step)
            elif isinstance(value, str):
                log.board.training.add_text(name, verbatim(value), step)
    except OSError as e:
        raise RunError(f"{log.records.name} could not be written ({e.strerror or e})") from e


def add_counts(writer: SummaryWriter, tag: str, counts: list[int], step: int) -> None:
    """A histogram of radii, counted in equal bins from 0 to R_MAX."""
    edges = np.linspace(0, R_MAX, len(counts) + 1)
    middles, n = (edges[:-1] + edges[1:]) / 2, np.array(counts)
    writer.add_histogram_raw(tag, 0, R_MAX, int(n.sum()), float(n @ middles), float(n @ middles**2), edges[1:].tolist(), counts, step)


def verbatim(text: str) -> str:
    """Markdown that shows a text as it is: four spaces before each line."""
    return "    " + clean(text).replace("\n", "\n    ")


def tell_settings(log: Log, config: Config, step: int) -> None:
    """Show the settings of a run from `step` on in TensorBoard, as flags."""
    flags = {flag_of(name): " ".join(value) if isinstance(value, tuple) else str(value) for name, value in flat(to_dict(config)).items()}
    rows = "".join(f"| `--{flag}` | {clean(value).replace('|', '&#124;')} |\n" for flag, value in flags.items())
    log.board.training.add_text("settings", f"| setting | value |\n|---|---|\n{rows}", step)


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
        for writer in log.board:
            writer.close()
    except OSError as e:
        raise RunError(f"{log.records.name} could not be written ({e.strerror or e})") from e


def history(run: Path) -> list[dict[str, Any]]:
    """What steps and evaluations recorded, together by step; nothing where there are no records, as of models that bench.py trained."""
    steps: dict[int, dict[str, Any]] = {}
    if (run / "metrics.jsonl").exists():
        with open(run / "metrics.jsonl", "rb") as file:
            for line in file:
                if (step := record_step(line)) is not None:
                    steps[step] = steps.get(step, {}) | json.loads(line)
    return [steps[step] for step in sorted(steps)]


def evaluations(run: Path) -> list[tuple[int, float]]:
    """Step and validation loss of every evaluation whose loss is finite, in order."""
    return [(r["step"], r["val_loss"]) for r in history(run) if isinstance(r.get("val_loss"), float)]


# -- lines that a person reads, none longer than a terminal is wide --------------------------------------------------------------------


def labelled(label: str, text: str) -> str:
    """What a run says of one thing: a label, and text that is wrapped beside it."""
    return textwrap.fill(
        text, COLUMNS, initial_indent=f"{label:<11}", subsequent_indent=" " * 11, break_on_hyphens=False, break_long_words=False
    )


def count(n: float) -> str:
    """Three figures: 1234567 -> 1.23M"""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if size * 0.9995 <= n < math.inf:
            return f"{n / size:.3g}{unit}"
    return f"{n:.3g}"


def nats(x: float) -> str:
    """Of a loss, as many figures as mean something: 10.8, 4.4612"""
    return f"{x:.4f}" if x < 10 else count(x)


def duration(seconds: float) -> str:
    """Two units: 45s, 12m05s, 5h07m, 3d04h"""
    for unit, size, below, part in (("d", 86400, "h", 3600), ("h", 3600, "m", 60), ("m", 60, "s", 1)):
        if seconds >= size:
            return f"{int(seconds // size)}{unit}{int(seconds % size // part):02d}{below}"
    return f"{int(seconds)}s"


def step_record(
    state: State, metrics: Metrics, total: int, seconds: float, peak_memory: int, seconds_a_token: float | None = None
) -> dict[str, Any]:
    """What is logged of a step that took `seconds`, `total` being the last step, `peak_memory` in bytes, and `seconds_a_token` the least
    that a token could take on the device, if that is known."""
    speed = metrics["positions"] / seconds
    return {
        "tokens": state.tokens,
        "loss": float(metrics["loss"]),
        "lr": metrics["lr"],
        "grad_norm": float(metrics["grad_norm"]),
        "tokens_per_second": speed,
        **({"mfu": speed * seconds_a_token} if seconds_a_token else {}),
        "peak_memory_gib": peak_memory / GIB,
        "seconds_left": (total - state.step) * seconds,
        "skipped": state.step - state.updates,
    }


def step_line(step: int, total: int, r: dict[str, Any]) -> str:
    used = f"  MFU {r['mfu']:.0%}" if "mfu" in r else ""
    return (
        f"step {step:>{len(str(total))}}/{total}  loss {nats(r['loss']):<6}  norm {count(r['grad_norm']):<5}"
        f"  {count(r['tokens_per_second']):>5} tok/s{used}  left {duration(r['seconds_left'])}"
    )


def eval_line(step: int, total: int, r: dict[str, Any], tokens: int) -> str:
    """Of an evaluation after so many tokens; bits a byte of each source, if there are several, and passkeys below."""
    line = (
        f"eval {step:>{len(str(total))}}/{total}  loss {nats(r['val_loss']):<6}  ppl {count(r['val_ppl'])}"
        f"  bits per byte {r['val_bpb']:.3f}  {count(tokens)} tokens"
    )
    sources = ", ".join(f"{name.removeprefix('val_bpb/')} {value:.3f}" for name, value in r.items() if name.startswith("val_bpb/"))
    trials = ""
    if "val_passkey" in r:
        said, chosen = f"{r['val_passkey']:.0%} of trials", f"{r['val_passkey_choice']:.0%} (chance {1 / CHOICES:.0%})"
        trials = f"passkey said in {said}, chosen among {CHOICES} in {chosen}"
    return "\n".join([line, *(labelled("", text) for text in (sources, trials) if text)])


def summary_lines(run: Path, r: dict[str, Any]) -> str:
    """How a run ended: what it took and reached, and the way of its validation loss."""
    validation = f"validation loss {r['val_loss']:.4f}, perplexity {r['val_ppl']:.1f}, {r['val_bpb']:.3f} bits per byte"
    points = evaluations(run)
    if points and (least := min(points, key=lambda point: point[1])) != points[-1]:
        validation += f"; best {least[1]:.4f}, at step {least[0]}"
    took = f"{r['steps']} steps, {count(r['tokens'])} tokens, {count(r['parameters'])} parameters, "
    took += f"{r['peak_memory_gib']:.2f} GiB; {duration(r['seconds'])}"
    drawn = curve(points) if encodable(BLOCKS, sys.stdout.encoding) else []
    return "\n".join([labelled("done", f"{run}: {took}"), labelled("", validation), *drawn])


def encodable(text: str, encoding: str | None) -> bool:
    """Whether a terminal of this encoding can show a text."""
    try:
        text.encode(encoding or "utf-8")
    except UnicodeEncodeError:
        return False
    return True


BLOCKS = " ▁▂▃▄▅▆▇█"


def curve(points: list[tuple[int, float]], width: int = 60, height: int = 4) -> list[str]:
    """The way of a loss as a few lines of block characters: its values at `points`, steps in order, and straight lines between them. None
    of two points."""
    if len(points) < 3:
        return []
    steps, losses = np.array(points, dtype=float).T
    low, high = losses.min(), losses.max()
    along = np.interp(np.linspace(steps[0], steps[-1], width), steps, losses)
    eighths = 1 + np.rint((along - low) / ((high - low) or 1) * (8 * height - 1)).astype(int)  # filled of each column, from below
    rows = ["".join(BLOCKS[min(8, max(0, n - 8 * row))] for n in eighths) for row in reversed(range(height))]
    names = [f"{high:.4f}", *[""] * (height - 2), f"{low:.4f}"]
    first, last = f"step {steps[0]:.0f}", f"{steps[-1]:.0f}"
    return [f"{name:>10} {row}".rstrip() for name, row in zip(names, rows, strict=True)] + [
        " " * 11 + first + last.rjust(width - len(first))
    ]
