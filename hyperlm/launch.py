"""How a run of train.py begins: its command line, its settings, and the state and schedule before its next step.

A run goes on from its own newest checkpoint (--resume), or starts from the weights of another run (--init), or from scratch.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from hyperlm import checkpoint, cli, data, env, finetune, forecast, kernels, log, memory, model, residence, runs, startup
from hyperlm.config import Config, ConfigError, another_run, differences, flag_of, from_dict, resolve
from hyperlm.files import file_digest
from hyperlm.finetune import Base
from hyperlm.optim import Schedule, extended, learning_rate, new_schedule
from hyperlm.residence import Residence
from hyperlm.state import State
from hyperlm.step import init_state

# -- settings --------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Asked:
    """What a command is to do."""

    preset: str = "standard"
    """small, standard, max, max-ssm or study: the settings that the rest of the command line starts from."""
    resume: str = ""
    """Folder of a run to continue exactly; with --train.steps, to extend; or with other settings that concern its future alone."""
    init: str = ""
    """Folder of a run to fine-tune: a new run starts from its weights, shape and tokenizer, with its settings or those of --preset."""
    init_checkpoint: checkpoint.Which = "latest"
    """Which of its checkpoints: the newest, or the one with the lowest validation loss."""
    plan: bool = False
    """Print the parameter count, the memory plan, whether it fits this machine and how long it takes, and stop."""
    doctor: bool = False
    """Check this machine, and stop; exit code 0 only if training can run."""


@dataclass(frozen=True)
class Command(Config, Asked):
    """A command line: what is asked for, then the settings."""


class Launch(NamedTuple):
    """A command line, understood and checked."""

    command: Command
    config: Config
    base: Base | None  # of --init
    changes: dict[str, tuple[Any, Any]]  # settings of a resumed run that are to be others from here on: {name: (old, new)}


def parse(argv: list[str], presets: Mapping[str, Callable[[], Config]], description: str) -> Launch:
    """What a command line asks for, on top of a preset, of the run that it resumes or of the one that it starts from.

    Raises:
        UsageError: if it cannot be understood.
        ConfigError: on a setting that cannot work, or with which a resumed run would be another.
        RunError, CheckpointError, TokenizerError: if the run that it names is missing or damaged.
    """
    preset, resume, init = (cli.peek(flag, argv) for flag in ("preset", "resume", "init"))
    if resume and (preset or init):
        raise cli.UsageError(
            f"--{'preset' if preset else 'init'} and --resume exclude each other: a run keeps the settings it was started with"
        )
    if not init and cli.peek("init-checkpoint", argv):
        raise cli.UsageError("--init-checkpoint says which checkpoint of --init to start from, and there is no --init")
    if preset and preset not in presets:
        raise cli.UsageError(f"--preset {preset}: choose from {', '.join(presets)}")
    base_config = runs.read_config(Path(init)) if init else None
    if resume:
        stored = stored_settings(Path(resume))
    elif init and base_config:
        new_text = cli.peek("data.sources", argv) is not None
        stored = finetune.settings(Path(init), base_config, presets[preset]() if preset else None, new_text=new_text)
    else:
        stored = presets[preset or "standard"]()
    command = cli.parse(Command, argv, Command(**vars(stored)), description=description)
    config = Config(**{f.name: getattr(command, f.name) for f in fields(Config)})
    if resume:
        if config.optim.state == "auto":  # decided when the run was started
            config = replace(config, optim=replace(config.optim, state=stored.optim.state))
        for name, (old, new) in another_run(stored, config).items():
            raise ConfigError(
                f"--{flag_of(name)} {new}: {resume} was started with {old}, and with another value it is another run: start a new one, "
                f"with --init {resume} from its weights"
            )
        resolved = resolve(config)
        return Launch(command, resolved, None, differences(stored, resolved))
    if init and base_config:
        resolved, base = resolve(config), Base(Path(init), base_config, command.init_checkpoint)
        finetune.require_base(base, config)
        return Launch(command, resolved, base, {})
    return Launch(command, data.with_vocabulary(resolve(config)), None, {})


def stored_settings(run: Path) -> Config:
    """The settings of a run, from its newest checkpoint where its config.json is damaged or gone."""
    try:
        return runs.read_config(run)
    except runs.RunError as e:
        if not run.is_dir() or (of_checkpoint := checkpoint.settings(run)) is None:
            raise
        step, config = of_checkpoint
        print(f"settings   {e}: taken from the checkpoint of step {step}")
        return config


def with_own_tokenizer(run: Path, config: Config) -> Config:
    """The configuration with the tokenizer that lies beside a run, where the file that it was given is gone.

    The digest of the text tells if it is the same.
    """
    given, beside = config.data.tokenizer, run / "tokenizer.json"
    if given in ("bpe", "bytes") or Path(given).exists() or not beside.is_file():
        return config
    print(f"tokenizer  {given} is gone: taken from {beside}")
    return replace(config, data=replace(config.data, tokenizer=str(beside)))


# -- where it will run -----------------------------------------------------------------------------------------------------------------

SHOWN = "; --plan shows the parts"


def choose_residence(config: Config, device: torch.device) -> Residence:
    """Where the run's state will live, with the residence and the optimizer's state decided: see `residence.decide`.

    Raises:
        TrainingError: if nothing that the settings leave open has the memory.
    """
    dtype, asked = env.compute_dtype(device), config
    allowed, have = env.allowed_memory(device, config.train.device_memory), env.available_memory(torch.device("cpu"))
    config = residence.decide(config, dtype, allowed, have, gpu=device.type == "cuda")
    chosen = residence.make(config, device, allowed)
    planned = chosen.plan
    if planned.host and planned.device > allowed:
        raise too_little(f"on its visits to {device} this model needs {gib(planned.device)} GiB, and {gib(allowed)} may be used")
    if planned.host > have:
        small = residence.plan(replace(config, optim=replace(config.optim, state="int8")), dtype, allowed).host
        less = small <= have and small < planned.host
        fits = f"--optim.state int8 needs {gib(small)}" if less else "lower --model.d-model or --model.n-layers"
        raise cli.TrainingError(f"this run needs {gib(planned.host)} GiB of host memory, and {gib(have)} are free: {fits}")
    if asked.train.residence == "auto" and device.type == "cpu" and planned.device > allowed:
        raise too_little(f"this run needs {gib(planned.device)} GiB and {device} has {gib(allowed)}")
    if asked.optim.state == "auto" and config.optim.state == "int8":
        wide = residence.plans_before(asked, planned, dtype, allowed)
        print(log.labelled("state", f"int8: fp32 needs {' or '.join(room(plan, device) for plan in wide)}"))
    if config.train.device_memory and device.type == "cuda":
        env.limit_memory(device, allowed)
    return chosen


def gib(size: int) -> str:
    return f"{size / env.GIB:.1f}"


def room(planned: residence.Plan, device: torch.device) -> str:
    """What decides whether a plan fits, in words."""
    return f"{gib(planned.host)} GiB of host memory" if planned.host else f"{gib(planned.device)} GiB on {device}"


def too_little(what: str) -> cli.TrainingError:
    return cli.TrainingError(
        f"{what}: lower --model.d-model, --model.n-layers, --data.seq-len or --train.batch-size, or set --train.recompute{SHOWN}"
    )


def show_plan(config: Config, device: torch.device) -> None:
    """What the run would need and take."""
    print(*forecast.needs(config), forecast.machine(config, device), sep="\n", flush=True)
    try:
        chosen = choose_residence(config, device)
    except cli.TrainingError as e:
        print(log.labelled("fits", f"no: {str(e).removesuffix(SHOWN)}"))
        return
    for line in forecast.here(chosen):
        print(line, flush=True)


def announce(chosen: Residence) -> None:
    """Say what will be trained, where, and with which kernels."""
    config, device, planned = chosen.config, chosen.device, chosen.plan
    cfg, dtype = config.model, env.compute_dtype(device)
    count = f"{sum(memory.parameters(config).values()):,} parameters"
    print(log.labelled("model", f"{cfg.kind}, {count}, d {cfg.d_model}, {cfg.n_layers} layers"))
    print(log.labelled("device", f"{device}, {str(dtype).removeprefix('torch.')}"))
    where = f"{gib(planned.device)} of {gib(env.allowed_memory(device, config.train.device_memory))}"
    where = f"{gib(planned.host)} GiB there, {where} planned on {device}: {planned.words}" if planned.host else f"{where} GiB planned"
    print(log.labelled("residence", f"{planned.residence}, {config.optim.state} state: {where}"))
    print(log.labelled("kernels", kernels.summary(kernels_of(config, device))))


def kernels_of(config: Config, device: torch.device) -> list[kernels.Choice]:
    """What runs the operations of the model."""
    cfg = config.model
    return [kernels.select(op, device, config.kernels, cfg.head_dim, env.compute_dtype(device)) for op in model.ops(cfg)]


def kernel_facts(config: Config, device: torch.device) -> dict[str, str]:
    """Of each operation, for env.json: what runs it, and why."""
    heads = config.train.batch_size * config.model.n_heads
    return {
        c.op: ", ".join(filter(None, (f"{c.backend} ({c.reason})", kernels.division(c, heads, config.data.seq_len, device))))
        for c in kernels_of(config, device)
    }


# -- the first state -------------------------------------------------------------------------------------------------------------------


def start(chosen: Residence, base: Base | None, corpus: data.Corpus, argv: list[str], preset: str) -> tuple[Path, State]:
    """A new run, and its state before the first step: with the weights of `base`, or with those that its seed gives.

    Where that fails, nothing is left behind.

    Args:
        preset: after which the run is called, unless it has a base or a name.
    """
    config, device = chosen.config, chosen.device
    run = runs.create(config, base.run.name if base else preset)
    try:
        event: dict[str, Any] = {"step": 0, "command": command_line(argv)}
        if base is None:
            state = init_state(chosen)
        else:
            step = checkpoint.chosen(base.run, base.which)
            state = finetune.first_state(base, step, chosen)
            event["init"] = finetune.origin(base, step)
            print(f"weights    {checkpoint.folder_of(base.run, step)}")
        facts = {**env.describe(device), "kernels": kernel_facts(config, device), "command": command_line(argv)}
        runs.describe(run, config, corpus.tokenizer, corpus.chat, facts)
        runs.remember(run, event)
    except BaseException:
        runs.remove(run)
        raise
    return run, state


def resume(run: Path, chosen: Residence, corpus: data.Corpus) -> tuple[State, Schedule, float]:
    """The state of a run's newest checkpoint, the schedule that it followed, and its last learning rate.

    Small files are put back where they are damaged.

    Raises:
        CheckpointError: if it is damaged, or of a version whose runs this one cannot continue exactly.
        DataError: if the text is another.
    """
    config, step = chosen.config, checkpoint.latest(run)
    with env.live("restoring"):
        state, meta = checkpoint.restore(run, step, config, chosen.store)
    if lacking := "data order" if meta["schedule"] is None else "dropout" if meta["format"] < 4 and config.model.dropout else "":
        raise checkpoint.CheckpointError(
            f"{checkpoint.folder_of(run, step)} was written by {checkpoint.WRITERS[meta['format']]} of hyperlm, "
            f"whose {lacking} this version does not have: go on with that version; chat.py and bench.py read it"
        )
    if meta["fingerprint"] != corpus.fingerprint:
        raise data.DataError(
            f"the text of {', '.join(config.data.sources)} changed since {run} was started, or another version of hyperlm prepared it: "
            "resuming would not be exact; start a new run"
        )
    runs.write_config(run, config)
    if file_digest(path := run / "tokenizer.json") != meta["tokenizer"]:
        runs.write_text(path, corpus.tokenizer.to_str(pretty=True))
        print(f"tokenizer  {path} was damaged or gone: put back")
    schedule = Schedule(**meta["schedule"])
    return state, schedule, learning_rate(schedule, from_dict(meta["config"]).optim)(max(0, state.updates - 1))


def resumed_schedule(
    run: Path,
    state: State,
    schedule: Schedule,
    rate: float,
    total: int,
    config: Config,
    changes: dict[str, tuple[Any, Any]],
    argv: list[str],
) -> Schedule:
    """The schedule that a resumed run follows from now on: what it was, unless its end or its warm-up is to be another.

    Said, and remembered. `rate` is the learning rate of its last step, `total` the step at which it ends.
    """
    if "optim.warmup_steps" in changes and state.updates < schedule.warmup:
        after = new_schedule(config.optim, total)
    else:
        after = schedule if total == schedule.end else extended(schedule, config.optim, state.updates, total)
    lr = learning_rate(after, config.optim)
    if after != schedule or any(name.startswith("optim.") for name in changes):
        then = f"{lr(state.updates):.2e} from there on, {lr(total):.2e} at step {total}"
        print(log.labelled("rate", f"{rate:.2e} up to step {state.step}, {then}"))
    event = {"step": state.step, "command": command_line(argv), "changes": changes, "lr": [rate, lr(state.updates)]}
    runs.remember(run, event)
    return after


def command_line(argv: list[str]) -> str:
    return " ".join([startup.command("train"), *argv])
