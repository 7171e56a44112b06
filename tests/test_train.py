"""train.py as a person uses it: whole runs, resuming after every kind of end, and one clear line for every mistake."""

import itertools
import json
import math
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import CASES, SMALLEST, TINY

import bench
import chat
import train
from hyperlm import checkpoint, cli, data, health, log, model, residence, runs, startup, tree
from hyperlm.config import Config
from hyperlm.files import digest
from hyperlm.state import State

REPOSITORY = Path(train.__file__).parent


def call(*arguments: str) -> int:
    return cli.run(train.main, [str(a) for a in arguments])


def start(prose: Path, name: str, *more: str) -> int:
    return call(*SMALLEST, "--data.sources", prose, "--name", name, *more)


def losses(run: str | Path) -> dict[int, float]:
    """By step, of a run or of the one called so."""
    records = [json.loads(line) for line in (Path("runs") / run / "metrics.jsonl").read_text().splitlines()]
    return {r["step"]: r["loss"] for r in records if "loss" in r}


def final(run: str | Path):
    run = Path("runs") / run  # which is the run, if that is a whole path
    return checkpoint.restore(run, checkpoint.latest(run), runs.read_config(run), lambda stage: stage)[0]


def same(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(tree.leaves((a.params, a.opt_state)), tree.leaves((b.params, b.opt_state)), strict=True))


def test_a_disk_too_small_for_a_checkpoint_ends_a_run_before_it_starts(prose, capsys, monkeypatch):
    assert start(prose, "a", "--train.steps", "1") == 0
    state = final("a")
    need = sum(x.nbytes for x in tree.leaves((state.params, state.opt_state)))
    free = {"bytes": need}
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": free["bytes"]}))
    assert start(prose, "b", "--train.steps", "1") == 0
    free["bytes"] -= 1
    capsys.readouterr()
    assert start(prose, "c", "--train.steps", "1") == 2
    assert capsys.readouterr().err.startswith("error: a checkpoint of this run takes") and not Path("runs/c").exists()


def test_a_run_writes_everything_it_promises(prose, capsys):
    assert start(prose, "a", "--train.steps", "4", "--ckpt.every", "2", "--eval.every", "2", "--eval.prompt", "def ") == 0
    run = Path("runs/a")
    assert {p.name for p in run.iterdir()} >= {
        "config.json",
        "env.json",
        "tokenizer.json",
        "metrics.jsonl",
        "training_summary.json",
        "checkpoints",
    }
    assert any(p.name.startswith("events") for p in run.iterdir())
    assert "chat_template" not in json.loads((run / "tokenizer_config.json").read_text())
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps, evaluations = [r for r in records if "loss" in r], [r for r in records if "val_loss" in r]
    assert [r["step"] for r in steps] == [1, 2, 3, 4] and [r["step"] for r in evaluations] == [2, 4]
    assert set(steps[0]) == {"step", "tokens", "loss", "lr", "grad_norm", "tokens_per_second", "peak_memory_gib", "seconds_left", "skipped"}
    assert steps[-1]["tokens"] == 4 * 2 * 4 * 32
    last = evaluations[-1]
    assert last["val_ppl"] == pytest.approx(math.exp(last["val_loss"])) and last["val_bpb"] > 0 and last["sample"].startswith("def ")
    assert {f"radius/layer_{layer:02d}/{x}_{what}" for layer in (0, 1) for x in "qk" for what in ("mean", "p05", "p95")} <= set(last)
    assert json.loads((run / "training_summary.json").read_text())["val_bpb"] == last["val_bpb"]
    ran = json.loads((run / "env.json").read_text())["kernels"]
    assert set(ran) == set(model.ops(runs.read_config(run).model)) and all(
        said.startswith(("torch (", "triton (")) for said in ran.values()
    )
    lines = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("  | ")]
    assert sum(line.startswith("kernels ") for line in lines) == 1 and not any("\r" in line for line in lines)
    assert (
        all(len(line) <= 80 for line in lines if not line.startswith(("data ", "split ")))
        and sum("bits per byte" in line for line in lines) == 3
    )


def test_bits_per_byte_are_those_of_text_alone(prose):
    assert start(prose, "a", "--train.steps", "1", "--eval.max-tokens", "0", "--data.val-fraction", "0.3") == 0
    config = runs.read_config(Path("runs/a"))
    corpus = data.prepare(config, say=lambda line: None)
    record = json.loads(Path("runs/a/metrics.jsonl").read_text().splitlines()[-1])
    windows, _ = data.validation_sequences(corpus.shards[0], config.data, 0)
    targets = windows.targets.flatten()
    logits = model.apply(final("a").params, windows.tokens, config.model).flatten(0, 1)
    nats = torch.nn.functional.cross_entropy(logits, targets, ignore_index=-1, reduction="none").double()
    text = corpus.tokenizer.decode(targets[targets >= 0].tolist(), skip_special_tokens=True)
    ends = targets == corpus.tokenizer.token_to_id("<|endoftext|>")
    assert int(ends.sum()) > 1
    assert record["val_loss"] == pytest.approx(nats.sum().item() / int((targets >= 0).sum()), rel=1e-5)
    assert record["val_documents"] == len(corpus.shards[0].val_documents)
    assert record["val_bpb"] == pytest.approx(nats[~ends].sum().item() / math.log(2) / len(text.encode()), rel=1e-5)


def test_losses_fall_on_text(prose):
    assert start(prose, "a", "--train.steps", "80", "--optim.lr", "0.01", "--eval.every", "80") == 0
    assert losses("a")[80] < losses("a")[1] - 1.0


