"""Train a hyperbolic language model: parse, resume or init, then a loop of { batch, step, log, evaluate, save }.

    python train.py --preset small            a whole run in about two minutes, on a CPU too
    python train.py --resume runs/x           go on exactly where runs/x stopped
    python train.py --preset max --plan       what a run would need, without starting it
"""

import math
import signal
import sys
import time
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from configs import PRESETS, Config, ConfigError, differences, resolve, to_dict
from hyperlm import checkpoint, cli, data, doctor, env, evals, log, model, plan, runs, sample, tree
from hyperlm import tokenizer as tok
from hyperlm.kernels import division, select
from hyperlm.state import State
from hyperlm.step import init_state, make_settle, make_step, place, weights
from hyperlm.tree import Tree

BAD_STEPS = 5  # steps without a finite gradient, in a row, that end a run
CHANGEABLE = ("train.steps", "train.epochs", "train.device", "train.device_memory", "train.residence", "train.compile", "train.recompute", "kernels", "ckpt.", "eval.", "log.", "data.cache")


@dataclass(frozen=True)
class Command(Config):
    preset: str = "standard"
    """small, standard, max or max-ssm: the settings that the rest of the command line starts from."""
    resume: str = ""
    """Folder of a run to continue exactly; with --train.steps, to extend."""
    plan: bool = False
    """Print the parameter count and the memory plan, and stop."""
    doctor: bool = False
    """Check this machine, and stop; exit code 0 only if training can run."""


def parse(argv: list[str]) -> tuple[Command, Config]:
    """The command, and its configuration checked."""
    preset, resume = cli.peek("preset", argv), cli.peek("resume", argv)
    if preset and resume:
        raise cli.UsageError("--preset and --resume exclude each other: a run keeps the settings it was started with")
    if preset and preset not in PRESETS:
        raise cli.UsageError(f"--preset {preset}: choose from {', '.join(PRESETS)}")
    stored = runs.read_config(Path(resume)) if resume else PRESETS[preset or "standard"]()
    command = cli.parse(Command, argv, Command(**vars(stored)), description=__doc__)
    config = Config(**{f.name: getattr(command, f.name) for f in fields(Config)})
    if resume:
        for name, (old, new) in differences(stored, config).items():
            if not name.startswith(CHANGEABLE):
                raise ConfigError(f"--{name.replace('_', '-')} {new}: {resume} was started with {old}, and a resumed run must keep it")
    return command, data.with_vocabulary(resolve(config))


def choose_residence(config: Config, device: torch.device) -> Config:
    """The configuration with its residence decided: the device if the memory plan fits it, else the host.

    Raises:
        TrainingError: if neither has the memory.
    """
    dtype, chosen = env.compute_dtype(device), config.train.residence
    allowed = env.allowed_memory(device, config.train.device_memory)
    here = plan.everything(config, dtype)
    if chosen == "auto":
        chosen = "device" if here.device <= allowed or device.type == "cpu" else "host"
        config = replace(config, train=replace(config.train, residence=chosen))
        if device.type == "cpu" and here.device > allowed:
            raise too_little(f"this run needs {here.device / env.GIB:.1f} GiB and {device} has {allowed / env.GIB:.1f}")
    if chosen == "host":
        there, have = plan.visits(config, dtype, allowed), env.available_memory(torch.device("cpu"))
        if there.device > allowed:
            raise too_little(f"on its visits to {device} this model needs {there.device / env.GIB:.1f} GiB, and {allowed / env.GIB:.1f} may be used")
        if there.host > have:
            small = plan.visits(replace(config, optim=replace(config.optim, state="int8")), dtype, allowed).host
            fits = f"--optim.state int8 needs {small / env.GIB:.1f}" if small <= have and small < there.host else "lower --model.d-model or --model.n-layers"
            raise cli.TrainingError(f"this run needs {there.host / env.GIB:.1f} GiB of host memory, and {have / env.GIB:.1f} are free: {fits}")
    if config.train.device_memory and device.type == "cuda":
        env.limit_memory(device, allowed)
    return config


def too_little(what: str) -> cli.TrainingError:
    return cli.TrainingError(f"{what}: lower --model.d-model, --model.n-layers or --train.batch-size, or set --train.recompute; --plan shows the parts")


