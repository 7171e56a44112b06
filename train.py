"""Train a hyperbolic language model: parse, resume or init, then a loop of { batch, step, log, evaluate, save }.

    python train.py --preset small            a whole run in about two minutes, on a CPU too
    python train.py --resume runs/x           go on exactly where runs/x stopped
    python train.py --preset max --plan       what a run would need, without starting it
"""

import json
import math
import sys
import time
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from configs import PRESETS, Config, ConfigError, differences, resolve, to_dict
from hyperlm import checkpoint, cli, data, doctor, env, evals, log, plan, runs, sample, tree
from hyperlm import tokenizer as tok
from hyperlm.kernels import OPS, select
from hyperlm.step import compute_copy, init_state, make_step
from hyperlm.tree import Tree

BAD_STEPS = 5  # steps without a finite gradient, in a row, that end a run
CHANGEABLE = ("train.steps", "train.epochs", "train.device", "train.compile", "train.recompute", "kernels", "ckpt.", "eval.", "log.", "data.cache")


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


def check_memory(config: Config, device: torch.device) -> None:
    """Refuse a run that the memory plan says cannot fit, unless --train.residence device insists."""
    need = plan.plans(config, env.compute_dtype(device))[0].device
    have = env.total_memory(device)
    if config.train.residence == "auto" and need > have:
        raise cli.TrainingError(
            f"this run needs {need / env.GIB:.1f} GiB and {device} has {have / env.GIB:.1f}: lower --model.d-model, --model.n-layers or "
            "--train.batch-size, or set --train.recompute; --plan shows the parts"
        )


def write_sample(params: Tree, seed: int, corpus: data.Corpus, config: Config) -> str:
    """A text that begins with the configured prompt."""
    cfg, tokenizer = config.model, corpus.tokenizer
    prompt = tokenizer.encode(config.eval.prompt, add_special_tokens=False).ids
    end = tok.end_of_text(tokenizer)
    logits, cache = sample.read(params, [end, *prompt], sample.empty_cache(params, cfg), cfg, kernels=config.kernels)
    generator = torch.Generator().manual_seed(seed)
    drawn = sample.generate(
        params, logits, cache, cfg, sample.Sampling(), generator, stop={end}, usable=tokenizer.get_vocab_size(), kernels=config.kernels
    )
    ids = [token for (token, _, _), _ in zip(drawn, range(config.eval.sample_tokens), strict=False)]
    return config.eval.prompt + "".join(tok.stream(tokenizer, ids))


