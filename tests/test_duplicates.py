"""Near copies: what MinHash estimates and finds, against sets of runs of words and a loop over all pairs; what is left out of a corpus."""

import random
import sys

import numpy as np
import pytest
from test_data import config, text_of, write_jsonl

from hyperlm import data
from hyperlm.data import duplicates

rensa = pytest.importorskip("rensa", reason="the extra `dedup` is not installed")


def runs(text: str) -> set[tuple[str, ...]]:
    words = text.split()
    return {tuple(words[i : i + 5]) for i in range(max(1, len(words) - 4))}


def jaccard(a: str, b: str) -> float:
    return len(runs(a) & runs(b)) / len(runs(a) | runs(b))


def prose(seed: int, words: int = 300) -> str:
    return " ".join(random.Random(seed).choices([f"word{i}" for i in range(2000)], k=words))


def edited(text: str, changes: int, seed: int = 0) -> str:
    """The text with that many of its words replaced, at random places."""
    rng, words = random.Random(seed), text.split()
    for i in rng.sample(range(len(words)), changes):
        words[i] = f"other{rng.randrange(10**6)}"
    return " ".join(words)


@pytest.mark.parametrize("changes", [0, 1, 3, 8, 20, 60, 300])
def test_signatures_estimate_the_share_of_runs_in_common(changes):
    pairs = [(prose(seed), edited(prose(seed), changes, seed)) for seed in range(40)]
    a, b = (duplicates.signatures(list(side)) for side in zip(*pairs, strict=True))
    error = (a == b).mean(1) - [jaccard(*pair) for pair in pairs]
    assert a.shape == (40, 64) and a.dtype == np.uint16
    assert abs(error.mean()) < 0.03 and abs(error).max() < 0.25


@pytest.mark.parametrize(
    ("text", "same", "count"),
    [
        ("a b c d e f", " a  b\nc\td e f\n", 2),  # spacing is none of it
        ("a b c d e a b c d e a b", "e a b c d e a b c d", None),  # a set: how often and in what order does not count
        ("a b", "a b ", 1),
        ("one", "one\n", 1),
        ("日本語の文章です", "日 本 語 の 文 章 で す", 4),
        ("tail ข้อความ", "tail ข้อความ ", None),
    ],
)
def test_runs_of_words_are_of_five_or_of_all_there_are(text, same, count):
    ours, others = set(duplicates.runs_of_words(text).tolist()), set(duplicates.runs_of_words(same).tolist())
    assert ours == others and (count is None or len(ours) == count)
    assert ours != set(duplicates.runs_of_words(f"{text} more").tolist())


def naive_originals(signatures: np.ndarray, given: int) -> list[int]:
    kept: list[int] = []
    found = []
    for i, row in enumerate(signatures):
        bands = [j for j in kept if any((signatures[j, b : b + 6] == row[b : b + 6]).all() for b in range(0, 60, 6))]
        best = max(bands, key=lambda j: ((signatures[j] == row).mean(), -j), default=None)
        copy = i >= given and best is not None and (signatures[best] == row).mean() >= 0.8
        found.append(best if copy else -1)
        kept += [] if copy else [i]
    return found


@pytest.mark.parametrize("given", [0, 25])
@pytest.mark.parametrize("seed", range(4))
def test_copies_are_those_that_a_loop_over_all_pairs_finds(seed, given):
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, 1 << 16, (12, 64))[rng.integers(0, 12, 150)]  # 12 documents and their copies,
    rows = np.where(
        rng.random(rows.shape) < rng.random((150, 1)) * 0.4, rng.integers(0, 1 << 16, rows.shape), rows
    )  # more and less changed
    signatures = rows.astype(np.uint16)
    found = duplicates.originals(signatures, given)
    assert found.tolist() == naive_originals(signatures, given) and 20 < (found >= 0).sum() < 140


def test_of_many_alike_the_last_are_compared_and_all_that_are_the_same(monkeypatch):
    monkeypatch.setattr(duplicates, "RECENT", 2)
    rng = np.random.default_rng(0)
    few = rng.integers(0, 1 << 16, (6, 64))
    alike = few[np.repeat(rng.integers(0, 6, (60, 11)), 6, axis=1)[:, :64], np.arange(64)]  # each band is that of ten others
    near = alike[[0, 59]].copy()
    near[:, [0, 6]] += 1
    found = duplicates.originals(np.concatenate([alike, alike[:3], near[::-1]]).astype(np.uint16))
    assert found.tolist() == [-1] * 60 + [0, 1, 2] + [59, -1]


@pytest.mark.parametrize("rows", [[], [[1, 2]], [[1, 2], [1, 2], [3, 4], [1, 3], [3, 4], [5, 5]], [[0, 0], [0, 0]]])
def test_equal_rows_have_a_number_together(rows):
    groups = duplicates.equal_rows(np.array(rows, np.uint16).reshape(-1, 2))
    for i, row in enumerate(rows):
        equal = {j for j in range(len(rows)) if rows[j] == row}
        assert {j for j in range(len(rows)) if groups[i] == groups[j] >= 0} == (equal if len(equal) > 1 else set())


