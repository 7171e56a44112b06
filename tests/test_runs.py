"""Folders of runs: settings that are checked when they are read back, small files that cannot harm, one writer."""

import json
import os
import random
from dataclasses import replace
from pathlib import Path

import pytest

from hyperlm import files, runs
from hyperlm.config import PROSPECTIVE, Config, ModelConfig, OptimConfig, TrainConfig, another_run, flat, to_dict

CONFIG = Config(model=ModelConfig(d_model=64), optim=OptimConfig(lr=0.003), name="x")


@pytest.fixture
def run(tmp_path) -> Path:
    (tmp_path / "runs" / "x").mkdir(parents=True)
    runs.write_config(Path("runs/x"), CONFIG)
    return Path("runs/x")


def test_settings_come_back(run):
    assert runs.read_config(run) == CONFIG


def test_no_flipped_bit_gives_other_settings(run):
    """Each bit of a byte in four; a line end more or less changes nothing."""
    path = run / "config.json"
    content = path.read_bytes()
    others = 0
    for position in range(0, len(content), 4):
        for bit in range(8):
            path.write_bytes(content[:position] + bytes([content[position] ^ 1 << bit]) + content[position + 1 :])
            try:
                others += runs.read_config(run) != CONFIG
            except runs.RunError as e:
                assert "config.json is damaged" in str(e) and "\n" not in str(e)
    assert others == 0


def changed(**values) -> bytes:
    """config.json without a digest, as earlier versions wrote it, with another value: {"model__d_model": 3}."""
    settings = to_dict(CONFIG)
    for name, value in values.items():
        group, _, key = name.rpartition("__")
        (settings[group] if group else settings)[key] = value
    return json.dumps(settings).encode()


HOSTILE = {
    "empty": b"",
    "no JSON": b"{",
    "a list": b"[]",
    "a number": b"7",
    "not UTF-8": b'{"name": "\xff"}',
    "nested 100,000 deep": b'{"model":' * 100_000,
    "a list nested 100,000 deep": b"[" * 100_000,
    "a string of 2 MiB": b'"' + b"a" * (2 << 20) + b'"',
    "a group that is a number": changed(model=3),
    "an unknown setting": changed(model__width=3),
    "a float for an int": changed(model__d_model=64.5),
    "a string for an int": changed(model__d_model="64"),
    "a bool for an int": changed(model__n_layers=True),
    "an int for a bool": changed(model__ssm=1),
    "null": changed(optim__lr=None),
    "NaN": changed(optim__lr=float("nan")),
    "infinity": changed(optim__lr=float("inf")),
    "an unknown kind": changed(model__kind="phase9"),
    "sources that are no list": changed(data__sources="stdlib"),
    "a source that is no string": changed(data__sources=[3]),
    "a negative width": changed(model__d_model=-64),
    "no layers": changed(model__n_layers=0),
    "ten million layers": changed(model__n_layers=10_000_000),
    "an absurd width": changed(model__d_model=1 << 40),
    "an absurd vocabulary": changed(model__vocab_size=1 << 60),
    "a seed of 100 bits": changed(train__seed=1 << 100),
    "an integer of 5,000 digits": b'{"name": ' + b"9" * 5000 + b"}",
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_settings_are_one_line_in_no_time(run, case):
    (run / "config.json").write_bytes(HOSTILE[case])
    with pytest.raises(runs.RunError) as e:
        runs.read_config(run)
    assert str(e.value).startswith(f"{run / 'config.json'} is damaged (") and "\n" not in str(e.value) and len(str(e.value)) < 300


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_what_is_no_file_is_not_waited_for(run, make):
    (run / "config.json").unlink()
    make(run / "config.json")
    with pytest.raises(runs.RunError, match="config.json"):
        runs.read_config(run)


def test_settings_of_earlier_versions_have_no_digest_and_take_defaults(run):
    settings = to_dict(CONFIG)
    del settings["optim"]["clip"]
    (run / "config.json").write_text(json.dumps(settings))
    assert runs.read_config(run) == replace(CONFIG, optim=replace(CONFIG.optim, clip=OptimConfig().clip))


@pytest.mark.parametrize("name", flat(to_dict(CONFIG)))
def test_only_what_concerns_the_future_may_change(name):
    group, _, key = name.rpartition(".")
    old = getattr(CONFIG, group) if group else CONFIG
    value = getattr(old, key)
    new = replace(
        old,
        **{
            key: (not value)
            if type(value) is bool
            else (*value, "a")
            if isinstance(value, tuple)
            else value + type(value)(1)
            if value != "" and not isinstance(value, str)
            else "b"
        },
    )
    other = replace(CONFIG, **{group: new}) if group else new
    assert list(another_run(CONFIG, other)) == ([] if name in PROSPECTIVE else [name])


def test_micro_batches_may_be_cut_otherwise_while_a_step_is_as_large():
    a, b, c = (replace(CONFIG, train=TrainConfig(batch_size=b, grad_accum=a)) for a, b in ((4, 8), (2, 16), (4, 16)))
    assert not another_run(a, b) and set(another_run(a, c)) == {"train.batch_size"}


def test_a_file_that_cannot_be_written_leaves_what_was_there(run, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(runs.RunError, match=r"config.json could not be written \(No space left on device\)"):
        runs.write_config(run, Config())
    assert runs.read_config(run) == CONFIG and not list(run.glob("*.part"))


def test_a_run_is_owned_once_and_says_by_whom(run):
    assert not runs.is_owned(run)
    with runs.owned(run):
        assert runs.is_owned(run)
        with pytest.raises(runs.RunError, match=f"is being trained by process {os.getpid()} on "), runs.owned(run):
            pass
        assert runs.is_owned(run)
    assert not runs.is_owned(run) and runs.owner(run) == ""


def test_a_digest_does_not_depend_on_the_order_of_keys():
    values = {"a": 1, "b": [1.5, {"c": None}], "d": "x"}
    shuffled = list(values.items())
    random.Random(1).shuffle(shuffled)
    assert files.digest(values) == files.digest(dict(shuffled)) != files.digest({**values, "a": 2})
