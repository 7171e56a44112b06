"""Measure models and runs side by side: tables, figures and a report under runs/.

    python bench.py phase7 phase8 softmax  speed and memory, several lengths
    python bench.py runs/x runs/y          perplexity, as far as comparable
    python bench.py runs/x --suite perplexity --data.sources book.txt
                                           of any text
    python bench.py phase7 phase8 softmax hybrid nanogpt --suite quality
                                           trained side by side, each at its
                                           best rate, on all GPUs
    python bench.py runs/x --suite long-context geometry
                                           loss by position, passkeys; radii,
                                           and what the model uses them for
    python bench.py phase7 phase8 --suite recall nulls
                                           what small models can keep; what of
                                           Phase 7 is geometry
    python bench.py phase8 --suite decode memory --preset max
                                           generation; training from host memory
    python bench.py --suite linear hyperbolic
                                           kernels beside their peers (GPU)
    python bench.py phase8 --suite all     whatever this machine can do
    python bench.py runs/a runs/b --suite report
                                           benchmarks joined in one report

Models are those of a preset, with train.py's settings on top, but for the kind.
"""

if __name__ == "__main__":
    from hyperlm import startup

    startup.quiet()  # before the slow imports

import tempfile
import time
from pathlib import Path

import torch

from configs import PRESETS
from hyperlm import cli, env, runs, startup
from hyperlm.bench import arms, pool, report, tables
from hyperlm.bench.result import Result
from hyperlm.bench.suites import SETTINGS, SUITES, Bench, Command
from hyperlm.config import ConfigError
from hyperlm.kernels import HAVE_TRITON


def parse(argv: list[str], preset: str) -> Command:
    """The command, on top of the preset that it names, or else this one."""
    preset = cli.peek("preset", argv) or preset
    if preset not in PRESETS:
        raise ConfigError(f"--preset {preset}: choose from {', '.join(PRESETS)}")
    config = PRESETS[preset]()
    default = Command(preset=preset, model=config.model, data=config.data, train=config.train, optim=config.optim, eval=config.eval)
    return cli.parse(Command, argv, default, description=__doc__)


MOST = 1 << 26  # tokens of a sequence or a step; to make them takes a moment
OFTEN = 60  # seconds after which what a suite has measured so far is written


def check(command: Command, argv: list[str], device: torch.device) -> Bench:
    """What is to be measured.

    Raises:
        ConfigError, UsageError: on what cannot be measured or written.
    """
    for flag, values, low, high in (
        ("lengths", command.lengths, 1, MOST),
        ("tokens", (command.tokens,), 0, MOST),
        ("seeds", (command.seeds,), 0, 1000),
    ):
        for value in values:
            if not low <= value <= high:
                raise ConfigError(f"--{flag} {value}: must be at least {low} and at most {high:,}")
    for rate in command.rates:
        if not 0 < rate < 1e3:
            raise ConfigError(f"--rates {rate:g}: must be above 0")
    if "/" in command.name or "\0" in command.name or command.name in (".", ".."):
        raise ConfigError(f"--name {command.name!r}: must be a plain folder name")
    folder = runs.ROOT / (command.name or f"bench-{time.strftime('%Y%m%d-%H%M%S')}")
    if folder.exists():
        raise cli.UsageError(f"{folder} exists: choose another --name")
    subjects = list(dict.fromkeys(subject.rstrip("/") or subject for subject in command.subjects))
    for subject in subjects:
        if subject not in arms.KINDS + arms.PEERS and not Path(subject).is_dir():
            names = ", ".join(arms.KINDS + arms.PEERS)
            raise cli.UsageError(f"{subject}: neither a kind or peer ({names}) nor the folder of a run")
    kinds, peers = ([s for s in subjects if s in known] for known in (arms.KINDS, arms.PEERS))
    others = [s for s in subjects if s not in arms.KINDS + arms.PEERS]
    return Bench(argv, device, pool.devices(device, command.train.device), folder, kinds, peers, others)


