"""Suite long-context: losses by position against plain loops and scorers that know where they are; windows; pass keys; the whole suite."""

import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, generator, write_prose

from hyperlm import data, evals, model, passkey
from hyperlm import tokenizer as tok
from hyperlm.bench import long_context, scoring
from hyperlm.bench.long_context import Windows, buckets, cells, edges_of, nats_by_place, over_depths, texts_of, windows_of
from hyperlm.config import Config, DataConfig

CPU = torch.device("cpu")
END = 0


def document(size: int, value: int) -> np.ndarray:
    """A text between ends of texts, `size` tokens with the end."""
    return np.array([END] + [value] * (size - 1) + [END])


# -- windows ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "most", "times", "count", "documents", "joined"),
    [
        ([65] * 9, 100, 16, 9, 9, False),  # a window each
        ([65] * 9, 3, 16, 3, 3, False),
        ([65 + 64] + [65] * 7, 8, 16, 8, 8, False),  # the beginnings of all before the rest of one
        ([640], 100, 16, 10, 1, False),
        ([640], 100, 4, 40, 1, False),
        ([20] * 40, 100, 16, 12, 39, True),  # 12 x 64 tokens of 800
        ([100, 20, 20], 2, 16, 2, 3, True),  # one is long enough, two windows are there
        ([20, 20], 9, 16, 1, 2, True),  # 40 tokens: 8 x 4 of them
    ],
)
def test_windows_are_within_documents_where_enough_are_long_and_else_of_documents_joined(sizes, most, times, count, documents, joined):
    n, texts = 4, [document(size, i + 1) for i, size in enumerate(sizes)]
    found = windows_of(texts, n, times, most)
    length = min(times, 1 << int(math.log2(sum(sizes) / n))) * n
    assert found.tokens.shape == found.targets.shape == (count, length) and found.tokens.dtype == torch.int64
    assert torch.equal(found.tokens[:, 1:], found.targets[:, :-1])
    inside = [len(set(window) - {END}) for window in found.tokens.tolist()]
    assert found.joined == joined and (joined or inside == [1] * count)
    assert int(found.group.max()) + 1 == (count if joined else documents)
    assert joined or len(set(zip(found.tokens.max(1).values.tolist(), found.group.tolist(), strict=True))) == documents
    assert found.documents == documents == len(set(found.tokens.flatten().tolist()) - {END})
    said = f"{count} window{'s' * (count > 1)} of {length} tokens, from {documents} document{'s' * (documents > 1)} "
    assert str(found).startswith(said + ("joined" if joined else "at least that long"))


def test_windows_of_a_text_are_as_it_is():
    stream = np.arange(1, 1000) % 97 + 1
    stream[0] = END
    found = windows_of([stream], 4, 16, 100)
    for i, window in enumerate(found.tokens):
        assert window.tolist() == stream[64 * i : 64 * (i + 1)].tolist()


def test_too_little_text_is_an_error():
    with pytest.raises(data.DataError, match="fewer than twice the 30 of training: name more by --data.sources"):
        windows_of([document(20, 1), document(30, 2)], 30, 16, 9)


def test_conversations_are_left_out(tmp_path):
    rows = [
        '{"text": "some words here"}',
        '{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}',
        '{"text": "and others"}',
    ]
    (tmp_path / "d.jsonl").write_text("\n".join(rows))
    cfg = Config(data=DataConfig(sources=(), val_sources=(str(tmp_path / "d.jsonl"),), tokenizer="bytes"))
    texts = texts_of(data.prepare(cfg, say=lambda line: None))
    tokenizer = tok.byte_tokenizer()
    assert {tokenizer.decode(text.tolist()) for text in texts} == {"some words here", "and others"}
    assert all(text[0] == text[-1] == tok.end_of_text(tokenizer) for text in texts)


# -- loss by position ------------------------------------------------------------------------------------------------------------------


