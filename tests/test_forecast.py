"""What --plan says of a run: operations a token, whether it fits, how many steps and how long; and what auto takes."""

import json
import re
import time
from dataclasses import replace

import pytest
import torch
from conftest import CASES, SMALLEST, TINY
from torch.utils.flop_counter import FlopCounterMode

import train
from configs import PRESETS
from hyperlm import cli, env, finetune, flops, forecast, launch, log, model, residence, runs
from hyperlm.config import Config, DataConfig, TrainConfig, resolve
from hyperlm.env import GIB
from hyperlm.mixers import MIXERS

N = 48


@pytest.mark.parametrize("case", CASES)
def test_operations_of_a_token_are_six_for_each_number_that_multiplies_it_and_those_of_its_attention(case):
    cfg = CASES[case]
    declared = model.declaration(cfg)
    matrices = [spec.shape for stage in (declared["embed"], *declared["blocks"], declared["head"]) for name, spec in stage.items()
                if len(spec.shape) == 2 and name not in ("low", "mixer.conv", "mixer.norm", "ssm.conv")]  # fmt: skip
    of_matrices = 2 * sum(rows * columns for rows, columns in matrices)
    of_cores = 0
    for layer in range(cfg.n_layers):
        for op in MIXERS[cfg.layer_kind(layer)].ops(cfg):
            scores_or_state = {"hyperbolic_attention": N, "softmax_attention": N, "linear_attention": cfg.head_dim}.get(op, 0)
            of_cores += 2 * 2 * cfg.n_heads * cfg.head_dim * scores_or_state
    assert flops.a_token(cfg, N) == 3 * (of_matrices + of_cores)