def main(argv: list[str]) -> int:
    command, config = parse(argv)
    if command.plan:
        print(plan.table(config))
        return 0
    device = env.pick_device(config.train.device)
    env.prepare(device)
    if command.doctor:
        return doctor.check(device)
    check_memory(config, device)
    choices = [select(op, device, config.kernels) for op in OPS]

    print(f"model      {config.model.kind}, {sum(plan.parameters(config).values()):,} parameters, d {config.model.d_model}, {config.model.n_layers} layers")
    print(f"device     {device}, {str(env.compute_dtype(device)).removeprefix('torch.')}")
    for choice in choices:
        print(f"kernel     {choice.op}: {choice.backend} ({choice.reason})")
    corpus = data.prepare(config)
    order = data.batches(corpus, config)
    total = config.train.steps or math.ceil(config.train.epochs * order.steps_per_epoch)

    # Where the state comes from: a run's newest checkpoint, or the seed.
    if command.resume:
        run = Path(command.resume)
        state, meta = checkpoint.restore(run, checkpoint.latest(run), config.model, device)
        if meta["fingerprint"] != corpus.fingerprint:
            raise data.DataError(f"the text of {', '.join(config.data.sources)} changed since {run} was started: resuming would not be exact; start a new run")
        if state.step >= total:
            print(f"{run} is complete at step {state.step}; extend it with --resume {run} --train.steps N")
            return 0
        runs.write_json(run / "config.json", to_dict(config))
    else:
        run = runs.create(config, command.preset)
        state = init_state(config, total, device)
        corpus.tokenizer.save(str(run / "tokenizer.json"))
        runs.write_json(run / "env.json", {**env.describe(device), "command": " ".join(["python train.py", *argv])})
    print(f"run        {run}, steps {state.step} to {total} ({total / order.steps_per_epoch:.2f} epochs)")
    if len(order.shares) > 1:
        print("mixture    " + ", ".join(f"{name} {share:.1%}" for name, share in order.shares.items()))
    if config.train.compile:
        print("compiling  the first step may take a minute", flush=True)

    step = make_step(config, total, device)
    writer = checkpoint.manager(run, config.ckpt.keep)
    records = log.open_log(run, state.step)
    env.reset_peak_memory(device)
    started, timed_from, timed_step, bad, val, evaluated = time.monotonic(), time.monotonic(), state.step, 0, {}, False
    saved = state.step if command.resume else -1
    with env.stop_signals() as stop_signal:
        while state.step < total and not stop_signal():
            state, metrics = step(state, order.at(state.step))
            now, last = state.step, state.step == total

            bad = bad + 1 if metrics["skipped"] else 0
            if bad == BAD_STEPS:
                checkpoint.finish(writer)
                good = checkpoint.folder_of(run, checkpoint.steps(run)[-1]) if checkpoint.steps(run) else "none"
                raise cli.TrainingError(f"no finite loss or gradient for {BAD_STEPS} steps, up to step {now}; last good checkpoint: {good}; try a lower --optim.lr")

            if now % config.log.every == 0 or last or metrics["skipped"]:
                seconds = time.monotonic() - timed_from
                per_step = seconds / (now - timed_step)
                record = {
                    "tokens": state.tokens,
                    "loss": float(metrics["loss"]),
                    "lr": metrics["lr"],
                    "grad_norm": float(metrics["grad_norm"]),
                    "tokens_per_second": metrics["tokens"] / per_step,
                    "peak_memory_gib": env.peak_memory(device) / env.GIB,
                    "seconds_left": (total - now) * per_step,
                    "skipped": now - state.updates,
                }
                log.record(records, now, record)
                print(log.step_line(now, total, record), flush=True)
                timed_from, timed_step = time.monotonic(), now

            paused = time.monotonic()
            if evaluated := now % config.eval.every == 0 or last:
                params = compute_copy(state.params, env.compute_dtype(device))
                val = evals.evaluate(params, corpus, config, device)
                gauges = evals.radius_gauges(params, order.at(0)[0, :, :-1].to(device), config)
                text = write_sample(params, state.seed + now, corpus, config) if config.eval.sample_tokens else ""
                log.record(records, now, {**val, **gauges, "sample": text})
                print(log.eval_line(now, total, val))
                if text:
                    print("  | " + text.rstrip().replace("\n", "\n  | "), flush=True)
            if now % config.ckpt.every == 0 or last:
                checkpoint.save(writer, state, corpus, val["val_loss"] if evaluated else None)
                saved = now
            timed_from += time.monotonic() - paused
        if saved != state.step:  # a signal ended the loop, whenever in a step it came
            checkpoint.save(writer, state, corpus, val["val_loss"] if evaluated else None)
    checkpoint.finish(writer)
    writer.close()
    log.close(records)

    if stop_signal() and state.step < total:
        print(f"stopped by {stop_signal().name} after step {state.step}, all saved; go on with: python train.py --resume {run}")
        return 128 + stop_signal()
    summary = {
        "steps": state.step,
        "tokens": state.tokens,
        "skipped": state.step - state.updates,
        "parameters": tree.count(state.params),
        "loss": record["loss"],
        **val,
        "peak_memory_gib": record["peak_memory_gib"],
        "seconds": round(time.monotonic() - started, 1),
        "device": str(device),
    }
    runs.write_json(run / "training_summary.json", summary)
    print(f"done       {run}: {json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in summary.items()})}")
    print(f"talk to it with: python chat.py {run}")
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
