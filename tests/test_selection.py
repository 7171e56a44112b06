"""Which documents are used and on which side: near the share asked for, within the limit asked for, and nothing on both sides."""

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import write_prose
from test_data import config, text_of, write_jsonl

from hyperlm import data
from hyperlm.config import ModelConfig
from hyperlm.data import documents, selection, tokenise


def sides(*paths, **options) -> tuple[list[str], list[str], list[str]]:
    """The training and the validation documents of all sources, and what was said."""
    said = []
    corpus = data.prepare(config(*paths, **options), say=said.append)
    streams = [stream for s in corpus.shards for stream in (s.train, *([s.talks.tokens[1:]] if s.talks else []))]
    train = [text for stream in streams for text in text_of(corpus, stream).split("<|endoftext|>")[:-1]]
    val = [text for s in corpus.shards for text in text_of(corpus, s.val).split("<|endoftext|>")[1:-1]]
    return train, val, said[:-1]


def share(train: list[str], val: list[str]) -> float:
    sizes = [sum(len(text.encode()) for text in side) for side in (train, val)]
    return sizes[1] / sum(sizes)


def texts(*sizes: int) -> list[dict[str, str]]:
    return [{"text": f"{i:04d} " + "words " * (size // 6)} for i, size in enumerate(sizes)]


# -- the split -----------------------------------------------------------------------------------------------------------------------

SIZES = {
    "one long among sixty short": [200] * 60 + [60_000],
    "two": [5000, 5000],
    "three": [9000, 90, 9000],
    "a few": [3000] * 5,
    "powers of two": [2**i for i in range(5, 16)],
    "many": [300] * 300,
}


@pytest.mark.parametrize("fraction", [0.01, 0.05, 0.2, 0.5, 0.9])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
def test_the_share_held_out_is_near_the_one_asked_for(tmp_path, sizes, fraction):
    records = texts(*sizes)
    train, val, said = sides(write_jsonl(tmp_path / "d.jsonl", records), val_fraction=fraction)
    assert fraction / 2 <= share(train, val) <= 2 * fraction and 1 - share(train, val) >= (1 - fraction) / 2
    together = "".join(sorted(train + val))
    assert len(together) == sum(len(r["text"]) for r in records)  # nothing is lost
    assert len(said) == (0 if {x["text"] for x in records} >= {*train, *val} and "split" not in "".join(said) else 1)


def test_one_text_holds_out_its_end(tmp_path):
    content = "".join(f"Sentence {i} of the text. " for i in range(300))
    (tmp_path / "t.txt").write_text(content)
    train, val, said = sides(tmp_path / "t.txt", val_fraction=0.05)
    assert len(train) == len(val) == 1 and train[0] + val[0] == content and val[0].startswith("Sentence")
    assert share(train, val) == pytest.approx(0.05, rel=0.3)
    assert said == [f"split      the text is one document: the last {len(val[0])} bytes of one are held out"]


def test_one_talk_holds_out_its_last_turns(tmp_path):
    messages = [{"role": role, "content": f"{role} says {i}. "} for i in range(40) for role in ("user", "assistant")]
    train, val, _ = sides(write_jsonl(tmp_path / "d.jsonl", [{"messages": messages}]), val_fraction=0.1)
    assert len(train) == len(val) == 1 and val[0].startswith("<|user|>") and train[0].endswith("<|end|>")
    assert (train[0] + val[0]).count("<|end|>") == 80 and share(train, val) == pytest.approx(0.1, abs=0.03)


def test_a_tail_has_no_copy_in_training(tmp_path):
    record = {"text": "".join(f"Sentence {i} of the text. " for i in range(300))}
    train, val, said = sides(write_jsonl(tmp_path / "d.jsonl", [record] * 3))
    assert len(train) == 1 and train[0] + val[0] == record["text"] and "2 documents dropped from training" in said[1]


@pytest.mark.parametrize("content", ["x", "a b", "word " * 20])
def test_a_text_too_short_for_two_sides_says_how_short_it_is(tmp_path, content):
    (tmp_path / "t.txt").write_text(content)
    with pytest.raises(data.DataError, match=f"the text is one document of {len(content)} bytes, too short .*--data.val-sources"):
        sides(tmp_path / "t.txt")


def test_a_share_that_cannot_be_had_is_said_with_numbers(tmp_path):
    train, val, said = sides(write_jsonl(tmp_path / "d.jsonl", texts(60, 60, 60)), val_fraction=0.05)
    assert (len(train), len(val)) == (2, 1) and said == [
        "split      33.3% of the text is held out instead of 5.0%: no documents are of a better length"
    ]


def test_the_split_is_the_same_each_time_and_in_any_order(tmp_path):
    records = texts(*SIZES["one long among sixty short"])
    first = sides(write_jsonl(tmp_path / "a.jsonl", records))[1]
    random.Random(0).shuffle(records)
    assert sorted(sides(write_jsonl(tmp_path / "b.jsonl", records))[1]) == sorted(first)


# -- copies --------------------------------------------------------------------------------------------------------------------------


def test_what_is_validated_on_is_not_trained_on(tmp_path):
    records = texts(*[300] * 40)
    train = write_jsonl(tmp_path / "train.jsonl", records)
    held = write_jsonl(tmp_path / "val.jsonl", records[5:9] + texts(100))
    trained, val, said = sides(train, val_sources=(held,))
    assert not set(trained) & set(val) and len(trained) == 36 and len(val) == 5
    assert said == ["split      4 documents dropped from training: the same text is held out"]


def test_line_ends_do_not_hide_a_copy(tmp_path):
    prose = write_prose(tmp_path / "val.txt", 3000)
    (tmp_path / "train.txt").write_bytes(
        prose.read_text().replace("\n", "\r\n").encode() + write_prose(tmp_path / "more.txt", 3000, 1).read_bytes()
    )
    trained, val, said = sides(tmp_path / "train.txt", val_sources=(str(prose),))
    assert not set(trained) & set(val) and "dropped from training" in said[0]


def test_training_on_nothing_but_what_is_held_out_is_an_error(prose):
    with pytest.raises(data.DataError, match="all of the text is held out"):
        sides(prose, val_sources=(str(prose),))


def test_a_limit_on_text_lets_no_copy_through(tmp_path):
    records = texts(*[30_000] * 10)
    source = write_jsonl(tmp_path / "d.jsonl", records)
    trained, val, said = sides(source, val_sources=(write_jsonl(tmp_path / "v.jsonl", records[:8]),), max_mib=0.1)
    assert trained and val and not {t[:4] for t in trained} & {t[:4] for t in val} and "dropped from training" in said[-1]


# -- the limit -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(12))
def test_a_limit_is_filled_whatever_the_sizes_and_their_order(tmp_path, seed):
    rng = random.Random(seed)
    sizes = [int(10 ** rng.uniform(1, 5)) for _ in range(rng.randint(1, 60))]
    train, val, _ = sides(write_jsonl(tmp_path / "d.jsonl", texts(*sizes)), max_mib=0.02)
    used, most = sum(len(t) for t in train + val), int(0.02 * 2**20)
    everything = sum(len(r["text"]) for r in texts(*sizes))
    left = [len(r["text"]) for r in texts(*sizes) if r["text"] not in train + val]
    assert 0 < used <= most
    assert used == min(most, everything) or min(left) > most - used


def test_a_limit_cuts_a_document_longer_than_it_in_whole_characters(tmp_path):
    train, val, _ = sides(write_jsonl(tmp_path / "d.jsonl", [{"text": "日本語" * 20_000}]), max_mib=0.01)
    assert len((train[0] + val[0]).encode()) in range(int(0.01 * 2**20) - 3, int(0.01 * 2**20) + 1) and "\ufffd" not in train[0] + val[0]


def naive_limit(order: np.ndarray, size: np.ndarray, most: int) -> set[int]:
    chosen: set[int] = set()
    for i in sorted(range(len(size)), key=lambda i: order[i]):
        if sum(size[j] for j in chosen) + size[i] <= most:
            chosen.add(i)
    return chosen


@pytest.mark.parametrize("seed", range(5))
def test_documents_are_taken_in_the_order_of_their_hashes(seed):
    rng = np.random.default_rng(seed)
    order, size = rng.integers(0, 2**63, 50).astype(np.uint64), rng.integers(1, 100, 50)
    use, _ = selection.limit(order, size, 500)
    assert set(np.flatnonzero(use)) == naive_limit(order, size, 500)


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([[10, 20], [5]], [30, 5]),  # all that there is
        ([[10] * 100], [60]),
        ([[10] * 100, [10] * 100], [30, 30]),
        ([[10] * 100, [5, 5], [10] * 100], [20, 10, 30]),  # what others leave, in whole documents, is for the longest
        ([[1000], [1] * 20], [40, 20]),  # the beginning of one that is too long
        ([[], [10]], [0, 10]),
        ([[]], [0]),
    ],
)
def test_a_tokenizer_is_trained_on_a_share_of_every_source(monkeypatch, sizes, expected):
    monkeypatch.setattr(tokenise, "BPE_TEXT", 60)
    rng = np.random.default_rng(0)
    orders = [rng.integers(0, 2**63, len(size)).astype(np.uint64) for size in sizes]
    parts = tokenise.samples([np.array(size, np.int64) for size in sizes], orders)
    assert [part.sum() for part in parts] == expected
    for part, order in zip(parts, orders, strict=True):
        assert not part.any() or order[part > 0].max() <= np.sort(order)[(part > 0).sum() - 1]  # the first by their hashes: spread evenly


def test_what_a_tokenizer_learns_is_spread_over_the_text(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenise, "BPE_TEXT", 20_000)
    words = ["".join(random.Random(i).choices("abcdefgh", k=8)) for i in range(20)]
    records = [{"text": f"{i} " + f"{words[i // 50]} " * 20} for i in range(1000)]  # a new word from time to time
    source = write_jsonl(tmp_path / "d.jsonl", records)
    cfg = replace(config(source), model=ModelConfig(vocab_size=600))
    tokenizer = data.prepare(replace(cfg, data=replace(cfg.data, tokenizer="bpe")), say=lambda line: None).tokenizer
    assert len([word for word in words if tokenizer.token_to_id(f"Ġ{word}") is not None]) > 15


# -- parts of documents --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("most", range(0, 40, 3))
def test_the_head_of_a_document_keeps_to_its_limit(most):
    talk = documents.Document("", (("user", "été " * 3), ("assistant", "日本" * 3)))
    for document in (documents.Document("日本 été " * 4), talk):
        head = document.head(most)
        assert most - 3 <= len(head.raw) <= most and document.content.startswith(head.content)


@pytest.mark.parametrize("share", [0.5, 0.9, 0.95])
@pytest.mark.parametrize("content", ["word " * 500, "x" * 500, "line\n" * 500, "a. " * 500, "a\n\nb\n\n" * 500])
def test_a_divided_document_loses_nothing(content, share):
    first, rest = documents.Document(content).divide(share)
    assert first.text + rest.text == content and len(first.text) / len(content) == pytest.approx(share, abs=(1 - share) / 2 + 0.01)


# -- empty ones ----------------------------------------------------------------------------------------------------------------------


def test_files_without_text_are_left_out_with_a_word_and_folders_are_errors(prose, tmp_path):
    for i in range(5):
        (tmp_path / f"{i}.txt").write_text(" \n\n")
    said = sides(prose, *(tmp_path / f"{i}.txt" for i in range(5)))[2]
    assert said[:4] == [
        "reading    0.txt: left out, no text in it",
        "reading    1.txt: left out, no text in it",
        "reading    2.txt: left out, no text in it",
        "reading    and 2 more files likewise",
    ]
    (tmp_path / "empty").mkdir()
    with pytest.raises(data.DataError, match="--data.sources .*empty: no text in it"):
        sides(prose, tmp_path / "empty")
    with pytest.raises(data.DataError, match="--data.val-sources .*0.txt: no text in it"):
        sides(prose, val_sources=(str(tmp_path / "0.txt"),))


# -- 200 random corpora ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(40))
def test_a_random_corpus_is_on_two_sides_or_an_error_in_one_line(tmp_path, seed):
    rng = random.Random(seed)
    kinds = [" ", "\n", "\n\n", "word ", "é", ". ", "\r\n", "\r\n\r\n"]
    for i in range(rng.randint(1, 4)):
        (tmp_path / f"{i}.txt").write_bytes(
            "".join(rng.choices(kinds, [rng.random() for _ in kinds], k=int(10 ** rng.uniform(0, 4.5)))).encode()
        )
    try:
        train, val, _ = sides(
            *sorted(Path(tmp_path).glob("*.txt")), val_fraction=rng.choice([0.001, 0.05, 0.5, 0.99]), max_mib=rng.choice([0, 0.001, 0.01])
        )
        assert train and val and not set(train) & set(val)
    except data.DataError as e:
        assert "\n" not in str(e) and json.dumps(str(e))


# -- files ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("order", "expected"), [([2, 0, 1], b"|ccaabbb"), ([], b"|"), ([0, 1, 2], b"|aabbbcc")])
def test_pieces_of_a_file_are_put_into_order(tmp_path, order, expected):
    (tmp_path / "x.bin").write_bytes(b"aabbbcc")
    tokenise.rearrange(tmp_path / "x.bin", np.array([2, 3, 2]), np.array(order, np.int64), b"|")
    assert (tmp_path / "x.bin").read_bytes() == expected and len(list(tmp_path.iterdir())) == 1


def test_validation_documents_stand_in_the_order_of_their_hashes(tmp_path):
    records = texts(*[300] * 60)
    val = sides(write_jsonl(tmp_path / "d.jsonl", records), val_fraction=0.3)[1]
    order = [int.from_bytes(selection.content_hash(documents.Document(text))[8:], "little") for text in val]
    assert len(val) > 8 and order == sorted(order)


@pytest.mark.parametrize("known", ["", "ab", "ab日", "xyz"])
def test_new_characters_are_those_that_are_not_known(known):
    assert tokenise.characters(["abc 日本", "", "\x00é"], set(known)) == set("abc 日本\x00é") - set(known)


@pytest.mark.parametrize("found", [[], [3], [0, 5, 9], list(range(10))])
def test_values_among_others_are_found(found):
    values = np.array([5, 0, 9, 3, 10, 5], np.uint64)
    assert selection.among(values, np.array(found, np.uint64)).tolist() == [value in found for value in values.tolist()]