def announce(config: Config, device: torch.device) -> None:
    """Say what will be trained, where, and with which kernels."""
    cfg = config.model
    print(f"model      {cfg.kind}, {sum(plan.parameters(config).values()):,} parameters, d {cfg.d_model}, {cfg.n_layers} layers")
    print(f"device     {device}, {str(env.compute_dtype(device)).removeprefix('torch.')}")
    if config.train.residence == "host":
        p = plan.visits(config, env.compute_dtype(device), env.allowed_memory(device, config.train.device_memory))
        print(f"residence  host: {p.host / env.GIB:.1f} GiB there, {config.optim.state} state; {p.device / env.GIB:.1f} GiB planned on {device},")
        print(f"           {p.group} of {config.train.grad_accum} micro-batches at a time, {plan.resident(config, p)}")
    for choice in (select(op, device, config.kernels, cfg.head_dim, env.compute_dtype(device)) for op in model.ops(cfg)):
        divided = division(choice, config.train.batch_size * cfg.n_heads, config.data.seq_len, device)
        print(f"kernel     {choice.op}: {choice.backend} ({choice.reason})" + (f", {divided}" if divided else ""))


def start(argv: list[str], preset: str, config: Config, corpus: data.Corpus, total: int, device: torch.device) -> tuple[Path, State]:
    """A new run, and the state that its seed gives."""
    run = runs.create(config, preset)
    state = init_state(config, total, device)
    corpus.tokenizer.save(str(run / "tokenizer.json"))
    runs.write_json(run / "env.json", {**env.describe(device), "command": " ".join(["python train.py", *argv])})
    return run, state


def resume(run: Path, config: Config, corpus: data.Corpus, device: torch.device) -> State:
    """The state of a run's newest checkpoint."""
    state, meta = checkpoint.restore(run, checkpoint.latest(run), config, place(config, device))
    if meta["fingerprint"] != corpus.fingerprint:
        raise data.DataError(f"the text of {', '.join(config.data.sources)} changed since {run} was started: resuming would not be exact; start a new run")
    return state


def diverged(run: Path, step: int) -> cli.TrainingError:
    good = checkpoint.folder_of(run, checkpoint.steps(run)[-1]) if checkpoint.steps(run) else "none"
    return cli.TrainingError(f"no finite loss or gradient for {BAD_STEPS} steps, up to step {step}; last good checkpoint: {good}; try a lower --optim.lr")


def write_sample(params: Tree, seed: int, corpus: data.Corpus, config: Config) -> str:
    """A text that begins with the configured prompt."""
    cfg, tokenizer = config.model, corpus.tokenizer
    prompt = tokenizer.encode(config.eval.prompt, add_special_tokens=False).ids
    end = tok.end_of_text(tokenizer)
    logits, cache = sample.read(params, [end, *prompt], sample.empty_cache(params, cfg), cfg, kernels=config.kernels)
    generator = torch.Generator().manual_seed(seed)
    decode = sample.decoder(params, cfg, kernels=config.kernels)
    drawn = sample.generate(logits, cache, sample.Sampling(), generator, stop={end}, usable=tokenizer.get_vocab_size(), decode=decode)
    ids = [token for (token, _, _), _ in zip(drawn, range(config.eval.sample_tokens), strict=False)]
    return config.eval.prompt + "".join(tok.stream(tokenizer, ids))


def evaluate(state: State, corpus: data.Corpus, order: data.Batches, config: Config, device: torch.device) -> tuple[dict[str, float], dict[str, Any]]:
    """Validation losses; and radius gauges with, if asked for, a sample."""
    params = weights(config, state.params, device)
    together = 1
    if config.train.residence == "host":  # the fewer visits of the blocks, the better
        dtype = env.compute_dtype(device)
        together = plan.evaluated(config, dtype, plan.visits(config, dtype, env.allowed_memory(device, config.train.device_memory)))
    val = evals.evaluate(params, corpus, config, device, together * config.train.batch_size)
    more: dict[str, Any] = evals.radius_gauges(params, order.at(0)[0, :, :-1].to(device), config)
    if config.eval.sample_tokens:
        more["sample"] = write_sample(params, state.seed + state.step, corpus, config)
    return val, more


