"""What a command does before its slow imports, so that a signal or a missing package during them is one line.

Imports nothing that is slow itself.
"""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType

DISTRIBUTIONS = {"orbax": "orbax-checkpoint", "absl": "absl-py"}  # where a package is called otherwise than its module
ENDING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
PACKAGE = Path(__file__).resolve().parent
INSTALLED = (PACKAGE / "scripts" / "train.py").is_file()  # from a wheel, not as the checkout that people edit
SCRIPTS = PACKAGE / "scripts" if INSTALLED else PACKAGE.parent  # the folder of train.py, bench.py, chat.py and their configs.py


def command(script: str) -> str:
    """What a person here types to run a script, to be named in messages: `python train.py`, or `hyperlm train` where that was typed or no
    script is at hand."""
    return f"hyperlm {script}" if INSTALLED or sys.argv[0].startswith("hyperlm ") else f"python {script}.py"


def quiet() -> None:
    """Until `cli.run` takes over: a signal ends the process with one line, and a missing package is named with what installs it.

    Output that was closed by whoever started the process (`>&-`) goes nowhere.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))
    for number in ENDING:
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup wants it
            signal.signal(number, stopped)
    sys.excepthook = explained


def stopped(number: int, frame: FrameType | None) -> None:
    os.write(2, f"\nstopped by {signal.Signals(number).name}\n".encode())
    os._exit(128 + number)  # at once: exceptions in the middle of an import end up anywhere


def explained(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    name = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    if not name or name in ("hyperlm", "configs"):
        sys.__excepthook__(kind, error, trace)
        return
    package = DISTRIBUTIONS.get(name, name)
    rest = "" if INSTALLED else ", or all of them in hyperlm's folder: pip install -e ."
    print(f"error: the package {package} is missing: pip install {package}{rest}", file=sys.stderr)
    sys.stderr.flush()
    os._exit(2)


@contextmanager
def signals_held() -> Iterator[None]:
    """Inside, as during a slow import, signals for which Python has a handler wait. At the end they reach it, in order."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[int] = []
    before = {number: handler for number in ENDING if callable(handler := signal.getsignal(number))}
    for number in before:
        signal.signal(number, lambda number, frame: held.append(number))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for number in held:
            signal.raise_signal(number)
