"""What a run says: lines of a terminal's width, and records in metrics.jsonl and TensorBoard."""

import io
import json
import math
import re
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import CASES, TINY
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hyperlm import env, evals, kernels, log, model
from hyperlm.config import Config
from hyperlm.kernels import Choice
from hyperlm.state import State


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (0.8512, "0.851"),
        (12.34, "12.3"),
        (999, "999"),
        (999.7, "1k"),
        (12_345, "12.3k"),
        (999_999, "1M"),
        (1.5e9, "1.5B"),
        (2e13, "20T"),
        (math.inf, "inf"),
        (math.nan, "nan"),
    ],
)
def test_counts_have_three_figures(number, text):
    assert log.count(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0s"), (59.9, "59s"), (60, "1m00s"), (725, "12m05s"), (18_420, "5h07m"), (86_400 * 3 + 4 * 3600, "3d04h")]
)
def test_durations_have_two_units(seconds, text):
    assert log.duration(seconds) == text


WIDEST = {"loss": 123456.7, "grad_norm": 123456.7, "tokens_per_second": 999_499, "mfu": 0.99, "seconds_left": 86_400 * 99 + 82_800}


@pytest.mark.parametrize("total", [9, 1000, 9_999_999])
@pytest.mark.parametrize("known", [True, False])
def test_no_line_of_a_step_or_an_evaluation_is_wider_than_a_terminal(total, known):
    record = {name: value for name, value in WIDEST.items() if known or name != "mfu"}
    line = log.step_line(total, total, record)
    assert len(line) <= 80 and ("MFU 99%" in line) == known
    sources = {f"val_bpb/{name}": 1.5 for name in ("books", "a source of a long name", "another one of a longer name", "and one more")}
    lines = log.eval_line(total, total, {"val_loss": 10.82, "val_ppl": 5e34, "val_bpb": 13.25, **sources}, 10**12).splitlines()
    assert max(map(len, lines)) <= 80 and "another one of a longer name 1.500" in " ".join(" ".join(lines).split())


def test_the_way_of_a_loss_falls_with_it():
    """Columns are as high as the loss there is above the lowest, and no column is empty."""
    points = [(100, 8.0), (200, 4.0), (300, 2.0), (400, 1.0)]
    *rows, below = log.curve(points, width=31, height=4)
    heights = [sum(max(0, log.BLOCKS.index(row[11:].ljust(31)[column])) for row in rows) for column in range(31)]
    assert heights == sorted(heights, reverse=True) and (heights[0], heights[-1]) == (32, 1)
    assert heights[10] == round(1 + (4 - 1) / (8 - 1) * 31)
    assert rows[0].startswith("    8.0000 ") and rows[-1].startswith("    1.0000 ") and below.split() == ["step", "100", "400"]
    assert [log.encodable(log.BLOCKS, encoding) for encoding in ("utf-8", "cp1252", "ascii", None)] == [True, False, False, True]
    assert log.curve(points[:2]) == [] and all(len(row) <= 80 for row in log.curve(points))


@pytest.mark.parametrize(
    ("backends", "text"),
    [
        ({"a": "", "b": ""}, "triton: 2 of 2"),
        ({"a": "", "b": "no kernel"}, "triton: 1 of 2; torch: b (no kernel)"),
        ({"a": "no GPU", "b": "no GPU"}, "torch: all (no GPU)"),
        ({"a": "x", "b": "y", "c": "x"}, "torch: a, c (x); torch: b (y)"),
    ],
)
def test_kernels_are_one_line(backends, text):
    assert (
        kernels.summary([Choice(op, "torch" if reason else "triton", reason or "fastest here") for op, reason in backends.items()]) == text
    )


def step(n: int, seconds_a_token: float | None = None) -> dict:
    state = State({}, {}, step=n, updates=n, tokens=100 * n, seed=0)
    metrics = {"loss": torch.tensor(10 / n), "grad_norm": torch.tensor(1.0), "lr": 1e-3, "tokens": 50, "positions": 100}
    return log.step_record(state, metrics, 10, 0.5, 1 << 30, seconds_a_token)


def test_utilisation_is_the_least_time_of_a_token_over_the_time_it_took():
    assert "mfu" not in step(1)
    assert step(1, seconds_a_token=1e-3)["mfu"] == pytest.approx(0.2)  # 200 tokens a second of 1,000


