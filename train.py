"""Train a hyperbolic language model: parse, resume or init; then the loop.

    python train.py --preset small         a whole run in two minutes
    python train.py --resume runs/x        go on exactly where runs/x stopped
    python train.py --init runs/x --data.sources talks.jsonl
                                           a new run from its weights: fine-tuning
    python train.py --preset max --plan    what a run takes on this machine

What each setting means is in hyperlm/config.py; presets are in configs.py.
"""

if __name__ == "__main__":
    from hyperlm import startup

    startup.quiet()  # before the slow imports

import math
import signal
import sys
import time
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from configs import PRESETS
from hyperlm import (
    checkpoint,
    cli,
    data,
    doctor,
    env,
    evals,
    flops,
    forecast,
    health,
    launch,
    log,
    model,
    passkey,
    plan,
    runs,
    sample,
    startup,
    tree,
)
from hyperlm.config import Config, from_dict, peak_rate
from hyperlm.env import say
from hyperlm.files import file_digest
from hyperlm.kernels import Choice, division, select
from hyperlm.kernels import summary as kernel_summary
from hyperlm.optim import Schedule, new_schedule
from hyperlm.state import State
from hyperlm.step import make_settle, make_step, weights

FEW_STEPS = 50  # where their number follows from epochs, and a person may not know how few they are
BAD_STEPS = 5  # steps without a finite gradient, in a row, that end a run


def choose_residence(config: Config, device: torch.device) -> Config:
    """The configuration with its residence and the optimizer's state decided: see `plan.decided`.

    Raises:
        TrainingError: if nothing that the settings leave open has the memory.
    """
    dtype, asked = env.compute_dtype(device), config
    allowed, have = env.allowed_memory(device, config.train.device_memory), env.available_memory(torch.device("cpu"))
    config = plan.decided(config, dtype, allowed, have, gpu=device.type == "cuda")
    if config.train.residence == "host":
        there = plan.visits(config, dtype, allowed)
        if there.device > allowed:
            raise too_little(
                f"on its visits to {device} this model needs {there.device / env.GIB:.1f} GiB, and {allowed / env.GIB:.1f} may be used"
            )
        if there.host > have:
            small = plan.visits(replace(config, optim=replace(config.optim, state="int8")), dtype, allowed).host
            fits = (
                f"--optim.state int8 needs {small / env.GIB:.1f}"
                if small <= have and small < there.host
                else "lower --model.d-model or --model.n-layers"
            )
            raise cli.TrainingError(
                f"this run needs {there.host / env.GIB:.1f} GiB of host memory, and {have / env.GIB:.1f} are free: {fits}"
            )
    elif asked.train.residence == "auto" and device.type == "cpu" and (need := plan.everything(config, dtype).device) > allowed:
        raise too_little(f"this run needs {need / env.GIB:.1f} GiB and {device} has {allowed / env.GIB:.1f}")
    if asked.optim.state == "auto" and config.optim.state == "int8":
        wide = replace(config, optim=replace(config.optim, state="fp32"))
        on_device = [f"{plan.everything(wide, dtype).device / env.GIB:.1f} GiB on {device}"] if asked.train.residence != "host" else []
        in_host = [f"{plan.visits(wide, dtype, allowed).host / env.GIB:.1f} GiB of host memory"] if config.train.residence == "host" else []
        print(log.labelled("state", f"int8: fp32 needs {' or '.join(on_device + in_host)}"))
    if config.train.device_memory and device.type == "cuda":
        env.limit_memory(device, allowed)
    return config


def show_plan(config: Config, device: torch.device) -> None:
    """What the run would need and take."""
    print(*forecast.needs(config), forecast.machine(config, device), sep="\n", flush=True)
    try:
        config = choose_residence(config, device)
    except cli.TrainingError as e:
        print(log.labelled("fits", f"no: {str(e).removesuffix(SHOWN)}"))
        return
    for line in forecast.here(config, device):
        print(line, flush=True)


SHOWN = "; --plan shows the parts"


def too_little(what: str) -> cli.TrainingError:
    return cli.TrainingError(
        f"{what}: lower --model.d-model, --model.n-layers, --data.seq-len or --train.batch-size, or set --train.recompute{SHOWN}"
    )


