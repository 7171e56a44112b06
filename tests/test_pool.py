"""Jobs side by side: in pairs with their results, failures that stay their own, and an end that leaves no process behind."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch

from hyperlm.bench.pool import Failure, devices, side_by_side

CPU = torch.device("cpu")


def work(job: tuple[str, int], device: torch.device) -> tuple[int, int]:
    """What a job of a test asks for: the process that did it, and the number."""
    what, number = job
    if what == "raise":
        raise ValueError(f"no {number}\nand more")
    if what == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "unpicklable":
        return lambda: None
    if what == "full":
        raise torch.OutOfMemoryError("CUDA out of memory")
    return os.getpid(), number


def test_a_job_that_fails_is_no_end_of_the_others():
    jobs = [("raise", 1), ("full", 2), ("do", 3)]
    found = list(side_by_side(work, jobs, [CPU]))
    assert found == list(zip(jobs, [Failure("ValueError: no 1"), Failure("out of memory"), (os.getpid(), 3)], strict=True))


def test_a_process_that_dies_is_the_failure_of_its_job_alone():
    """Two processes on one device; those that failed are replaced, the others go on, and all are gone in the end."""
    jobs = [("die", 1), ("unpicklable", 2), ("do", 3), ("do", 4), ("do", 5)]
    found = dict(side_by_side(work, jobs, [CPU], each=2))
    assert found["die", 1] == Failure("its process was ended by SIGKILL")
    assert found["unpicklable", 2].why.startswith("its result cannot be sent")
    pids = {found["do", number][0] for number in (3, 4, 5)}
    assert [found["do", number][1] for number in (3, 4, 5)] == [3, 4, 5] and len(pids) <= 2
    assert os.getpid() not in pids and not any(map(psutil.pid_exists, pids))


@pytest.mark.parametrize("each", [1, 2])
def test_jobs_may_lead_to_others(each):
    jobs = [("do", 1), ("do", 2)]
    for (_, number), found in side_by_side(work, jobs, [CPU], each=each):
        assert found[1] == number
        if number < 5:
            jobs.append(("do", number + 2))
    assert sorted(number for _, number in jobs) == [1, 2, 3, 4, 5, 6]


def test_all_gpus_are_taken_where_none_was_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    gpu = torch.device("cuda", 0)
    assert devices(gpu, "auto") == devices(gpu, "cuda") == [torch.device("cuda", 0), torch.device("cuda", 1)]
    assert devices(gpu, "cuda:0") == [gpu] and devices(CPU, "auto") == [CPU]


SCRIPT = """
    import sys, time
    import torch
    from pathlib import Path
    from hyperlm import env
    from hyperlm.bench.pool import side_by_side

    def sleep(job, device):
        for _ in env.progress(range(3), desc="a bar of its own"):
            time.sleep(0.1)
        Path(f"began-{job}").touch()
        time.sleep(300)

    if __name__ == "__main__":
        for _ in side_by_side(sleep, [1, 2, 3], [torch.device("cpu")] * 2):
            pass
"""


@pytest.mark.parametrize(("to", "number"), [(os.killpg, signal.SIGINT), (os.kill, signal.SIGKILL)], ids=["Ctrl-C", "the parent is killed"])
def test_all_end_at_once(to, number, tmp_path):
    """Ctrl-C goes to every process of a terminal, and one alone says so; of a parent that is killed none learns by itself."""
    (tmp_path / "script.py").write_text(textwrap.dedent(SCRIPT))
    variables = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
    process = subprocess.Popen(
        [sys.executable, "script.py"], cwd=tmp_path, env=variables, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        deadline = time.monotonic() + 60
        while len(list(tmp_path.glob("began-*"))) < 2:
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.05)
        children = psutil.Process(process.pid).children(recursive=True)
        to(process.pid, number)
        _, said = process.communicate(timeout=10)
        _, alive = psutil.wait_procs(children, timeout=5)
        assert len(children) >= 2 and not alive
        assert said.count("Traceback") == (1 if number == signal.SIGINT else 0) and "a bar of its own" not in said, said
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
