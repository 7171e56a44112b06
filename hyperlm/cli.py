"""The command line: two-stage parsing (a preset or a run first, then everything else on top), and errors in one line."""

import contextlib
import io
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import tyro

from configs import ConfigError
from hyperlm.checkpoint import CheckpointError
from hyperlm.data import DataError
from hyperlm.env import DeviceError
from hyperlm.kernels import KernelError
from hyperlm.runs import RunError
from hyperlm.tokenizer import TokenizerError

T = TypeVar("T")


class UsageError(ValueError):
    """A command line that cannot be understood."""


class TrainingError(RuntimeError):
    """A run that cannot go on; what was saved is safe."""


EXPECTED = (CheckpointError, ConfigError, DataError, DeviceError, KernelError, RunError, TokenizerError, TrainingError, UsageError)


def parse(cls: type[T], argv: list[str], default: T | None = None, *, description: str = "") -> T:
    """Parse `argv` into the dataclass `cls` on top of `default`.

    Raises:
        UsageError: one line with what is wrong, and the nearest flag where one is unknown.
    """
    report = io.StringIO()
    try:
        with contextlib.redirect_stderr(report):
            return tyro.cli(cls, args=argv, default=default, description=description or None)
    except SystemExit as e:
        if e.code in (0, None):  # --help
            raise
        raise UsageError(one_line(report.getvalue())) from None


def peek(flag: str, argv: list[str]) -> str | None:
    """The value of --flag in `argv`, before the rest can be parsed; None if it is not there."""
    for i, argument in enumerate(argv):
        name, equals, value = argument.partition("=")
        if name == f"--{flag}":
            if equals:
                return value
            if i + 1 < len(argv) and not argv[i + 1].startswith("--"):
                return argv[i + 1]
            raise UsageError(f"--{flag} needs a value")
    return None


def one_line(report: str) -> str:
    """The message of tyro's error report, and the nearest flag that it suggests.

    A report is a title, the message and help, with rules between them; framed on a UTF-8 terminal, and plain elsewhere.
    """
    parts: list[list[str]] = [[]]
    for line in report.splitlines():
        text = line.strip("│ ")
        if text.startswith("╭") or (text and not text.strip("─-")):  # the frame's top holds the title, and ends it like a rule
            parts.append([])
        elif text and not text.startswith("╰"):
            parts[-1].append(text)
    message = " ".join(parts[1]).rstrip(".") if len(parts) > 1 else "bad command line"
    rest = [line for part in parts[2:] for line in part]
    flags = [line.split()[0].rstrip(",") for line in rest if line.startswith("--")]
    if "Perhaps you meant:" in rest and flags:
        return f"{message}; did you mean {flags[0]}?"
    return f"{message}; --help lists all settings"


def run(main: Callable[[list[str]], Any], argv: list[str] | None = None) -> int:
    """Run a command: its exit code, with expected errors as one line on stderr and 2."""
    try:
        return int(main(sys.argv[1:] if argv is None else argv) or 0)
    except EXPECTED as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except SystemExit as e:  # --help
        return int(e.code or 0)
    except BrokenPipeError:  # the reader of our output is gone
        return 0
    except OSError as e:  # a full disk, a folder that cannot be written
        print(f"error: {e.strerror or e}{f' ({e.filename})' if e.filename else ''}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except torch.OutOfMemoryError as e:
        reason = str(e).split(".")[0]
        remedy = "lower --train.batch-size and raise --train.grad-accum, set --train.recompute or --train.residence host, or raise --train.device-memory"
        print(f"error: out of GPU memory ({reason}): {remedy}", file=sys.stderr)
        return 2
