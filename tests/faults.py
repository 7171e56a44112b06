"""The fault-injection campaign: kills, damage, full disks and second processes, until something is lost or goes wrong in silence.

    python tests/faults.py --rounds 300 --seed 0            all of it; about half an hour on two cores
    python tests/faults.py --only damage --rounds 20        one kind of fault
    python tests/faults.py --seed 0 --round 17              one round again

Every round works on a small run of its own, in a folder of its own, through the commands that a person types:

    kill    a run is killed with -9 (half of the times within a save) or stopped by a signal, and resumed, up to its end
    damage  a file of a finished run, an interrupted one or their cache is damaged; then it is resumed, extended, talked to or measured
    disk    the disk of a run, sometimes with the cache, is full at some moment; then there is room again, and the run is resumed
    two     a second process resumes a run that is being trained

A round ends well if what came out equals, to the bit, what no fault would have given (`equal`; `healed` if what was damaged is whole
again), or if the command said in one line what is wrong and where, and left whole what was whole (`refused`). Anything else is a failure,
and is reported with what it takes to see it again. What a round does is a function of (seed, round), but for the timing of processes.
"""

import argparse
import hashlib
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np
import orbax.checkpoint as ocp
from conftest import SMALLEST, write_prose
from tqdm import tqdm

RUN = Path("runs/x")
STEPS, EVERY, LONG = 24, 4, 160
SETTINGS = {
    "phase7": "--model.kind phase7",
    "phase8": "--model.kind phase8",
    "softmax": "--model.kind softmax",
    "hybrid": "--model.kind phase8 --model.n-layers 3 --model.exact-every 2",
    "dropout-ssm": "--model.kind phase7 --model.ssm --model.dropout 0.1",
    "int8": "--model.kind phase8 --optim.state int8",
    "host": "--model.kind phase8 --train.residence host",
    "host-int8": "--model.kind phase7 --train.residence host --optim.state int8",
    "by-layer": "--model.kind phase8 --optim.clip-scope layer",
    "host-by-layer": "--model.kind phase8 --train.residence host --optim.state int8 --optim.clip-scope layer",
    "long": f"--model.kind phase8 --train.steps {LONG} --ckpt.every {5 * EVERY} --ckpt.keep 99",  # long enough to be found running
}
SHORT = [name for name in SETTINGS if name != "long"]
DAMAGED = ["phase8", "int8", "host-int8"]  # fewer, since each needs what every command gives without damage
KINDS = {"kill": 0.35, "damage": 0.4, "disk": 0.15, "two": 0.1}  # share of the rounds
TIMING = {"tokens_per_second", "peak_memory_gib", "seconds_left", "seconds"}  # differ between equal runs
OUTCOMES = ("equal", "healed", "refused", "FAILED", "skipped")
EXIT = 10.0  # seconds that a command may take to exit after its error line or a signal
HANGS = 180.0  # seconds after which a command counts as hung
DISK = 16  # MiB of the small disk: a run takes about 3


class Failure(Exception):
    """What a round found; the message says what was expected."""


# -- commands --------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """A round's own folder; commands run in `work`, which may be a small disk."""

    folder: Path
    work: Path
    cache: Path

    @property
    def run(self) -> Path:
        return self.work / RUN


@dataclass(frozen=True)
class Outcome:
    """How a command ended. `after_error`: seconds from its error line to its exit."""

    command: str
    code: int
    out: bytes
    err: str
    after_error: float = 0.0
    hung: bool = False

    @property
    def lines(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.strip()]

    @property
    def short(self) -> str:
        return "`" + self.command.replace(" ".join(SMALLEST), "...") + "`"

    @property
    def error(self) -> str:
        return next((line for line in self.lines if line.startswith("error: ")), "")


@dataclass
class Running:
    process: subprocess.Popen
    command: str
    stdout: Path
    stderr: Path
    began: float
    leftovers: set[str]  # folders of unfinished saves that were there before

    def said(self) -> bytes:
        return self.stdout.read_bytes()

    def steps(self) -> int:
        """Steps that it has reported."""
        return len(re.findall(rb"^step +\d+/", self.said(), re.MULTILINE))


@dataclass
class Round:
    """What a round has done so far, for the report of a failure."""

    number: int
    kind: str
    rng: random.Random
    place: Place
    said: list[str] = field(default_factory=list)
    outcomes: list[Outcome] = field(default_factory=list)
    struck: Counter = field(default_factory=Counter)  # what faults met


def load() -> float:
    """By how much this machine is slower than one with nothing else to do; at least 1."""
    return max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


def environment(place: Place) -> dict[str, str]:
    own = {"XDG_CACHE_HOME": str(place.cache), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "CUDA_VISIBLE_DEVICES": ""}
    shared = {"MPLCONFIGDIR": str(place.folder.parent / "matplotlib")}  # its list of fonts takes seconds to make
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | own | shared


