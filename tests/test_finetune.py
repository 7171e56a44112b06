"""train.py --init: a run that starts from another one's weights, in every residence and optimizer state."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from test_train import HOST, call, final, losses, same

from hyperlm import checkpoint, runs, tree

BASE = ("--train.steps", "4", "--ckpt.every", "2", "--ckpt.keep", "9", "--eval.every", "2")
INT8 = ["--optim.state", "int8"]


@pytest.fixture
def base(made, tmp_path, request) -> Path:
    """runs/base, trained 4 steps on prose with flags of its own."""
    folder = made(*BASE, *getattr(request, "param", ()))
    shutil.copytree(folder / "runs" / "r", tmp_path / "runs" / "base")
    return Path("runs/base")


@pytest.fixture
def talks(tmp_path) -> Path:
    path = tmp_path / "talks.jsonl"
    rows = [
        {"messages": [{"role": "user", "content": f"who {i} are you?"}, {"role": "assistant", "content": f"i am {i % 7}"}]}
        for i in range(300)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def tune(base: Path, source: Path, *more: str, name: str = "tuned") -> int:
    return call("--init", base, "--data.sources", source, "--name", name, *more)


def records(run: str) -> list[dict]:
    return [json.loads(line) for line in (Path("runs") / run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("residence", [[], [*HOST, "fp32"]], ids=["device", "host"])
def test_before_the_first_step_the_loss_is_the_bases_to_the_bit(base, prose, residence):
    assert tune(base, prose, "--train.steps", "1", *residence) == 0
    first = next(r for r in records("tuned") if "val_loss" in r)
    last = [r for r in records("base") if "val_loss" in r][-1]
    assert first["step"] == 0 and first["val_loss"] == last["val_loss"] and first["val_bpb"] == last["val_bpb"]


@pytest.mark.parametrize("residence", [[], HOST[:2]], ids=["device", "host"])
@pytest.mark.parametrize("state", ["fp32", "int8"])
@pytest.mark.parametrize("base", [[], INT8], ids=["fp32", "int8"], indirect=True)
def test_weights_come_over_from_every_state_into_every_other(base, prose, residence, state):
    from hyperlm import finetune
    from hyperlm.residence import make
    from train import parse

    argv = ["--init", str(base), "--data.sources", str(prose), "--train.residence", "device", *residence, "--optim.state", state]
    launch = parse(argv)
    began = finetune.first_state(launch.base, 4, make(launch.config, torch.device("cpu")))
    stored = final("base").params
    for own, theirs in zip(tree.leaves(began.params), tree.leaves(stored), strict=True):
        assert own.dtype == (torch.bfloat16 if state == "int8" and own.dim() > 1 else torch.float32)
        assert torch.equal(own, theirs.float().to(own.dtype))
    assert (began.step, began.updates, began.tokens) == (0, 0, 0)
    assert all(not x.any() for x in tree.leaves(began.opt_state) if x.is_floating_point())


def test_shape_and_tokenizer_are_the_bases_and_the_origin_is_remembered(base, talks, capsys):
    assert tune(base, talks, "--train.steps", "2") == 0
    old, new = runs.read_config(base), runs.read_config(Path("runs/tuned"))
    assert new.model == old.model and new.data.seq_len == old.data.seq_len and new.data.sources == (str(talks),)
    assert Path("runs/tuned/tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    first, *_ = [json.loads(line) for line in Path("runs/tuned/history.jsonl").read_text().splitlines()]
    meta = checkpoint.read_meta(base, 4)
    assert first["init"] == {
        "run": "runs/base",
        "step": 4,
        "tokens": meta["tokens"],
        "val_loss": meta["val_loss"],
        "text": meta["fingerprint"],
    }
    assert "runs/base/checkpoints/step_00000004" in capsys.readouterr().out


def test_a_name_follows_from_the_base(base, prose):
    assert call("--init", base, "--data.sources", prose, "--train.steps", "1") == 0
    assert any(run.name.startswith("base-phase8-") for run in Path("runs").iterdir())


def test_the_best_checkpoint_can_be_chosen(base, prose, monkeypatch):
    monkeypatch.setattr("hyperlm.checkpoint.meta.best", lambda run: 2)
    assert tune(base, prose, "--train.steps", "1", "--init-checkpoint", "best") == 0
    evaluations = {r["step"]: r["val_loss"] for r in records("base") if "val_loss" in r}
    assert next(r for r in records("tuned") if "val_loss" in r)["val_loss"] == evaluations[2]


def test_a_preset_gives_everything_but_shape_and_tokenizer(base, prose):
    assert tune(base, prose, "--preset", "small", "--train.steps", "1", "--data.seq-len", "32", "--eval.sample-tokens", "0") == 0
    new = runs.read_config(Path("runs/tuned"))
    assert new.model == runs.read_config(base).model and new.train.batch_size == 8 and new.train.grad_accum == 1


@pytest.mark.parametrize("base", [["--model.vocab-size", "1000"]], ids=["odd-vocabulary"], indirect=True)
@pytest.mark.parametrize("more", [[], HOST[:2], [*HOST[:2], *INT8]], ids=["device", "host", "host-int8"])
def test_a_tuned_run_resumes_bit_for_bit_even_where_its_base_is_gone(base, talks, more):
    common = ["--train.steps", "4", "--ckpt.every", "2", "--ckpt.keep", "9", *more]
    assert tune(base, talks, *common, name="whole") == 0
    assert tune(base, talks, *common, name="parts") == 0
    shutil.rmtree("runs/parts/checkpoints/step_00000004")
    shutil.rmtree(base)
    assert call("--resume", "runs/parts") == 0
    assert losses("whole") == losses("parts") and same(final("whole"), final("parts"))


def test_what_a_base_cannot_give_is_one_line_and_leaves_nothing(base, prose, capsys, tmp_path):
    for flags, words in (
        (["--model.d-model", "64"], "--model.d-model 64: runs/base has 32"),
        (["--model.kind", "phase7"], "--model.kind phase7: runs/base has phase8"),
        (["--data.tokenizer", "bytes"], "--data.tokenizer bytes: runs/base has runs/base/tokenizer.json"),
        (["--resume", "runs/base"], "--init and --resume exclude each other"),
        (["--train.epochs", "nan"], "--train.epochs nan: must be a finite number"),
    ):
        assert tune(base, prose, *flags) == 2
        error = capsys.readouterr().err.strip()
        assert words in error and len(error.splitlines()) == 1
    text = (base / "tokenizer.json").read_text()
    (base / "tokenizer.json").write_text(text.replace('"a":', '"\u2581":', 1))  # another tokenizer of as many tokens
    assert tune(base, prose) == 2 and "tokenizer.json is not what runs/base was trained with" in capsys.readouterr().err
    (base / "tokenizer.json").unlink()
    assert tune(base, prose) == 2 and "tokenizer.json is missing" in capsys.readouterr().err
    (base / "tokenizer.json").write_text(text)
    shutil.rmtree(base / "checkpoints")
    capsys.readouterr()
    assert tune(base, prose) == 2
    out, error = capsys.readouterr()
    assert "has no checkpoint" in error and "data " not in out  # found before the text is read
    (base / "config.json").unlink()
    assert tune(base, prose) == 2 and "is not a run" in capsys.readouterr().err
    assert tune(tmp_path / "nowhere", prose) == 2 and "no such run" in capsys.readouterr().err
    assert [run.name for run in Path("runs").iterdir()] == ["base"]


def test_dropout_is_no_part_of_the_shape(base, prose):
    assert tune(base, prose, "--train.steps", "1", "--model.dropout", "0.1") == 0


def test_the_text_of_the_base_is_kept_where_no_other_is_named(base):
    shutil.copy(runs.read_config(base).data.sources[0], ".")
    assert call("--init", base, "--name", "more", "--train.steps", "1") == 0
    assert runs.read_config(Path("runs/more")).data.sources == runs.read_config(base).data.sources


def test_a_sample_begins_as_a_held_out_document_does(base, talks, prose):
    assert tune(base, talks, "--train.steps", "1", name="chat") == 0
    assert tune(base, prose, "--train.steps", "1", name="text") == 0
    chat, text = (next(r["sample"] for r in records(name) if "sample" in r) for name in ("chat", "text"))
    assert chat.startswith("<|user|>who ") and "<|end|><|assistant|>" in chat
    assert text[:20] in prose.read_text()


def test_a_question_is_answered_after_tuning(base, talks):
    """The loss of conversations falls far, of which the base knows nothing."""
    assert tune(base, talks, "--train.steps", "100", "--optim.lr", "1e-2", "--eval.every", "100", "--log.every", "50") == 0
    evaluations = [r["val_loss"] for r in records("tuned") if "val_loss" in r]
    assert evaluations[-1] < 0.5 * evaluations[0]
