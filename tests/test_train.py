"""train.py as a person uses it: whole runs, resuming after every kind of end, and one clear line for every mistake."""

import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from conftest import CASES, SMALLEST

import train
from hyperlm import checkpoint, cli, data, runs, tree

REPOSITORY = Path(train.__file__).parent


def call(*arguments: str) -> int:
    return cli.run(train.main, [str(a) for a in arguments])


def start(prose: Path, name: str, *more: str) -> int:
    return call(*SMALLEST, "--data.sources", prose, "--name", name, *more)


def losses(name: str) -> dict[int, float]:
    records = [json.loads(line) for line in Path(f"runs/{name}/metrics.jsonl").read_text().splitlines()]
    return {r["step"]: r["loss"] for r in records if "loss" in r}


def final(name: str):
    run = Path("runs") / name
    return checkpoint.restore(run, checkpoint.latest(run), runs.read_config(run), lambda stage: stage)[0]


def same(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(tree.leaves((a.params, a.opt_state)), tree.leaves((b.params, b.opt_state)), strict=True))


def test_a_disk_too_small_for_a_checkpoint_ends_a_run_before_it_starts(prose, capsys, monkeypatch):
    assert start(prose, "a", "--train.steps", "1") == 0
    state = final("a")
    need = sum(x.nbytes for x in tree.leaves((state.params, state.opt_state)))
    free = {"bytes": need}
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: type("Usage", (), {"free": free["bytes"]}))
    assert start(prose, "b", "--train.steps", "1") == 0
    free["bytes"] -= 1
    capsys.readouterr()
    assert start(prose, "c", "--train.steps", "1") == 2
    assert capsys.readouterr().err.startswith("error: a checkpoint of this run takes") and not Path("runs/c").exists()


def test_a_run_writes_everything_it_promises(prose, capsys):
    assert start(prose, "a", "--train.steps", "4", "--ckpt.every", "2", "--eval.every", "2") == 0
    run = Path("runs/a")
    assert {p.name for p in run.iterdir()} >= {"config.json", "env.json", "tokenizer.json", "metrics.jsonl", "training_summary.json", "checkpoints"}
    assert any(p.name.startswith("events") for p in run.iterdir())
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps, evaluations = [r for r in records if "loss" in r], [r for r in records if "val_loss" in r]
    assert [r["step"] for r in steps] == [1, 2, 3, 4] and [r["step"] for r in evaluations] == [2, 4]
    assert set(steps[0]) == {"step", "tokens", "loss", "lr", "grad_norm", "tokens_per_second", "peak_memory_gib", "seconds_left", "skipped"}
    assert steps[-1]["tokens"] == 4 * 2 * 4 * 32
    last = evaluations[-1]
    assert last["val_ppl"] == pytest.approx(math.exp(last["val_loss"])) and last["val_bpb"] > 0 and last["sample"].startswith("def ")
    assert {f"radius/layer_{layer:02d}/{x}_{what}" for layer in (0, 1) for x in "qk" for what in ("mean", "p05", "p95")} <= set(last)
    assert json.loads((run / "training_summary.json").read_text())["val_bpb"] == last["val_bpb"]
    assert "bits per byte" in capsys.readouterr().out


def test_bits_per_byte_are_counted_on_raw_bytes(prose):
    assert start(prose, "a", "--train.steps", "1", "--eval.max-tokens", "0") == 0
    run = Path("runs/a")
    shard = data.prepare(runs.read_config(run), say=lambda line: None).shards[0]
    record = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    size = shard.val_documents[:, 1].sum()
    assert record["val_bpb"] == pytest.approx(record["val_loss"] * (len(shard.val) - 1) / math.log(2) / size)


def test_losses_fall_on_text(prose):
    assert start(prose, "a", "--train.steps", "80", "--optim.lr", "0.01", "--eval.every", "80") == 0
    assert losses("a")[80] < losses("a")[1] - 1.0


HOST = ["--train.residence", "host", "--optim.state"]


@pytest.mark.parametrize(
    ("kind", "more"),
    [("phase7", []), ("phase8", []), ("softmax", []), ("hybrid-ssm", []), ("hybrid-ssm", [*HOST, "fp32"]), ("phase8", [*HOST, "int8"]), ("phase7", ["--optim.state", "int8"])],
)
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(prose, kind, more):
    cfg = CASES[kind]
    model = ["--model.kind", cfg.kind, "--model.exact-every", cfg.exact_every, "--model.ssm" if cfg.ssm else "--model.no-ssm", "--model.dropout", "0.1"]
    common = [*model, *more, "--train.steps", "6", "--ckpt.every", "3", "--ckpt.keep", "9", "--eval.every", "3"]
    assert start(prose, "whole", *common) == 0
    assert start(prose, "parts", *common) == 0
    shutil.rmtree("runs/parts/checkpoints/step_00000006")
    assert call("--resume", "runs/parts") == 0
    assert losses("whole") == losses("parts")
    assert same(final("whole"), final("parts"))


def test_a_run_goes_on_in_another_residence(prose):
    assert start(prose, "whole", "--train.steps", "4") == 0
    assert start(prose, "parts", "--train.steps", "2") == 0
    assert call("--resume", "runs/parts", "--train.steps", "4", *HOST[:2]) == 0
    a, b = final("whole"), final("parts")
    assert (a.step, a.tokens) == (b.step, b.tokens) and runs.read_config(Path("runs/parts")).train.residence == "host"


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


def popen(prose: Path, name: str, *more: str) -> subprocess.Popen:
    command = [sys.executable, str(REPOSITORY / "train.py"), *SMALLEST, "--data.sources", str(prose), "--name", name, *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | {"PYTHONUNBUFFERED": "1"})


