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
    health,
    launch,
    log,
    memory,
    passkey,
    runs,
    sample,
    startup,
    tree,
)
from hyperlm.config import Config, from_dict, peak_rate
from hyperlm.env import say
from hyperlm.files import file_digest
from hyperlm.optim import Schedule, new_schedule
from hyperlm.residence import Residence
from hyperlm.state import State
from hyperlm.step import make_flush, make_step, weights

FEW_STEPS = 50  # where their number follows from epochs, and a person may not know how few they are
BAD_STEPS = 5  # steps without a finite gradient, in a row, that end a run


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


def evaluate(residence: Residence, state: State, corpus: data.Corpus, order: data.Batches) -> tuple[dict[str, float], dict[str, Any]]:
    """Validation losses; and radius gauges with, if asked for, a sample."""
    params, config, device = weights(residence, state), residence.config, residence.device
    val = evals.evaluate(params, corpus, config, device, residence.eval_batch)
    gauges = evals.radius_gauges(params, order.at(0).tokens[0].to(device), config)
    if config.eval.sample_tokens:
        with suppress(sample.NotFinite):  # the losses tell
            gauges["sample"] = evals.write_sample(params, state.seed + state.step, corpus, config)
    return val, gauges


def train(
    run: Path, state: State, schedule: Schedule, total: int, corpus: data.Corpus, order: data.Batches, residence: Residence,
    *, evaluate_first: bool,
) -> tuple[State, signal.Signals | None]:  # fmt: skip
    """The loop, from `state` to step `total` or a signal.

    Args:
        evaluate_first: before the first step, so that it shows what training changes.

    Returns:
        The last state, and the signal.
    """
    config, device, in_place = residence.config, residence.device, residence.plan.host > 0  # a second copy would not fit
    facts = checkpoint.Facts(config, schedule, corpus.fingerprint, file_digest(run / "tokenizer.json"), corpus.chat)
    fastest = flops.seconds_a_token(config, device)
    with (
        env.live("the first step", total=total, initial=state.step, unit="step") as bar,
        env.stop_signals() as stop_signal,
        checkpoint.writing(run, config.ckpt.keep) as writer,
        log.recording(run, state.step) as records,
    ):
        log.tell_settings(records, config, state.step)
        step, flush = make_step(residence, schedule), make_flush(residence, schedule)
        yardstick, saved, bad, val_loss = health.sample_of(order, config), max(checkpoint.steps(run), default=-1), 0, None

        def save(state: State, val_loss: float | None) -> str:
            """Why `state` was not saved; empty if it was."""
            loss = health.loss_of(weights(residence, state), yardstick, config, device, residence.eval_batch)
            if not (flaw := health.flaw(state, loss, list(writer.losses.values()), config)):
                checkpoint.save(writer, state, facts, val_loss, loss, in_place=in_place)
            return flaw

        def measure(state: State) -> float | None:
            """Evaluate `state`, record and say it: the validation loss, None where it is not finite."""
            bar.set_description("evaluating", refresh=False)
            try:
                val, gauges = evaluate(residence, state, corpus, order)
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
                state = flush(state)
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
        if saved != state.step and (flaw := save(flush(state), val_loss)):  # a signal ended the loop, whenever in a step it came
            raise diverged(run, state.step, flaw, config)
    return state, stop_signal()


def carry_out(
    run: Path, state: State, schedule: Schedule, total: int, corpus: data.Corpus, order: data.Batches, residence: Residence,
    *, evaluate_first: bool,
) -> int:  # fmt: skip
    """Train, and tell how it went: the exit code."""
    config = residence.config
    print(log.labelled("run", f"{run}, steps {state.step} to {total} ({total / order.steps_per_epoch:.2f} epochs)"))
    if total < FEW_STEPS and not config.train.steps:
        print(log.labelled("hint", f"{total} steps teach little: raise --train.epochs, or make steps smaller by --train.grad-accum"))
    if len(order.shares) > 1:
        print(log.labelled("mixture", ", ".join(f"{name} {share:.1%}" for name, share in order.shares.items())))
    if config.train.compile:
        print(log.labelled("compiling", "the first step may take a minute"), flush=True)

    started = time.monotonic()
    try:
        state, stopped = train(run, state, schedule, total, corpus, order, residence, evaluate_first=evaluate_first)
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
    summary = summarise(run, state, residence.device, time.monotonic() - started)
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
        launch.show_plan(config, device)
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
        residence = launch.choose_residence(config, device)
        config = residence.config
        checkpoint.require_room(Path(command.resume or runs.ROOT), memory.checkpoint_size(config))
        launch.announce(residence)

        corpus = data.prepare(launch.with_own_tokenizer(Path(command.resume), config) if command.resume else config)
        passkey.check(config.eval.passkey, config.data.seq_len, corpus.tokenizer)
        order = data.batches(corpus, config)
        total = config.train.total_steps(order.steps_per_epoch)
        if command.resume:
            state, schedule, rate = launch.resume(run, residence, corpus)
            if state.step >= total:
                summarise(run, state, device)
                print(f"{run} is complete at step {state.step}; extend it with --resume {run} --train.steps N")
                return 0
            schedule = launch.resumed_schedule(run, state, schedule, rate, total, config, changes, argv)
        else:
            run, state = launch.start(residence, base, corpus, argv, command.preset)
            stack.push(lambda kind, *_: runs.remove(run) if kind and not (run / "metrics.jsonl").exists() else None)  # it never began
            stack.enter_context(runs.owned(run))
            schedule = new_schedule(config.optim, total)
            by_rule = f" (rule for d {config.model.d_model})" if config.optim.lr == peak_rate(config.model) else ""
            print(f"rate       {config.optim.lr:.1e} peak{by_rule}, warm-up to step {schedule.warmup}")
        return carry_out(run, state, schedule, total, corpus, order, residence, evaluate_first=base is not None)


if __name__ == "__main__":
    cli.end(cli.run(main))
