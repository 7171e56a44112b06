"""Errors that a user can cause: one class above them all, one line, one exit code; and start-up that imports no storage layer for their sake."""

import importlib
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hyperlm import cli, startup
from hyperlm.errors import HyperlmError

ROOT = Path(__file__).parent.parent
KINDS = """
    hyperlm.checkpoint.CheckpointError hyperlm.cli.TrainingError hyperlm.cli.UsageError hyperlm.config.ConfigError hyperlm.data.DataError
    hyperlm.conversation.ConversationError hyperlm.env.DeviceError hyperlm.kernels.KernelError hyperlm.runs.RunError
    hyperlm.tokenizer.TokenizerError
""".split()


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_user_can_cause_is_one_line_and_an_exit_code(kind, capsys):
    module, _, name = kind.rpartition(".")
    error = getattr(importlib.import_module(module), name)

    def main(argv: list[str]) -> int:
        raise error("what is wrong:\nwhat to do")

    assert issubclass(error, HyperlmError) and issubclass(error, ValueError | RuntimeError)
    assert cli.run(main, []) == HyperlmError.exit_code == 2
    assert capsys.readouterr().err == "error: what is wrong: what to do\n"


def test_what_is_wrong_in_the_program_is_not_passed_over():
    def main(argv: list[str]) -> int:
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        cli.run(main, [])


def test_the_storage_layer_is_imported_when_a_checkpoint_is_read_or_written_and_not_before():
    code = "import sys, train, bench, chat; print({'jax', 'orbax.checkpoint', 'ml_dtypes'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "set()\n", "")


def test_a_storage_layer_that_is_missing_is_told_when_a_command_starts():
    """Each command in a process of its own, which has imported what is slow and not ours."""
    code = """if True:
        import os, sys
        import torch._dynamo, triton
        from hyperlm import startup
        startup.quiet()
        sys.modules["orbax"] = None
        for script in ("train", "bench", "chat"):
            if os.fork() == 0:
                __import__(script)
                os._exit(0)
            print(script, os.waitstatus_to_exitcode(os.wait()[1]), file=sys.stderr)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    lines = done.stderr.splitlines()
    assert lines[1::2] == ["train 2", "bench 2", "chat 2"] and len(lines) == 6
    assert all(line.startswith("error: the package orbax-checkpoint is missing: pip install orbax-checkpoint") for line in lines[::2])


def test_a_signal_during_a_late_import_acts_after_it(capsys):
    """An exception in the middle of an import would end up anywhere."""
    reached = []

    def main(argv: list[str]) -> int:
        with startup.signals_held():
            signal.raise_signal(signal.SIGTERM)
            reached.append("imported")
        reached.append("went on")
        return 0

    before = signal.getsignal(signal.SIGTERM)
    assert cli.run(main, []) == 128 + signal.SIGTERM and reached == ["imported"]
    assert capsys.readouterr().err.strip() == "stopped by SIGTERM" and signal.getsignal(signal.SIGTERM) is before