HOST = ["--train.residence", "host", "--optim.state"]


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("phase7", []),
        ("phase8", []),
        ("softmax", []),
        ("hybrid-ssm", []),
        ("hybrid-ssm", [*HOST, "fp32"]),
        ("phase8", [*HOST, "int8"]),
        ("phase7", ["--optim.state", "int8"]),
    ],
)
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(prose, kind, more):
    cfg = CASES[kind]
    model = [
        "--model.kind",
        cfg.kind,
        "--model.exact-every",
        cfg.exact_every,
        "--model.ssm" if cfg.ssm else "--model.no-ssm",
        "--model.dropout",
        "0.1",
    ]
    common = [*model, *more, "--train.steps", "6", "--ckpt.every", "3", "--ckpt.keep", "9", "--eval.every", "3"]
    assert start(prose, "whole", *common) == 0
    assert start(prose, "parts", *common) == 0
    shutil.rmtree("runs/parts/checkpoints/step_00000006")
    assert call("--resume", "runs/parts") == 0
    assert losses("whole") == losses("parts")
    assert same(final("whole"), final("parts"))


@pytest.mark.parametrize(
    ("residence", "loss"), [([], "assistant"), ([], "all"), ([*HOST, "fp32"], "assistant"), ([*HOST, "int8"], "assistant")], ids=str
)
def test_a_run_on_conversations_resumes_bit_for_bit_in_the_middle_of_an_epoch_and_in_the_next(tmp_path, capsys, residence, loss):
    """Packed anew in each epoch, with texts beside them; what it learns from is counted, and said."""
    rng, path = random.Random(0), tmp_path / "talks.jsonl"
    rows = [{"question": f"q{i} " * rng.randint(1, 4), "answer": f"a{i} " * rng.randint(1, 9)} for i in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"text": "a text. " * 20}]))
    flags = "--data.tokenizer bytes --data.val-fraction 0.3 --train.steps 7 --ckpt.every 2 --ckpt.keep 9 --eval.every 4".split()
    for name in ("whole", "parts"):
        assert start(path, name, *flags, "--data.loss", loss, *residence) == 0
    said = capsys.readouterr().out
    for step in ("6", "7"):
        shutil.rmtree(f"runs/parts/checkpoints/step_0000000{step}")
    assert call("--resume", "runs/parts") == 0
    assert losses("whole") == losses("parts") and same(final("whole"), final("parts"))

    config = runs.read_config(Path("runs/whole"))
    order = data.batches(data.prepare(config, say=lambda line: None), config, say=lambda line: None)
    learnt = sum(int((order.at(step).targets >= 0).sum()) for step in range(7))
    assert final("whole").tokens == learnt < 7 * 8 * 32 and 4 < order.steps_per_epoch < 7
    assert ("loss       on what the assistant says, " in said) == (loss == "assistant") and "conversations packed into" in said
    assert json.loads(Path("runs/whole/tokenizer_config.json").read_text())["eos_token"] == "<|end|>"


def test_a_run_goes_on_in_another_residence(prose):
    """And ends as it would have ended where it was, to the bit."""
    assert start(prose, "whole", "--train.steps", "4", "--ckpt.every", "2", "--ckpt.keep", "9") == 0
    shutil.copytree("runs/whole", "runs/parts")
    shutil.rmtree("runs/parts/checkpoints/step_00000004")
    assert call("--resume", "runs/parts", *HOST[:2]) == 0
    a, b = final("whole"), final("parts")
    assert (a.step, a.tokens) == (b.step, b.tokens) and runs.read_config(Path("runs/parts")).train.residence == "host"
    assert losses("whole") == losses("parts") and same(a, b)


def test_the_state_that_auto_took_is_stored_and_kept(prose, monkeypatch, capsys):
    """Where there is room for 8 bits alone; more of it later changes nothing."""
    config = train.parse([*SMALLEST, "--optim.state", "int8"]).config
    room = residence.plan(config, torch.float32, 0).device
    with monkeypatch.context() as during:
        during.setattr("hyperlm.env.allowed_memory", lambda device, budget: room)
        assert start(prose, "a", "--train.steps", "2", "--train.device", "cpu") == 0
    assert "state      int8: fp32 needs" in capsys.readouterr().out
    assert call("--resume", "runs/a", "--train.steps", "3") == 0
    assert runs.read_config(Path("runs/a")).optim.state == "int8" and final("a").params["head"]["weight"].dtype == torch.bfloat16


def test_too_little_host_memory_is_one_line_with_what_would_fit(prose, capsys, monkeypatch):
    monkeypatch.setattr("hyperlm.env.available_memory", lambda device: 350_000)
    assert start(prose, "a", *HOST, "fp32", "--train.steps", "1") == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and "of host memory" in error[0] and "--optim.state int8 needs" in error[0] and not Path("runs/a").exists()


