"""The command line: two-stage parsing (a preset or a run first, then everything else on top), and errors in one line."""

import contextlib
import dataclasses
import difflib
import io
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Annotated, Any, NoReturn, TypeVar, get_args, get_origin, get_type_hints

import torch
import tyro

from hyperlm.errors import HyperlmError
from hyperlm.startup import ENDING, command

T = TypeVar("T")


class UsageError(HyperlmError, ValueError):
    """A command line that cannot be understood."""


class TrainingError(HyperlmError, RuntimeError):
    """A run that cannot go on; what was saved is safe."""


CLOSED_PIPE = 128 + 1  # as if the terminal had been closed (SIGHUP)


class Stopped(BaseException):
    """A signal that ends the process came where nothing else takes note of it."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.signal = signal.Signals(number)


def parse(cls: type[T], argv: list[str], default: T | None = None, *, description: str = "") -> T:
    """Parse `argv` into the dataclass `cls` on top of `default`.

    Raises:
        UsageError: one line with what is wrong, and the nearest flag where one is unknown.
    """
    for script in ("train", "bench", "chat"):  # examples as they are typed here
        description = description.replace(f"python {script}.py", command(script))
    report = io.StringIO()
    try:
        with contextlib.redirect_stderr(report):
            return tyro.cli(cls, args=argv, default=default, description=description or None)
    except SystemExit as e:
        if e.code in (0, None):  # --help
            raise
        raise UsageError(one_line(report.getvalue(), cls)) from None


def peek(flag: str, argv: list[str]) -> str | None:
    """The value of --flag in `argv`, before the rest can be parsed: the last one, as when all is; None if it is not there.

    Raises:
        UsageError: if its value is missing or empty, as from a shell variable that is not set.
    """
    value = None
    for i, argument in enumerate(argv):
        name, equals, attached = argument.partition("=")
        if name == f"--{flag}":
            value = attached if equals else next(iter(argv[i + 1 :]), "")
            if not value or (not equals and value.startswith("--")):
                raise UsageError(f"--{flag} needs a value")
    return value


def one_line(report: str, cls: type) -> str:
    """The message of tyro's error report, and flags of `cls` that an unknown one may have meant.

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
    unknown = re.search(r"Unrecognized options: (?:.*?, )??(--[^\s,=]+)", message)
    if unknown and (near := nearest(unknown[1], flags_of(cls))):
        return f"{message}; did you mean {' or '.join(near)}?"
    return f"{message}; --help lists all settings"


def flags_of(cls: type, prefix: str = "--") -> list[str]:
    """Every flag of a dataclass of settings, in order."""
    flags = []
    for name, annotated in get_type_hints(cls, include_extras=True).items():
        hint, *marks = get_args(annotated) if get_origin(annotated) is Annotated else (annotated,)
        flag = prefix + name.replace("_", "-")
        if dataclasses.is_dataclass(hint):
            nameless = any(getattr(mark, "name", None) == "" for mark in marks)
            flags += flags_of(hint, prefix if nameless else f"{flag}.")
        elif tyro.conf.Positional not in marks:
            flags.append(flag)
    return flags


def nearest(flag: str, flags: list[str]) -> list[str]:
    """Those that `flag` may have meant, at most three: of its name in another group, else of one that begins so, else of one that is
    spelled much like it, with or without its group."""
    wanted = flag.lstrip("-").lower().replace("_", "-")
    by_name: dict[str, list[str]] = {}
    for known in flags:
        by_name.setdefault(known.lstrip("-"), []).append(known)
        if "." in known:
            by_name.setdefault(known.rpartition(".")[2], []).append(known)
    last = wanted.rpartition(".")[2]
    begins = [name for name in by_name if name.startswith(last) and len(last) > 2]
    close = difflib.get_close_matches(wanted, by_name, 1) or difflib.get_close_matches(last, by_name, 1)
    meant = next((names for names in ([wanted], [last], begins, close) if any(name in by_name for name in names)), [])
    return list(dict.fromkeys(known for name in meant for known in by_name.get(name, [])))[:3]


def run(main: Callable[[list[str]], Any], argv: list[str] | None = None) -> int:
    """Run a command: its exit code, with a HyperlmError as one line on stderr and its own code, and 128 + n where signal n ended it."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # what a console cannot show must not end a run
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="replace")
    with ending_signals():
        try:
            return int(main(sys.argv[1:] if argv is None else argv) or 0)
        except HyperlmError as e:
            return failed(str(e), e.exit_code)
        except SystemExit as e:  # --help
            return int(e.code or 0)
        except BrokenPipeError:  # the reader of our output is gone
            return CLOSED_PIPE
        except OSError as e:  # a full disk, a folder that cannot be written
            return failed(f"{e.strerror or e}{f' ({e.filename})' if e.filename else ''}")
        except KeyboardInterrupt:
            say_last("\ninterrupted")
            return 128 + signal.SIGINT
        except Stopped as e:
            say_last(f"\nstopped by {e.signal.name}")
            return 128 + e.signal
        except torch.OutOfMemoryError as e:
            reason = str(e).split(".")[0]
            return failed(
                f"out of GPU memory ({reason}): lower --train.batch-size and raise --train.grad-accum, "
                "set --train.recompute or --train.residence host, or raise --train.device-memory"
            )
        except MemoryError:
            return failed("out of host memory: lower --model.d-model, --model.n-layers or --train.batch-size; --plan shows the parts")


def failed(why: str, exit_code: int = HyperlmError.exit_code) -> int:
    say_last("error: " + " ".join(why.splitlines()))
    return exit_code


def say_last(line: str) -> None:
    with contextlib.suppress(OSError):  # nobody may be there to read it
        print(line, file=sys.stderr, flush=True)


@contextlib.contextmanager
def ending_signals() -> Iterator[None]:
    """Inside, SIGTERM and SIGHUP raise `Stopped`, as SIGINT raises KeyboardInterrupt, so that what is half done is cleared away."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: Any) -> None:
        raise Stopped(number)

    before = {number: signal.getsignal(number) for number in ENDING}
    for number, handler in before.items():
        if handler != signal.SIG_IGN:  # as nohup wants it
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def end(code: int) -> NoReturn:
    """Leave the process. After an error at once: a thread of the storage layer may wait for minutes for what will never come."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    if code:
        os._exit(code)
    sys.exit(0)
