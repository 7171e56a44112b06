"""bench.py: tables, plots and files of all suites; what a number counts; what is kept when something fails; mistakes."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALLEST, write_prose

import bench
import train
from hyperlm import cli, env, kernels, model
from hyperlm.bench import speed
from hyperlm.bench.report import table
from hyperlm.bench.speed import exponent
from hyperlm.config import Config, ModelConfig, OptimConfig, TrainConfig

TINIEST = "--model.d-model 32 --model.n-layers 2 --model.head-dim 8 --model.vocab-size 320 --preset small --train.device cpu".split()


def call(*argv: str) -> int:
    return cli.run(bench.main, list(argv))


@pytest.fixture
def quick(monkeypatch) -> None:
    for suite in ("speed", "decode", "memory"):
        monkeypatch.setattr(f"hyperlm.bench.{suite}.run.__defaults__", (0.0,))


@pytest.fixture
def run(made, monkeypatch, tmp_path) -> str:
    """A run of two steps, in a folder of one's own."""
    shutil.copytree(made("--train.steps", "2", "--model.kind", "phase8", "--eval.max-tokens", "0"), tmp_path, dirs_exist_ok=True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return "runs/r"


def results(name: str) -> list[dict[str, Any]]:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    return json.loads(Path(f"runs/{name}/results.json").read_text(), parse_constant=refuse)["results"]


def test_speed_and_quality_are_measured_and_written(run, quick, capsys):
    trained = json.loads(Path("runs/r/training_summary.json").read_text())
    assert call("phase7", "phase8", "runs/r", *TINIEST, "--lengths", "16", "32", "--name", "b") == 0
    out = capsys.readouterr().out
    assert "phase7: time of a sequence grows as N^" in out and "| phase8" in out.replace("|  phase8", "| phase8")
    folder = Path("runs/b")
    for name in ("report.md", "speed_training.png", "speed_forward.png", "speed_memory.png"):
        assert (folder / name).stat().st_size > 500
    speed, quality = results("b")
    assert [(r["model"], r["length"]) for r in speed["rows"]] == [("phase7", 16), ("phase7", 32), ("phase8", 16), ("phase8", 32)]
    assert all(r["training tok/s"] > 0 and r["training GiB"] > 0 and r["batch"] * r["length"] == 32 for r in speed["rows"])
    assert quality["rows"][0]["val_bpb"] == pytest.approx(trained["val_bpb"], rel=1e-9)


def test_decoding_is_measured_with_a_cache_that_grows_for_attention_alone(quick):
    assert call("phase7", "phase8", "--suite", "decode", *TINIEST, "--lengths", "16", "4096", "--name", "d") == 0
    rows = json.loads(Path("runs/d/results.json").read_text())["results"][0]["rows"]
    size = {(row["model"], row["batch"], row["context"]): row["cache MiB"] for row in rows}
    assert size["phase8", 1, 4096] == size["phase8", 1, 16] and size["phase7", 1, 4096] > 10 * size["phase7", 1, 16]
    assert all(row["tok/s"] > 0 for row in rows) and Path("runs/d/decode_speed.png").stat().st_size > 500


@pytest.mark.parametrize(("residence", "state"), [("host", "int8"), ("device", "fp32")])
def test_memory_is_measured_of_a_residence(residence, state, quick):
    flags = ["--suite", "memory", "--name", "m", *TINIEST, "--train.residence", residence]
    assert call("phase8", *flags, "--optim.state", state, "--train.grad-accum", "2", "--model.n-layers", "3") == 0
    (row,) = json.loads(Path("runs/m/results.json").read_text())["results"][0]["rows"]
    assert row["step"] == "16 x 256" and row["parameters"] < 2.5e6 and row["tok/s"] > 0 and row["host GiB"] > row["planned GiB"] > 0
    assert ("GB/s in" in row) == (residence == "host")


@pytest.mark.parametrize("more", [[], ["--optim.state", "int8"], ["--train.residence", "host"], ["--train.residence", "host", "--optim.state", "int8"]])
def test_speed_trains_one_model_step_after_step(more, quick, monkeypatch):
    """A state is used once: what a step returns goes into the next."""
    seen, make_step = [], speed.make_step

    def watched(*args: Any) -> Callable:
        step = make_step(*args)

        def once(state: Any, batch: torch.Tensor) -> Any:
            seen.append(state.step)
            return step(state, batch)

        return once

    monkeypatch.setattr(speed, "make_step", watched)
    assert call("phase8", "--lengths", "16", "--tokens", "32", "--name", "s", *TINIEST, *more) == 0
    assert seen == list(range(len(seen))) and len(seen) > 3
    (row,) = results("s")[0]["rows"]
    assert row["forward tok/s"] > row["training tok/s"] > 0


@pytest.mark.parametrize("residence", ["device", "host"])
def test_forward_is_up_to_the_loss_and_before_there_are_moments(residence, monkeypatch):
    """With the head, in chunks as an evaluation has it; and in the memory of the weights alone."""
    done = []

    def watched(name: str, fn: Callable) -> Callable:
        return lambda *args, **options: (done.append(name), fn(*args, **options))[1]

    for name in ("init_state", "head_nats"):
        monkeypatch.setattr(speed, name, watched(name, getattr(speed, name)))
    monkeypatch.setattr(speed.env, "peak_memory", watched("measured", env.peak_memory))
    cfg = Config(model=ModelConfig(d_model=32, n_layers=2, head_dim=8, vocab_size=320), train=TrainConfig(residence=residence), optim=OptimConfig(lr=1e-3, state="int8"))
    speed.measure(speed.of_length(cfg, 16, 32), torch.device("cpu"), 0.0)
    first = done.index("measured")
    assert done[:first].count("head_nats") >= 3 and "init_state" in done[first:] and "init_state" not in done[:first]


def fails(*_: Any) -> Any:
    raise kernels.KernelError("no such kernel")


def test_a_kind_that_fails_does_not_lose_what_was_measured(run, quick, capsys, monkeypatch):
    init_state = speed.init_state
    monkeypatch.setattr(speed, "init_state", lambda config, *rest: (fails if config.model.kind == "softmax" else init_state)(config, *rest))
    assert call("phase7", "phase8", "softmax", run, "--lengths", "16", "--name", "b", *TINIEST) == 2
    (found,) = results("b")
    assert [row["model"] for row in found["rows"]] == ["phase7", "phase8"]
    assert capsys.readouterr().err.strip().splitlines()[-1] == "error: no such kernel"


def test_results_are_written_whole_or_not_at_all(quick, capsys, monkeypatch):
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hyperlm.bench.report.draw", full)
    assert call("phase8", "--lengths", "16", "--name", "b", *TINIEST) == 2
    assert "No space left" in capsys.readouterr().err and list(Path("runs").iterdir()) == []


def test_runs_on_different_texts_are_told_apart(run, tmp_path, capsys):
    """By their validation text, whatever its tokenizer."""
    common = [*SMALLEST, "--train.steps", "1", "--eval.sample-tokens", "0", "--data.sources"]
    assert cli.run(train.main, [*common, str(tmp_path / "prose.txt"), "--name", "bytes", "--data.tokenizer", "bytes"]) == 0
    assert cli.run(train.main, [*common, str(write_prose(tmp_path / "other.txt", seed=1)), "--name", "other"]) == 0

    def compared(*names: str) -> tuple[list[str], str]:
        assert call(*(f"runs/{name}" for name in names), "--name", "-".join(names), "--train.device", "cpu") == 0
        (found,) = results("-".join(names))
        return [row["validation text"] for row in found["rows"]], " ".join(found["notes"])

    texts, notes = compared("r", "other")
    assert texts[0] != texts[1] and "runs on different texts: their losses cannot be compared" in notes
    texts, notes = compared("r", "bytes")
    assert texts[0] == texts[1] and "bits per byte alone can be compared" in notes
    texts, notes = compared("r", "r")
    assert texts[0] == texts[1] and notes == ""


def test_a_run_that_diverged_is_measured_as_such_in_valid_json(run, diverged):
    assert call(run, "--name", "b", "--train.device", "cpu") == 0
    (found,) = results("b")
    assert found["rows"][0]["val_loss"] is None and "the run diverged" in found["notes"][0]
    assert "nan" in Path("runs/b/report.md").read_text()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run: (run / "tokenizer.json").unlink(), "tokenizer.json is missing"),
        (lambda run: (run / "tokenizer.json").write_text("[]"), "tokenizer.json"),
        (lambda run: (run / "config.json").write_text("{"), "config.json is damaged"),
        (lambda run: (run / "config.json").unlink(), "no config.json"),
        (lambda run: shutil.rmtree(run / "checkpoints"), "no checkpoint"),
    ],
)
def test_a_damaged_run_is_found_before_anything_is_measured(damage, message, run, capsys, monkeypatch):
    damage(Path(run))
    monkeypatch.setattr(model, "init", fails)
    assert call("phase8", run, "--name", "b", *TINIEST) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and len(error.splitlines()) == 1 and not Path("runs/b").exists()