def test_an_evaluation_that_fails_loses_nothing(prose, capsys, monkeypatch):
    def fails(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    flags = "--train.steps", "6", "--eval.every", "3", "--ckpt.every", "100"
    assert start(prose, "whole", *flags) == 0
    with monkeypatch.context() as during:
        during.setattr(train, "evaluate", fails)
        assert start(prose, "failed", *flags) == 2
    said = capsys.readouterr().err.splitlines()
    assert "step 3 is saved" in said[-2] and "out of GPU memory" in said[-1]
    assert call("--resume", "runs/failed") == 0 and same(final("whole"), final("failed"))


def test_extending_a_run_goes_on_from_its_end(prose, capsys):
    assert start(prose, "a", "--train.steps", "2") == 0
    assert call("--resume", "runs/a") == 0
    assert "complete at step 2" in capsys.readouterr().out
    assert call("--resume", "runs/a", "--train.steps", "5") == 0
    assert list(losses("a")) == [1, 2, 3, 4, 5] and final("a").step == 5
    assert runs.read_config(Path("runs/a")).train.steps == 5


def popen(prose: Path, name: str, *more: str, stderr: int = subprocess.STDOUT) -> subprocess.Popen:
    command = [sys.executable, str(REPOSITORY / "train.py"), *SMALLEST, "--data.sources", str(prose), "--name", name, *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True, env=os.environ | {"PYTHONUNBUFFERED": "1"})


def wait_for(process: subprocess.Popen, text: str) -> str:
    seen = ""
    for line in process.stdout:
        seen += line
        if text in line:
            return seen
    raise AssertionError(f"{text!r} never came:\n{seen}")


LONG = ["--train.steps", "40", "--ckpt.every", "5", "--ckpt.keep", "9", "--eval.every", "100", "--data.seq-len", "64"]


@pytest.mark.parametrize(("ending", "more"), [(signal.SIGTERM, [*HOST, "int8"]), (signal.SIGINT, []), (signal.SIGHUP, [])])
def test_a_stopped_run_saves_and_resumes_exactly(prose, made, ending, more):
    whole = made(*LONG, *more) / "runs/r"
    process = popen(prose, "parts", *LONG, *more)
    wait_for(process, "step  7/40")
    process.send_signal(ending)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + ending
    assert "python train.py --resume runs/parts" in output and "Traceback" not in output
    stopped = checkpoint.latest(Path("runs/parts"))
    assert 7 <= stopped < 40
    assert call("--resume", "runs/parts") == 0
    assert losses(whole) == losses("parts") and same(final(whole), final("parts"))


def test_a_closed_pipe_stops_a_run_as_a_closed_terminal_does(prose, made):
    whole = made(*LONG) / "runs/r"
    process = popen(prose, "parts", *LONG, stderr=subprocess.PIPE)
    wait_for(process, "step  3/40")
    process.stdout.close()
    error = process.stderr.read()
    assert process.wait(60) == 128 + signal.SIGHUP
    finishing, stopped = error.strip().splitlines()
    assert finishing == "SIGHUP: finishing the step and saving; once more to stop at once"
    assert stopped.startswith("stopped by SIGHUP after step ") and stopped.endswith("python train.py --resume runs/parts")
    assert 3 <= checkpoint.latest(Path("runs/parts")) < 40
    assert call("--resume", "runs/parts") == 0
    assert losses(whole) == losses("parts") and same(final(whole), final("parts"))


PLACES = {
    "reading": "data.prepare",
    "initialising": "launch.init_state",
    "storing what was initialised": "env.describe",
    "beginning": "flops.seconds_a_token",
}


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
@pytest.mark.parametrize("place", PLACES)
def test_a_signal_before_the_loop_ends_with_a_line_and_leaves_nothing(prose, monkeypatch, capsys, ending, place):
    monkeypatch.setattr(f"train.{PLACES[place]}", lambda *a, **k: os.kill(os.getpid(), ending))
    assert start(prose, "a", "--train.steps", "2") == 128 + ending
    error = capsys.readouterr().err.strip()
    assert error in (f"stopped by {ending.name}", "interrupted") and not Path("runs").exists()


def test_a_signal_while_a_run_is_restored_changes_nothing(prose, monkeypatch, capsys):
    assert start(prose, "a", "--train.steps", "1") == 0
    before = {path: path.read_bytes() for path in Path("runs/a").rglob("*") if path.is_file()}
    monkeypatch.setattr("train.checkpoint.restore", lambda *a, **k: os.kill(os.getpid(), signal.SIGTERM))
    assert call("--resume", "runs/a", "--train.steps", "3") == 128 + signal.SIGTERM
    assert capsys.readouterr().err.strip() == "stopped by SIGTERM"
    assert {path: path.read_bytes() for path in Path("runs/a").rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_during_imports_is_one_line(ending):
    script = "import time\nfrom hyperlm import startup\nstartup.quiet(); print('in', flush=True); time.sleep(60)"
    child = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )
    child.stdout.readline()
    child.send_signal(ending)
    assert child.stderr.read().strip() == f"stopped by {ending.name}" and child.wait(20) == 128 + ending


@pytest.mark.parametrize("command", ["train.py", "bench.py", "chat.py"])
def test_every_command_is_quiet_before_its_slow_imports(command):
    """The first of them is not there: one line with what installs it."""
    child = subprocess.run(
        [sys.executable, "-c", f"import runpy, sys; sys.modules['torch'] = None; sys.argv = [{command!r}]; runpy.run_path({str(REPOSITORY / command)!r}, run_name='__main__')"],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    assert (
        child.returncode == 2
        and child.stderr.startswith("error: the package torch is missing: pip install torch")
        and len(child.stderr.splitlines()) == 1
    )


@pytest.mark.parametrize(
    ("module", "package"),
    [
        ("tensorboard.compat", "tensorboard"),
        ("tyro", "tyro"),
        ("orbax.checkpoint", "orbax-checkpoint"),
        ("tokenizers", "tokenizers"),
        ("matplotlib", "matplotlib"),
    ],
)
def test_a_missing_package_is_named_with_what_installs_it(module, package, capsys, monkeypatch):
    codes = []
    monkeypatch.setattr("os._exit", codes.append)
    startup.explained(ModuleNotFoundError, ModuleNotFoundError(f"No module named {module!r}", name=module), None)
    assert f"pip install {package}," in capsys.readouterr().err and codes == [2]


def test_one_run_has_one_writer(prose, made, capsys):
    """A second process says who trains there, and changes nothing: records and checkpoints of the first are complete."""
    whole = made(*LONG) / "runs/r"
    process = popen(prose, "a", *LONG)
    wait_for(process, "step  7/40")
    for command in (
        ["--resume", "runs/a"],
        ["--resume", "runs/a", "--train.steps", "80"],
        [*SMALLEST, "--data.sources", prose, "--name", "a"],
    ):
        assert call(*command) == 2
        error = capsys.readouterr().err.strip()
        assert len(error.splitlines()) == 1 and (
            f"process {process.pid} on {platform.node()}" in error or "runs/a exists: continue it with" in error
        )
    process.communicate(timeout=60)
    assert process.returncode == 0 and losses(whole) == losses("a") and same(final(whole), final("a"))
    assert list(losses("a")) == list(range(1, 41)) and call("--resume", "runs/a") == 0


def test_a_name_that_is_taken_is_found_before_text_is_read(prose, capsys, monkeypatch):
    assert start(prose, "a", "--train.steps", "1") == 0
    (Path("runs") / "b").mkdir()
    monkeypatch.setattr(data, "prepare", lambda *a: pytest.fail("text was read"))
    for name, message in (("a", "continue it with --resume runs/a"), ("b", "never saved anything: remove it (rm -r runs/b)")):
        capsys.readouterr()
        assert start(prose, name) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("passes", [0, 1, 2])
def test_a_signal_between_two_steps_is_not_lost(prose, monkeypatch, capsys, passes):
    """The signal shows first where the loop asks whether to go on: nothing of the finished step has been saved for it yet."""

    @contextmanager
    def stop_signals():
        asked = itertools.count()
        yield lambda: signal.SIGTERM if next(asked) >= passes else None

    monkeypatch.setattr("hyperlm.env.stop_signals", stop_signals)
    assert start(prose, "a", "--train.steps", "9", "--ckpt.every", "100") == 128 + signal.SIGTERM
    assert "all saved" in capsys.readouterr().out
    assert checkpoint.latest(Path("runs/a")) == len(losses("a")) if passes else checkpoint.latest(Path("runs/a")) == 0


def test_a_killed_run_resumes_from_its_last_save_exactly(prose, made):
    whole = made(*LONG) / "runs/r"
    process = popen(prose, "parts", *LONG)
    wait_for(process, "step 13/40")
    assert runs.is_owned(Path("runs/parts"))
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not runs.is_owned(Path("runs/parts"))  # the lock is gone with its process
    assert checkpoint.latest(Path("runs/parts")) >= 5  # at most the steps since the last finished save are lost
    assert call("--resume", "runs/parts") == 0
    assert losses(whole) == losses("parts") and same(final(whole), final("parts"))


def test_records_of_lost_steps_are_made_again_and_not_twice(prose):
    assert start(prose, "a", "--train.steps", "4", "--ckpt.every", "2", "--ckpt.keep", "9") == 0
    shutil.rmtree("runs/a/checkpoints/step_00000004")
    with open("runs/a/metrics.jsonl", "a") as file:
        file.write('{"step": 5, "los')  # half a line, as a kill leaves it
    assert call("--resume", "runs/a") == 0
    steps = [json.loads(line)["step"] for line in Path("runs/a/metrics.jsonl").read_text().splitlines() if "grad_norm" in line]
    assert steps == [1, 2, 3, 4]


def test_the_command_line_beats_the_preset():
    for argv in (["--preset", "small", "--model.n-layers", "3"], ["--model.n-layers", "3", "--preset=small"]):
        config = train.parse(argv).config
        assert (config.model.n_layers, config.model.d_model) == (3, 256)
    assert train.parse([]).config.model.d_model == 512
    assert train.parse(["--data.tokenizer", "bytes"]).config.model.vocab_size == 320


def test_the_plan_of_the_flags_and_of_the_preset_name_the_same_model(capsys):
    assert call("--preset", "max", "--plan") == 0
    preset = capsys.readouterr().out
    assert call("--model.d-model", "4096", "--model.n-layers", "32", "--plan") == 0
    flags = capsys.readouterr().out
    assert preset.splitlines()[0] == flags.splitlines()[0] and "3,141,021,696" in preset
    assert "device" in preset and "host" in preset


def test_the_doctor_finds_this_machine_fit(capsys):
    assert call("--doctor", "--train.device", "cpu") == 0
    out = capsys.readouterr().out
    assert "training can run here" in out and "relative error" in out and "torch" in out


def test_the_doctor_reads_every_byte_of_the_cache(prose, capsys, tmp_path):
    """A start reads the ends of a file and a few blocks between them; here one bit is wrong in the middle of many."""
    assert start(prose, "a", "--train.steps", "1") == 0
    (tokens,) = (tmp_path / "cache").rglob("train_00.bin")
    content = bytearray(tokens.read_bytes())
    content[len(content) // 2] ^= 1
    assert call("--doctor", "--train.device", "cpu") == 0
    tokens.write_bytes(content)
    capsys.readouterr()
    assert call("--doctor", "--train.device", "cpu") == 1
    out = capsys.readouterr().out
    assert f"{tokens.parent.name}/train_00.bin" in out and f"delete {tokens.parent}" in out


def test_the_doctor_reports_what_is_wrong(monkeypatch, capsys):
    monkeypatch.setattr("hyperlm.doctor.numerical_errors", lambda *a: {"linear attention": float("nan")})
    assert call("--doctor", "--train.device", "cpu") == 1
    assert "training cannot run here" in capsys.readouterr().out


MISTAKES = {
    "unknown flag": (["--model.dmodel", "4"], "did you mean --model.d-model"),
    "flag without its group": (["--steps", "4"], "did you mean --train.steps?"),
    "short flag without its group": (["--lr", "4"], "did you mean --optim.lr?"),
    "flag of one letter less": (["--source", "a.txt"], "did you mean --data.sources?"),
    "flag as it is in Python": (["--d_model", "4"], "did you mean --model.d-model?"),
    "flag of several groups": (["--every=4"], "did you mean --ckpt.every or --eval.every or --log.every?"),
    "beginning of a flag": (["--batch", "4"], "did you mean --train.batch-size?"),
    "flag like no other": (["--zzz", "4"], "--help lists all settings"),
    "not a number": (["--model.d-model", "x"], "--model.d-model"),
    "no value": (["--optim.lr"], "Missing value"),
    "stray word": (["stray"], "stray"),
    "unknown kind": (["--model.kind", "phase9"], "phase9"),
    "unknown preset": (["--preset", "huge"], "choose from small, standard, max, max-ssm"),
    "preset without a value": (["--preset"], "needs a value"),
    "preset given twice": (["--preset", "small", "--preset=huge"], "--preset huge: choose from"),
    "checkpoint of no base": (["--init-checkpoint", "best"], "there is no --init"),
    "preset and resume": (["--preset", "small", "--resume", "runs/a"], "exclude each other"),
    "heads that do not divide": (["--model.head-dim", "48"], "must be a multiple"),
    "odd head": (["--model.d-model", "64", "--model.head-dim", "1"], "at least 4"),
    "negative rate": (["--optim.lr", "-1"], "above 0"),
    "rate beyond fp32": (["--optim.lr", "1e38"], "at most 1e+30"),
    "rate beyond fp64": (["--optim.lr", "1e400"], "finite"),
    "rate that is no number": (["--optim.lr", "nan"], "finite"),
    "endless epochs": (["--train.epochs", "inf"], "finite"),
    "clipping by infinity": (["--optim.clip", "inf"], "finite"),
    "seed beyond 64 bits": (["--train.seed", "99999999999999999999999"], "at most"),
    "ten million layers": (["--model.n-layers", "10000000"], "at most 10,000"),
    "run of an empty variable": (["--resume", ""], "--resume needs a value"),
    "run of an empty variable, =": (["--resume="], "--resume needs a value"),
    "preset of an empty variable": (["--preset="], "--preset needs a value"),
    "no layers": (["--model.n-layers", "0"], "at least 1"),
    "no steps": (["--train.epochs", "0"], "--train.epochs"),
    "dropout of one": (["--model.dropout", "1"], "below 1"),
    "bad device": (["--train.device", "tpu"], "use auto"),
    "absent device": (["--train.device", "cuda:99"], "not on this machine"),
    "absent kernels": (["--train.device", "cpu", "--kernels", "triton", "--model.kind", "softmax"], "use --kernels auto"),
    "missing source": (["--train.device", "cpu", "--data.sources", "nowhere.txt"], "no such file"),
    "missing tokenizer": (["--train.device", "cpu", "--data.tokenizer", "nowhere.json"], "no such file"),
    "name with a slash": (["--name", "a/b"], "plain folder name"),
    "name with a space": (["--name", "my run"], "plain folder name"),
    "name of two lines": (["--name", "a\nb"], "plain folder name"),
    "name that is no text": (["--name", "\udcff"], "plain folder name"),
    "name like a flag": (["--name=-x"], "plain folder name"),
    "step beyond all memory": (["--train.grad-accum", "1000000000000"], "at most 1,048,576"),
    "missing run": (["--resume", "runs/nowhere"], "no such run"),
    "not a run": (["--resume", "cache"], "not a run"),
    "too large": (
        ["--train.device", "cpu", "--model.d-model", "32768", "--model.n-layers", "64", "--data.seq-len", "64"],
        "--plan shows the parts",
    ),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_clear_line_and_exit_code_2(case, capsys, tmp_path):
    (tmp_path / "cache").mkdir()
    argv, message = MISTAKES[case]
    assert call(*argv) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and error.startswith("error: ") and len(error.splitlines()) == 1
    assert not Path("runs").exists()


def test_a_run_is_never_overwritten(prose, capsys):
    assert start(prose, "a", "--train.steps", "1") == 0
    assert start(prose, "a", "--train.steps", "1") == 2
    assert "--resume runs/a" in capsys.readouterr().err


def test_a_resumed_run_keeps_the_state_that_was_decided(prose):
    assert start(prose, "a", "--train.steps", "1", "--optim.state", "int8") == 0
    assert call("--resume", "runs/a", "--train.steps", "2", "--optim.state", "auto") == 0
    assert runs.read_config(Path("runs/a")).optim.state == "int8"


def test_a_resumed_run_refuses_what_would_make_it_another(prose, capsys):
    assert start(prose, "a", "--train.steps", "2") == 0
    for flag, value in (
        ("--model.n-layers", "3"),
        ("--train.seed", "9"),
        ("--data.seq-len", "16"),
        ("--data.loss", "all"),
        ("--optim.state", "int8"),
        ("--train.grad-accum", "3"),
    ):
        assert call("--resume", "runs/a", "--train.steps", "4", flag, value) == 2
        assert flag in capsys.readouterr().err
    prose.write_text(prose.read_text() + "\n\nchanged")
    assert call("--resume", "runs/a", "--train.steps", "4") == 2
    assert "changed since" in capsys.readouterr().err


def test_damaged_runs_are_one_line(prose, capsys):
    assert start(prose, "a", "--train.steps", "2", "--ckpt.every", "1") == 0
    victim = max(Path("runs/a/checkpoints/step_00000002/params").rglob("*"), key=lambda p: p.stat().st_size if p.is_file() else 0)
    victim.write_bytes(b"")
    capsys.readouterr()
    assert call("--resume", "runs/a", "--train.steps", "4") == 2
    error = capsys.readouterr().err.strip()
    assert "step_00000002 is damaged" in error and "go on from step 1" in error and len(error.splitlines()) == 1
    shutil.rmtree("runs/a/checkpoints")
    Path("runs/a/config.json").write_text("{")
    assert call("--resume", "runs/a") == 2
    assert "config.json is damaged" in capsys.readouterr().err
    Path("runs/b").mkdir()
    assert call("--resume", "runs/b") == 2
    assert "not a run" in capsys.readouterr().err


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "gone":
        path.unlink()
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "half":
        path.write_bytes(content[: len(content) // 2])
    elif how == "a flipped bit":
        path.write_bytes(content[: len(content) // 2] + bytes([content[len(content) // 2] ^ 1]) + content[len(content) // 2 + 1 :])
    elif how == "not UTF-8":
        path.write_bytes(b"\xff" + content)


HEALED = ["gone", "empty", "half", "a flipped bit", "not UTF-8"]


@pytest.fixture
def copied(made, tmp_path, monkeypatch) -> Path:
    """A run of four steps, saved at the second and the last, to be damaged."""
    whole = made("--train.steps", "4", "--ckpt.every", "2", "--ckpt.keep", "9")
    shutil.copytree(whole / "runs/r", "runs/a")
    monkeypatch.setenv("XDG_CACHE_HOME", str(whole / "cache"))
    return Path("runs/a")


@pytest.mark.parametrize("how", HEALED)
def test_what_a_checkpoint_or_the_text_can_restore_is_put_back(copied, capsys, how):
    names = "config.json", "tokenizer.json"
    truth, expected = [(copied / name).read_bytes() for name in names], final("a")
    for name in names:
        damage(copied / name, how)
    shutil.rmtree(copied / "checkpoints" / "step_00000004")
    assert call("--resume", copied) == 0
    said = capsys.readouterr()
    assert said.err == "" and all(name in said.out for name in names)
    assert [(copied / name).read_bytes() for name in names] == truth and same(final("a"), expected)


def test_no_line_of_the_records_blocks_a_resume(copied, capsys):
    bad = [
        b"half a li",
        b"\xff\xfe",
        b'{"step": "3", "loss": 1}',
        b'{"loss": 1}',
        b"[1]",
        b"7",
        b"[" * 100_000,
        b'{"step": 1e400}',
        b'{"step": null}',
    ]
    path = copied / "metrics.jsonl"
    lines = path.read_bytes().splitlines()
    expected = losses("a")
    path.write_bytes(b"\n".join([*lines[:1], *bad, b"", *lines[1:], b'{"step": 9, "lo']))
    shutil.rmtree(copied / "checkpoints" / "step_00000004")
    assert call("--resume", copied) == 0 and losses("a") == expected
    assert path.with_suffix(".damaged").read_bytes().splitlines() == [*bad, b""] and f"{len(bad) + 1} lines of" in capsys.readouterr().out


@pytest.mark.parametrize("part", ["params", "opt", "meta"])
def test_a_checkpoint_that_lacks_a_part_is_set_aside_and_blocks_nothing(copied, capsys, part):
    expected = final("a")
    shutil.rmtree(copied / "checkpoints" / "step_00000004" / part)
    assert call("--resume", copied) == 0
    assert "step_00000004 lacks a part: set aside as incomplete-step_00000004" in capsys.readouterr().out
    assert same(final("a"), expected) and len(list((copied / "checkpoints").glob("incomplete-*"))) == 1


def test_what_an_interrupted_save_left_is_cleared_away_before_room_is_asked_for(copied, monkeypatch):
    left = copied / "checkpoints" / "step_00000006.orbax-checkpoint-tmp"
    (left / "params").mkdir(parents=True)
    monkeypatch.setattr(checkpoint, "require_room", lambda *_: pytest.fail("left there") if left.exists() else None)
    assert call("--resume", copied, "--train.steps", "5") == 0


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")
def test_a_tokenizer_that_is_no_file_is_replaced_or_named(copied, capsys):
    path = copied / "tokenizer.json"
    truth = path.read_bytes()
    path.unlink()
    os.mkfifo(path)
    assert call("--resume", copied) == 0 and path.read_bytes() == truth
    path.unlink()
    path.mkdir()
    capsys.readouterr()
    assert call("--resume", copied) == 2
    said = capsys.readouterr()
    assert "tokenizer.json could not be written (Is a directory)" in said.err and "put back" not in said.out


def test_history_goes_on_after_half_a_line(copied):
    with open(copied / "history.jsonl", "a") as file:
        file.write('{"time": "2026')
    assert call("--resume", copied, "--train.steps", "5") == 0
    assert json.loads((copied / "history.jsonl").read_text().splitlines()[-1])["step"] == 4


@pytest.mark.parametrize("closed", [">&-", ">&- 2>&-"])
def test_output_that_was_closed_from_the_start_changes_nothing(closed):
    command = f"{sys.executable} {REPOSITORY / 'train.py'} {' '.join(SMALLEST)} --plan --train.steps 1 {closed}"
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_summary_of_a_run_that_was_killed_at_its_very_end_is_written(copied):
    path = copied / "training_summary.json"
    whole = json.loads(path.read_text())
    path.unlink()
    assert call("--resume", copied) == 0
    assert json.loads(path.read_text()) == {name: value for name, value in whole.items() if name != "seconds"}


def test_settings_of_another_run_are_blamed_and_no_checkpoint_is(copied, capsys):
    config = runs.read_config(copied)
    runs.write_config(copied, replace(config, model=replace(config.model, vocab_size=640)))
    for command in ([train.main, "--resume", copied], [chat.main, copied, "--prompt", "a"], [bench.main, copied]):
        assert cli.run(command[0], list(map(str, command[1:]))) == 2
        error = capsys.readouterr().err.strip().splitlines()
        assert "config.json is of another run" in error[-1] and "delete" not in error[-1]


def test_a_console_that_cannot_show_a_sample_ends_nothing(prose):
    process = subprocess.run(
        [sys.executable, str(REPOSITORY / "train.py"), *SMALLEST, "--data.sources", str(prose), "--train.steps", "1", "--eval.prompt", "Grüße 你好 \u202e\x1b[31m"],
        capture_output=True, env={**os.environ, "PYTHONIOENCODING": "cp1252"},
    )  # fmt: skip
    assert process.returncode == 0 and process.stderr == b"" and b"done" in process.stdout and b"\x1b" not in process.stdout


def test_records_that_cannot_be_written_name_the_file_and_the_way_on(prose, capsys, monkeypatch):
    """A full disk, met by the third record; what was saved is resumed."""
    flags = "--train.steps", "4", "--ckpt.every", "2", "--ckpt.keep", "9"
    assert start(prose, "whole", *flags) == 0
    with monkeypatch.context() as during:
        written = itertools.count()

        def full(log, step, values):
            if next(written) == 2:
                raise runs.RunError("runs/a/metrics.jsonl could not be written (No space left on device)")

        during.setattr(log, "record", full)
        assert start(prose, "a", *flags) == 2
    error = capsys.readouterr().err.strip()
    assert (
        "metrics.jsonl could not be written (No space left on device); the last good checkpoint is runs/a/checkpoints/step_00000002"
        in error
    )
    assert "--resume runs/a" in error and len(error.splitlines()) == 1
    assert call("--resume", "runs/a") == 0 and same(final("whole"), final("a"))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_record_on_a_full_disk_is_an_error_of_its_file():
    records = log.Log(open("/dev/full", "w", buffering=1), None)
    with pytest.raises(runs.RunError, match=r"/dev/full could not be written \(No space left on device\)"):
        log.record(records, 1, {"loss": 1.0})


def test_what_a_thread_of_tensorboard_meets_is_said_once():
    """By the error that reaches us; what other threads meet is said as ever."""
    from tensorboard.summary.writer.event_file_writer import _AsyncWriterThread

    said = []
    for thread in (_AsyncWriterThread.__new__(_AsyncWriterThread), threading.main_thread()):
        log.silent(SimpleNamespace(thread=thread), default=said.append)
    assert [event.thread for event in said] == [threading.main_thread()]


def test_records_are_json_whatever_the_numbers(tmp_path):
    records = log.open_log(tmp_path, 0)
    log.record(records, 1, {"loss": math.nan, "norm": math.inf, "lr": 1.0, "sample": "\ud800"})
    log.close(records)
    assert json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail) == {
        "step": 1,
        "loss": None,
        "norm": None,
        "lr": 1.0,
        "sample": "\ud800",
    }


def test_a_run_that_diverges_ends_with_a_clear_line(prose, capsys):
    code = start(
        prose,
        "a",
        "--train.steps",
        "60",
        "--ckpt.every",
        "5",
        "--optim.lr",
        "1e30",
        "--optim.clip",
        "0",
        "--eval.sample-tokens",
        "0",
        "--eval.every",
        "60",
    )
    assert code == 2
    error = capsys.readouterr().err.strip()
    assert (
        "no finite loss or gradient for 5 steps" in error
        and "no checkpoint was good enough to save" in error
        and len(error.splitlines()) == 1
    )


DIVERGING = ["--ckpt.every", "1", "--eval.every", "2"]


@pytest.mark.parametrize("steps", ["3", "12"])
def test_weights_that_diverged_take_the_place_of_nothing(prose, capsys, steps):
    """Trained well for four steps, then at a rate that no weights survive: until the end, and until too many steps were bad."""
    assert start(prose, "a", "--train.steps", "4", *DIVERGING) == 0
    good = checkpoint.steps(Path("runs/a"))
    capsys.readouterr()
    assert call("--resume", "runs/a", "--train.steps", 4 + int(steps), "--optim.lr", "1e30") == 2
    said = capsys.readouterr()
    error = said.err.strip()
    assert checkpoint.steps(Path("runs/a")) == good and "not saved  step 5: " in said.out
    assert (
        error.startswith("error: diverged by step") and "runs/a/checkpoints/step_00000004: go on" in error and len(error.splitlines()) == 1
    )
    assert checkpoint.read_meta(Path("runs/a"), 4)["loss"] < 7 and checkpoint.best(Path("runs/a")) == 4
    assert not {"NaN", "Infinity"} & set(Path("runs/a/metrics.jsonl").read_text().replace(",", " ").replace("}", " ").split())
    advice = error.split("python train.py ")[1].split()
    assert advice[-1] == "8e-03"  # which did no harm before
    assert call(*advice) == 0 and final("a").step == 4 + int(steps)


def test_a_run_that_never_was_good_says_so(prose, capsys):
    assert start(prose, "a", "--train.steps", "3", "--optim.lr", "1e30", *DIVERGING) == 2
    error = capsys.readouterr().err.strip()
    assert (
        "diverged by step 3" in error
        and "rm -r runs/a" in error
        and len(error.splitlines()) == 1
        and checkpoint.steps(Path("runs/a")) == []
    )


@pytest.mark.parametrize(
    ("loss", "before", "verdict"),
    [
        (3.0, [3.5, 2.9], ""),
        (4.8, [2.9], ""),
        (5.0, [2.9], "far above 2.90"),
        (6.0, [], ""),
        (6.3, [], "that of guessing, 4.16"),  # log 64
        (math.nan, [3.0], "its loss is nan"),
        (math.inf, [], "its loss is inf"),
    ],
)
def test_a_state_is_worth_saving_if_its_loss_is_near_the_lowest(loss, before, verdict):
    state = State(*([{"a": torch.ones(3)}] * 2), step=1, updates=1, tokens=1, seed=0)
    flaw = health.flaw(state, loss, before, Config(model=TINY))
    assert verdict in flaw and bool(flaw) == bool(verdict)


def test_a_number_that_is_not_finite_anywhere_in_a_state_is_a_flaw():
    for bad in (math.nan, math.inf, -math.inf):
        for where in (0, 1):
            trees = [{"a": torch.ones(3), "b": torch.zeros(2, dtype=torch.uint8)} for _ in range(2)]
            assert health.all_finite(State(*trees, step=1, updates=1, tokens=1, seed=0))
            trees[where]["a"][1] = bad
            assert not health.all_finite(State(*trees, step=1, updates=1, tokens=1, seed=0))


def test_a_resumed_run_may_change_its_future(prose, capsys):
    assert start(prose, "a", "--train.steps", "2", "--optim.warmup-steps", "1") == 0
    changes = [
        "--train.steps",
        "4",
        "--optim.lr",
        "5e-4",
        "--optim.clip",
        "2",
        "--optim.weight-decay",
        "0",
        "--train.batch-size",
        "8",
        "--train.grad-accum",
        "1",
    ]
    capsys.readouterr()
    assert call("--resume", "runs/a", *changes, "--eval.every", "1") == 0
    assert "rate       " in capsys.readouterr().out
    kept = runs.read_config(Path("runs/a"))
    assert (kept.optim.lr, kept.optim.clip, kept.train.batch_size, kept.train.grad_accum) == (5e-4, 2.0, 8, 1)
    started, resumed = map(json.loads, Path("runs/a/history.jsonl").read_text().splitlines())
    assert (
        started["step"] == 0
        and resumed["step"] == 2
        and resumed["changes"]["optim.lr"] == [1 / 128, 5e-4]
        and "--optim.clip 2" in resumed["command"]
    )
    assert final("a").step == 4


def test_the_rate_of_a_run_is_said_stored_and_kept_by_those_that_go_on_with_it(prose, capsys, monkeypatch):
    """That of the rule, and one that is given: in a resumed run it stays, even if the rule has become another, unless the command line gives one."""
    assert start(prose, "a", "--train.steps", "2", "--log.every", "1") == 0
    assert "rate       7.8e-03 peak (rule for d 32), warm-up to step 1\n" in capsys.readouterr().out
    assert start(prose, "b", "--train.steps", "2", "--optim.lr", "2e-3", "--optim.warmup-steps", "2") == 0
    assert "rate       2.0e-03 peak, warm-up to step 2\n" in capsys.readouterr().out
    monkeypatch.setattr("hyperlm.config.peak_rate", lambda cfg: 0.1)
    for run, rate in ("a", 1 / 128), ("b", 2e-3):
        assert runs.read_config(Path("runs") / run).optim.lr == rate
        assert call("--resume", f"runs/{run}", "--train.steps", "3") == 0
        assert runs.read_config(Path("runs") / run).optim.lr == rate
    assert call("--resume", "runs/b", "--train.steps", "4", "--optim.lr", "1e-3") == 0
    assert runs.read_config(Path("runs/b")).optim.lr == 1e-3
    assert call("--resume", "runs/b", "--train.steps", "5", "--optim.lr", "0") == 0
    changed = json.loads(Path("runs/b/history.jsonl").read_text().splitlines()[-1])["changes"]
    assert runs.read_config(Path("runs/b")).optim.lr == 0.1 and changed["optim.lr"] == [1e-3, 0.1]


def test_extending_a_run_does_not_raise_its_rate(prose, capsys):
    """From the end of a cosine, and from the middle of one; and a run that was extended is resumed exactly."""
    flags = "--optim.lr", "1e-3", "--optim.warmup-steps", "2", "--ckpt.every", "5", "--ckpt.keep", "9"
    assert start(prose, "a", "--train.steps", "10", *flags) == 0
    capsys.readouterr()
    assert call("--resume", "runs/a", "--train.steps", "20") == 0
    assert "from there on, 1.00e-04 at step 20" in capsys.readouterr().out
    rates = {r["step"]: r["lr"] for r in map(json.loads, Path("runs/a/metrics.jsonl").read_text().splitlines()) if "lr" in r}
    assert all(rates[step + 1] <= rates[step] + 1e-12 for step in range(2, 20)) and rates[11] == pytest.approx(1e-4)
    whole, end = losses("a"), final("a")
    shutil.rmtree("runs/a/checkpoints/step_00000020")
    assert call("--resume", "runs/a") == 0
    assert losses("a") == whole and same(final("a"), end)


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_acts_at_once(ending):
    script = (
        "import time\nfrom hyperlm import env\nwith env.stop_signals():\n    print('in', flush=True)\n    time.sleep(60); time.sleep(60)"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    child.stdout.readline()
    child.send_signal(ending)
    assert "once more to stop at once" in child.stderr.readline() + child.stderr.readline()
    assert child.poll() is None
    child.send_signal(ending)
    assert child.wait(20) != 0


@pytest.mark.parametrize("rate", ["0.1", "0"])
def test_a_run_of_an_earlier_version_goes_on_only_if_its_dropout_was_the_same(rate, made, tmp_path, capsys):
    shutil.copytree(made("--train.steps", "2", "--model.dropout", rate), tmp_path, dirs_exist_ok=True)
    path = Path("runs/r/checkpoints/step_00000002/meta/metadata")
    meta = json.loads(path.read_text()) | {"format": 3}
    del meta["digest"]
    path.write_text(json.dumps(meta | {"digest": digest(meta)}))
    code = cli.run(train.main, ["--resume", "runs/r", "--train.steps", "3", "--data.cache", str(tmp_path / "cache")])
    error = capsys.readouterr().err
    assert (code, "written by version 0.2 or 0.3 of hyperlm, whose dropout this version does not have" in error) == (
        (2, True) if rate != "0" else (0, False)
    )
