"""bench.py: tables, plots and files of both suites; the fit; mistakes."""

import json
from pathlib import Path

import pytest
from conftest import SMALLEST

import bench
import train
from hyperlm import cli
from hyperlm.bench.report import table
from hyperlm.bench.speed import exponent


def call(*argv: str) -> int:
    return cli.run(bench.main, list(argv))


def test_speed_and_quality_are_measured_and_written(prose, capsys, monkeypatch):
    monkeypatch.setattr("hyperlm.bench.speed.run.__defaults__", (0.0,))
    assert cli.run(train.main, [*SMALLEST, "--data.sources", str(prose), "--name", "r", "--train.steps", "2", "--eval.max-tokens", "0"]) == 0
    trained = json.loads(Path("runs/r/training_summary.json").read_text())
    assert call("phase7", "phase8", "runs/r", "--preset", "small", "--lengths", "16", "32", "--name", "b", "--train.device", "cpu") == 0
    out = capsys.readouterr().out
    assert "phase7: time of a sequence grows as N^" in out and "| phase8" in out.replace("|  phase8", "| phase8")
    folder = Path("runs/b")
    for name in ("report.md", "speed_training.png", "speed_forward.png", "speed_memory.png"):
        assert (folder / name).stat().st_size > 500
    speed, quality = json.loads((folder / "results.json").read_text())["results"]
    assert [(r["model"], r["length"]) for r in speed["rows"]] == [("phase7", 16), ("phase7", 32), ("phase8", 16), ("phase8", 32)]
    assert all(r["training tok/s"] > 0 and r["training GiB"] > 0 and r["batch"] * r["length"] == 32 for r in speed["rows"])
    assert quality["rows"][0]["val_bpb"] == pytest.approx(trained["val_bpb"], rel=1e-9)


def test_decoding_is_measured_with_a_cache_that_grows_for_attention_alone(monkeypatch):
    monkeypatch.setattr("hyperlm.bench.decode.run.__defaults__", (0.0,))
    assert call("phase7", "phase8", "--suite", "decode", "--preset", "small", "--lengths", "16", "4096", "--name", "d", "--train.device", "cpu") == 0
    rows = json.loads(Path("runs/d/results.json").read_text())["results"][0]["rows"]
    size = {(row["model"], row["batch"], row["context"]): row["cache MiB"] for row in rows}
    assert size["phase8", 1, 4096] == size["phase8", 1, 16] and size["phase7", 1, 4096] > 10 * size["phase7", 1, 16]
    assert all(row["tok/s"] > 0 for row in rows) and Path("runs/d/decode_speed.png").stat().st_size > 500


@pytest.mark.parametrize(("residence", "state"), [("host", "int8"), ("device", "fp32")])
def test_memory_is_measured_of_a_residence(residence, state, monkeypatch):
    monkeypatch.setattr("hyperlm.bench.memory.run.__defaults__", (0.0,))
    flags = ["--suite", "memory", "--preset", "small", "--name", "m", "--train.device", "cpu", "--train.residence", residence]
    assert call("phase8", *flags, "--optim.state", state, "--train.grad-accum", "2", "--model.n-layers", "3") == 0
    (row,) = json.loads(Path("runs/m/results.json").read_text())["results"][0]["rows"]
    assert row["step"] == "16 x 256" and row["parameters"] < 2.5e6 and row["tok/s"] > 0 and row["host GiB"] > row["planned GiB"] > 0
    assert ("GB/s in" in row) == (residence == "host")


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
        (["phase7", "--train.device", "cuda:99"], "not on this machine"),
    ],
)
def test_a_mistake_is_one_clear_line(argv, message, capsys):
    assert call(*argv) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and len(error.splitlines()) == 1
