"""Checkpoints: exact, verified, and clear about damage."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import CASES, TINY, generator

from configs import Config, OptimConfig, TrainConfig
from hyperlm import checkpoint, tree
from hyperlm.optim import new_schedule
from hyperlm.step import init_state, make_step

CPU = torch.device("cpu")


def here(stage):
    return stage


def config_of(cfg=TINY) -> Config:
    return Config(model=cfg, train=TrainConfig(seed=1))


def facts(cfg=TINY) -> checkpoint.Facts:
    return checkpoint.Facts(config_of(cfg), new_schedule(OptimConfig(), 10), "print", "tokenizer", False)


def trained(cfg=TINY, steps: int = 2):
    config = config_of(cfg)
    state, step = init_state(config, CPU), make_step(config, new_schedule(config.optim, 10), CPU)
    for i in range(steps):
        state, _ = step(state, torch.randint(64, (1, 2, 9), generator=generator(i)))
    return state


def save(run: Path, *steps_and_losses, keep: int = 2, state=None, cfg=TINY):
    state = state or trained(cfg)
    writer = checkpoint.manager(run, keep)
    for step, loss in steps_and_losses:
        checkpoint.save(writer, replace(state, step=step, updates=min(step, state.updates)), facts(cfg), loss, 5.0)
    checkpoint.close(writer)
    return state


def test_what_is_saved_comes_back_bit_for_bit(tmp_path):
    cfg = CASES["hybrid-ssm"]
    state = save(tmp_path, (2, 1.0), cfg=cfg)
    back, meta = checkpoint.restore(tmp_path, 2, config_of(cfg), here)
    assert (back.step, back.updates, back.tokens, back.seed) == (2, state.updates, state.tokens, 1)
    assert meta["fingerprint"] == "print"
    for before, after in ((state.params, back.params), (state.opt_state, back.opt_state)):
        before, after = tree.by_path(before), tree.by_path(after)
        assert list(before) == list(after)
        assert all(torch.equal(before[path], after[path]) and before[path].dtype == after[path].dtype for path in before)


def test_saving_is_not_disturbed_by_training_on(tmp_path):
    state = trained()
    truth = tree.map(torch.clone, state.params)
    writer = checkpoint.manager(tmp_path, 1)
    checkpoint.save(writer, state, facts(), None, None)
    tree.map(lambda p: p.fill_(7), state.params)
    checkpoint.finish(writer)
    back, _ = checkpoint.restore(tmp_path, 2, config_of(), here)
    assert all(torch.equal(a, b) for a, b in zip(tree.leaves(truth), tree.leaves(back.params), strict=True))


def test_bf16_comes_back_bit_for_bit():
    x = torch.randn(33, generator=generator()).to(torch.bfloat16)
    assert torch.equal(checkpoint.to_tensor(checkpoint.to_numpy(x, copy=False)), x)


def test_latest_and_best_are_kept(tmp_path):
    save(tmp_path, (1, 3.0), (2, 1.0), (3, 2.0), (4, None), (5, 2.5), (6, None))
    assert checkpoint.steps(tmp_path) == [2, 5, 6]
    assert checkpoint.latest(tmp_path) == 6 and checkpoint.best(tmp_path) == 2


def test_without_evaluations_the_best_is_the_newest(tmp_path):
    save(tmp_path, (1, None), (2, None))
    assert checkpoint.best(tmp_path) == 2


def test_folders_are_named_by_their_step(tmp_path):
    save(tmp_path, (100, None))
    assert (tmp_path / "checkpoints" / "step_00000100").is_dir()


def largest_file(folder: Path) -> Path:
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


@pytest.mark.parametrize("item", ["params", "opt"])
def test_a_flipped_byte_is_noticed_and_the_way_out_named(tmp_path, item):
    save(tmp_path, (1, None), (2, None))
    victim = largest_file(tmp_path / "checkpoints" / "step_00000002" / item)
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    with pytest.raises(checkpoint.CheckpointError) as e:
        checkpoint.restore(tmp_path, 2, config_of(), here)
    assert "step_00000002 is damaged" in str(e.value) and "go on from step 1" in str(e.value) and "\n" not in str(e.value)
    checkpoint.restore(tmp_path, 1, config_of(), here)


@pytest.mark.parametrize("damage", ["truncated", "file missing", "item missing", "meta missing"])
def test_other_damage_is_one_line_too(tmp_path, damage):
    save(tmp_path, (1, None))
    folder = tmp_path / "checkpoints" / "step_00000001"
    victim = largest_file(folder / "params")
    if damage == "truncated":
        victim.write_bytes(victim.read_bytes()[:100])
    elif damage == "file missing":
        victim.unlink()
    else:
        shutil.rmtree(folder / ("params" if damage == "item missing" else "meta"))
    with pytest.raises(checkpoint.CheckpointError) as e:
        checkpoint.restore(tmp_path, 1, config_of(), here)
    assert "damaged" in str(e.value) and "\n" not in str(e.value)


def test_a_checkpoint_of_another_shape_is_refused(tmp_path):
    save(tmp_path, (1, None))
    for other in (replace(TINY, d_model=64), replace(TINY, n_layers=1), replace(TINY, n_layers=3), replace(TINY, kind="softmax")):
        with pytest.raises(checkpoint.CheckpointError):
            checkpoint.restore(tmp_path, 1, config_of(other), here)


def test_a_step_is_never_overwritten_in_silence(tmp_path):
    save(tmp_path, (5, None))
    with pytest.raises(checkpoint.CheckpointError, match="not written"):
        save(tmp_path, (5, None))


def test_missing_and_empty_runs_are_errors(tmp_path):
    with pytest.raises(checkpoint.CheckpointError, match="no such run"):
        checkpoint.latest(tmp_path / "nowhere")
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    with pytest.raises(checkpoint.CheckpointError, match="no checkpoint"):
        checkpoint.latest(tmp_path / "empty")


def test_a_full_disk_is_found_before_anything_is_half_written(tmp_path, monkeypatch):
    save(tmp_path, (1, None))
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10}))
    with pytest.raises(checkpoint.CheckpointError) as e:
        save(tmp_path, (2, None))
    assert "no space left on the disk" in str(e.value) and "the last good checkpoint is" in str(e.value) and "step_00000001" in str(e.value) and "--resume" in str(e.value)
    assert checkpoint.steps(tmp_path) == [1]