def announce(config: Config, device: torch.device) -> None:
    """Say what will be trained, where, and with which kernels."""
    cfg, dtype = config.model, env.compute_dtype(device)
    allowed = env.allowed_memory(device, config.train.device_memory)
    print(
        log.labelled("model", f"{cfg.kind}, {sum(plan.parameters(config).values()):,} parameters, d {cfg.d_model}, {cfg.n_layers} layers")
    )
    print(log.labelled("device", f"{device}, {str(dtype).removeprefix('torch.')}"))
    if config.train.residence == "host":
        p = plan.visits(config, dtype, allowed)
        where = f"{p.host / env.GIB:.1f} GiB there, {p.device / env.GIB:.1f} of {allowed / env.GIB:.1f} planned on {device}: "
        where += f"{p.group} of {config.train.grad_accum} micro-batches at a time; {plan.resident(config, p)}"
    else:
        where = f"{plan.everything(config, dtype).device / env.GIB:.1f} of {allowed / env.GIB:.1f} GiB planned"
    print(log.labelled("residence", f"{config.train.residence}, {config.optim.state} state: {where}"))
    print(log.labelled("kernels", kernel_summary(kernels_of(config, device))))


def kernels_of(config: Config, device: torch.device) -> list[Choice]:
    """What runs the operations of the model."""
    cfg = config.model
    return [select(op, device, config.kernels, cfg.head_dim, env.compute_dtype(device)) for op in model.ops(cfg)]


def kernel_facts(config: Config, device: torch.device) -> dict[str, str]:
    """Of each operation, for env.json: what runs it, and why."""
    heads = config.train.batch_size * config.model.n_heads
    return {
        c.op: ", ".join(filter(None, (f"{c.backend} ({c.reason})", division(c, heads, config.data.seq_len, device))))
        for c in kernels_of(config, device)
    }


def diverged(run: Path, step: int, why: str, config: Config) -> cli.TrainingError:
    good = checkpoint.steps(run)
    if not good:
        return cli.TrainingError(
            f"diverged by step {step}: {why}; no checkpoint was good enough to save: "
            f"remove {run} (rm -r {run}), and start again with a lower --optim.lr"
        )
    settled = from_dict(checkpoint.read_meta(run, good[-1])["config"]).optim.lr  # the rate that led there did no harm until then
    return cli.TrainingError(
        f"diverged by step {step}: {why}; the last checkpoint with a finite loss is {checkpoint.folder_of(run, good[-1])}: "
        f"go on from there with a lower rate, {startup.command('train')} --resume {run} --optim.lr {min(settled, config.optim.lr / 10):.0e}"
    )


def evaluation_batch(config: Config, device: torch.device) -> int:
    """Sequences that are evaluated at a time."""
    together = 1
    if config.train.residence == "host":  # the fewer visits of the blocks, the better
        dtype = env.compute_dtype(device)
        together = plan.evaluated(config, dtype, plan.visits(config, dtype, env.allowed_memory(device, config.train.device_memory)))
    return together * config.train.batch_size


def evaluate(
    state: State, corpus: data.Corpus, order: data.Batches, config: Config, device: torch.device
) -> tuple[dict[str, float], dict[str, Any]]:
    """Validation losses; and radius gauges with, if asked for, a sample."""
    params = weights(config, state, device)
    val = evals.evaluate(params, corpus, config, device, evaluation_batch(config, device))
    gauges = evals.radius_gauges(params, order.at(0).tokens[0].to(device), config)
    if config.eval.sample_tokens:
        with suppress(sample.NotFinite):  # the losses tell
            gauges["sample"] = evals.write_sample(params, state.seed + state.step, corpus, config)
    return val, gauges