def train(
    run: Path, state: State, total: int, corpus: data.Corpus, order: data.Batches, config: Config, device: torch.device
) -> tuple[State, dict[str, Any], signal.Signals | None]:
    """The loop, from `state` to step `total` or a signal.

    Returns:
        The last state, the newest value of everything that was logged, and the signal.
    """
    step, settle = make_step(config, total, device), make_settle(config, total, device)
    writer, in_place = checkpoint.manager(run, config.ckpt.keep), config.train.residence == "host"  # where a second copy would not fit
    records = log.open_log(run, state.step)
    saved, bad, val_loss, newest = max(checkpoint.steps(run), default=-1), 0, None, {}
    env.reset_peak_memory(device)
    timed_from, timed_step = time.monotonic(), state.step
    with env.stop_signals() as stop_signal:
        while state.step < total and not stop_signal():
            state, metrics = step(state, order.at(state.step))
            now, last, val_loss = state.step, state.step == total, None

            bad = bad + 1 if metrics["skipped"] else 0
            if bad == BAD_STEPS:
                checkpoint.finish(writer)
                raise diverged(run, now)

            if now % config.log.every == 0 or last or metrics["skipped"]:
                record = log.step_record(state, metrics, total, (time.monotonic() - timed_from) / (now - timed_step), env.peak_memory(device))
                log.record(records, now, record)
                print(log.step_line(now, total, record), flush=True)
                timed_from, timed_step, newest = time.monotonic(), now, newest | record

            paused = time.monotonic()
            if last or now % config.eval.every == 0 or now % config.ckpt.every == 0:
                state = settle(state)
            if now % config.eval.every == 0 or last:
                try:
                    val, more = evaluate(state, corpus, order, config, device)
                except Exception:
                    checkpoint.save(writer, state, corpus, None, in_place=in_place)
                    checkpoint.finish(writer)
                    print(f"the evaluation failed; step {now} is saved: go on with python train.py --resume {run}", file=sys.stderr)
                    raise
                log.record(records, now, val | more)
                print(log.eval_line(now, total, val))
                if "sample" in more:
                    print("  | " + more["sample"].rstrip().replace("\n", "\n  | "), flush=True)
                val_loss, newest = val["val_loss"], newest | val
            if now % config.ckpt.every == 0 or last:
                checkpoint.save(writer, state, corpus, val_loss, in_place=in_place)
                saved = now
            timed_from += time.monotonic() - paused
        if saved != state.step:  # a signal ended the loop, whenever in a step it came
            checkpoint.save(writer, settle(state), corpus, val_loss, in_place=in_place)
    checkpoint.finish(writer)
    writer.close()
    log.close(records)
    return state, newest, stop_signal()


def main(argv: list[str]) -> int:
    command, config = parse(argv)
    if command.plan:
        print(plan.table(config))
        return 0
    device = env.pick_device(config.train.device)
    env.prepare(device)
    if command.doctor:
        return doctor.check(device)
    config = choose_residence(config, device)
    checkpoint.require_room(Path(command.resume or runs.ROOT), plan.checkpoint_size(config))
    announce(config, device)

    corpus = data.prepare(config)
    order = data.batches(corpus, config)
    total = config.train.steps or math.ceil(config.train.epochs * order.steps_per_epoch)
    if command.resume:
        run = Path(command.resume)
        state = resume(run, config, corpus, device)
        if state.step >= total:
            print(f"{run} is complete at step {state.step}; extend it with --resume {run} --train.steps N")
            return 0
        runs.write_json(run / "config.json", to_dict(config))
    else:
        run, state = start(argv, command.preset, config, corpus, total, device)
    print(f"run        {run}, steps {state.step} to {total} ({total / order.steps_per_epoch:.2f} epochs)")
    if len(order.shares) > 1:
        print("mixture    " + ", ".join(f"{name} {share:.1%}" for name, share in order.shares.items()))
    if config.train.compile:
        print("compiling  the first step may take a minute", flush=True)

    started = time.monotonic()
    state, newest, stopped = train(run, state, total, corpus, order, config, device)
    if stopped and state.step < total:
        print(f"stopped by {stopped.name} after step {state.step}, all saved; go on with: python train.py --resume {run}")
        return 128 + stopped

    summary = {"steps": state.step, "parameters": tree.count(state.params), **newest, "seconds": round(time.monotonic() - started, 1), "device": str(device)}
    runs.write_json(run / "training_summary.json", summary)
    print(f"done       {run}: {log.summary_line(summary)}")
    print(f"talk to it with: python chat.py {run}")
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
