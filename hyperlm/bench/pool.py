"""Measurements side by side: one process a GPU, the next job to whichever is free."""

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from itertools import cycle
from typing import TypeVar

import torch

from hyperlm import env, startup

Job = TypeVar("Job")
Found = TypeVar("Found")


@dataclass(frozen=True)
class Failure:
    """Why a job has no result."""

    why: str


def devices(device: torch.device, name: str) -> list[torch.device]:
    """All GPUs that are there, where the name that was asked for leaves it open; else the one device."""
    if device.type == "cuda" and name in ("auto", "cuda"):
        return [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    return [device]


def attempt(work: Callable[[Job, torch.device], Found], job: Job, device: torch.device) -> Found | Failure:
    """work(job, device), or why there is none: a kind or peer that fails is no end of the others."""
    try:
        return work(job, device)
    except torch.OutOfMemoryError:
        return Failure("out of memory")
    except Exception as e:
        return Failure(f"{type(e).__name__}: {str(e).splitlines()[0] if str(e) else 'no reason given'}")
    finally:
        if device.type == "cuda":
            torch.cuda.empty_cache()


def begin(device: torch.device) -> None:
    """What a process of the pool does first."""
    startup.quiet()
    env.prepare(device)


def attempt_in_process(work: Callable[[Job, torch.device], Found], job: Job, device: torch.device) -> Found | Failure:
    begin(device)
    return attempt(work, job, device)


def side_by_side(
    work: Callable[[Job, torch.device], Found], jobs: Sequence[Job], devices: Sequence[torch.device], *, each: int = 1, desc: str = ""
) -> Iterator[tuple[Job, Found | Failure]]:
    """work(job, device) of each job, as many at a time as there are devices, `each` on every one; in pairs with the job, as they end.

    With one place alone everything happens in this process. With more, `work`, jobs and results must be picklable, and `work` a function of a module.
    """
    places = [device for _ in range(each) for device in devices]
    with env.progress(total=len(jobs), desc=desc) as bar:
        if len(places) == 1:
            for job in jobs:
                yield job, attempt(work, job, places[0])
                bar.update()
            return
        free, waiting = list(reversed(places)), list(reversed(jobs))
        running: dict[Future, tuple[Job, torch.device]] = {}
        pool = ProcessPoolExecutor(min(len(places), len(jobs)), mp_context=multiprocessing.get_context("spawn"))
        try:
            while waiting or running:
                while waiting and free:
                    job, device = waiting.pop(), free.pop()
                    running[pool.submit(attempt_in_process, work, job, device)] = job, device
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    job, device = running.pop(future)
                    free.append(device)
                    died = future.exception()
                    yield job, Failure(f"its process ended: {died}") if died else future.result()
                    bar.update()
        finally:  # at once, when interrupted
            for process in list((pool._processes or {}).values()):
                process.terminate()
            pool.shutdown(wait=False, cancel_futures=True)