def place(tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """A scorer whose nats are how many tokens it has read."""
    return torch.where(targets >= 0, torch.arange(1, tokens.shape[1] + 1).expand_as(tokens), 0).float()


@pytest.mark.parametrize(("n", "times"), [(8, 4), (16, 16), (7, 4)])
@pytest.mark.parametrize("at_once", [1, 50, 10000])
def test_a_token_is_scored_with_all_before_it_and_with_half_a_window_to_a_window(n, times, at_once):
    length = n * times
    tokens = torch.randint(50, (3, length), generator=generator())
    whole, recent = nats_by_place(place, Windows(tokens, tokens, 1, False, torch.zeros(3)), n, at_once)
    assert torch.equal(whole, torch.arange(1.0, length + 1).expand(3, length))
    assert torch.equal(recent[:, :n], whole[:, :n])
    assert ((recent[:, n:] > n - n // 2) & (recent[:, n:] <= n)).all()


@torch.no_grad()
@pytest.mark.parametrize("kind", ["phase7", "phase8", "softmax"])
def test_losses_are_those_of_a_loop_over_windows(kind):
    n, config = 8, Config(model=replace(TINY, kind=kind))
    params = model.init(config.model, 0)
    windows = Windows(*torch.randint(64, (2, 2, 4 * n), generator=generator()), 1, False, torch.zeros(2))
    whole, recent = nats_by_place(lambda *pair: evals.token_nats(params, *pair, config), windows, n, 20)
    for w, t in [(0, 0), (0, 7), (1, 8), (1, 13), (0, 31)]:
        start = 0 if t < n else -(-(t + 1 - n) // (n // 2)) * (n // 2)
        for found, first in ((whole, 0), (recent, start)):
            logits = model.apply(params, windows.tokens[w : w + 1, first : t + 1], config.model)[0, -1]
            assert found[w, t].item() == pytest.approx(-logits.double().log_softmax(-1)[windows.targets[w, t]].item(), rel=1e-5)


def test_buckets_are_means_with_errors_over_documents():
    """Of five windows two are of one document, and count together: the error of a ratio, from what documents are off it."""
    n, whole, recent = 32, torch.rand(5, 128, generator=generator(1)), torch.rand(5, 128, generator=generator(2))
    for documents in (torch.arange(5), torch.tensor([0, 1, 2, 3, 1])):
        rows = buckets(whole, recent, documents, n)
        assert [(row["from"], row["to"]) for row in rows] == [(0, 2), (2, 4), (4, 8), (8, 16), (16, 32), (32, 64), (64, 128)]
        for row in rows:
            own, other = ([np.mean([float(x[w, t]) for t in range(row["from"], row["to"])]) for w in range(5)] for x in (whole, recent))
            gain = np.subtract(other, own)
            expected = [np.mean(own), by_document(own, documents), np.mean(other), np.mean(gain), by_document(gain, documents)]
            assert [row[name] for name in ("loss", "standard error", "loss of N", "gain", "error of gain")] == pytest.approx(
                expected, rel=1e-5
            )
    assert math.isnan(buckets(whole, recent, torch.zeros(5, dtype=torch.int64), n)[0]["standard error"])  # one document has none


def by_document(values: list[float], documents: torch.Tensor) -> float:
    off = [sum(x - np.mean(values) for x, own in zip(values, documents.tolist(), strict=True) if own == k) for k in set(documents.tolist())]
    return (len(off) / (len(off) - 1) * sum(x * x for x in off)) ** 0.5 / len(values)


@pytest.mark.parametrize(
    ("n", "length", "edges"), [(1024, 16384, [0, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384]), (2, 8, [0, 1, 2, 4, 8])]
)
def test_buckets_begin_and_end_at_powers_of_two_of_a_window(n, length, edges):
    assert edges_of(n, length) == edges


# -- pass keys -------------------------------------------------------------------------------------------------------------------------


def test_keys_are_found_by_who_knows_them_until_the_text_is_too_long():
    """A reader that sees the last 300 tokens alone: it finds what is late enough in the text."""
    tokenizer, keys = tok.byte_tokenizer(), set()
    words, hay = passkey.words_of(tokenizer), np.array(tok.encode(tokenizer, ["so it goes. " * 40])[0])

    def read(texts: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(len(texts), passkey.DIGITS, 320)
        for own, text in zip(logits, texts[:, -300:].tolist(), strict=True):
            _, *said = tokenizer.decode(text).split("The pass key is ")
            keys.add(said[0][: passkey.DIGITS] if len(said) > 1 else "")
            if len(said) > 1:  # before the question
                own[torch.arange(passkey.DIGITS), tok.encode(tokenizer, [said[0][: passkey.DIGITS]])[0]] = 9.0
        return logits

    rows = cells(read, words, hay, [200, 800], 3, 1 << 12)
    assert [(row["length"], row["depth"]) for row in rows] == [(length, depth) for length in (200, 800) for depth in long_context.DEPTHS]
    assert [row["said"] for row in rows] == [1.0] * 5 + [0.0] * 3 + [1.0] * 2
    assert [row["chosen"] for row in rows] == pytest.approx([1.0] * 5 + [0.1] * 3 + [1.0] * 2)
    assert len(keys - {""}) == 15 + 6  # of each trial another
    short, long = over_depths(rows)
    assert short == {"length": 200, "trials": 15, "said": 1.0, "chosen": 1.0, "standard error": 0.0}
    assert (
        long["said"] == pytest.approx(0.4)
        and long["chosen"] == pytest.approx(0.46)
        and long["standard error"] == pytest.approx((0.46 * 0.54 / 15) ** 0.5)
    )


# -- the suite -------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(made, monkeypatch, tmp_path) -> Path:
    """A run of two steps, in a folder of one's own, with the text beside it."""
    shutil.copytree(made("--train.steps", "2", "--model.kind", "phase8", "--eval.max-tokens", "0"), tmp_path, dirs_exist_ok=True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return Path("runs/r")


def test_a_column_for_each_length_of_passkeys():
    rows = [
        {"model": "a", "weights": "trained", "length": n, "trials": 25, "said": said, "chosen": 0.5}
        for n, said in ((512, 0.2), (1024, 0.0))
    ]
    failed = {"model": "b", "weights": "trained", "failed": "why"}
    own = {"model": "a", "weights": "trained"}
    assert long_context.passkeys([*rows, failed]) == [
        own | {"answer": "chosen", "512": "0.50 ± 0.10", "1,024": "0.50 ± 0.10"},
        own | {"answer": "said", "512": "0.20 ± 0.08", "1,024": "0.00 ± 0.00"},
        failed | {"answer": "chosen"},
        failed | {"answer": "said"},
    ]
    assert [row["answer"] for row in long_context.passkeys(rows[1:])] == ["chosen"]  # where none was said, a note says so


def test_the_suite_measures_runs_beside_untrained_weights_and_a_failure_is_a_row(run, tmp_path):
    text = DataConfig(sources=(str(write_prose(tmp_path / "other.txt", 3000, seed=1)),))
    shutil.copytree(run, "runs/broken")
    models = {"whole": run, "broken": Path("runs/broken")}
    long_context.check(models, text)
    (Path("runs/broken") / "tokenizer.json").write_text("{}")
    results = list(long_context.run(models, text, [CPU], times=4, windows=3, trials=2))
    assert len(results) == 6 and [len(result.tables[0].rows) for result in results[:2]] == [7, 8]  # as they come
    tables = {table.name: table.rows for table in results[-1].tables}
    *positions, failed = tables["loss by position"]
    assert (
        [row["to"] for row in positions] == [2, 4, 8, 16, 32, 64, 128]
        and failed["model"] == "broken"
        and "tokenizer.json" in failed["failed"]
    )
    assert ["gain" in row for row in positions] == [False] * 5 + [True] * 2  # where more stands before than in training
    lengths = [(row["weights"], row["length"]) for row in tables["passkey by length"] if row["model"] == "whole"]
    assert lengths == [("trained", 128), ("untrained", 128)]
    assert len(tables["passkey by length and depth"]) == len(tables["passkey by length and depth, untrained"]) == 5 + 1
    notes = " ".join(results[-1].notes)
    assert "whole: trained on 32 tokens at a time; 3 windows of 128 tokens, from" in notes and "whole: lengths below" in notes
    columns = {name: set().union(*rows) for name, rows in tables.items()}
    for figure in results[-1].figures:
        used = {figure.x, figure.y, *(figure.series if hasattr(figure, "series") else (figure.value, figure.panels))}
        assert used <= columns[figure.table]


def test_untrained_weights_are_those_that_the_run_began_with(run, made):
    from hyperlm import trained

    loaded = trained.load_model(run, "latest", "cpu")
    first = model.init(loaded.config.model, loaded.config.train.seed)
    found = scoring.untrained(loaded.config, CPU)
    assert torch.equal(found["head"]["weight"], first["head"]["weight"]) and not torch.equal(
        found["head"]["weight"], loaded.params["head"]["weight"]
    )