def wait_for(process: subprocess.Popen, text: str) -> str:
    seen = ""
    for line in process.stdout:
        seen += line
        if text in line:
            return seen
    raise AssertionError(f"{text!r} never came:\n{seen}")


LONG = ["--train.steps", "40", "--ckpt.every", "5", "--ckpt.keep", "9", "--eval.every", "100", "--data.seq-len", "64"]


@pytest.mark.parametrize(("ending", "more"), [(signal.SIGTERM, [*HOST, "int8"]), (signal.SIGINT, [])])
def test_a_stopped_run_saves_and_resumes_exactly(prose, ending, more):
    assert start(prose, "whole", *LONG, *more) == 0
    process = popen(prose, "parts", *LONG, *more)
    wait_for(process, "step  7/40")
    process.send_signal(ending)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + ending
    assert "python train.py --resume runs/parts" in output and "Traceback" not in output
    stopped = checkpoint.latest(Path("runs/parts"))
    assert 7 <= stopped < 40
    assert call("--resume", "runs/parts") == 0
    assert losses("whole") == losses("parts") and same(final("whole"), final("parts"))


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


def test_a_killed_run_resumes_from_its_last_save_exactly(prose):
    assert start(prose, "whole", *LONG) == 0
    process = popen(prose, "parts", *LONG)
    wait_for(process, "step 13/40")
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert checkpoint.latest(Path("runs/parts")) >= 5  # at most the steps since the last finished save are lost
    assert call("--resume", "runs/parts") == 0
    assert losses("whole") == losses("parts") and same(final("whole"), final("parts"))


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
        _, config = train.parse(argv)
        assert (config.model.n_layers, config.model.d_model) == (3, 256)
    assert train.parse([])[1].model.d_model == 512
    assert train.parse(["--data.tokenizer", "bytes"])[1].model.vocab_size == 320


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


def test_the_doctor_reports_what_is_wrong(monkeypatch, capsys):
    monkeypatch.setattr("hyperlm.doctor.numerical_errors", lambda *a: {"linear attention": float("nan")})
    assert call("--doctor", "--train.device", "cpu") == 1
    assert "training cannot run here" in capsys.readouterr().out


MISTAKES = {
    "unknown flag": (["--model.dmodel", "4"], "did you mean --model.d-model"),
    "not a number": (["--model.d-model", "x"], "--model.d-model"),
    "no value": (["--optim.lr"], "Missing value"),
    "stray word": (["stray"], "stray"),
    "unknown kind": (["--model.kind", "phase9"], "phase9"),
    "unknown preset": (["--preset", "huge"], "choose from small, standard, max, max-ssm"),
    "preset without a value": (["--preset"], "needs a value"),
    "preset and resume": (["--preset", "small", "--resume", "runs/a"], "exclude each other"),
    "heads that do not divide": (["--model.head-dim", "48"], "must be a multiple"),
    "odd head": (["--model.d-model", "64", "--model.head-dim", "1"], "at least 4"),
    "negative rate": (["--optim.lr", "-1"], "above 0"),
    "no layers": (["--model.n-layers", "0"], "at least 1"),
    "no steps": (["--train.epochs", "0"], "--train.epochs"),
    "dropout of one": (["--model.dropout", "1"], "below 1"),
    "bad device": (["--train.device", "tpu"], "use auto"),
    "absent device": (["--train.device", "cuda:99"], "not on this machine"),
    "absent kernels": (["--train.device", "cpu", "--kernels", "triton", "--model.kind", "softmax"], "use --kernels auto"),
    "missing source": (["--train.device", "cpu", "--data.sources", "nowhere.txt"], "no such file"),
    "missing tokenizer": (["--train.device", "cpu", "--data.tokenizer", "nowhere.json"], "no such file"),
    "name with a slash": (["--name", "a/b"], "plain folder name"),
    "missing run": (["--resume", "runs/nowhere"], "no such run"),
    "not a run": (["--resume", "cache"], "not a run"),
    "too large": (["--train.device", "cpu", "--model.d-model", "32768", "--model.n-layers", "64", "--data.seq-len", "64"], "--plan shows the parts"),
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


def test_a_resumed_run_refuses_what_would_make_it_another(prose, capsys):
    assert start(prose, "a", "--train.steps", "2") == 0
    for flag, value in (("--model.n-layers", "3"), ("--train.seed", "9"), ("--data.seq-len", "16"), ("--optim.lr", "0.5")):
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
    Path("runs/a/config.json").write_text("{")
    assert call("--resume", "runs/a") == 2
    assert "config.json is damaged" in capsys.readouterr().err
    shutil.rmtree("runs/a/checkpoints")
    Path("runs/b").mkdir()
    assert call("--resume", "runs/b") == 2
    assert "not a run" in capsys.readouterr().err


def test_a_run_that_diverges_ends_with_a_clear_line(prose, capsys):
    code = start(prose, "a", "--train.steps", "60", "--ckpt.every", "5", "--optim.lr", "1e30", "--optim.clip", "0", "--eval.sample-tokens", "0", "--eval.every", "60")
    assert code == 2
    error = capsys.readouterr().err.strip()
    assert "no finite loss or gradient for 5 steps" in error and "last good checkpoint" in error and len(error.splitlines()) == 1


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_acts_at_once(ending):
    script = "import time\nfrom hyperlm import env\nwith env.stop_signals():\n    print('in', flush=True)\n    time.sleep(60); time.sleep(60)"
    child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    child.stdout.readline()
    child.send_signal(ending)
    assert "once more to stop at once" in child.stderr.readline() + child.stderr.readline()
    assert child.poll() is None
    child.send_signal(ending)
    assert child.wait(20) != 0
