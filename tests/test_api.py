"""hyperlm from Python: what its functions return against the parts that they are made of, what `import hyperlm` costs, and the README's blocks."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import write_prose
from tokenizers import Tokenizer

import hyperlm
import train
from hyperlm import checkpoint, cli, evals, runs, sample
from hyperlm import model as decoder
from hyperlm import tokenizer as tok
from hyperlm.batch import next_tokens
from hyperlm.config import Config, ConfigError, DataConfig, ModelConfig, OptimConfig, TrainConfig
from hyperlm.runs import RunError
from hyperlm.state import StaleState

ROOT = Path(__file__).parent.parent
KINDS = {"phase8": (), "hybrid": ("--model.exact-every", "2"), "softmax": ("--model.kind", "softmax")}


@pytest.fixture(params=KINDS.values(), ids=KINDS.keys())
def run(request, made) -> Path:
    return made("--train.steps", "6", *request.param) / "runs" / "r"


@pytest.fixture
def model(made) -> hyperlm.Model:
    return hyperlm.load(made("--train.steps", "6") / "runs" / "r")


def test_logits_are_those_of_the_decoder_read_token_by_token(run):
    model = hyperlm.load(str(run), device="cpu")
    text = "Some words\nand <|user|> more."
    (ids,) = tok.encode(tok.load(run / "tokenizer.json"), [text])
    assert hyperlm.encode(model, text).tolist() == [tok.end_of_text(model.tokenizer), *ids]

    cache = sample.empty_cache(model.params, model.config.model)
    rows = []
    for token in hyperlm.encode(model, text):
        row, cache = sample.prefill(model.params, [int(token)], cache, model.config.model)
        rows.append(row)
    assert hyperlm.logits(model, text).dtype == torch.float32
    torch.testing.assert_close(hyperlm.logits(model, text), torch.stack(rows), rtol=1e-4, atol=1e-4)


def test_an_empty_text_is_one_row(model):
    assert hyperlm.logits(model, "").shape == (1, model.config.model.vocab_size)


@pytest.mark.parametrize("which", ["latest", "best"])
def test_a_model_is_a_checkpoint_of_the_run(which, made, monkeypatch):
    run = made("--train.steps", "6", "--ckpt.every", "2", "--eval.every", "2") / "runs" / "r"
    first, *_, last = checkpoint.steps(run)
    monkeypatch.setattr("hyperlm.checkpoint.meta.best", lambda run: first)
    step = {"latest": last, "best": first}[which]
    model = hyperlm.load(run, checkpoint=which)
    state, _ = checkpoint.restore(run, step, runs.read_config(run), lambda stage: stage, with_opt=False)
    assert model.step == step and torch.equal(model.params["head"]["weight"], state.params["head"]["weight"])


def test_without_a_name_the_newest_run_is_loaded(made, monkeypatch):
    with pytest.raises(RunError, match="no run with a checkpoint"):
        hyperlm.load()
    monkeypatch.chdir(made("--train.steps", "6"))
    assert hyperlm.load().step == 6


def test_the_most_probable_text_is_found_by_logits_alone(model):
    """Greedy, against a whole forward pass for each token."""
    text, usable = "A word", tok.vocabulary_size(model.tokenizer)
    ids = hyperlm.encode(model, text).tolist()
    for _ in range(8):
        row = decoder.apply(model.params, torch.tensor([ids]), model.config.model)[0, -1, :usable]
        if (token := int(row.argmax())) in tok.stop_ids(model.tokenizer):
            break
        ids.append(token)
    expected = model.tokenizer.decode(ids, skip_special_tokens=True).removeprefix(text)
    assert hyperlm.generate(model, text, max_tokens=8, temperature=0) == expected.rstrip(
        "\ufffd"
    )  # bytes of an unfinished character wait for the rest


def test_text_is_a_function_of_the_seed(model):
    first, same, other = (hyperlm.generate(model, "a", max_tokens=30, seed=seed, temperature=1.5) for seed in (1, 1, 2))
    assert first == same != other


def test_a_conversation_is_read_turn_by_turn(model, monkeypatch):
    read = []
    monkeypatch.setattr(sample, "PREFILL", 10_000)
    extend = decoder.extend

    def noted(params, tokens, *more, **options):
        read.append(tokens[0].tolist())
        return extend(params, tokens, *more, **options)

    monkeypatch.setattr(decoder, "extend", noted)
    turns = [{"role": "developer", "content": "be"}, {"role": "user", "content": [{"type": "text", "text": "a b"}]}]
    with pytest.raises(ValueError, match="it continues text"):
        hyperlm.generate(model, turns)
    model = replace(model, chat=True)
    hyperlm.generate(model, turns, max_tokens=1)
    t: Tokenizer = model.tokenizer
    special = {name: t.token_to_id(name) for name in tok.SPECIALS}
    be, ab = (t.encode(text, add_special_tokens=False).ids for text in ("be", "a b"))
    assert read[0] == [
        special["<|endoftext|>"], special["<|system|>"], *be, special["<|end|>"], special["<|user|>"], *ab, special["<|end|>"], special["<|assistant|>"],
    ]  # fmt: skip
    robot, silent = {"role": "robot", "content": ""}, {"role": "user"}
    for wrong, message in (([robot], "role 'robot' is none of"), ([silent], "no 'content' field"), ([], "prompt is empty")):
        with pytest.raises(ValueError, match=message):
            hyperlm.generate(model, wrong)


def test_radii_are_of_every_hyperbolic_layer_in_their_range(run):
    model = hyperlm.load(run)
    radii = hyperlm.radii(model, "Some words")
    cfg, n = model.config.model, len(hyperlm.encode(model, "Some words"))
    assert list(radii) == [layer for layer in range(cfg.n_layers) if cfg.kind != "softmax"]
    for of_layer in radii.values():
        assert set(of_layer) == {"q", "k"}
        assert all(r.shape == (cfg.n_heads, n) and float(r.min()) >= 0.05 and float(r.max()) <= 4 for r in of_layer.values())


def settings(folder: Path, **train: object) -> Config:
    return Config(
        ModelConfig(d_model=32, n_layers=2, head_dim=8, vocab_size=320),
        DataConfig((str(folder / "prose.txt"),), seq_len=32),
        TrainConfig(batch_size=4, grad_accum=2, steps=4, **train),
        OptimConfig(lr=1e-2),
    )


@pytest.mark.parametrize("residence", ["auto", "host"])
def test_a_loop_of_ones_own_is_a_run(prose, residence):
    """The same losses as train.py, to the bit, and the same weights."""
    config = settings(prose.parent, residence=residence)
    training = hyperlm.prepare(config)
    state, losses = training.state, []
    for i in range(4):
        state, metrics = training.step(state, training.batch(i))
        losses.append(metrics["loss"])
    state = training.flush(state)
    mine = hyperlm.model_of(training, state)

    flags = "--model.d-model 32 --model.n-layers 2 --model.head-dim 8 --model.vocab-size 320 --data.seq-len 32 --train.batch-size 4 --train.grad-accum 2"
    flags += f" --train.steps 4 --optim.lr 1e-2 --log.every 1 --name r --train.residence {residence} --data.sources {prose}"
    assert cli.run(train.main, flags.split()) == 0
    records = [line for line in map(json.loads, Path("runs/r/metrics.jsonl").read_text().splitlines()) if "loss" in line]
    assert [record["loss"] for record in records] == losses
    theirs = hyperlm.load("runs/r", device="cpu")
    assert mine.step == theirs.step == 4
    assert torch.equal(hyperlm.logits(mine, "Some words"), hyperlm.logits(theirs, "Some words"))


def test_what_a_loop_may_not_do_is_said(prose):
    training = hyperlm.prepare(settings(prose.parent))
    training.step(training.state, training.batch(0))
    with pytest.raises(StaleState):
        hyperlm.model_of(training, training.state)
    with pytest.raises(ConfigError, match="--model.head-dim 7"):
        hyperlm.prepare(replace(settings(prose.parent), model=ModelConfig(head_dim=7)))


def test_nats_of_a_text_are_the_evaluation_s(model):
    """A cross entropy as the README has it, against the evaluation's own function."""
    text = "Some more words, and some more."
    ids = hyperlm.encode(model, text)
    nats, tokens, *_ = evals.nats_of(model.params, next_tokens(ids[None]), model.config, model.device, 1)
    loss = F.cross_entropy(hyperlm.logits(model, text)[:-1], ids[1:])
    assert tokens == len(ids) - 1 and float(loss) == pytest.approx(nats / tokens, rel=1e-5)


# -- the module ------------------------------------------------------------------------------------------------------------------------


def test_importing_takes_nothing_and_works_beside_foreign_modules(tmp_path):
    for name in ("configs", "train", "bench", "chat"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('not yours')\n")
    code = "import sys, hyperlm; print(hyperlm.__version__, {'torch', 'numpy', 'tyro'} & set(sys.modules)); import hyperlm.model, hyperlm.cli; hyperlm.load"
    done = subprocess.run(
        [sys.executable, "-c", code], check=False, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert (done.stdout, done.returncode) == (f"{hyperlm.__version__} set()\n", 0), done.stderr


def test_everything_offered_is_there_and_nothing_else():
    assert all(getattr(hyperlm, name) is not None and name in dir(hyperlm) for name in hyperlm.__all__)
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        hyperlm.lode  # noqa: B018


def test_the_blocks_of_the_readme_run(made, capsys):
    """In order, in one session, in a folder with a run and a book."""
    shutil.copytree(made("--train.steps", "6") / "runs" / "r", "runs/x")
    write_prose(Path("book.txt"))
    blocks = re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    names: dict[str, object] = {"__name__": "__main__"}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert len(blocks) >= 3 and names["state"].step == 10 and "nats a token" in capsys.readouterr().out
