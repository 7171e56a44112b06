"""Windows and macOS, as far as Linux can stand in for them: a run without Triton, without the signals and calls that Windows lacks, and with files that
cannot be removed or renamed while they are open. What only the true systems have, nothing here tests."""

import os
import subprocess
import sys
from pathlib import Path

from conftest import SMALLEST

REPOSITORY = Path(__file__).parent.parent

LIKE_WINDOWS = """
import os, shutil, signal, sys
sys.modules["triton"] = None
os.environ["JAX_PLATFORMS"] = "cpu"
import filelock, orbax.checkpoint, psutil, tokenizers, torch.utils.tensorboard, tyro  # what other libraries need of Linux they have by now
for name in ("SIGHUP", "SIGPIPE", "SIGKILL", "SIGQUIT", "SIGUSR1"):
    delattr(signal, name)
for name in ("fork", "uname", "sched_getaffinity", "geteuid", "mkfifo"):
    delattr(os, name)
sys.modules |= dict.fromkeys(("resource", "pwd", "termios", "fcntl"))

def is_open(path):
    path = os.path.realpath(path)
    files = {os.path.realpath(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd")}
    files |= {line[line.index("/") :].strip() for line in open("/proc/self/maps") if "/" in line}
    return any(name == path or name.startswith(path + "/") for name in files)

def strict(call):
    def guarded(path, *more, **options):
        if any(is_open(p) for p in (path, *more)):
            raise PermissionError(13, "used by another process", str(path))
        return call(path, *more, **options)
    return guarded

shutil._use_fd_functions = False
for name in ("unlink", "remove", "rmdir", "rename", "replace"):
    setattr(os, name, strict(getattr(os, name)))
"""
RUNS = """
import sys
from pathlib import Path
import chat, train
from hyperlm import cli
text, *flags = sys.argv[1:]
run = [*flags, "--data.sources", text, "--train.steps", "4", "--ckpt.every", "2", "--ckpt.keep", "1", "--name", "r"]
for _ in range(2):
    assert cli.run(train.main, run) == 0
    run = ["--resume", "runs/r", "--train.steps", "6"]
    (tokens,) = Path("cache").glob("hyperlm/*/train_00.bin")
    tokens.write_bytes(tokens.read_bytes()[:-2])  # damaged: made again
assert cli.run(chat.main, ["--prompt", "A", "--max-tokens", "2"]) == 0
assert sorted(path.name for path in Path("runs/r/checkpoints").iterdir()) == ["step_00000006"]
"""


def test_a_run_without_what_other_systems_lack(prose, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", LIKE_WINDOWS + RUNS, str(prose), *SMALLEST],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "XDG_CACHE_HOME": str(tmp_path / "cache")},
    )
    assert done.returncode == 0 and "error" not in done.stderr and "made again" in done.stdout, done.stderr
    assert "Triton is not installed" in done.stdout