def train(
    run: Path, state: State, schedule: Schedule, total: int, corpus: data.Corpus, order: data.Batches, config: Config, device: torch.device,
    *, evaluate_first: bool,
) -> tuple[State, signal.Signals | None]:  # fmt: skip
    """The loop, from `state` to step `total` or a signal.

    Args:
        evaluate_first: before the first step, so that it shows what training changes.

    Returns:
        The last state, and the signal.
    """
    in_place = config.train.residence == "host"  # where a second copy would not fit
    facts = checkpoint.Facts(config, schedule, corpus.fingerprint, file_digest(run / "tokenizer.json"), corpus.chat)
    fastest = flops.seconds_a_token(config, device)
    with (
        env.live("the first step", total=total, initial=state.step, unit="step") as bar,
        env.stop_signals() as stop_signal,
        checkpoint.writing(run, config.ckpt.keep) as writer,
        log.recording(run, state.step) as records,
    ):
        log.tell_settings(records, config, state.step)
        step, settle = make_step(config, schedule, device), make_settle(config, schedule, device)
        yardstick, saved, bad, val_loss = health.sample_of(order, config), max(checkpoint.steps(run), default=-1), 0, None

        def save(state: State, val_loss: float | None) -> str:
            """Why `state` was not saved; empty if it was."""
            loss = health.loss_of(weights(config, state, device), yardstick, config, device, evaluation_batch(config, device))
            if not (flaw := health.flaw(state, loss, list(writer.losses.values()), config)):
                checkpoint.save(writer, state, facts, val_loss, loss, in_place=in_place)
            return flaw

        def measure(state: State) -> float | None:
            """Evaluate `state`, record and say it: the validation loss, None where it is not finite."""
            bar.set_description("evaluating", refresh=False)
            try:
                val, gauges = evaluate(state, corpus, order, config, device)
            except Exception:
                if health.all_finite(state):
                    checkpoint.save(writer, state, facts, None, None, in_place=in_place)
                    checkpoint.finish(writer)
                    print(
                        f"the evaluation failed; step {state.step} is saved: go on with {startup.command('train')} --resume {run}",
                        file=sys.stderr,
                    )
                raise
            log.record(records, state.step, val | gauges)
            say(log.eval_line(state.step, total, val, state.tokens))
            if "sample" in gauges:
                say("  | " + sample.printable(gauges["sample"]).rstrip().replace("\n", "\n  | "))
            return val["val_loss"] if math.isfinite(val["val_loss"]) else None

        if evaluate_first:
            measure(state)
            bar.set_description("the first step", refresh=False)
        env.reset_peak_memory(device)
        timed_from, timed_step = time.monotonic(), state.step
        while state.step < total and not stop_signal():
            state, metrics = step(state, order.at(state.step))
            now, last, val_loss = state.step, state.step == total, None
            bar.set_description("training", refresh=False)
            bar.update()

            if now % config.log.every == 0 or last or metrics["skipped"]:
                record = log.step_record(
                    state, metrics, total, (time.monotonic() - timed_from) / (now - timed_step), env.peak_memory(device), fastest
                )
                log.record(records, now, record)
                say(log.step_line(now, total, record))
                timed_from, timed_step = time.monotonic(), now

            bad = bad + 1 if metrics["skipped"] else 0
            if bad == BAD_STEPS:
                raise diverged(run, now, f"no finite loss or gradient for {BAD_STEPS} steps", config)

            paused = time.monotonic()
            if last or now % config.eval.every == 0 or now % config.ckpt.every == 0:
                state = settle(state)
            if now % config.eval.every == 0 or last:
                val_loss = measure(state)
            if now % config.ckpt.every == 0 or last:
                bar.set_description("saving", refresh=False)
                if not (flaw := save(state, val_loss)):
                    saved = now
                elif last:
                    raise diverged(run, now, flaw, config)
                else:
                    say(f"not saved  step {now}: {flaw}" + ("; earlier checkpoints stay" if writer.losses else ""))
            timed_from += time.monotonic() - paused
        if saved != state.step and (flaw := save(settle(state), val_loss)):  # a signal ended the loop, whenever in a step it came
            raise diverged(run, state.step, flaw, config)
    return state, stop_signal()


