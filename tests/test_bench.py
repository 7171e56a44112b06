"""bench.py: what a command measures and leaves; what is kept when something fails; mistakes."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALLEST, SMALLEST_MODEL, write_prose

import bench
import train
from hyperlm import cli, kernels, model
from hyperlm.bench import suites, training

TINIEST = [*SMALLEST_MODEL, "--preset", "small", "--train.device", "cpu"]


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
    """Of each suite: notes, and the rows of its first table."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    record = json.loads(Path(f"runs/{name}/results.json").read_text(), parse_constant=refuse)
    return [{"notes": result["notes"], "rows": result["tables"][0]["rows"]} for result in record["results"]]


def test_speed_and_quality_are_measured_and_written(run, quick, capsys):
    trained = json.loads(Path("runs/r/training_summary.json").read_text())
    assert call("phase7", "phase8", "runs/r", *TINIEST, "--lengths", "16", "32", "--name", "b") == 0
    out = capsys.readouterr().out
    assert "phase7: how its time of training grows" in out and "| phase8" in out
    folder = Path("runs/b")
    for name in ("report.md", "report.tex", "speed_training.png", "speed_forward.pdf", "speed_memory.png"):
        assert (folder / name).stat().st_size > 500
    speed, quality = results("b")
    assert [(r["model"], r["length"]) for r in speed["rows"]] == [("phase7", 16), ("phase7", 32), ("phase8", 16), ("phase8", 32)]
    assert all(r["training tok/s"] > 0 and r["training GiB"] > 0 and r["batch"] * r["length"] == 32 for r in speed["rows"])
    assert quality["rows"][0]["bits per byte"] == pytest.approx(trained["val_bpb"], rel=1e-6)


def fails(*_: Any) -> Any:
    raise kernels.KernelError("no such kernel")


def test_results_are_written_whole_or_not_at_all(quick, capsys, monkeypatch):
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hyperlm.bench.figures.draw", full)
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
        return [row["text"] for row in found["rows"] if row["stride"] == 32], " ".join(found["notes"])

    texts, notes = compared("r", "other")
    assert texts[0] != texts[1] and "different texts (column `text`): their losses cannot be compared" in notes
    texts, notes = compared("r", "bytes")
    assert texts[0] == texts[1] and "bits per byte alone can be compared" in notes
    texts, notes = compared("r", "r")  # named twice, measured once
    assert len(texts) == 1 and notes == ""


def test_runs_have_short_names_that_are_no_kinds():
    short = {
        "runs/study/phase8": "study/phase8",
        "runs/phase8": "runs/phase8",
        "/data/run": "/data/run",
        "runs/a/b": "runs/a/b",
        "a/b": "a/b",
    }
    assert suites.named_runs(list(short)) == {name: Path(folder) for folder, name in short.items()}


def test_a_run_that_diverged_is_measured_as_such_in_valid_json(run, diverged):
    assert call(run, "--name", "b", "--train.device", "cpu") == 0
    (found,) = results("b")
    assert found["rows"][0]["loss"] is None and "the run diverged" in found["notes"][0]
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


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "name what to measure"),
        (["phase9"], "neither a kind"),
        (["phase7", "--suite", "report"], "needs folders of benchmarks"),
        (["runs", "--suite", "decode"], "neither a kind"),
        (["--suite", "decode"], "needs kinds"),
        (["--suite", "linear", "--train.device", "cpu"], "needs a CUDA device"),
        (["phase8", "--suite", "perplexity", "--data.sources", "nowhere.txt"], "--data.sources nowhere.txt: no such file"),
        (["phase7", "--preset", "huge"], "choose from"),
        (["phase7", "--lengths", "0"], "at least 1"),
        (["phase7", "--lengths", "16", "99999999999999999999"], "at most"),
        (["phase7", "--tokens", "-1"], "at least 0"),
        (["phase7", "--name", "a/b"], "plain folder name"),
        (["phase7", "--name", ".."], "plain folder name"),
        (["phase7", "--name", "taken"], "choose another --name"),
        (["phase7", "--preset", "max", "--lengths", "1048576", "--train.device", "cpu"], "a step of phase7 needs"),
        (["phase7", "--suite", "decode", "--preset", "max", "--lengths", "33554432", "--train.device", "cpu"], "a cache of phase7 needs"),
        (
            ["phase8", "--suite", "memory", "--model.d-model", "16384", "--model.n-layers", "64", "--train.device", "cpu"],
            "GiB of host memory",
        ),
        (["phase7", "--train.device", "cuda:99"], "not on this machine"),
        (["hybrid", "--model.n-layers", "3"], "a hybrid has a layer of phase7 in every 4"),
        (["phase7", "nanogpt", "--suite", "speed"], "nanogpt: nothing that suite speed measures"),
        (["phase8", "--suite", "nulls"], "phase8: nothing that suite nulls measures"),
        (["phase7", "--suite", "recall", "--train.steps", "5"], "--train.steps would change nothing in suite recall"),
        (
            ["phase7", "--suite", "memory", "--rates=1e-3"],
            "--rates would change nothing in suite memory (that is for quality, recall, nulls)",
        ),
        (["phase7", "--suite", "speed", "--seeds", "2"], "--seeds would change nothing"),
    ],
)
def test_a_mistake_is_one_clear_line(argv, message, capsys):
    if "taken" in argv:
        Path("runs/taken").mkdir(parents=True)
    assert call(*argv) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and len(error.splitlines()) == 1
    assert {str(p) for p in Path("runs").rglob("*")} <= {"runs/taken"}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--model.d-model", "64"], "--model.d-model would change nothing in suite perplexity (runs have settings of their own)"),
        (["--data.sources", "prose.txt", "--suite", "geometry"], "--data.sources would change nothing in suite geometry"),
        (["--data.sources", "prose.txt", "--suite", "perplexity", "geometry"], "geometry looks at runs on their own validation text"),
        (["--data.sources", "empty.txt"], "--data.sources empty.txt: no text in it"),
        (["--suite", "long-context", "--lengths", "64"], "--lengths would change nothing"),
    ],
)
def test_what_runs_do_not_take_is_refused_before_anything_is_measured(argv, message, run, capsys, monkeypatch):
    Path("empty.txt").touch()
    monkeypatch.setattr(model, "init", fails)
    assert call(run, *argv, "--name", "b", "--train.device", "cpu") == 2
    error = capsys.readouterr().err.strip()
    assert message in error and len(error.splitlines()) == 1 and not Path("runs/b").exists()


def test_a_run_that_is_named_twice_is_measured_once(run, capsys):
    assert call(run, f"{run}/", "--name", "b", "--train.device", "cpu") == 0
    assert len(results("b")[0]["rows"]) == 2 and "preset" not in capsys.readouterr().out  # two strides; no preset was used


def test_a_kind_that_cannot_be_trained_is_tried_once_and_is_a_row_that_says_why(capsys, monkeypatch, tmp_path):
    write_prose(tmp_path / "prose.txt")
    trained = []

    def diverges(job: training.Job, device: torch.device) -> None:
        trained.append(job.label)
        (job.keep / "checkpoints").mkdir(parents=True)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(training, "train", diverges)
    settings = [*TINIEST, "--data.sources", "prose.txt", "--data.seq-len", "32"]
    assert call("phase7", *settings, "--suite", "perplexity", "geometry", "--name", "b") == 2
    said = capsys.readouterr()
    assert (
        "1 failed, and the tables say why: phase7 (training)" in said.err
        and "could not be trained: OSError: [Errno 28] No space" in said.out
    )
    assert trained == ["phase7"] and not Path("runs/b/phase7").exists()
