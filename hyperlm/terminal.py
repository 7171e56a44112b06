"""What a person types and sees: lines with editing and history on a terminal, plain lines elsewhere, and notes beside the text."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from hyperlm.sample import printable
from hyperlm.startup import ENDING
from hyperlm.tokenizer import clean


def note(text: str) -> None:
    """A line beside the text: on stderr, dim on a terminal."""
    dim = sys.stderr.isatty() and not os.environ.get("NO_COLOR")
    line = printable(text)
    print(f"\x1b[2m{line}\x1b[0m" if dim else line, file=sys.stderr, flush=True)


@contextmanager
def handled(handler: Any, *numbers: int) -> Iterator[None]:
    """Inside, a handler of the signal module for these signals."""
    if threading.current_thread() is not threading.main_thread():
        numbers = ()
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def ctrl_c(handler: Any) -> AbstractContextManager[None]:
    return handled(handler, signal.SIGINT)


@contextmanager
def interruptions() -> Iterator[Callable[[], bool]]:
    """Inside, Ctrl-C only takes note: the function that this yields tells whether it came. So nothing is left half done."""
    seen: list[int] = []
    with ctrl_c(lambda number, frame: seen.append(number)):
        yield lambda: bool(seen)


def reader(prompt: str) -> Callable[[], str]:
    """A function that reads what a person writes, and raises EOFError at the end: an editor on a terminal, else line by line.

    Ctrl-C while it reads a line does what it does now, whatever it does in between.
    """
    if sys.stdin.isatty() and (sys.stdout.isatty() or sys.stderr.isatty()):
        return editor(prompt)
    handler = signal.getsignal(signal.SIGINT)

    def read() -> str:
        with ctrl_c(handler):
            return clean(input(prompt))

    return read


def editor(prompt: str, **console: Any) -> Callable[[], str]:
    """A line editor: Enter sends; Alt-Enter, or Enter after a backslash, begins another line, and what is pasted keeps its own.

    Ctrl-C clears the line; on an empty one, the second ends, as Ctrl-D does.

    Args:
        console: input and output of prompt_toolkit; those of the process by default.
    """
    from prompt_toolkit import PromptSession  # here: it takes a while, and only a terminal needs it
    from prompt_toolkit.formatted_text import FormattedText
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
    from prompt_toolkit.output import create_output

    keys, warned = KeyBindings(), False

    @keys.add("enter")
    def send(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.text_before_cursor.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def another_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    @keys.add("c-c")
    @keys.add("<sigint>")
    def clear(event: KeyPressEvent) -> None:
        nonlocal warned
        if warned and not event.current_buffer.text:
            event.app.exit(exception=EOFError)
        else:
            warned = True
            event.current_buffer.reset()

    session: PromptSession[str] = PromptSession(
        prompt,
        multiline=True,
        key_bindings=keys,
        history=history(),
        placeholder=lambda: FormattedText([("ansibrightblack", "Ctrl-C again or /quit ends")] if warned else []),
        prompt_continuation=lambda width, line, wrapped: " " * width,
        **({"output": create_output(always_prefer_tty=True)} | console),
    )

    def read() -> str:
        nonlocal warned
        warned = False
        with left_by_signals(session.app):
            return clean(session.prompt())

    return read


@contextmanager
def left_by_signals(app: Any) -> Iterator[None]:
    """Inside, what the handler of another signal than Ctrl-C raises comes when the editor `app` has put the terminal back.

    Within its loop it would only be reported, and the editor go on.
    """
    ending = [number for number in ENDING if number != signal.SIGINT and callable(signal.getsignal(number))]
    before, raised = {number: signal.getsignal(number) for number in ending}, []

    def leave() -> None:
        if app.is_running and not app.is_done:
            app.exit(exception=EOFError)

    def handle(number: int, frame: Any) -> None:
        try:
            before[number](number, frame)
        except BaseException as e:
            if not app.is_running:
                raise
            raised.append(e)
            app.loop.call_soon_threadsafe(leave)

    try:
        with handled(handle, *ending):
            yield
    finally:
        if raised:
            raise raised[0]


def history_file() -> Path:
    """Where what was typed is kept, by the rules of the XDG base directories."""
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state") / "hyperlm/history"


def history() -> Any:
    """The lines of earlier sessions, in `history_file`, which its owner alone can read; where that cannot be, of this one, with a note."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    kept = True

    def not_kept(error: Exception) -> None:
        nonlocal kept
        kept = False
        note(f"[what you write is not remembered for the next session: {error}]")

    class Kept(FileHistory):
        def store_string(self, string: str) -> None:
            try:
                if kept:
                    super().store_string(clean(string))
            except OSError as e:
                not_kept(e)

    try:
        path = history_file()
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        if path.exists() and not path.is_file():
            raise OSError(f"{path} is not a file")
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        path.chmod(0o600)
        return Kept(path)
    except (OSError, RuntimeError) as e:  # as where there is no home
        not_kept(e)
        return InMemoryHistory()
