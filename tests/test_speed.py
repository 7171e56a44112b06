"""Suites of speed, decoding, memory and kernels: what their numbers count, and what is a row where there is no number."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hyperlm import env, kernels
from hyperlm.bench import arms, checks, decode, figures, memory, speed
from hyperlm.bench import kernels as kernel_suites
from hyperlm.bench.result import Result, Row
from hyperlm.bench.speed import Timing, exponent
from hyperlm.config import Config, ConfigError, DataConfig, ModelConfig, OptimConfig, TrainConfig
from hyperlm.memory import parameters

CPU = torch.device("cpu")
TINIEST = Config(
    model=ModelConfig(d_model=32, n_layers=4, head_dim=8, vocab_size=320),
    data=DataConfig(seq_len=16),
    train=TrainConfig(residence="device", batch_size=2, grad_accum=2),
    optim=OptimConfig(lr=1e-3, state="int8"),
)


def of_residence(residence: str, state: str = "int8") -> Config:
    return replace(TINIEST, train=replace(TINIEST.train, residence=residence), optim=replace(TINIEST.optim, state=state))


def tables(measuring: Iterator[Result]) -> dict[str, list[Row]]:
    """Of the last of the results, which grow. What it draws is in its tables."""
    *_, last = measuring
    found = {table.name: table.rows for table in last.tables}
    assert all(figure.table in found for figure in last.figures)
    return found


def fails(*_: Any, **__: Any) -> Any:
    raise kernels.KernelError("no such kernel\nat all")


# -- times -----------------------------------------------------------------------------------------------------------------------------


def test_a_spread_is_half_of_the_quartiles_range_in_percent_of_the_median():
    assert Timing([5.0, 1.0, 2.0, 3.0, 4.0]).median == 3.0 and Timing([5.0, 1.0, 2.0, 3.0, 4.0]).spread == pytest.approx(
        100 * (4 - 2) / 2 / 3
    )
    assert Timing([2.0, 2.0, 2.0]).spread == 0


@pytest.mark.parametrize(("seconds", "budget", "repeats"), [(1.0, 0.0, 3), (1.0, 2.5, 3), (1.0, 10.0, 11), (0.001, 10.0, 50)])
def test_calls_are_repeated_as_long_as_there_is_time(seconds, budget, repeats, monkeypatch):
    clock, done = [0.0], []

    def work() -> None:
        clock[0] += 100.0 if not done else seconds  # the first is warm-up
        done.append(1)

    monkeypatch.setattr(speed.time, "perf_counter", lambda: clock[0])
    assert speed.timed(work, CPU, budget).each == pytest.approx([seconds] * repeats) and len(done) == repeats + 1


@pytest.mark.parametrize("power", [1.0, 1.5, 2.0])
def test_the_exponent_is_that_of_the_time_of_a_sequence_in_its_longer_half(power):
    rows = [{"length": n, "x": n / (1e-6 * n**power + (1 if n < 512 else 0))} for n in (2**i for i in range(6, 14))]
    fit = exponent(rows, "x")
    assert fit.p == pytest.approx(power) and fit.error == pytest.approx(0, abs=1e-6)


def test_the_error_of_an_exponent_is_the_standard_error_of_the_slope():
    rng = np.random.default_rng(0)
    n = 2.0 ** np.arange(6, 14)
    many = []
    for _ in range(400):
        seconds = 1e-6 * n**1.5 * np.exp(0.1 * rng.normal(size=len(n)))
        x, y = np.log(n[-4:]), np.log(seconds[-4:])
        slope = ((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum()
        rest = y - y.mean() - slope * (x - x.mean())
        error = (rest @ rest / 2 / ((x - x.mean()) ** 2).sum()) ** 0.5  # four points, of which the line takes two
        fit = exponent([{"length": int(a), "x": float(a / b)} for a, b in zip(n, seconds, strict=True)], "x")
        assert fit == pytest.approx((slope, error))
        many.append(fit)
    assert np.std([fit.p for fit in many]) == pytest.approx(np.sqrt(np.mean([fit.error**2 for fit in many])), rel=0.1)


@pytest.mark.parametrize("values", [[1.0] * 3, [1.0, 1.0, 1.0, "out of memory"], [1.0, 1.0, 1.0, None]])
def test_fewer_than_four_lengths_have_no_exponent(values):
    rows = [{"model": "phase7", "length": 2**i, "forward tok/s": x, "training tok/s": 1.0 + i} for i, x in enumerate(values)]
    assert exponent(rows, "forward tok/s") is None
    grown, notes = speed.growth(rows)
    assert [list(row) for row in grown] == [["model", "training"]] * (len(values) > 3)
    assert "phase7: how its time of forward grows with the length takes at least 4 lengths to say" in notes


# -- speed -----------------------------------------------------------------------------------------------------------------------------


def test_speed_is_measured_of_every_kind_at_every_length_with_the_time_of_every_call():
    results = list(speed.run(["phase8", "hybrid"], TINIEST, CPU, [16, 32], 32, 0.0))
    assert [len(result.tables[0].rows) for result in results] == [1, 2, 3, 4]  # an interrupted bench keeps what was measured
    found = tables(iter(results))
    assert [(r["model"], r["length"], r["batch"]) for r in found["speed"]] == [
        ("phase8", 16, 2),
        ("phase8", 32, 1),
        ("hybrid", 16, 2),
        ("hybrid", 32, 1),
    ]
    assert found["speed"][0]["parameters"] != found["speed"][2]["parameters"]
    for row in found["speed"]:
        for what in ("forward", "training"):
            each = [
                call["seconds"]
                for call in found["calls"]
                if (call["model"], call["length"], call["what"]) == (row["model"], row["length"], what)
            ]
            assert (
                len(each) >= 3
                and row[f"{what} tok/s"] == 32 / np.median(each)
                and row[f"{what} ± %"] == Timing(each).spread
                and row[f"{what} GiB"] > 0
            )


@pytest.mark.parametrize(("residence", "state"), [("device", "fp32"), ("device", "int8"), ("host", "fp32"), ("host", "int8")])
def test_speed_trains_one_model_step_after_step(residence, state, monkeypatch):
    """A state is used once: what a step returns goes into the next."""
    seen, make_step = [], speed.make_step

    def watched(*args: Any) -> Callable:
        step = make_step(*args)

        def once(state: Any, batch: torch.Tensor) -> Any:
            seen.append(state.step)
            return step(state, batch)

        return once

    monkeypatch.setattr(speed, "make_step", watched)
    (row,) = tables(speed.run(["phase8"], of_residence(residence, state), CPU, [16], 32, 0.0))["speed"]
    assert seen == list(range(len(seen))) and len(seen) > 3
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
    speed.measure("phase8", speed.of_length(of_residence(residence), 16, 32), CPU, 0.0)
    first = done.index("measured")
    assert done[:first].count("head_nats") >= 3 and "init_state" in done[first:] and "init_state" not in done[:first]


def test_a_kind_that_fails_is_a_row_that_says_why_and_the_next_is_measured(monkeypatch):
    init_state = speed.init_state
    monkeypatch.setattr(
        speed, "init_state", lambda residence: (fails if residence.config.model.kind == "softmax" else init_state)(residence)
    )
    found = tables(speed.run(["softmax", "phase8"], TINIEST, CPU, [16, 32], 32, 0.0))["speed"]
    assert found[0] == {"model": "softmax", "length": 16, "failed": "KernelError: no such kernel"}
    assert [(row["model"], row["length"]) for row in found[1:]] == [("phase8", 16), ("phase8", 32)]


@pytest.mark.parametrize(
    "suite",
    [lambda kinds: speed.run(kinds, TINIEST, CPU, [16, 32], 32, 0.0), lambda kinds: decode.run(kinds, TINIEST, CPU, [16, 32], [1], 0.0)],
    ids=["speed", "decode"],
)
def test_a_kind_that_is_wrong_is_not_timed(suite, monkeypatch):
    """It is looked at once, before the first number."""
    seen = []

    def model(config: Config, device: torch.device) -> None:
        seen.append(config.model.kind)
        if config.model.kind == "phase7":
            raise checks.CheckFailed("it is not causal")

    monkeypatch.setattr(checks, "model", model)
    *_, last = suite(["phase7", "phase8"])
    found = last.tables[0].rows
    assert (
        found[0]["failed"] == "CheckFailed: it is not causal"
        and [row["model"] for row in found] == ["phase7", "phase8", "phase8"]
        and seen == ["phase7", "phase8"]
    )


def test_what_does_not_fit_is_said_and_what_was_measured_before_is_kept(monkeypatch):
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(speed, "init_state", full)
    (row,) = tables(speed.run(["phase8"], TINIEST, CPU, [16], 32, 0.0))["speed"]
    assert row["training tok/s"] == "out of memory" and row["forward tok/s"] > 0 and "failed" not in row


# -- decode and memory -----------------------------------------------------------------------------------------------------------------


def test_decoding_is_measured_with_a_cache_that_grows_for_attention_alone():
    found = tables(decode.run(["phase7", "phase8", "hybrid"], TINIEST, CPU, [16, 1024], [2], 0.0))
    size = {(row["model"], row["batch"], row["context"]): row["cache MiB"] for row in found["decode"]}
    assert size["phase8", 2, 1024] == size["phase8", 2, 16] and size["phase7", 2, 1024] > 10 * size["phase7", 2, 16]
    grown = {kind: size[kind, 2, 1024] - size[kind, 2, 16] for kind in ("phase7", "hybrid")}
    assert grown["hybrid"] == grown["phase7"] / 4  # one layer of four
    for row in found["decode"]:
        each = [c["seconds"] for c in found["calls"] if all(c[name] == row[name] for name in ("model", "batch", "context"))]
        assert row["tok/s"] == row["batch"] / np.median(each) and row["± %"] == Timing(each).spread


def test_a_kind_that_cannot_decode_is_a_row_that_says_why(monkeypatch):
    decoder = decode.sample.decoder
    monkeypatch.setattr(
        decode.sample, "decoder", lambda params, own, **rest: (fails if own.kind == "phase7" else decoder)(params, own, **rest)
    )
    found = tables(decode.run(["phase7", "phase8"], TINIEST, CPU, [16], [1, 2], 0.0))["decode"]
    assert found[0] == {"model": "phase7", "batch": 1, "context": 16, "failed": "KernelError: no such kernel"}
    assert [(row["model"], row["batch"]) for row in found[1:]] == [("phase8", 1), ("phase8", 2)]


@pytest.mark.parametrize(("residence", "state"), [("host", "int8"), ("device", "fp32")])
def test_memory_is_measured_of_a_residence(residence, state):
    found = tables(memory.run(["phase8", "hybrid"], of_residence(residence, state), CPU, 0.0))
    for row, kind in zip(found["memory"], ("phase8", "hybrid"), strict=True):
        assert row["model"] == kind and row["parameters"] == sum(parameters(arms.of_kind(TINIEST, kind)).values())
        assert row["step"] == "4 x 16" and row["host GiB"] > row["planned GiB"] > 0 and ("GB/s in" in row) == (residence == "host")
        each = [call["seconds"] for call in found["calls"] if call["model"] == kind]
        assert row["tok/s"] == 64 / np.median(each) and row["± %"] == Timing(each).spread


def test_a_kind_that_cannot_be_trained_is_a_row_that_says_why(monkeypatch):
    make_step = memory.make_step
    monkeypatch.setattr(
        memory, "make_step", lambda residence, *rest: (fails if residence.config.model.exact_every else make_step)(residence, *rest)
    )
    found = tables(memory.run(["hybrid", "phase8"], TINIEST, CPU, 0.0))["memory"]
    assert found[0] == {"model": "hybrid", "failed": "KernelError: no such kernel"} and found[1]["tok/s"] > 0


HUGE = replace(TINIEST, model=ModelConfig(d_model=16384, n_layers=64, vocab_size=320), optim=OptimConfig(lr=1e-3, state="fp32"))


@pytest.mark.parametrize(
    ("check", "message"),
    [
        (lambda: speed.check(["phase8", "hybrid"], HUGE, CPU, [1 << 20], 1 << 20), "a step of phase8 needs"),
        (lambda: decode.check(["hybrid"], HUGE, CPU, [1 << 25], [4]), "a cache of hybrid needs"),
        (lambda: memory.check(["hybrid"], HUGE, CPU), "training hybrid needs .* GiB of host memory"),
    ],
)
def test_what_memory_cannot_hold_is_said_before_anything_is_measured(check, message):
    with pytest.raises(ConfigError, match=message):
        check()


# -- kernels ---------------------------------------------------------------------------------------------------------------------------


def contestants() -> list[kernel_suites.Contestant]:
    """Right, wrong, failing, and something else than what is measured."""

    def product(x: kernel_suites.Inputs) -> torch.Tensor:
        return x["q"] * x["k"] * x["v"]

    def of(name: str, fn: Callable, reference: Callable | None = product, limit: int = 1 << 30) -> kernel_suites.Contestant:
        return kernel_suites.Contestant(name, fn, ("q", "k", "v"), reference, limit)

    return [
        of("right", product),
        of("wrong", lambda x: product(x) * 1.1),
        of("failing", fails),
        of("other", lambda x: x["q"] + x["k"] + x["v"], None, limit=8),
    ]


def test_a_kernel_that_is_wrong_or_fails_is_not_timed_and_says_why(monkeypatch):
    x = kernel_suites.linear_inputs((1, 2, 16, 8), CPU)
    right, rows, notes = kernel_suites.check(contestants(), x)
    assert [c.name for c in right] == ["right", "other"] and len(notes) == 1 and notes[0].startswith("right: largest relative error")
    assert (
        [row["kernel"] for row in rows] == ["wrong", "failing"]
        and rows[0]["failed"].startswith("wrong: relative error 1.0e-01")
        and rows[1]["failed"] == "KernelError: no such kernel"
    )

    monkeypatch.setattr(kernel_suites, "milliseconds", lambda fn: (fn(), 2.0)[1])
    monkeypatch.setattr(kernel_suites, "device_milliseconds", lambda fn: (fn(), [1.0, 2.0, 3.0, 4.0, 5.0])[1])
    late = kernel_suites.Contestant("late", fails, ("q",))
    done = kernel_suites.timed([*right, late], (1, 2, 16, 8), x, {"forward": 1.0, "forward+backward": 1.5})
    assert [row["kernel"] for row in done] == ["right", "late"]  # the other is not for such lengths
    assert (
        done[0]["forward, device"] == 3.0
        and done[0]["forward, ± %"] == Timing([1, 2, 3, 4, 5]).spread
        and done[0]["forward+backward, device / limit"] == 2.0
    )
    assert done[1] == {"B, H, N, K": "1, 2, 16, 8", "kernel": "late", "failed": "KernelError: no such kernel"}


def test_times_of_kernels_are_drawn_for_each_token(tmp_path):
    rows = [{"kernel": "wrong", "failed": "wrong"}]
    rows += [{"B, H, N, K": f"{65536 // n}, 16, {n}, 64", "kernel": "ours", "forward+backward, device": 6.5536} for n in (1024, 2048)]
    rows += [{"B, H, N, K": "8, 16, 4096, 128", "kernel": "ours", "forward+backward, device": 1.0}]
    found = kernel_suites.result("linear", rows, [])
    assert found.tables[1].rows == [{"kernel": "ours", "length": n, "ns a token": pytest.approx(100)} for n in (1024, 2048)]
    assert (
        figures.draw(found.figures[0], found.tables, tmp_path)
        and isinstance(found, Result)
        and Path(tmp_path / "linear_attention.pdf").exists()
    )