@pytest.mark.parametrize("power", [1.0, 2.0])
def test_the_exponent_is_that_of_the_time_of_a_sequence(power):
    rows = [{"length": n, "x": n / (1e-6 * n**power)} for n in (64, 128, 256, 512)]
    assert exponent(rows, "x") == pytest.approx(power)


def test_tables_align_and_show_what_is_missing():
    lines = table([{"a": 1, "b": 1234.5}, {"a": 22222, "c": "out of memory"}]).splitlines()
    assert len({len(line) for line in lines}) == 1 and "22,222" in lines[3] and "1,234" in lines[2]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "name what to measure"),
        (["phase9"], "neither a kind"),
        (["phase7", "--suite", "quality"], "needs folders of runs"),
        (["runs", "--suite", "decode"], "neither a kind"),
        (["--suite", "decode"], "needs kinds"),
        (["--suite", "linear", "--train.device", "cpu"], "needs a CUDA device"),
        (["phase7", "--preset", "huge"], "choose from"),
        (["phase7", "--lengths", "0"], "at least 1"),
        (["phase7", "--lengths", "16", "99999999999999999999"], "at most"),
        (["phase7", "--tokens", "-1"], "at least 0"),
        (["phase7", "--name", "a/b"], "plain folder name"),
        (["phase7", "--name", ".."], "plain folder name"),
        (["phase7", "--name", "taken"], "choose another --name"),
        (["phase7", "--preset", "max", "--lengths", "1048576", "--train.device", "cpu"], "a step of phase7 needs"),
        (["phase7", "--suite", "decode", "--preset", "max", "--lengths", "33554432", "--train.device", "cpu"], "a cache of phase7 needs"),
        (["phase8", "--suite", "memory", "--model.d-model", "16384", "--model.n-layers", "64", "--train.device", "cpu"], "GiB of host memory"),
        (["phase7", "--train.device", "cuda:99"], "not on this machine"),
    ],
)
def test_a_mistake_is_one_clear_line(argv, message, capsys):
    if "taken" in argv:
        Path("runs/taken").mkdir(parents=True)
    assert call(*argv) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and len(error.splitlines()) == 1
    assert {str(p) for p in Path("runs").rglob("*")} <= {"runs/taken"}