def sides(*sources, **options) -> tuple[list[str], list[str], list[str]]:
    """The training and the validation documents, and what was said of near copies."""
    said = []
    corpus = data.prepare(config(*sources, **options), say=said.append)
    train = [text for s in corpus.shards for text in text_of(corpus, s.train).split("<|endoftext|>")[:-1]]
    val = [text for s in corpus.shards for text in text_of(corpus, s.val).split("<|endoftext|>")[1:-1]]
    return train, val, [line for line in said if line.startswith("dedup")]


def test_near_copies_are_left_out_and_the_first_stays(tmp_path):
    originals = [prose(seed) for seed in range(60)]
    copies = [edited(text, 1 + seed % 3, seed) for seed, text in enumerate(originals[:20])]  # 1 to 3 words of 300
    distant = [edited(text, 60, seed) for seed, text in enumerate(originals[20:30])]
    assert min(map(jaccard, originals, copies)) > 0.9 and max(map(jaccard, originals[20:], distant)) < 0.5
    source = write_jsonl(tmp_path / "d.jsonl", [{"text": text} for text in [*originals, *distant, *copies, *originals[:5]]])
    train, val, said = sides(source, dedup=True, val_fraction=0.2)
    assert sorted(train + val) == sorted([*originals, *distant]) and val
    assert said == ["dedup      25 of 95 documents left out, near copies of others"]
    assert sides(source, dedup=True, val_fraction=0.2)[:2] == (train, val)
    everything = sides(source, val_fraction=0.2)
    assert len(everything[0] + everything[1]) == 95 and everything[2] == []


def test_nothing_is_trained_on_that_nearly_is_what_is_held_out(tmp_path):
    held = [prose(seed) for seed in range(10)]
    train = [edited(text, 2, seed) for seed, text in enumerate(held[:4])] + [prose(seed) for seed in range(100, 110)]
    files = [
        write_jsonl(tmp_path / f"{name}.jsonl", [{"text": t} for t in texts])
        for name, texts in (("t", [*train, train[-1]]), ("v", [*held, held[0]]))
    ]
    trained, val, said = sides(files[0], val_sources=(files[1],), dedup=True)
    assert trained == train[4:] and sorted(val) == sorted([*held, held[0]])  # what is held out is as it was given
    assert said == ["dedup      5 of 15 documents left out, near copies of others, 4 of them of what is held out"]


def test_sources_are_looked_at_together_in_their_order(tmp_path):
    texts = [prose(seed) for seed in range(20)]
    first = write_jsonl(tmp_path / "a.jsonl", [{"text": t} for t in texts])
    second = write_jsonl(tmp_path / "b.jsonl", [{"text": edited(t, 1)} for t in texts])
    train, val, said = sides(first, second, dedup=True)
    assert sorted(train + val) == sorted(texts) and said == ["dedup      20 of 40 documents left out, near copies of others"]


def test_a_limit_on_text_is_filled_with_what_is_no_copy(tmp_path):
    texts = [prose(seed) for seed in range(40)]
    source = write_jsonl(tmp_path / "d.jsonl", [{"text": t} for t in texts[:20] * 10 + texts[20:]])
    size = sum(map(len, texts)) / 2**20
    train, val, _ = sides(source, dedup=True, max_mib=1.01 * size)
    assert sorted(train + val) == sorted(texts)


def test_conversations_are_compared_by_what_is_said(tmp_path):
    talks = [[{"role": "user", "content": prose(seed)}, {"role": "assistant", "content": prose(seed + 50)}] for seed in range(12)]
    again = [[talk[0], {"role": "assistant", "content": edited(talk[1]["content"], 1)}] for talk in talks[:3]]
    source = write_jsonl(tmp_path / "d.jsonl", [{"messages": talk} for talk in talks + again])
    assert sides(source, dedup=True)[2] == ["dedup      3 of 15 documents left out, near copies of others"]


def test_a_system_prompt_that_conversations_share_makes_no_copies_of_them(tmp_path):
    said = [({"role": "user", "content": prose(seed, 9)}, {"role": "assistant", "content": prose(seed + 50, 9)}) for seed in range(12)]
    rows = [{"messages": [{"role": "system", "content": prose(99)}, *talk]} for talk in said + said[:3]]
    source = write_jsonl(tmp_path / "d.jsonl", rows)
    assert sides(source, dedup=True)[2] == ["dedup      3 of 15 documents left out, near copies of others"]


def test_without_rensa_it_is_one_line_that_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "rensa", None)
    with pytest.raises(data.DataError, match=r"^--data.dedup needs rensa: pip install 'hyperlm-torch\[dedup\]'$"):
        sides(write_jsonl(tmp_path / "d.jsonl", [{"text": prose(0)}]), dedup=True)