def chosen(command: Command, bench: Bench) -> list[str]:
    """The suites to run.

    Raises:
        UsageError: if one has nothing to measure, or what is named has none.
    """
    available = {
        "kinds": bench.kinds,
        "peers": bench.kinds + bench.peers,
        "models": bench.kinds + bench.runs,
        "nothing": ["all"],
        "reports": bench.runs,
    }
    asked = list(dict.fromkeys(command.suite))
    if "all" in asked:
        if not bench.kinds + bench.runs:
            raise cli.UsageError("--suite all needs kinds or runs, and none was named")
        kernels = ("linear", "hyperbolic") if bench.gpu and HAVE_TRITON else ()
        suites = ("speed", "memory", "decode", *kernels, "quality", "perplexity", "long-context", "geometry", "recall", "nulls")
        of_runs = {name: SUITES[name].measured == "models" for name in suites}
        asked = [name for name in suites if available[SUITES[name].measured] and (bench.kinds or of_runs[name])]
    if not asked:
        if not bench.kinds + bench.runs:
            what = "has suite quality alone: add --suite quality" if bench.peers else ""
            raise cli.UsageError(
                f"{bench.peers[0]}: {what}"
                if what
                else "name what to measure: phase7, phase8, softmax, hybrid or folders of runs; or a --suite"
            )
        asked = ["speed"] * bool(bench.kinds) + ["perplexity"] * bool(bench.runs)
    wanted = {"kinds": "kinds", "peers": "kinds or peers", "models": "kinds or folders of runs", "reports": "folders of benchmarks"}
    for name in asked:
        if not available[SUITES[name].measured]:
            raise cli.UsageError(f"--suite {name} needs {wanted[SUITES[name].measured]}, and none was named")
    measured = {subject for name in asked for subject in available[SUITES[name].measured]}
    if idle := [subject for subject in bench.kinds + bench.peers + bench.runs if subject not in measured]:
        raise cli.UsageError(f"{idle[0]}: nothing that suite {' or '.join(asked)} measures; leave it out, or name another --suite")
    return asked


def makes_models(bench: Bench, name: str) -> bool:
    """Whether a suite measures models that are made for it, by the settings of the command, and not runs alone."""
    return "settings" in SUITES[name].flags and (SUITES[name].measured != "models" or bool(bench.kinds))


def takes(bench: Bench, name: str, flag: str) -> bool:
    """Whether a suite depends on a flag."""
    group = flag.partition(".")[0]
    if group not in SETTINGS:
        return flag in SUITES[name].flags
    return makes_models(bench, name) or (group == "data" and name in ("perplexity", "long-context"))


def check_flags(bench: Bench, names: list[str]) -> None:
    """Raises UsageError on a flag that would change nothing."""
    for flag in (a.partition("=")[0][2:].replace("_", "-") for a in bench.argv if a.startswith("--")):
        takers = [name for name, suite in SUITES.items() if flag in suite.flags]
        if (
            (takers or flag.partition(".")[0] in SETTINGS)
            and flag != "train.device"
            and not any(takes(bench, name, flag) for name in names)
        ):
            why = "runs have settings of their own" if bench.runs else "it has sizes of its own"
            why = f"that is for {', '.join(takers)}" if takers else why
            raise cli.UsageError(f"--{flag} would change nothing in suite {' and '.join(names)} ({why}): leave it out")


def main(argv: list[str]) -> int:
    device = env.pick_device(cli.peek("train.device", argv) or "auto")
    command = parse(argv, "standard" if device.type == "cuda" else "small")
    bench = check(command, argv, device)
    names = chosen(command, bench)
    check_flags(bench, names)
    env.prepare(device)
    suites = {}
    for name in names:
        own = parse(argv, SUITES[name].gpu if bench.gpu else SUITES[name].cpu)
        suites[name] = SUITES[name].start(bench, own)
        if name != "report":
            where = ", ".join(map(str, bench.devices)) if SUITES[name].measured != "kinds" else device
            print(f"{name}: {f'preset {own.preset} on ' * makes_models(bench, name)}{where}")
    runs.ROOT.mkdir(exist_ok=True)
    try:  # found out now, not when there is something to write
        with tempfile.TemporaryDirectory(prefix=".", dir=runs.ROOT):
            pass
    except OSError as e:
        where = runs.ROOT.absolute()
        raise cli.UsageError(f"{where}, where results go, cannot be written to ({e.strerror}): mend that, or go to another folder") from e

    results: dict[str, Result] = {}
    machine = env.describe(device) if names != ["report"] else {}  # what is joined was measured elsewhere, and says where
    written = time.monotonic()

    def write() -> None:
        nonlocal written
        report.write(bench.folder, list(results.values()), machine, " ".join([startup.command("bench"), *argv]))
        written = time.monotonic()

    try:
        for name, measuring in suites.items():
            result = None
            for result in measuring:
                results[result.suite] = result
                if time.monotonic() - written > OFTEN:
                    write()
                if name == "report":
                    print(tables.text(result), flush=True)
            if name != "report" and result:
                print(tables.text(result), flush=True)
                write()
    finally:  # whatever ended it: what was measured is not lost
        if results:
            write()
            with_figures = ", figures" if any(r.figures for r in results.values()) else ""
            print(f"written to {bench.folder}: report.md, report.tex, results.json{with_figures}")
    rows = ((name, row) for name, result in results.items() for table in result.tables for row in table.rows)
    failed = dict.fromkeys(f"{row.get('model', 'one')} ({name})" for name, row in rows if "failed" in row)
    if failed:
        raise cli.UsageError(f"{len(failed)} failed, and the tables say why: {', '.join(failed)}")
    return 0


if __name__ == "__main__":
    cli.end(cli.run(main))