def shown(run: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard has of a run, by name."""
    board = EventAccumulator(str(run), {"scalars": 0, "histograms": 0, "tensors": 0})
    board.Reload()
    return {tag: [(e.step, e.value) for e in board.Scalars(tag)] for tag in board.Tags()["scalars"]} | {
        tag: board.Histograms(tag) for tag in board.Tags()["histograms"]
    }


def test_tensorboard_has_both_losses_in_one_chart_then_the_machine_and_gauges_last(tmp_path):
    tokens, cfg = torch.zeros(1, 8, dtype=torch.int64), replace(CASES["hybrid"], n_layers=9)
    records = log.open_log(tmp_path, 0)
    log.record(records, 1, step(1, 1e-3))
    gauges = evals.radius_gauges(model.init(cfg, 0), tokens, Config(model=cfg))
    losses = {"val_loss": 9.0, "val_ppl": 8103.0, "val_bpb": 3.0, "val_bpb/b": 3.1, "val_documents": 7}
    more = {"val_loss/positions_64_128": 2.0, "val_passkey": 0.0, "val_passkey_choice": 0.3}
    log.record(records, 1, {**losses, **more, "sample": "def", **gauges})
    log.tell_settings(records, Config(model=cfg), 0)
    log.close(records)
    training, validation = shown(tmp_path), shown(tmp_path / "validation")
    assert training["loss/nats a token"] == [(1, 10.0)] and validation["loss/nats a token"] == [(1, 9.0)]
    groups = sorted({name.split("/")[0] for name in [*training, *validation]})  # as TensorBoard sorts them
    assert validation["loss by position/000064 to 000128, nats a token"] == [(1, 2.0)]
    assert groups == ["loss", "loss by position", "machine", "optimizer", "passkey", "per source", "radius"]
    assert [name for name in training if name.startswith("radius")] == ["radius/queries", "radius/keys"]  # however many layers
    (event,) = training["radius/keys"]
    assert event.histogram_value.num == 9 * cfg.n_heads * 8 and event.histogram_value.sum == pytest.approx(
        event.histogram_value.num * 1.0, rel=0.05
    )


def test_what_a_resumed_run_makes_again_is_in_no_chart_twice(tmp_path):
    records = log.open_log(tmp_path, 0)
    for n in (1, 2, 3):
        log.record(records, n, step(n) | {"val_loss": float(n)})
    log.close(records)
    time.sleep(1.1)  # files of events are named by the second
    records = log.open_log(tmp_path, 2)
    log.record(records, 3, step(3) | {"val_loss": 7.0})
    log.close(records)
    assert [n for n, _ in shown(tmp_path)["loss/nats a token"]] == [1, 2, 3]
    assert shown(tmp_path / "validation")["loss/nats a token"] == [(1, 1.0), (2, 2.0), (3, 7.0)]
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3]
    assert log.newest(tmp_path)["val_loss"] == 7.0 and log.evaluations(tmp_path) == [(1, 1.0), (2, 2.0), (3, 7.0)]


def test_radii_are_counted_whole():
    tokens = torch.zeros(2, 5, dtype=torch.int64)
    gauges = evals.radius_gauges(model.init(TINY, 0), tokens, Config(model=TINY))
    for name in ("radius/q_counts", "radius/k_counts"):
        assert sum(gauges[name]) == TINY.n_layers * TINY.n_heads * tokens.numel()
    assert not any(
        "counts" in name for name in evals.radius_gauges(model.init(CASES["softmax"], 0), tokens, Config(model=CASES["softmax"]))
    )


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("watched", [True, False])
def test_something_moves_where_somebody_watches_and_nowhere_else(watched, monkeypatch, capsys):
    monkeypatch.setattr(env, "DELAY", 0.0)
    out = Terminal() if watched else io.StringIO()
    monkeypatch.setattr(sys, "stderr", out)
    with env.live("waiting") as bar:
        time.sleep(1.5)  # and tells the bar nothing
        seen = out.getvalue()
        env.say("a line")
    assert capsys.readouterr().out == "a line\n" and bar.disable
    assert re.search(r"\rwaiting: .*00:01", seen) if watched else out.getvalue() == ""