def test_what_attention_is_counted_as_is_what_its_products_take():
    """Written down naively: scores and values over all positions; a state that every token is added to and read from."""
    h, n, k = TINY.n_heads, N, TINY.head_dim
    q, key, v = (torch.zeros(h, n, k) for _ in range(3))
    with FlopCounterMode(display=False) as quadratic:
        (q @ key.mT) @ v
    with FlopCounterMode(display=False) as linear:
        for i in range(n):
            state = key[:, i, :, None] @ v[:, i, None]
            q[:, i, None] @ state
    assert quadratic.get_total_flops() == n * flops.core("hyperbolic_attention", TINY, n) == n * flops.core("softmax_attention", TINY, n)
    assert linear.get_total_flops() == n * flops.core("linear_attention", TINY, n)


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("a card of next year", None),
    ],
)
def test_a_card_that_nobody_stated_has_no_utilisation(name, known, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert flops.peak(torch.device("cuda", 0)) == known and flops.peak(torch.device("cpu")) is None


def machine(monkeypatch, card: float, host: float) -> torch.device:
    """A pretended one: GiB of a GPU that may be used (0 for none) and of host memory."""
    device = torch.device("cuda", 0) if card else torch.device("cpu")
    monkeypatch.setattr(env, "allowed_memory", lambda device, budget: round(((card - 0.8) if card else host) * GIB))
    monkeypatch.setattr(env, "available_memory", lambda device: round(host * GIB))
    monkeypatch.setattr(env, "compute_dtype", lambda device: torch.bfloat16 if card else torch.float32)
    return device


BILLIONS = ["--model.d-model", "4096", "--model.n-layers", "32"]
DECISIONS = [
    (BILLIONS, 8, 24, "host", "int8"),
    (BILLIONS, 8, 64, "host", "fp32"),
    (BILLIONS, 24, 24, "host", "int8"),
    (BILLIONS, 24, 64, "host", "fp32"),
    (BILLIONS, 80, 24, "device", "int8"),
    (["--preset", "max"], 80, 24, "device", "fp32"),
    (["--preset", "max"], 8, 24, "host", "int8"),
    ([], 8, 24, "device", "fp32"),
    ([], 0, 24, "device", "fp32"),
    (["--preset", "max"], 0, 64, "device", "int8"),
    (["--preset", "max"], 0, 96, "device", "fp32"),
    (["--train.residence", "host"], 8, 24, "host", "fp32"),
    ([*BILLIONS, "--optim.state", "int8"], 8, 64, "host", "int8"),
    ([*BILLIONS, "--train.residence", "device"], 24, 64, "device", "int8"),
]


@pytest.mark.parametrize(("flags", "card", "host", "residence", "state"), DECISIONS)
def test_auto_takes_fp32_where_memory_suffices_and_else_int8(flags, card, host, residence, state, monkeypatch, capsys):
    device = machine(monkeypatch, card, host)
    config = train.parse(flags).config
    config = launch.choose_residence(config, device).config
    assert (config.train.residence, config.optim.state) == (residence, state)
    said = capsys.readouterr().out
    assert ("int8: fp32 needs" in said) == (state == "int8" and "--optim.state" not in flags)
    assert all(len(line) <= 80 for line in said.splitlines())


@pytest.mark.parametrize(
    ("card", "host", "message"), [(8, 12, "of host memory"), (2, 64, "on its visits to cuda:0"), (0, 24, "cpu has 24.0")]
)
def test_what_fits_nowhere_is_said_with_what_to_do(card, host, message, monkeypatch):
    device = machine(monkeypatch, card, host)
    config = train.parse(BILLIONS).config
    with pytest.raises(cli.TrainingError, match=message) as error:
        launch.choose_residence(config, device)
    assert "lower --model.d-model" in str(error.value)


def test_a_run_from_the_weights_of_another_decides_for_itself(made):
    base = made("--train.steps", "1") / "runs/r"
    settings = finetune.settings(base, runs.read_config(base), None, new_text=False)
    assert (settings.train.residence, settings.optim.state) == ("auto", "auto") and runs.read_config(base).optim.state == "fp32"


def test_a_state_that_nobody_decided_is_planned_as_fp32():
    for state in ("auto", "fp32"):
        config = PRESETS["small"]()
        config = replace(config, optim=replace(config.optim, state=state))
        assert residence.plans(config, torch.bfloat16) == residence.plans(PRESETS["small"](), torch.bfloat16)


@pytest.fixture
def quick(monkeypatch) -> list[Config]:
    """What is measured, which takes no time."""
    seen = []
    monkeypatch.setattr(forecast, "products_a_second", lambda device: 1e9)
    monkeypatch.setattr(forecast, "measured", lambda chosen: seen.append(chosen.config) or 2.0)
    return seen


def settings(sequences: int, n_layers: int = 2) -> Config:
    train = TrainConfig(batch_size=4, grad_accum=sequences // 4, residence="device")
    return resolve(Config(model=replace(TINY, n_layers=n_layers, vocab_size=320), train=train, data=DataConfig(seq_len=N)))


@pytest.mark.parametrize(
    ("sequences", "slower", "of_these", "how"),
    [
        (8, 1, 8, "measured: 3 steps on random tokens"),
        (4096, 100, 4, "with 4 of their 4096 sequences"),
        (4096, 10**6, 0, "not measured: at 50% of the 1k operations a second"),
    ],
)
def test_steps_are_measured_as_far_as_patience_goes(quick, monkeypatch, sequences, slower, of_these, how):
    monkeypatch.setattr(forecast, "products_a_second", lambda device: 1e9 / slower)
    config = settings(sequences)
    seconds, words = forecast.step_seconds(residence.make(config, torch.device("cpu")))
    assert how in words
    if of_these:
        (measured,) = quick
        assert measured.train.batch_size * measured.train.grad_accum == of_these and seconds == 2.0 * sequences / of_these
    else:
        assert quick == [] and seconds == pytest.approx(flops.a_step(config) / (0.5 * 1e9 / slower))


def test_a_measured_step_takes_its_time():
    begun = time.perf_counter()
    seconds = forecast.measured(residence.make(settings(8), torch.device("cpu")))
    assert 0 < seconds * forecast.REPEATS < time.perf_counter() - begun


def told(capsys, prose, *more: str) -> dict[str, str]:
    """--plan's lines, by their label."""
    capsys.readouterr()
    assert cli.run(train.main, [*SMALLEST, "--data.sources", str(prose), "--train.device", "cpu", "--plan", *more]) == 0
    lines, label = capsys.readouterr().out.splitlines(), ""
    assert all(len(line) <= 80 for line in lines)
    said: dict[str, str] = {}
    for line in lines:
        label = line[:11].strip() or label
        said[label] = " ".join(filter(None, (said.get(label), line[11:].strip())))
    return said


def test_the_plan_counts_steps_in_the_cache_or_by_the_size_of_the_text(prose, capsys, quick, tmp_path):
    estimated = told(capsys, prose)
    assert "estimated" in estimated["steps"] and not (tmp_path / "cache").exists() and not (tmp_path / "runs").exists()
    assert cli.run(train.main, [*SMALLEST, "--data.sources", str(prose), "--train.steps", "1"]) == 0
    said = capsys.readouterr().out
    tokens = int(said.split("data       ")[1].split()[1].replace(",", ""))
    counted = told(capsys, prose)
    steps = int(counted["steps"].split(", ")[0].replace(",", ""))
    assert "in the cache" in counted["steps"] and steps == pytest.approx(4 * tokens / (4 * 2 * 32), rel=0.02)
    assert counted["time"].startswith("about ") and "measured" in counted["time"]
    assert told(capsys, prose, "--train.steps", "7")["steps"] == "7, as asked for"
    assert told(capsys, prose, "--data.sources", "nowhere.txt")["steps"].startswith("unknown: ")
    assert "yes: in residence device with fp32 state" in counted["fits"] and "GiB of disk are free" in counted["disk"]


def test_the_plan_of_what_does_not_fit_says_so(prose, capsys):
    said = told(capsys, prose, "--model.d-model", "32768", "--model.n-layers", "64")
    assert said["fits"].startswith("no: this run needs") and "time" not in said


def test_the_plan_counts_the_tokens_of_conversations(tmp_path, capsys):
    rows = [{"question": f"what is {i}?", "answer": f"it is {i * i}"} for i in range(400)]
    (tmp_path / "talks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = [*SMALLEST, "--data.sources", str(tmp_path / "talks.jsonl")]
    assert cli.run(train.main, [*flags, "--train.steps", "1"]) == 0
    found = re.search(r"talks.jsonl ([\d,]+) \+", capsys.readouterr().out)[1].replace(",", "")
    assert cli.run(train.main, [*flags, "--plan"]) == 0
    assert f"of {log.count(int(found))} tokens, in the cache" in " ".join(capsys.readouterr().out.split())