def spawn(at: Round, program: str, *flags: str) -> Running:
    """Start a command of the repository, in a session of its own, so that Ctrl-C on the campaign is none on the command."""
    logs = at.place.folder / f"command{len(list(at.place.folder.glob('command*.out')))}"
    stdout, stderr = logs.with_suffix(".out"), logs.with_suffix(".err")
    command = [sys.executable, str(REPOSITORY / program), *flags]
    leftovers = unfinished(at.place)
    with open(stdout, "wb") as out, open(stderr, "wb") as err:
        streams = {"stdin": subprocess.DEVNULL, "stdout": out, "stderr": err}
        process = subprocess.Popen(command, cwd=at.place.work, env=environment(at.place), start_new_session=True, **streams)
    return Running(process, " ".join(["python", program, *flags]), stdout, stderr, time.monotonic(), leftovers)


def finish(at: Round, running: Running, *, during: Callable[[], None] = lambda: None) -> Outcome:
    """Wait for the end of a command, calling `during` meanwhile; kill it if it hangs."""
    error_seen, hung = None, False
    try:
        while running.process.poll() is None:
            if error_seen is None and re.search(rb"^error: .*\n", running.stderr.read_bytes(), re.MULTILINE):
                error_seen = time.monotonic()
            waited = time.monotonic() - (error_seen or running.began)
            if hung := waited > load() * (3 * EXIT if error_seen else HANGS):
                break
            during()
            time.sleep(0.02)
        ended = time.monotonic()
    finally:
        if running.process.poll() is None:
            running.process.kill()
        running.process.wait()
    after = ended - error_seen if error_seen else 0.0
    outcome = Outcome(running.command, running.process.returncode, running.said(), running.stderr.read_text(errors="replace"), after, hung)
    at.outcomes.append(outcome)
    return outcome


def do(at: Round, program: str, *flags: str) -> Outcome:
    return finish(at, spawn(at, program, *flags))


def new(setting: str) -> list[str]:
    """Flags of a new run x."""
    frame = f"--data.sources prose.txt --name x --train.steps {STEPS} --ckpt.every {EVERY} --ckpt.keep 3 --eval.every {2 * EVERY}"
    return [*SMALLEST, *frame.split(), *SETTINGS[setting].split()]


RESUME = ["--resume", str(RUN)]


# -- moments ---------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Moment:
    """When a fault strikes a command: `delay` (seconds; at start-up: a share of it) after the `index`-th of what `where` names."""

    where: str  # start-up, save, step or end
    index: int
    delay: float


