"""Suite perplexity: its numbers against a loop over single tokens; texts that are told apart; what fails is a row."""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import SMALLEST, write_prose

import train
from hyperlm import checkpoint, cli, data, evals, model, trained
from hyperlm import tokenizer as tok
from hyperlm.bench import perplexity, scoring
from hyperlm.bench.result import Result
from hyperlm.config import DataConfig

CPU = torch.device("cpu")
N = 32  # of SMALLEST
SOME = 300  # tokens, in whole documents


@pytest.fixture
def run(made, monkeypatch, tmp_path) -> Path:
    """A run of two steps, in a folder of one's own, with the text beside it."""
    shutil.copytree(made("--train.steps", "2", "--model.kind", "phase8", "--eval.max-tokens", "0"), tmp_path, dirs_exist_ok=True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return Path("runs/r")


def evaluated(models: dict[str, Path], text: DataConfig | None = None, **options: int) -> Result:
    perplexity.check(models, text)
    return list(perplexity.run(models, text, [CPU], **options))[-1]


def rows_of(result: Result) -> list[dict]:
    return result.tables[0].rows


def jsonl(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def documents(path: Path) -> DataConfig:
    """Some short texts."""
    words = write_prose(path.with_suffix(".words"), 4000, seed=5).read_text().split()
    return DataConfig(sources=(str(jsonl(path, [{"text": " ".join(words[i : i + 12])} for i in range(0, 240, 12)])),))


def plain(run: Path, stream: list[int], stride: int) -> list[float]:
    """Nats of each token of a stream but the first, one after the other: each from the window in which the most tokens stand before it."""
    loaded = trained.load_model(run, "latest", "cpu")
    nats = []
    for t in range(1, len(stream)):
        start = 0 if t <= N else -(-(t - N) // stride) * stride
        logits = model.apply(loaded.params, torch.tensor([stream[start:t]]), loaded.config.model)[0, -1]
        nats.append(-float(F.log_softmax(logits.double(), -1)[stream[t]]))
    return nats


@torch.no_grad()
def test_numbers_are_those_of_a_loop_over_single_tokens(run, tmp_path):
    text = documents(tmp_path / "given.jsonl")
    rows = rows_of(evaluated({"a": run}, text, max_tokens=SOME))
    assert [(row["source"], row["stride"]) for row in rows] == [("given.jsonl", stride) for stride in (N, N // 2)]
    loaded = trained.load_model(run, "latest", "cpu")
    (shard,) = scoring.text_for(loaded, run, text).shards
    count = data.validation_documents(shard, SOME)
    stream = shard.val[: 1 + int(shard.val_documents[:count, 0].sum())].tolist()
    contents = {json.loads(line)["text"] for line in (tmp_path / "given.jsonl").read_text().splitlines()}
    found = loaded.tokenizer.decode_batch(split(stream))
    assert len(stream) > 3 * N and len(set(found) & contents) == count > 2  # whole documents, as they are, each after an end of text
    size = sum(len(document.encode()) for document in found)
    for row in rows:
        nats = plain(run, stream, row["stride"])
        of_text = [x for x, token in zip(nats, stream[1:], strict=True) if token != stream[0]]
        assert row["tokens"] == len(nats) and row["loss"] == pytest.approx(np.mean(nats), rel=1e-5)
        assert row["perplexity"] == pytest.approx(math.exp(np.mean(nats)), rel=1e-4)
        assert row["bits per byte"] == pytest.approx(sum(of_text) / math.log(2) / size, rel=1e-5)
        frequency = {token: stream[1:].count(token) / len(nats) for token in stream[1:]}
        assert row["no context"] == pytest.approx(-np.mean([math.log(frequency[token]) for token in stream[1:]]))


def test_without_a_text_it_is_the_evaluation_of_training(run):
    row, closer = rows_of(evaluated({"a": run}))
    summary = json.loads((run / "training_summary.json").read_text())  # of the same weights and all validation text, in the same windows
    for name, key in (("loss", "val_loss"), ("perplexity", "val_ppl"), ("bits per byte", "val_bpb")):
        assert row[name] == pytest.approx(summary[key], rel=1e-9)
    assert row["tokens"] == closer["tokens"] and row["loss"] != closer["loss"]


def split(stream: list[int]) -> list[list[int]]:
    """The documents between ends of text."""
    ends = [i for i, token in enumerate(stream) if token == stream[0]]
    return [stream[a + 1 : b] for a, b in pairwise(ends)]


@pytest.mark.parametrize(("learnt", "n", "stride"), [(t, n, s) for t in (0, 1, 7, 8, 9, 12, 13, 40) for n, s in ((8, 8), (8, 4), (7, 3))])
def test_every_token_is_a_target_once_with_as_much_before_it_as_a_stride_leaves(learnt, n, stride):
    val = np.arange(learnt + 1)
    shard = data.Shard(
        "s",
        None,
        val[:0],
        None,
        val,
        np.ones_like(val, np.uint8),
        np.array([[learnt, learnt, learnt, 0]] if learnt else np.zeros((0, 4), int)),
    )
    if not learnt:
        shard = replace(shard, val_documents=np.array([[0, 0, 0, 0]]))
    batch, _ = data.validation_sequences(shard, DataConfig(seq_len=n), 0, stride)
    places = (batch.targets >= 0).nonzero().tolist()
    assert sorted(int(batch.targets[w, i]) for w, i in places) == list(range(1, learnt + 1))
    for w, i in places:
        target = int(batch.targets[w, i])
        assert batch.tokens[w, : i + 1].tolist() == list(range(target - i - 1, target))  # what is read ends with the token before it
        assert i >= min(target - 1, n - stride)


def test_all_of_a_given_text_is_scored_by_source_and_as_a_whole(run, tmp_path):
    a, b = write_prose(tmp_path / "a.txt", 300, 1), write_prose(tmp_path / "b.txt", 500, 2)
    rows = rows_of(evaluated({"m": run}, DataConfig(sources=(str(a), str(b)))))
    tokenizer = tok.load(run / "tokenizer.json")
    for stride in (N, N // 2):
        of = {row["source"]: row for row in rows if row["stride"] == stride}
        assert list(of) == ["a.txt", "b.txt", "all"]
        for path in (a, b):
            assert of[path.name]["tokens"] >= len(tok.encode(tokenizer, [path.read_text().strip()])[0])
        assert of["all"]["tokens"] == of["a.txt"]["tokens"] + of["b.txt"]["tokens"]
        mean = sum(of[path.name]["loss"] * of[path.name]["tokens"] for path in (a, b)) / of["all"]["tokens"]
        assert of["all"]["loss"] == pytest.approx(mean)


def test_of_conversations_what_the_assistant_says_counts(run, tmp_path):
    talks = [
        {"messages": [{"role": "user", "content": f"what of {i}?"}, {"role": "assistant", "content": f"nothing but {i}"}]} for i in range(9)
    ]
    (row, other) = rows_of(evaluated({"m": run}, DataConfig(sources=(str(jsonl(tmp_path / "t.jsonl", talks)),))))
    tokenizer = tok.load(run / "tokenizer.json")
    said = [len(ids) + 1 for ids in tok.encode(tokenizer, [talk["messages"][1]["content"] for talk in talks])]  # and the end of a turn
    assert row["tokens"] == other["tokens"] == sum(said) and row["loss"] == other["loss"]


def test_runs_on_different_texts_are_told_apart(run, tmp_path):
    """By their text, whatever the tokenizer; and by their tokens."""
    common = [*SMALLEST, "--train.steps", "1", "--eval.sample-tokens", "0", "--data.sources"]
    assert cli.run(train.main, [*common, str(tmp_path / "prose.txt"), "--name", "bytes", "--data.tokenizer", "bytes"]) == 0
    assert cli.run(train.main, [*common, str(write_prose(tmp_path / "other.txt", seed=1)), "--name", "other"]) == 0

    def compared(*names: str, text: DataConfig | None = None) -> tuple[int, list[str]]:
        found = evaluated({f"{i} {name}": Path("runs") / name for i, name in enumerate(names)}, text, max_tokens=100)
        return len({row["text"] for row in rows_of(found)}), found.notes

    texts, (note,) = compared("r", "other")
    assert texts == 2 and "different texts (column `text`)" in note
    texts, (note,) = compared("r", "bytes")
    assert texts == 1 and "bits per byte alone can be compared" in note
    assert compared("r", "r") == (1, [])
    assert compared("r", "other", text=documents(tmp_path / "given.jsonl"))[0] == 1


# -- what goes wrong -------------------------------------------------------------------------------------------------------------------


def test_a_run_that_fails_is_a_row_that_says_why_and_others_are_measured(run, tmp_path):
    flags = [*SMALLEST, "--train.steps", "1", "--eval.sample-tokens", "0", "--name", "s", "--data.sources"]
    assert cli.run(train.main, [*flags, str(write_prose(tmp_path / "s.txt", seed=1))]) == 0
    write_prose(tmp_path / "s.txt", seed=2)
    growing = [rows_of(result) for result in perplexity.run({"s": Path("runs/s"), "r": run}, None, [CPU], max_tokens=100)]
    assert [[row["model"] for row in rows] for rows in growing] == [["s"], ["s", "r", "r"]]
    assert "its validation text is gone" in growing[-1][0]["failed"]


def test_a_run_that_diverged_is_measured_as_such(run, diverged):
    result = evaluated({"r": run}, max_tokens=100)
    assert math.isnan(rows_of(result)[0]["loss"]) and result.notes == ["r: its loss is not finite: the run diverged"]


def test_a_model_that_sees_ahead_is_a_row_that_says_so(run, monkeypatch):
    token_nats = evals.token_nats
    monkeypatch.setattr(
        evals, "token_nats", lambda params, tokens, targets, config: token_nats(params, tokens.roll(-1, 1), targets, config)
    )
    (row,) = rows_of(evaluated({"r": run}, max_tokens=100))
    assert row["model"] == "r" and "not causal" in row["failed"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run: (run / "tokenizer.json").unlink(), "tokenizer.json is missing"),
        (lambda run: (run / "config.json").write_text("{"), "config.json is damaged"),
        (lambda run: shutil.rmtree(run / "checkpoints"), "no checkpoint"),
    ],
)
def test_a_damaged_run_is_found_before_anything_is_measured(damage: Callable[[Path], None], message, run):
    damage(run)
    with pytest.raises((ValueError, checkpoint.CheckpointError), match=message):
        perplexity.check({"r": run}, None)


def test_a_text_that_is_not_there_is_found_before_anything_is_measured(run):
    with pytest.raises(data.DataError, match="--data.sources nowhere.txt: no such file"):
        perplexity.check({"r": run}, DataConfig(sources=("nowhere.txt",)))


def test_losses_of_training_are_overlaid_as_the_run_recorded_them(run):
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    wanted = [(r["step"], "training", r["loss"]) for r in records if "loss" in r] + [
        (r["step"], "validation", r["val_loss"]) for r in records if "val_loss" in r
    ]
    result = evaluated({"a": run}, max_tokens=SOME)
    tokens = {r["step"]: r["tokens"] for r in records if "tokens" in r}
    assert sorted((row["tokens"], row["of"], row["loss"]) for row in result.tables[1].rows) == sorted(
        (tokens[step], of, loss) for step, of, loss in wanted
    )
    (run / "metrics.jsonl").unlink()  # as of models that are trained to be compared
    assert [table.name for table in evaluated({"a": run}, max_tokens=SOME).tables] == ["perplexity"]


@pytest.mark.parametrize(
    ("losses", "high"),
    [
        ({"a": (9.0, 5.0, 3.2), "b": (8.0, 4.0, 3.6)}, 5),  # a nat above the best of the worse run, and up to the next whole number
        ({"a": (3.4, 3.2), "b": (3.9, 3.6)}, None),  # all is to be seen
        ({"a": (9.0, 3.2), "b": (math.nan, math.nan)}, None),
    ],
)
def test_first_losses_do_not_flatten_the_last(losses, high):
    rows = [{"model": m, "of": "validation", "tokens": i, "loss": x} for m, own in losses.items() for i, x in enumerate(own)]
    assert perplexity.overlaid(rows).high == high