def carry_out(
    run: Path, state: State, schedule: Schedule, total: int, corpus: data.Corpus, order: data.Batches, config: Config, device: torch.device,
    *, evaluate_first: bool,
) -> int:  # fmt: skip
    """Train, and tell how it went: the exit code."""
    print(log.labelled("run", f"{run}, steps {state.step} to {total} ({total / order.steps_per_epoch:.2f} epochs)"))
    if total < FEW_STEPS and not config.train.steps:
        print(log.labelled("hint", f"{total} steps teach little: raise --train.epochs, or make steps smaller by --train.grad-accum"))
    if len(order.shares) > 1:
        print(log.labelled("mixture", ", ".join(f"{name} {share:.1%}" for name, share in order.shares.items())))
    if config.train.compile:
        print(log.labelled("compiling", "the first step may take a minute"), flush=True)

    started = time.monotonic()
    try:
        state, stopped = train(run, state, schedule, total, corpus, order, config, device, evaluate_first=evaluate_first)
    except runs.RunError as e:  # records that cannot be written
        raise cli.TrainingError(f"{e}; {checkpoint.way_on(run)}") from e
    if stopped and state.step < total:
        with suppress(OSError):  # where a terminal or a pipe was closed, there may still be the other
            out = sys.stderr if stopped == env.HANGUP else sys.stdout
            print(
                f"stopped by {stopped.name} after step {state.step}, all saved; go on with: {startup.command('train')} --resume {run}",
                file=out,
                flush=True,
            )
        return 128 + stopped
    summary = summarise(run, state, device, time.monotonic() - started)
    say(log.summary_lines(run, summary))
    say(f"talk to it with: {startup.command('chat')} {run}")
    return 0


def summarise(run: Path, state: State, device: torch.device, seconds: float | None = None) -> dict[str, Any]:
    """Write training_summary.json; without `seconds` (a run that is complete) only where a kill at the very end left none."""
    path = run / "training_summary.json"
    summary = {"steps": state.step, "parameters": tree.count(state.params), **log.newest(run), "device": str(device)}
    if seconds is not None:
        summary["seconds"] = round(seconds, 1)
    if seconds is not None or not path.exists():
        runs.write_json(path, summary)
    return summary


def parse(argv: list[str]) -> launch.Launch:
    """`launch.parse` with the presets of configs.py."""
    return launch.parse(argv, PRESETS, __doc__)


def main(argv: list[str]) -> int:
    """Start a run, and train: the exit code. A run starts from the first of these that is asked for.

    --resume runs/x   its newest checkpoint, schedule and settings: exactly where it stopped
    --init runs/x     the weights of another run, with new moments and a new schedule: fine-tuning
    neither           the weights that the seed gives
    """
    command, config, base, changes = parse(argv)
    device = env.pick_device(config.train.device)
    env.prepare(device)
    if command.plan:
        show_plan(config, device)
        return 0
    if command.doctor:
        return doctor.check(device, data.cache_folder(config.data))
    with ExitStack() as stack:
        if command.resume:
            run = Path(command.resume)
            stack.enter_context(runs.owned(run))
            checkpoint.clear_away(run)
        else:
            runs.require_new(config.name)
        config = choose_residence(config, device)
        checkpoint.require_room(Path(command.resume or runs.ROOT), plan.checkpoint_size(config))
        announce(config, device)

        corpus = data.prepare(launch.with_own_tokenizer(Path(command.resume), config) if command.resume else config)
        passkey.check(config.eval.passkey, config.data.seq_len, corpus.tokenizer)
        order = data.batches(corpus, config)
        total = config.train.total_steps(order.steps_per_epoch)
        if command.resume:
            state, schedule, rate = launch.resume(run, config, corpus, device)
            if state.step >= total:
                summarise(run, state, device)
                print(f"{run} is complete at step {state.step}; extend it with --resume {run} --train.steps N")
                return 0
            schedule = launch.resumed_schedule(run, state, schedule, rate, total, config, changes, argv)
        else:
            run, state = launch.start(config, base, corpus, device, argv, command.preset, kernel_facts(config, device))
            stack.push(lambda kind, *_: runs.remove(run) if kind and not (run / "metrics.jsonl").exists() else None)  # it never began
            stack.enter_context(runs.owned(run))
            schedule = new_schedule(config.optim, total)
            by_rule = f" (rule for d {config.model.d_model})" if config.optim.lr == peak_rate(config.model) else ""
            print(f"rate       {config.optim.lr:.1e} peak{by_rule}, warm-up to step {schedule.warmup}")
        return carry_out(run, state, schedule, total, corpus, order, config, device, evaluate_first=base is not None)


if __name__ == "__main__":
    cli.end(cli.run(main))