def draw_moment(rng: random.Random, left: int = STEPS, *, saves: float = 0.5) -> Moment:
    """A random moment of a command with `left` steps to do: in a save with probability `saves`, else at start-up, in a step or the end."""
    where = "save" if rng.random() < saves else rng.choice(["start-up", "step", "end", "end"])
    if where == "save":  # most take 50 ms; the removal of old checkpoints comes after them
        return Moment(where, rng.randint(1, max(1, left // EVERY)), rng.choice([0, rng.uniform(0, 0.05), rng.uniform(0, 0.2)]))
    if where == "start-up":
        return Moment(where, 0, rng.uniform(0.05, 1.0))
    if where == "step":
        return Moment(where, rng.randint(1, max(1, left - 1)), rng.uniform(0, 0.05))
    return Moment(where, left, rng.uniform(0, 1.0))


def unfinished(place: Place) -> set[str]:
    """Folders under checkpoints/ that are no checkpoints yet, or no longer."""
    with suppress(OSError):
        names = os.listdir(place.run / "checkpoints")
        return {name for name in names if not re.fullmatch(r"step_\d{8}", name) and not name.startswith(".")}
    return set()


def await_moment(at: Round, running: Running, moment: Moment, startup: float) -> bool:
    """Return True when `moment` has come, or False when the command ended before it did. `startup`: seconds up to the first step."""
    saves: set[str] = set()
    while running.process.poll() is None:
        there = unfinished(at.place)
        running.leftovers &= there
        saves |= {name for name in there - running.leftovers if "tmp" in name}  # the storage layer's name for a save under way
        match moment.where:
            case "start-up":
                come = time.monotonic() >= running.began + moment.delay * startup
            case "save":
                come = len(saves) >= moment.index
            case "step":
                come = running.steps() >= moment.index
            case _:
                come = re.search(rb"^step +(\d+)/\1 ", running.said(), re.MULTILINE) is not None
        if come:
            if moment.where != "start-up":
                time.sleep(moment.delay)
            return running.process.poll() is None
        if time.monotonic() - running.began > HANGS * load():
            return False
        time.sleep(0.003)
    return False


# -- what a run should be --------------------------------------------------------------------------------------------------------------


READING = threading.Lock()  # of checkpoints, by one round at a time


def saved(place: Place) -> list[int]:
    """Steps with a checkpoint, by the names of their folders."""
    return sorted(int(p.name[5:]) for p in (place.run / "checkpoints").glob("step_*") if re.fullmatch(r"step_\d{8}", p.name))


def checkpoint_of(step: int) -> Path:
    return RUN / "checkpoints" / f"step_{step:08d}"


def arrays(checkpoint: Path) -> dict[str, bytes]:
    """A digest of each parameter and moment. Read from the storage layer itself, so that nothing here trusts what is tested."""
    found: dict[str, bytes] = {}

    def walk(path: str, x: Any) -> None:
        if isinstance(x, dict | list | tuple):
            for key, value in x.items() if isinstance(x, dict) else enumerate(x):
                walk(f"{path}/{key}", value)
        else:
            x = np.ascontiguousarray(x)
            found[path] = hashlib.sha256(f"{x.dtype} {x.shape}".encode() + x.tobytes()).digest()

    with READING:
        for item in ("params", "opt"):
            with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
                walk(item, reader.restore((checkpoint / item).absolute()))
    return found


def not_json(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def records(run: Path, since: int = 0, damaged: bool = False) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl of steps after `since`, without what differs between equal runs.

    Raises:
        ValueError: where a line is no JSON, unless the file was `damaged`: what it said before is lost then.
    """
    found = []
    for line in (run / "metrics.jsonl").read_bytes().splitlines():
        try:
            record = json.loads(line, parse_constant=not_json)
            if ("loss" in record or "val_loss" in record) and record["step"] > since:
                found.append({key: value for key, value in record.items() if key not in TIMING})
        except (ValueError, TypeError, KeyError):
            if not damaged:
                raise
    return found


@dataclass(frozen=True)
class Reference:
    """A run to which nothing happened."""

    place: Place
    steps: int
    records: list[dict[str, Any]]
    arrays: dict[str, bytes]
    startup: float  # seconds up to its first step
    seconds: float


def read_reference(place: Place, steps: int, startup: float = 0.0, seconds: float = 0.0) -> Reference:
    found = records(place.run)
    assert [r["step"] for r in found if "loss" in r] == list(range(1, steps + 1)) and saved(place)[-1] == steps
    return Reference(place, steps, found, arrays(place.work / checkpoint_of(steps)), startup, seconds)


def differences(place: Place, expected: Reference, *, damaged_at: int = 0, summary: bool = True) -> Iterator[str]:
    """In what a finished run differs from the uninterrupted one: losses, evaluations, parameters and moments, to the bit, and leftovers.

    Args:
        damaged_at: step up to which metrics.jsonl was damaged; later records are compared.
        summary: read training_summary.json too.
    """
    try:
        found = records(place.run, damaged_at, damaged_at > 0) if damaged_at < expected.steps else []
    except (OSError, ValueError, TypeError, KeyError) as e:
        yield f"metrics.jsonl cannot be read: {e}"
    else:
        for what, name in (("steps", "loss"), ("evaluations", "val_loss")):
            have = [r for r in found if name in r]
            want = [r for r in expected.records if name in r and r["step"] > damaged_at]
            if (a := [r["step"] for r in have]) != [r["step"] for r in want]:
                yield f"metrics.jsonl has {len(have)} {what}, up to {max(a, default=0)}, not {len(want)}, or not in order"
            elif wrong := [r["step"] for r, s in zip(have, want, strict=True) if r != s]:
                yield f"metrics.jsonl has other values in its {what} {wrong}"
    if (last := saved(place)[-1:]) != [expected.steps]:
        yield f"the newest checkpoint is {last}, not [{expected.steps}]"
    else:
        try:
            have, want = arrays(place.work / checkpoint_of(expected.steps)), expected.arrays
        except Exception as e:  # whatever the storage layer raises
            yield f"the last checkpoint cannot be read: {str(e)[:200]}"
        else:
            if wrong := [path for path in sorted(have.keys() | want.keys()) if have.get(path) != want.get(path)]:
                yield f"{len(wrong)} parameters and moments differ, such as {wrong[0]}"
    evaluations = {r["step"]: r["val_loss"] for r in expected.records if "val_loss" in r}
    if (best := min(evaluations, key=lambda step: (evaluations[step], -step))) not in saved(place):
        yield f"the best checkpoint, {checkpoint_of(best)}, is gone"
    try:
        told = json.loads((place.run / "training_summary.json").read_text(), parse_constant=not_json) if summary else {}
        if summary and (told["steps"], told["val_loss"]) != (expected.steps, evaluations[expected.steps]):
            yield f"training_summary.json tells of step {told['steps']} and validation loss {told['val_loss']}"
    except (OSError, ValueError, KeyError, TypeError) as e:
        yield f"training_summary.json cannot be read: {type(e).__name__}: {e}"
    tokenizer = place.run / "tokenizer.json"
    if not tokenizer.is_file() or tokenizer.read_bytes() != (expected.place.run / "tokenizer.json").read_bytes():
        yield "tokenizer.json is not what it was"
    if left := unfinished(place):
        yield f"unfinished saves are left: {sorted(left)}"
    if len(caches(place)) > len(caches(expected.place)):
        yield f"the cache has leftovers: {[p.name for p in caches(place)]}"


def caches(place: Place) -> list[Path]:
    """Folders in the cache, finished or not."""
    return sorted(p for p in (place.cache / "hyperlm").glob("*") if p.is_dir())


class References:
    """The runs to which nothing happened: each is made once, when a round first needs it."""

    def __init__(self, folder: Path):
        self.folder, self.guard, self.locks, self.made = folder, threading.Lock(), {}, {}

    def get(self, *key: str) -> Any:
        """("run", setting), ("extend", setting), ("chat", setting, state) or ("bench", setting, state)."""
        with self.guard:
            lock = self.locks.setdefault(key, threading.Lock())
        with lock:
            if key not in self.made:
                self.made[key] = self.make(*key)
            return self.made[key]

    def make(self, what: str, setting: str, state: str = "finished") -> Any:
        place = make_place(self.folder / f"{what}-{setting}-{state}")
        at = Round(-1, what, random.Random(0), place)
        if what == "run":
            steps = LONG if setting == "long" else STEPS
            running = spawn(at, "train.py", *new(setting))
            await_moment(at, running, Moment("step", 1, 0), 0)
            startup = time.monotonic() - running.began
            good(finish(at, running))
            return read_reference(place, steps, startup, time.monotonic() - running.began)
        copy_run(self.get("run", setting), place, state)
        if what == "extend":
            good(do(at, PROGRAMS[what], *COMMANDS[what]))
            return read_reference(place, STEPS + EXTENDED)
        outcome = good(do(at, PROGRAMS[what], *COMMANDS[what]))
        return outcome.out if what == "chat" else rows(place)


def make_place(folder: Path, work: Path | None = None, cache: Path | None = None) -> Place:
    """A folder with a text in it, and nothing else."""
    place = Place(folder, work or folder / "work", cache or folder / "cache")
    place.work.mkdir(parents=True, exist_ok=True)
    write_prose(place.work / "prose.txt", 6000)
    return place


def copy_run(reference: Reference, place: Place, state: str = "finished") -> None:
    """Put a copy of a finished run and of its cache in `place`; `interrupted`: as a kill before the last save leaves it."""
    shutil.copytree(reference.place.run, place.run)
    shutil.copytree(reference.place.cache, place.cache)
    if state == "interrupted":
        shutil.rmtree(place.work / checkpoint_of(reference.steps))
        (place.run / "training_summary.json").unlink()


def rows(place: Place) -> list[dict[str, Any]]:
    """The numbers that bench.py left."""
    return json.loads((place.work / "runs/b/results.json").read_text())["results"][0]["tables"][0]["rows"]


EXTENDED = 2 * EVERY
PROGRAMS = {"resume": "train.py", "extend": "train.py", "chat": "chat.py", "bench": "bench.py"}
COMMANDS = {
    "resume": RESUME,
    "extend": [*RESUME, "--train.steps", str(STEPS + EXTENDED)],
    "chat": [str(RUN), "--prompt", "a b", "--max-tokens", "4", "--seed", "0"],
    "bench": [str(RUN), "--name", "b"],
}


# -- judgement -------------------------------------------------------------------------------------------------------------------------


def require(ok: bool, why: str) -> None:
    if not ok:
        raise Failure(why)


def decent(outcome: Outcome) -> Outcome:
    """Raises Failure on what no command may ever do, however it ends."""
    require(not outcome.hung, f"{outcome.short} hangs")
    said = outcome.err + outcome.out.decode(errors="replace")
    for sign in ("Traceback (most recent call last)", "Exception ignored in", "Fatal Python error", "terminate called", "panicked at"):
        require(sign not in said, f"{outcome.short} prints {sign!r}")
    require(outcome.after_error <= EXIT * load(), f"{outcome.short} takes {outcome.after_error:.0f} s to exit after its error line")
    return outcome


def good(outcome: Outcome) -> Outcome:
    """Raises Failure unless the command ended well."""
    decent(outcome)
    require(outcome.code == 0, f"{outcome.short} ends with {outcome.code}, not 0: {outcome.err.strip()[-300:]}")
    return outcome


def refused(outcome: Outcome, *names: str) -> Outcome:
    """Raises Failure unless the command ended with 2 and one line on stderr, next to at most one warning, that holds one of `names`."""
    decent(outcome)
    errors = [line for line in outcome.lines if line.startswith("error: ")]
    ending = f"{outcome.code} and {len(errors)} error lines, not with 2 and 1: {outcome.err.strip()[-300:]}"
    require(outcome.code == 2 and len(errors) == 1, f"{outcome.short} ends with {ending}")
    require(len(outcome.lines) <= 2, f"{outcome.short} prints {len(outcome.lines)} lines on stderr, not one")
    require(any(name in errors[0] for name in names), f"{outcome.short} names none of {', '.join(names)}: {errors[0]}")
    return outcome


def stopped(outcome: Outcome, ending: signal.Signals, seconds: float, early: bool) -> Outcome:
    """Raises Failure unless the command ended as a signal should end it.

    Args:
        seconds: from the signal to the exit.
        early: the signal came before the command can have run a line of its own, or after its last one: the system acts then.
    """
    decent(outcome)
    require(seconds <= EXIT * load(), f"{outcome.short} takes {seconds:.0f} s to exit after {ending.name}")
    if (b"done " in outcome.out and outcome.code in (0, 128 + ending, -ending)) or (early and outcome.code == -ending):
        return outcome
    require(outcome.code == 128 + ending, f"{outcome.short} ends with {outcome.code} after {ending.name}, not with {128 + ending}")
    lines = [line for line in outcome.lines if "finishing the step" not in line]
    require(len(lines) <= 1, f"{outcome.short} prints {len(lines)} lines on stderr after {ending.name}, not one")
    require(bool(outcome.lines), f"{outcome.short} says nothing on stderr after {ending.name}")
    return outcome


def equal(at: Round, expected: Reference, *, damaged_at: int = 0, summary: bool = True) -> str:
    """Raises Failure unless the finished run is the uninterrupted one; see `differences`."""
    found = list(differences(at.place, expected, damaged_at=damaged_at, summary=summary))
    require(not found, "; ".join(found))
    return "equal"


def digests(folder: Path) -> dict[str, str]:
    """A digest of every file, by path."""
    files = (p for p in sorted(folder.rglob("*")) if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


# -- kill ------------------------------------------------------------------------------------------------------------------------------

SIGNALS = [signal.SIGKILL] * 7 + [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]


def kill(at: Round, references: References) -> str:
    """Kill or stop a run up to three times, and let it end: it is the uninterrupted one."""
    setting = at.rng.choice(SHORT)
    at.said.append(f"setting {setting}")
    reference = references.get("run", setting)
    for _ in range(at.rng.choice([1, 1, 2, 3])):
        fresh = not at.place.run.exists()
        left = STEPS - max(saved(at.place), default=0)
        moment, ending, asks = draw_moment(at.rng, left), at.rng.choice(SIGNALS), at.rng.random() < 0.5
        at.said.append(f"{ending.name} at {moment}")
        running = spawn(at, "train.py", *(new(setting) if fresh else RESUME))
        came = await_moment(at, running, moment, reference.startup)
        early = time.monotonic() - running.began < 0.5 * load() or b"\ndone " in running.said()
        if came:
            running.process.send_signal(ending)
        struck = time.monotonic()
        outcome = finish(at, running)
        at.struck[f"{ending.name}{' within a save' if unfinished(at.place) else ''}" if came else "too late"] += 1
        by_itself = f"{outcome.short} ends with {outcome.code} by itself: {outcome.err.strip()[-300:]}"
        if outcome.code == 0:  # it was done before the fault came
            good(outcome)
        elif ending == signal.SIGKILL:
            require(came and outcome.code == -signal.SIGKILL, by_itself)
            decent(outcome)
        else:
            require(came, by_itself)
            stopped(outcome, ending, time.monotonic() - struck, early)
        if at.place.run.exists() and not saved(at.place):
            require(not fresh or ending == signal.SIGKILL or early, f"{RUN} is left behind by {ending.name}, and has no checkpoint")
            refused(do(at, "train.py", *(RESUME if asks else new(setting))), str(RUN))
            shutil.rmtree(at.place.run)
    good(do(at, "train.py", *(RESUME if at.place.run.exists() else new(setting))))
    return equal(at, reference)


# -- damage ----------------------------------------------------------------------------------------------------------------------------


def overwrite(path: Path, at: int, data: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(data)


def zero_block(path: Path, rng: random.Random) -> None:
    size = path.stat().st_size
    at = rng.randrange(max(1, size))
    overwrite(path, at, bytes(min(512, size - at)))


def flip_bit(path: Path, rng: random.Random) -> None:
    if size := path.stat().st_size:
        at = rng.randrange(size)
        overwrite(path, at, bytes([path.read_bytes()[at] ^ 1 << rng.randrange(8)]))


def replace_by_folder(path: Path, rng: random.Random) -> None:
    path.unlink()
    path.mkdir()


def append_garbage(path: Path, rng: random.Random) -> None:
    with open(path, "ab") as file:
        file.write(rng.randbytes(rng.randint(1, 300)))


def swap(path: Path, rng: random.Random, other: Path) -> None:
    a, b = path.read_bytes(), other.read_bytes()
    path.write_bytes(b)
    other.write_bytes(a)


DAMAGE: dict[str, Callable[[Path, random.Random], Any]] = {
    "truncate to 0": lambda path, rng: os.truncate(path, 0),
    "truncate to half": lambda path, rng: os.truncate(path, path.stat().st_size // 2),
    "truncate to a random size": lambda path, rng: os.truncate(path, rng.randrange(max(1, path.stat().st_size))),
    "zero a block": zero_block,
    "flip a bit": flip_bit,
    "delete": lambda path, rng: path.unlink(),
    "replace by a folder": replace_by_folder,
    "append garbage": append_garbage,
}


def groups(place: Place) -> dict[str, list[Path]]:
    """Files that can be damaged, by what they belong to; by size and name, since the storage layer's names are random."""

    def files(folder: Path, pattern: str = "**/*") -> list[Path]:
        return sorted((p for p in folder.glob(pattern) if p.is_file()), key=lambda p: (p.stat().st_size, p))

    newest = place.work / checkpoint_of(saved(place)[-1])
    older = [p for p in files(place.run / "checkpoints") if newest not in p.parents]
    return {"run": files(place.run, "*"), "cache": files(place.cache / "hyperlm"), "newest": files(newest), "older": older}


def damage(at: Round, references: References) -> str:
    """Damage a file, then use the run: what comes out is what came out before, or one line names what is damaged."""
    setting, what = at.rng.choice(DAMAGED), at.rng.choice([*COMMANDS, "resume"])
    state = "interrupted" if what != "extend" and at.rng.random() < 0.8 else "finished"
    copy_run(references.get("run", setting), at.place, state)
    there = groups(at.place)
    group = at.rng.choices(list(there), [3, 3, 4, 2])[0]
    path, how = at.rng.choice(there[group]), at.rng.choice([*DAMAGE, "swap"])
    paths, original = [path], path.read_bytes()
    if how == "swap":
        paths.append(at.rng.choice([p for p in there[group] if p != path] or [path]))
        swap(path, at.rng, paths[1])
    else:
        DAMAGE[how](path, at.rng)
    hurt = [p.relative_to(at.place.folder) for p in paths]
    at.struck[f"damage to {group}"] += 1
    at.said.append(f"setting {setting}, {state}; {how}: {' and '.join(map(str, hurt))}; then {what}")
    shutil.copytree(at.place.work, at.place.folder / "damaged/work")
    shutil.copytree(at.place.cache, at.place.folder / "damaged/cache")

    before, last = digests(at.place.run / "checkpoints"), saved(at.place)[-1]
    records_hurt, summary_hurt = ((at.place.run / name) in paths for name in ("metrics.jsonl", "training_summary.json"))
    kept = intact_records(at.place, references.get("run", setting), last)
    outcome = decent(do(at, PROGRAMS[what], *COMMANDS[what]))
    if outcome.code:
        refused(outcome, *{name for p in hurt for name in names_of(p)})
        advised(outcome, hurt)
    elif what == "chat":
        require(outcome.out == (text := references.get("chat", setting, state)), f"chat.py says {outcome.out!r}, not {text!r}")
    elif what == "bench":
        require(rows(at.place) == references.get("bench", setting, state), "bench.py gives other numbers")
    else:
        expected = references.get("extend" if what == "extend" else "run", setting)
        equal(at, expected, damaged_at=last if records_hurt else 0, summary=not summary_hurt or how == "delete" or what == "extend")
        require(kept <= set(read_lines(at.place.run / "metrics.jsonl")), "whole lines of metrics.jsonl are gone")
    if saved(at.place)[-1:] <= [last]:  # nothing came that old ones have to go for
        after = digests(at.place.run / "checkpoints")
        changed = {name.split("/")[0] for name, digest in before.items() if after.get(name) != digest}
        require(changed <= {part for p in hurt for part in p.parts}, f"{', '.join(sorted(changed))} changed, and was whole")
    if outcome.code:
        follow(at, outcome, references.get("run", setting), what)
        return "refused"
    return "healed" if path.is_file() and path.read_bytes() == original else "equal"


def read_lines(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines() if path.is_file() else []


def intact_records(place: Place, reference: Reference, last: int) -> set[bytes]:
    """Lines of a damaged metrics.jsonl that are as they were, of steps that resuming keeps."""
    whole = {line for line in read_lines(reference.place.run / "metrics.jsonl") if json.loads(line)["step"] <= last}
    return whole & set(read_lines(place.run / "metrics.jsonl"))


def names_of(path: Path) -> Iterator[str]:
    """What a message about a damaged file may call it: its own name, its checkpoint's, or its cache folder's."""
    yield path.name
    yield from (part for part in path.parts if part.startswith("step_"))
    if path.parts[0] == "cache" and len(path.parts) > 3:
        yield path.parts[2]


def to_delete(outcome: Outcome) -> list[str]:
    """The checkpoints that a message advises to delete."""
    return re.findall(r"step_\d{8}", outcome.error) if re.search(r"\b(delete|remove|rm)\b", outcome.error) else []


def advised(outcome: Outcome, hurt: list[Path]) -> None:
    """Raises Failure where a message advises to delete a checkpoint that is whole."""
    for name in to_delete(outcome):
        require(any(name in p.parts for p in hurt), f"advice to delete {name}, which is whole: {outcome.error}")


def follow(at: Round, outcome: Outcome, reference: Reference, what: str) -> None:
    """Do what a message advises, where it is to delete a checkpoint: the run then goes on to its end."""
    if to_delete(outcome) and what in ("resume", "extend"):
        shutil.rmtree(at.place.run / "checkpoints" / to_delete(outcome)[0])
        good(do(at, "train.py", *RESUME))
        equal(at, reference)


# -- disk ------------------------------------------------------------------------------------------------------------------------------


@contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """A disk of a few MiB at `folder`. Raises OSError where mounting is not permitted."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK}m", "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(done.stderr.strip())
    try:
        yield
    finally:
        if subprocess.run(["umount", str(folder)], capture_output=True, check=False).returncode:
            subprocess.run(["umount", "-l", str(folder)], check=True)


@contextmanager
def kept_copy(place: Place) -> Iterator[None]:
    """After a failure, what was on a small disk is kept in `left`."""
    try:
        yield
    except Failure:
        shutil.copytree(place.work, place.folder / "left", ignore=shutil.ignore_patterns("ballast"))
        raise


def can_mount(folder: Path) -> str:
    """Why there can be no small disk here; empty if there can."""
    try:
        with small_disk(folder):
            return ""
    except OSError as e:
        return f"a small disk cannot be mounted ({e})"


def fill(ballast: Path, leave: int) -> None:
    """Fill the disk up to `leave` bytes; or, where the disk has less, not at all."""
    disk = os.statvfs(ballast.parent)
    size = disk.f_bavail * disk.f_frsize - leave
    with suppress(OSError), open(ballast, "ab", buffering=0) as file:
        while size > 0:
            size -= file.write(bytes(min(size, 1 << 16)))


def disk(at: Round, references: References) -> str:
    """Fill a run's disk, then make room: the command says which file or folder, what is saved and how to go on; that gives the same run."""
    setting, moment = at.rng.choice(SHORT), draw_moment(at.rng, saves=0.4)
    with_cache, again = at.rng.random() < 0.5, at.rng.random() < 0.5
    leave = at.rng.choice([0, 4096, at.rng.randrange(100_000), at.rng.randrange(1_000_000)])
    from_start = at.rng.random() < 0.2
    when = "before the start" if from_start else f"at {moment}"
    whose, how_often = "run and cache" if with_cache else "run", ", again and again" if again else ""
    at.said.append(f"setting {setting}; disk of {whose} full but for {leave} bytes {when}{how_often}")
    reference = references.get("run", setting)
    with small_disk(at.place.work), kept_copy(at.place):
        place = at.place = make_place(at.place.folder, cache=at.place.work / "cache" if with_cache else None)
        ballast = place.work / "ballast"
        if from_start:
            fill(ballast, leave)
        running = spawn(at, "train.py", *new(setting))
        if not from_start and await_moment(at, running, moment, reference.startup):
            fill(ballast, leave)
        outcome = finish(at, running, during=partial(fill, ballast, leave) if again and ballast.exists() else lambda: None)
        whole = saved(place)
        at.struck["disk full: " + ("refused" if outcome.code else "no matter")] += 1
        if outcome.code == 0:
            good(outcome)
        else:
            refused(outcome, *({str(RUN), "runs", str(place.work), str(place.cache)} if not whole else {str(RUN)}))
            said = outcome.error
            require("0.00" not in said, f"the error line tells of 0.00: {said}")
            if whole:
                named = re.search(rf"(step_0*|step ){whole[-1]}\b", said) is not None
                require(named, f"the error line does not name the last checkpoint, {whole[-1]}: {said}")
                require(re.search(rf"--resume \S*{RUN}\b", said) is not None, f"the error line does not say how to go on: {said}")
        ballast.unlink(missing_ok=True)
        if place.run.exists() and not whole:
            shutil.rmtree(place.run)
        good(do(at, "train.py", *(RESUME if place.run.exists() else new(setting))))
        return equal(at, reference)


# -- two -------------------------------------------------------------------------------------------------------------------------------


def two(at: Round, references: References) -> str:
    """Two processes on one run: one trains it to its end, and the other says which process that is and changes nothing."""
    reference = references.get("run", "long")
    at_once, late, step = at.rng.random() < 0.5, at.rng.uniform(0, 0.5), at.rng.randint(1, LONG - 1)
    at.said.append(f"resumed twice, {late:.2f} s apart" if at_once else f"resumed at step {step} of the first process")
    if at_once:
        copy_run(reference, at.place, "interrupted")
        for later in saved(at.place)[1:]:
            shutil.rmtree(at.place.work / checkpoint_of(later))
    running = [spawn(at, "train.py", *(RESUME if at_once else new("long")))]
    try:
        if at_once:
            time.sleep(late)
        elif await_moment(at, running[0], Moment("step", step, 0), reference.startup):
            running[0].process.send_signal(signal.SIGSTOP)  # until the second has had its chance
        running.append(spawn(at, "train.py", *RESUME))
        with ThreadPoolExecutor(2) as pool:
            waiting = [pool.submit(finish, at, each) for each in running]
            waiting[1].result()
            running[0].process.send_signal(signal.SIGCONT)
            ends = [each.result() for each in waiting]
    finally:
        for each in running:
            if each.process.poll() is None:
                each.process.kill()
                each.process.wait()
    winner = 0 if ends[0].code == 0 else 1
    good(ends[winner])
    equal(at, reference)
    loser = ends[1 - winner]
    if loser.code == 0 and b"complete" in loser.out:  # it came when the first one was done
        at.struck["too late"] += 1
        return "equal"
    at.struck["at once" if at_once else "second while the first trains"] += 1
    refused(loser, str(running[winner].process.pid))
    require(socket.gethostname() in loser.error, f"the error line does not name this machine: {loser.error}")
    return "refused"


# -- the campaign ----------------------------------------------------------------------------------------------------------------------

ROUNDS: dict[str, Callable[[Round, References], str]] = {"kill": kill, "damage": damage, "disk": disk, "two": two}


@dataclass(frozen=True)
class Result:
    number: int
    kind: str
    outcome: str
    why: str
    slowest: float  # seconds from an error line to the exit
    folder: Path
    said: list[str]
    outcomes: list[Outcome]
    struck: Counter


def play(number: int, seed: int, kinds: list[str], folder: Path, references: References, keep: bool = False) -> Result:
    """One round."""
    rng = random.Random(f"{seed}/{number}")
    kind = rng.choices(kinds, [KINDS[k] for k in kinds])[0]
    own = folder / f"round{number}"
    shutil.rmtree(own, ignore_errors=True)
    at, why = Round(number, kind, rng, make_place(own)), ""
    try:
        outcome = ROUNDS[kind](at, references)
    except Failure as e:
        outcome, why = "FAILED", str(e)
    except Exception as e:  # a mistake in here must not end the campaign, and must not pass
        outcome, why = "FAILED", f"the round itself: {type(e).__name__}: {e}"
        at.said.append(traceback.format_exc())
    if outcome != "FAILED" and not keep:
        shutil.rmtree(own, ignore_errors=True)
    return Result(number, kind, outcome, why, max((o.after_error for o in at.outcomes), default=0.0), own, at.said, at.outcomes, at.struck)


def describe(result: Result, seed: int, kinds: list[str]) -> str:
    """A failure, and what it takes to see it again."""
    only = "" if len(kinds) == len(KINDS) else f" --only {','.join(kinds)}"
    again = f"python tests/faults.py --seed {seed} --round {result.number}{only} --keep"
    lines = [f"round {result.number}, {result.kind}: {result.why}", f"  again     {again}", f"  folder    {result.folder}"]
    lines += [f"  what      {text}" for text in result.said]
    lines.append("  within    work, with XDG_CACHE_HOME the cache beside it; after damage: those in damaged/, as the command found them")
    for outcome in result.outcomes:
        lines.append(f"  command   {outcome.command}")
        lines.append(f"            exit code {outcome.code}, {outcome.after_error:.1f} s after an error line")
        lines += [f"  stderr    {line[:400]}" for line in outcome.lines[-6:]]
    return "\n".join(lines)


def table(results: list[Result]) -> str:
    counts = Counter((r.kind, r.outcome) for r in results)
    kinds = [kind for kind in KINDS if any(r.kind == kind for r in results)]
    lines = ["| kind   |" + "".join(f"{name:>8}|" for name in (*OUTCOMES, "all")), "|--------|" + "-------:|" * (len(OUTCOMES) + 1)]
    for name, own in [*((kind, [kind]) for kind in kinds), ("all", kinds)]:
        numbers = [sum(counts[kind, outcome] for kind in own) for outcome in OUTCOMES]
        lines.append(f"| {name:6} |" + "".join(f"{n:8}|" for n in (*numbers, sum(numbers))))
    return "\n".join(lines)


def campaign(numbers: list[int], seed: int, kinds: list[str], jobs: int, folder: Path, keep: bool = False) -> list[Result]:
    """Play rounds, `jobs` at a time. Where no disk can be mounted, rounds of that kind are skipped."""
    references, results = References(folder / "references"), []
    no_disk = can_mount(folder / "disk") if "disk" in kinds else ""
    if no_disk:
        print(f"disk rounds are skipped: {no_disk}")
        ROUNDS["disk"] = lambda at, references: "skipped"
    with ThreadPoolExecutor(jobs) as pool:
        waiting = [pool.submit(play, number, seed, kinds, folder, references, keep) for number in numbers]
        bar = tqdm(as_completed(waiting), total=len(waiting), unit=" rounds")
        try:
            for done in bar:
                results.append(done.result())
                bar.set_postfix(Counter(r.outcome for r in results))
                if results[-1].outcome == "FAILED":
                    bar.write(f"round {results[-1].number}, {results[-1].kind}: {results[-1].why[:300]}")
        except KeyboardInterrupt:
            print("interrupted: rounds under way end first", file=sys.stderr)
            pool.shutdown(cancel_futures=True)
    return sorted(results, key=lambda r: r.number)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=300, help="how many")
    parser.add_argument("--round", type=int, help="play this one alone")
    parser.add_argument("--seed", type=int, default=0, help="decides what every round does")
    parser.add_argument("--only", default=",".join(KINDS), help="kinds of faults, with commas between them")
    parser.add_argument("--jobs", type=int, default=2, help="rounds at a time")
    parser.add_argument("--keep", action="store_true", help="keep the folders of all rounds, not only of those that fail")
    arguments = parser.parse_args(argv)
    kinds = arguments.only.split(",")
    if unknown := set(kinds) - set(KINDS):
        parser.error(f"--only {unknown.pop()}: choose from {', '.join(KINDS)}")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does: disks are unmounted, commands ended
    folder = Path(tempfile.mkdtemp(prefix="hyperlm-faults-"))
    numbers = list(range(arguments.rounds)) if arguments.round is None else [arguments.round]
    results = campaign(numbers, arguments.seed, kinds, arguments.jobs, folder, arguments.keep)
    failures = [r for r in results if r.outcome == "FAILED"]
    for result in failures:
        print(f"\n{describe(result, arguments.seed, kinds)}")
    struck = sum((r.struck for r in results), Counter())
    print(f"\n{table(results)}\nfaults: {', '.join(f'{name} {n}' for name, n in sorted(struck.items()))}")
    print(f"slowest exit after an error line: {max((r.slowest for r in results), default=0.0):.1f} s")
    if failures or arguments.keep:
        print(f"kept in {folder}")
    else:
        shutil.rmtree(folder, ignore_errors=True)
    return 1 if failures or len(results) < len(numbers) else 0


if __name__ == "__main__":
    sys.exit(main())
