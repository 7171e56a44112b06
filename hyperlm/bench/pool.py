"""Measurements side by side: one process a GPU, the next job to whichever is free.

Processes are made by hand, and not by an executor of the standard library, of which all jobs fail once one process is killed.
"""

import gc
import io
import multiprocessing
import os
import pickle
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple, TypeVar

import torch
from tqdm import tqdm

from hyperlm import env

Job = TypeVar("Job")
Outcome = TypeVar("Outcome")
PATIENCE = 5.0  # seconds that a process is given to end


@dataclass(frozen=True)
class Failure:
    """Why a job has no result."""

    why: str


def devices(device: torch.device, name: str) -> list[torch.device]:
    """All GPUs that are there, where the name that was asked for leaves it open; else the one device."""
    if device.type == "cuda" and name in ("auto", "cuda"):
        return [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    return [device]


def attempt(work: Callable[[Job, torch.device], Outcome], job: Job, device: torch.device) -> Outcome | Failure:
    """work(job, device), or why there is none: a kind or peer that fails is no end of the others."""
    try:
        return work(job, device)
    except torch.OutOfMemoryError:
        return Failure("out of memory")
    except Exception as e:
        return Failure(f"{type(e).__name__}: {next(iter(str(e).splitlines()), 'no reason given')}")
    finally:
        if device.type == "cuda":
            gc.collect()
            with suppress(RuntimeError):  # a device whose last call failed
                torch.cuda.empty_cache()


# -- in a process of its own -----------------------------------------------------------------------------------------------------------


class Plain(io.TextIOWrapper):
    """A terminal for words alone: progress bars of several processes would write over each other."""

    def isatty(self) -> bool:
        return False


def end_with_parent() -> None:
    """Whatever ended it: nobody waits for a result any more."""
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)


def serve(channel: Connection, device: torch.device, threads: int) -> None:
    """Do the jobs that come, (work, job) each, until one fails: after an error of a GPU nothing more works in its process."""
    threading.Thread(target=end_with_parent, daemon=True).start()
    if sys.stderr:
        sys.stderr = Plain(sys.stderr.buffer, line_buffering=True, write_through=True)
    tqdm.set_lock(threading.RLock())  # its own is one of the system's, which a process that is ended leaves behind
    torch.set_num_threads(threads)
    env.prepare(device)
    failed = False
    while not failed:
        try:
            work, job = channel.recv()
        except EOFError:  # who asked has enough
            return
        outcome = attempt(work, job, device)
        failed = isinstance(outcome, Failure)
        try:
            message = pickle.dumps(outcome)
        except Exception as e:
            message = pickle.dumps(Failure(f"its result cannot be sent: {e}"))
        channel.send_bytes(message)


class Worker(NamedTuple):
    process: BaseProcess
    channel: Connection


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Processes that are started inside never see Ctrl-C, which a terminal sends to all: who started them ends them. Here it is not
    lost."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    from multiprocessing import resource_tracker  # other systems have none

    resource_tracker.ensure_running()  # the first process would start it, and that takes the block away
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def start(device: torch.device, threads: int) -> Worker:
    context = multiprocessing.get_context("spawn")
    parent_end, child_end = context.Pipe()
    process = context.Process(target=serve, args=(child_end, device, threads), daemon=True)
    with uninterrupted():
        process.start()
    child_end.close()  # so that what is read here ends when the process does
    return Worker(process, parent_end)


def end(worker: Worker) -> None:
    worker.channel.close()
    worker.process.terminate()
    worker.process.join(PATIENCE)
    if worker.process.is_alive():
        worker.process.kill()
        worker.process.join(PATIENCE)


def answer(worker: Worker) -> Any:
    """What came of a job, or why nothing did."""
    try:
        return pickle.loads(worker.channel.recv_bytes())
    except (EOFError, OSError):
        worker.process.join(PATIENCE)
        code = worker.process.exitcode or 0
        return Failure(f"its process was ended by {signal.Signals(-code).name}" if code < 0 else f"its process ended with exit code {code}")
    except Exception as e:
        return Failure(f"its result cannot be read: {e}")


def side_by_side(
    work: Callable[[Job, torch.device], Outcome], jobs: Sequence[Job], devices: Sequence[torch.device], *, each: int = 1, desc: str = ""
) -> Iterator[tuple[Job, Outcome | Failure]]:
    """work(job, device) of each job, as many at a time as there are devices, `each` on every one; in pairs with the job, as they end.

    With one place, or one job, everything happens in this process. With more, `work`, jobs and results must be picklable, and `work` a
    function of a module; what it prints appears, its progress bars do not. A process that is killed is the failure of its job alone. When
    the caller stops, is stopped or killed, all processes end at once. Jobs that the caller adds to the list on the way are done as well.
    """
    places = [device for _ in range(each) for device in devices][: max(1, len(jobs))]
    with env.progress(total=len(jobs), desc=desc) as bar:

        def count() -> None:
            bar.total = len(jobs)
            bar.update()

        if len(places) == 1:
            for job in jobs:
                yield job, attempt(work, job, places[0])
                count()
            return
        threads = max(1, torch.get_num_threads() // len(places))
        free, begun = list(reversed(places)), 0
        idle: dict[torch.device, list[Worker]] = {}
        running: dict[Connection, tuple[Worker, Job, torch.device]] = {}
        workers: list[Worker] = []
        try:
            while begun < len(jobs) or running:
                while begun < len(jobs) and free:
                    job, device, begun = jobs[begun], free.pop(), begun + 1
                    if idle.get(device):
                        worker = idle[device].pop()
                    else:
                        workers.append(worker := start(device, threads))
                    running[worker.channel] = worker, job, device
                    with suppress(OSError):  # it died: found out below
                        worker.channel.send((work, job))
                for channel in wait(list(running)):
                    worker, job, device = running.pop(channel)
                    outcome = answer(worker)
                    free.append(device)
                    if isinstance(outcome, Failure):
                        end(worker)
                        workers.remove(worker)
                    else:
                        idle.setdefault(device, []).append(worker)
                    yield job, outcome
                    count()
        finally:
            for worker in workers:
                end(worker)
