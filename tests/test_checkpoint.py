"""Checkpoints: exact, verified, and clear about damage."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import CASES, TINY, generator

from hyperlm import checkpoint, residence, tree
from hyperlm.batch import next_tokens
from hyperlm.checkpoint import storage
from hyperlm.checkpoint.folder import REMOVED
from hyperlm.checkpoint.meta import WORST, lowest
from hyperlm.config import Config, OptimConfig, TrainConfig
from hyperlm.optim import new_schedule
from hyperlm.state import StaleState
from hyperlm.step import init_state, make_step

CPU = torch.device("cpu")


def here(stage):
    return stage


def config_of(cfg=TINY) -> Config:
    return Config(model=cfg, train=TrainConfig(seed=1), optim=OptimConfig(lr=1e-3))


def facts(cfg=TINY) -> checkpoint.Facts:
    return checkpoint.Facts(config_of(cfg), new_schedule(OptimConfig(), 10), "print", "tokenizer", False)


def trained(cfg=TINY, steps: int = 2):
    config = config_of(cfg)
    at = residence.make(config, CPU)
    state, step = init_state(at), make_step(at, new_schedule(config.optim, 10))
    for i in range(steps):
        state, _ = step(state, next_tokens(torch.randint(64, (1, 2, 9), generator=generator(i))))
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
    assert torch.equal(storage.to_tensor(storage.to_numpy(x, copy=False)), x)


def test_latest_and_best_are_kept(tmp_path):
    save(tmp_path, (1, 3.0), (2, 1.0), (3, 2.0), (4, None), (5, 2.5), (6, None))
    assert checkpoint.steps(tmp_path) == [2, 5, 6]
    assert checkpoint.latest(tmp_path) == 6 and checkpoint.best(tmp_path) == 2


def test_a_state_is_judged_by_the_checkpoints_that_there_are(tmp_path):
    """Whether or not the run was interrupted since: losses of what is no longer kept are forgotten."""
    state, writer = trained(), checkpoint.manager(tmp_path, 2)
    for step, val_loss in ((1, 3.0), (2, 1.0), (3, 2.0), (4, None), (5, 2.5)):
        checkpoint.save(writer, replace(state, step=step, updates=1), facts(), val_loss, 5.0 + step)
    checkpoint.close(writer)
    assert writer.losses == {2: 7.0, 4: 9.0, 5: 10.0} and list(writer.losses) == checkpoint.steps(tmp_path)
    again = checkpoint.manager(tmp_path, 2)
    assert again.losses == writer.losses
    checkpoint.close(again)


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
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10}))
    with pytest.raises(checkpoint.CheckpointError) as e:
        save(tmp_path, (2, None))
    assert (
        "no space left on the disk" in str(e.value)
        and "the last good checkpoint is" in str(e.value)
        and "step_00000001" in str(e.value)
        and "--resume" in str(e.value)
    )
    assert checkpoint.steps(tmp_path) == [1]


# -- meta: counters, settings and what else is not an array ------------------------------------------------------------------------------


def meta_of(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step_{step:08d}" / "meta" / "metadata"


def rewrite(run: Path, at: int, /, **changes) -> None:
    """Other values in the meta of a checkpoint; None takes one away."""
    values = json.loads(meta_of(run, at).read_text()) | changes
    meta_of(run, at).write_text(json.dumps({name: value for name, value in values.items() if value is not None}))


def test_no_flipped_bit_in_a_meta_gives_other_values(tmp_path):
    save(tmp_path, (3, 1.0))
    truth, content = checkpoint.read_meta(tmp_path, 3), meta_of(tmp_path, 3).read_bytes()
    for position in range(0, len(content), 3):
        meta_of(tmp_path, 3).write_bytes(content[:position] + bytes([content[position] ^ 1 << position % 8]) + content[position + 1 :])
        try:
            assert checkpoint.read_meta(tmp_path, 3) == truth
        except checkpoint.CheckpointError as e:
            assert "step_00000003" in str(e) and "\n" not in str(e)


@pytest.mark.parametrize(
    "change",
    [
        {"step": 4},
        {"updates": 1},
        {"tokens": 0},
        {"seed": 2},
        {"val_loss": 0.5},
        {"fingerprint": "other"},
        {"digest": "0"},
        {"digest": None},
    ],
)
def test_counters_are_covered(tmp_path, change):
    save(tmp_path, (2, 1.0), (3, 1.0))
    rewrite(tmp_path, 3, **change)
    with pytest.raises(checkpoint.CheckpointError, match="step_00000003 is damaged .*go on from step 2"):
        checkpoint.restore(tmp_path, 3, config_of(), here)


def test_a_folder_of_another_step_is_noticed(tmp_path):
    save(tmp_path, (3, 1.0))
    shutil.copytree(tmp_path / "checkpoints" / "step_00000003", tmp_path / "checkpoints" / "step_00000007")
    with pytest.raises(checkpoint.CheckpointError, match="step_00000007 is damaged .its meta is of step 3"):
        checkpoint.restore(tmp_path, 7, config_of(), here)


@pytest.mark.parametrize(
    "other",
    [
        Config(model=replace(TINY, vocab_size=128), train=TrainConfig(seed=1)),
        Config(model=replace(TINY, kind="phase7"), train=TrainConfig(seed=1)),
        Config(model=TINY, train=TrainConfig(seed=2)),
        Config(model=TINY, train=TrainConfig(seed=1), optim=OptimConfig(state="int8")),
    ],
)
def test_settings_of_another_run_are_blamed_and_not_the_checkpoint(tmp_path, other):
    save(tmp_path, (2, 1.0), (3, 1.0))
    with pytest.raises(checkpoint.CheckpointError) as e:
        checkpoint.restore(tmp_path, 3, other, here)
    assert "config.json is of another run" in str(e.value) and "delete" not in str(e.value) and "damaged" not in str(e.value)


def test_what_cannot_be_read_now_is_not_called_damaged(tmp_path, monkeypatch):
    save(tmp_path, (2, 1.0), (3, 1.0))
    for error in (
        PermissionError(13, "Permission denied"),
        OSError(24, "Too many open files"),
        MemoryError(),
        ValueError("PERMISSION_DENIED: not for you"),
    ):

        def fails(*_, error=error, **__):
            raise error

        monkeypatch.setattr(storage.ocp.Checkpointer, "restore", fails)
        with pytest.raises(checkpoint.CheckpointError, match="could not be read") as e:
            checkpoint.restore(tmp_path, 3, config_of(), here)
        assert "delete" not in str(e.value)


def test_what_an_interrupted_removal_left_is_no_checkpoint(tmp_path):
    save(tmp_path, (2, 1.0), (3, 1.0))
    shutil.rmtree(tmp_path / "checkpoints" / "step_00000002" / "opt")
    assert checkpoint.steps(tmp_path) == [3]


def test_a_checkpoint_leaves_whole_or_not_at_all(tmp_path, monkeypatch):
    """What is no longer kept is moved away before it is deleted, so that a kill in between leaves no half of one; the next start clears it away."""
    monkeypatch.setattr(storage, "delete_removed", lambda run: None)
    save(tmp_path, (1, None), (2, None), (3, None))
    removed = tmp_path / "checkpoints" / REMOVED
    assert checkpoint.steps(tmp_path) == [2, 3] and (removed / "step_00000001" / "params").is_dir()
    monkeypatch.undo()
    save(tmp_path, (4, None))
    assert not removed.exists() and checkpoint.steps(tmp_path) == [3, 4]


def test_one_damaged_meta_hides_no_other_checkpoint(tmp_path):
    save(tmp_path, (1, 3.0), (2, 1.0), (3, 2.0), keep=3)
    for content in (b"", b"{", b"\xff\xfe", b"[" * 100_000):
        meta_of(tmp_path, 1).write_bytes(content)
        assert checkpoint.best(tmp_path) == 2
    meta_of(tmp_path, 2).write_bytes(b"")
    assert checkpoint.best(tmp_path) == 3
    save(tmp_path, (4, 1.5), (5, 2.0), keep=1)
    assert checkpoint.steps(tmp_path) == [1, 2, 4, 5]  # what cannot be read is not ours to delete


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), None])
def test_the_best_has_the_smallest_finite_loss(loss):
    assert lowest({1: 2.0, 2: loss, 3: 2.5}) == [1] and lowest({2: loss}) == []


def test_earlier_and_later_formats_say_which_version_reads_them(tmp_path):
    save(tmp_path, (2, 1.0))
    rewrite(tmp_path, 2, format=5)
    with pytest.raises(checkpoint.CheckpointError, match="format 5, .*a newer version of hyperlm wrote it"):
        checkpoint.read_meta(tmp_path, 2)
    rewrite(tmp_path, 2, format=1)
    with pytest.raises(checkpoint.CheckpointError, match="format 1: a version before 0.1"):
        checkpoint.read_meta(tmp_path, 2)
    rewrite(tmp_path, 2, format=2, digest=None, config=None, schedule=None, tokenizer=None, loss=None, val_loss=WORST)
    state, meta = checkpoint.restore(tmp_path, 2, config_of(), here, with_opt=False)
    assert state.step == 2 and meta["schedule"] is None and checkpoint.best(tmp_path) == 2
    with pytest.raises(checkpoint.CheckpointError, match="train.seed 5"):
        checkpoint.restore(tmp_path, 2, Config(model=TINY, train=TrainConfig(seed=5)), here)


def test_a_state_with_an_update_pending_is_not_saved(tmp_path):
    config = Config(model=TINY, train=TrainConfig(seed=1, residence="host"), optim=OptimConfig(lr=1e-3))
    at = residence.make(config, CPU)
    first, step = init_state(at), make_step(at, new_schedule(config.optim, 10))
    second, _ = step(first, next_tokens(torch.randint(64, (1, 2, 9), generator=generator(0))))
    for state, why in ((first, "consumed"), (second, "pending")):
        with pytest.raises(StaleState, match=why):
            save(tmp_path, (1, None), state=state)
