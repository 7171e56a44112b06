"""The machine: devices, memory, versions, and what of it is usable."""

import ctypes
import errno
import gc
import importlib.metadata
import os
import platform
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import torch
from tqdm import tqdm

from hyperlm.errors import HyperlmError

if sys.platform == "linux":  # torch has it nowhere else
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # read when CUDA starts: stages of many sizes would leave gaps
GIB = 1 << 30
CONTEXT = 920 << 20  # bytes of GPU memory that the driver, libraries and kernels of a process take beside what it allocates

DELAY = 2.0  # seconds before a progress bar shows


class DeviceError(HyperlmError, ValueError):
    """A device that was asked for and is not there."""


def pick_device(name: str) -> torch.device:
    """The device called `name`; "auto" is the first GPU, or the CPU where there is none.

    Raises:
        DeviceError: if it does not exist.
    """
    if name == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as e:
        raise DeviceError(f"device {name}: no such device; use auto, cpu, cuda or cuda:n") from e
    if device.type == "cpu":
        return torch.device("cpu")
    index = device.index or 0
    if device.type != "cuda" or not torch.cuda.is_available() or index >= torch.cuda.device_count():
        raise DeviceError(f"device {name}: not on this machine; use auto or cpu")
    return torch.device("cuda", index)


def compute_dtype(device: torch.device) -> torch.dtype:
    """bf16 on a GPU that has it, fp32 elsewhere."""
    return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32


def prepare(device: torch.device) -> None:
    """Process-wide settings: on a GPU, fp32 matrix products of bf16-rounded values may use TF32, which is exact for them."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.fp32_precision = "tf32"


def total_memory(device: torch.device) -> int:
    """Bytes that a process could use: the card's, or the machine's within the limits of its cgroup."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    limit = psutil.virtual_memory().total
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        if os.path.exists(path) and (text := Path(path).read_text().strip()).isdigit():
            limit = min(limit, int(text))
    return limit


def available_memory(device: torch.device) -> int:
    """Bytes that are free now: on the card, or in the machine within the limits of its cgroup."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return min(psutil.virtual_memory().available, total_memory(device))


def allowed_memory(device: torch.device, budget: float) -> int:
    """Bytes that torch may allocate: within `budget` GiB of a GPU for the whole process, or (0) what is free and what it has already."""
    if device.type != "cuda":
        return total_memory(device)
    if budget:
        return round(budget * GIB) - CONTEXT
    return (
        available_memory(device) + torch.cuda.memory_reserved(device) - CONTEXT // 2
    )  # half of that is taken when the device is first asked


def limit_memory(device: torch.device, size: int) -> None:
    """Let torch allocate at most `size` bytes on a GPU."""
    torch.cuda.set_per_process_memory_fraction(min(1.0, size / total_memory(device)), device)


def used_memory(device: torch.device) -> int:
    """Bytes in use on a GPU as its driver counts, by this process and any other."""
    free, total = torch.cuda.mem_get_info(device)
    return total - free


def reset_peak_memory(device: torch.device) -> None:
    """Start counting the peak anew; on a CPU only where the system allows it (Linux), and else from the start of the process."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        give_back_memory()  # or it would count
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def give_back_memory() -> None:
    """Let the system have what was freed and is kept for later, where the C library can (glibc)."""
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # AttributeError: another C library
            ctypes.CDLL(None).malloc_trim(0)


def peak_memory(device: torch.device) -> int:
    """Peak bytes: allocated by torch on a GPU; resident memory of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if os.path.exists("/proc/self/status"):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource  # Windows has none

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def readable(size: float) -> str:
    """Bytes with a unit in which they are no less than 1: 3.1 GiB, 512 KiB."""
    for unit, one in (("GiB", GIB), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if size >= one:
            return f"{size / one:.3g} {unit}"
    return f"{size:.0f} bytes"


def progress(*args: Any, **options: Any) -> tqdm:
    """A progress bar for work that may take longer than DELAY; silent where nobody watches."""
    return tqdm(*args, delay=DELAY, leave=False, disable=None, **options)


@contextmanager
def live(desc: str, **options: Any) -> Iterator[tqdm]:
    """A `progress` bar that moves every second, whether or not what goes on inside tells it anything."""
    with progress(desc=desc, **options) as bar:
        done, shown_from = threading.Event(), time.monotonic() + DELAY

        def move() -> None:
            while not done.wait(1.0):
                if time.monotonic() >= shown_from:
                    bar.refresh()

        if not bar.disable:
            threading.Thread(target=move, daemon=True).start()
        try:
            yield bar
        finally:
            done.set()


def version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def processor() -> str:
    """The CPU's name, where the system tells it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())


def describe(device: torch.device) -> dict[str, Any]:
    """The facts of this machine that a result depends on; stored as env.json with a run."""
    facts: dict[str, Any] = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        **{name: version_of(name) for name in ("torch", "triton", "orbax-checkpoint", "jax", "numpy", "tokenizers")},
        "cpu": processor(),
        "cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "cpu_threads": torch.get_num_threads(),
        "host_memory_gib": round(total_memory(torch.device("cpu")) / GIB, 1),
        "disk_free_gib": round(shutil.disk_usage(".").free / GIB, 1),
        "device": str(device),
        "compute_dtype": str(compute_dtype(device)).removeprefix("torch."),
    }
    if device.type == "cuda":
        p = torch.cuda.get_device_properties(device)
        facts |= {
            "gpu": p.name,
            "gpus": torch.cuda.device_count(),
            "gpu_capability": f"sm_{p.major}{p.minor}",
            "gpu_memory_gib": round(p.total_memory / GIB, 1),
            "cuda": torch.version.cuda,
            "driver": driver_version(),
        }
    return facts


def driver_version() -> str:
    path = Path("/proc/driver/nvidia/version")
    words = path.read_text().split("\n")[0].split() if path.exists() else []
    return next((word for word in words if word.count(".") >= 1 and word[0].isdigit()), "")


HANGUP = getattr(signal, "SIGHUP", None)  # the terminal is closed; Windows has no such signal


@contextmanager
def stop_signals() -> Iterator[Callable[[], signal.Signals | None]]:
    """Inside, signals that would end the process only take note: the function that this yields tells which came first. A second one acts at
    once.

    They are SIGINT, SIGTERM and, unless it is ignored as under nohup, SIGHUP, of which more change nothing.
    """
    seen: list[signal.Signals] = []

    def note(number: int, frame: Any) -> None:
        seen.append(signal.Signals(number))
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if HANGUP:
            signal.signal(HANGUP, signal.SIG_IGN)
        with suppress(OSError):  # nobody may be there to read it
            print(f"\n{signal.Signals(number).name}: finishing the step and saving; once more to stop at once", file=sys.stderr, flush=True)

    endings = [signal.SIGINT, signal.SIGTERM]
    if HANGUP and signal.getsignal(HANGUP) != signal.SIG_IGN:
        endings.append(HANGUP)
    before = {number: signal.signal(number, note) for number in endings}
    try:
        yield lambda: seen[0] if seen else None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def say(text: str) -> None:
    """Print a line of a run that is worth more than its output. Where nobody reads that any more (a closed pipe or terminal) it is as if
    the terminal had been closed; a full disk under redirected output is met where it matters."""
    try:
        with tqdm.external_write_mode(file=sys.stdout):  # above bars, not into them
            print(text, flush=True)
    except OSError as e:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if HANGUP and e.errno in (errno.EPIPE, errno.EIO):
            signal.raise_signal(HANGUP)
