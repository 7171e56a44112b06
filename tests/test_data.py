"""Data: documents and their sides, the cache, the order of batches, validation windows."""

import json
import math
import os
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import TINY, write_prose
from tokenizers import normalizers

from hyperlm import data, evals, model
from hyperlm import tokenizer as tok
from hyperlm.batch import Batch
from hyperlm.config import Config, ConfigError, DataConfig, ModelConfig, TrainConfig, resolve
from hyperlm.data import selection, sources, text
from hyperlm.data import tokenise as preparation
from hyperlm.loss import IGNORE


def config(*sources, n: int = 16, a: int = 2, b: int = 4, seed: int = 0, **options) -> Config:
    return Config(
        model=ModelConfig(vocab_size=300),
        data=DataConfig(sources=tuple(map(str, sources)), seq_len=n, tokenizer="bytes", **options),
        train=TrainConfig(batch_size=b, grad_accum=a, seed=seed),
    )


def prepare(cfg: Config) -> data.Corpus:
    return data.prepare(cfg, say=lambda line: None)


def text_of(corpus: data.Corpus, tokens) -> str:
    return corpus.tokenizer.decode([int(t) for t in tokens if t != IGNORE], skip_special_tokens=False)


def write_jsonl(path, records) -> str:
    path.write_text("\n".join(json.dumps(r) for r in records) + "\n")
    return str(path)


def windows_of(order: data.Batches, steps: int) -> torch.Tensor:
    """The windows of text that these steps learn from, (S, N+1): every token is predicted from those before it."""
    batches = [order.at(step) for step in range(steps)]
    assert all(torch.equal(b.tokens[..., 1:], b.targets[..., :-1]) for b in batches)
    return torch.cat([torch.cat([b.tokens[..., :1], b.targets], -1).flatten(0, 1) for b in batches])


def same(a: Batch, b: Batch) -> bool:
    return torch.equal(a.tokens, b.tokens) and torch.equal(a.targets, b.targets)


def test_every_token_is_a_target_once_an_epoch(prose):
    corpus = prepare(config(prose))
    order = data.batches(corpus, config(prose))
    train = corpus.shards[0].train
    windows = (len(train) - 1) // 16
    assert order.steps_per_epoch == pytest.approx(windows / 8)
    rows = windows_of(order, -(-windows // 8))[:windows]
    expected = torch.from_numpy(np.stack([train[i * 16 : i * 16 + 17] for i in range(windows)]).astype(np.int64))
    assert Counter(map(tuple, rows.tolist())) == Counter(map(tuple, expected.tolist()))


def test_batches_are_a_pure_function_of_seed_and_step(prose):
    corpus = prepare(config(prose))
    first, again, other = (data.batches(corpus, config(prose, seed=s)) for s in (0, 0, 1))
    forward = [first.at(step) for step in range(5)]
    backward = [again.at(step) for step in reversed(range(5))][::-1]
    assert all(same(x, y) for x, y in zip(forward, backward, strict=True))
    assert not same(first.at(0), other.at(0)) and not same(first.at(0), first.at(1))
    assert all(x.shape == (2, 4, 16) and x.dtype == torch.int64 for x in (forward[0].tokens, forward[0].targets))


def test_epochs_differ_in_order_and_agree_in_content(prose):
    corpus = prepare(config(prose, a=1, b=1))
    order = data.batches(corpus, config(prose, a=1, b=1))
    epoch = round(order.steps_per_epoch)
    first, second = (list(map(tuple, part.tolist())) for part in windows_of(order, 2 * epoch).split(epoch))
    assert first != second and Counter(first) == Counter(second)


def test_a_mixture_has_the_proportions_asked_for(tmp_path):
    a, b = tmp_path / "a.txt", tmp_path / "b.txt"
    a.write_text("\n\n".join("a" * 9000 for _ in range(6)))
    b.write_text("\n\n".join("b" * 9000 for _ in range(2)))
    cfg = config(f"{a}:3", f"{b}:1", a=4, b=32)
    order = data.batches(prepare(cfg), cfg)
    firsts = torch.cat([order.at(step).tokens[:, :, 3].flatten() for step in range(16)])
    letters = Counter(corpus_letter for corpus_letter in firsts.tolist())
    corpus = prepare(cfg)
    share = letters[corpus.tokenizer.token_to_id("a")] / len(firsts)
    assert share == pytest.approx(0.75, abs=0.01)
    assert order.shares == {"a.txt": 0.75, "b.txt": 0.25}


def test_without_weights_sources_count_by_size(tmp_path):
    a, b = write_prose(tmp_path / "a.txt", 9000, 1), write_prose(tmp_path / "b.txt", 3000, 2)
    cfg = config(a, b)
    corpus = prepare(cfg)
    shares, sizes = data.batches(corpus, cfg).shares, [len(s.train) for s in corpus.shards]
    assert shares["a.txt"] / shares["b.txt"] == pytest.approx(sizes[0] / sizes[1], rel=0.01) and sizes[0] > 2 * sizes[1]


def test_documents_are_on_one_side_and_nothing_is_lost(tmp_path):
    records = [{"text": f"document {i} says {i * i}. " * 3} for i in range(400)]
    corpus = prepare(config(write_jsonl(tmp_path / "d.jsonl", records), val_fraction=0.2))
    train, val = (set(text_of(corpus, side).split("<|endoftext|>")) - {""} for side in (corpus.shards[0].train, corpus.shards[0].val))
    assert not train & val
    assert train | val == {r["text"] for r in records}
    assert len(val) / 400 == pytest.approx(0.2, abs=0.06)


def test_the_side_of_a_document_does_not_depend_on_the_others(tmp_path):
    records = [{"text": f"document {i} says {i * i}. " * 3} for i in range(200)]
    sides = []
    for name, chosen in (("all.jsonl", records), ("half.jsonl", records[::2])):
        corpus = prepare(config(write_jsonl(tmp_path / name, chosen), val_fraction=0.2))
        sides.append(set(text_of(corpus, corpus.shards[0].val).split("<|endoftext|>")) - {""})
    assert sides[1] == {t for t in sides[0] if t in {r["text"] for r in records[::2]}}


def test_a_second_start_tokenises_nothing(prose, monkeypatch):
    first = prepare(config(prose))
    monkeypatch.setattr(preparation, "write", lambda *a: pytest.fail("tokenised again"))
    second = prepare(config(prose))
    assert first.fingerprint == second.fingerprint
    assert np.array_equal(first.shards[0].train, second.shards[0].train)


def test_changed_text_and_changed_settings_are_another_corpus(prose):
    prints = {prepare(config(prose)).fingerprint, prepare(config(prose, val_fraction=0.3)).fingerprint}
    prose.write_text(prose.read_text() + "\n\nand more")
    prints.add(prepare(config(prose)).fingerprint)
    assert len(prints) == 3


def test_an_interrupted_preparation_leaves_nothing_behind(prose, monkeypatch, tmp_path):
    def fail(*a):
        raise KeyboardInterrupt

    monkeypatch.setattr(preparation, "make_tokenizer", fail)
    with pytest.raises(KeyboardInterrupt):
        prepare(config(prose))
    assert list((tmp_path / "cache" / "hyperlm").iterdir()) == []


def test_prose_is_cut_into_documents_that_join_to_the_text(prose):
    content = prose.read_text()
    parts = list(text.pieces([content]))
    assert len(parts) > 3 and "".join(parts) == content and all(part.endswith("\n\n") for part in parts[:-1])


def test_limiting_the_text_keeps_whole_documents_within_the_limit(prose):
    full, small = prepare(config(prose)), prepare(config(prose, max_mib=0.03))
    assert 0 < len(small.shards[0].train) + len(small.shards[0].val) <= 0.03 * 2**20 + 100 < len(full.shards[0].train)


def test_validation_windows_hold_each_token_of_whole_documents_once(prose):
    corpus = prepare(config(prose, val_fraction=0.3))
    shard = corpus.shards[0]
    for limit in (0, 20000, 1):
        windows, size = data.validation_sequences(shard, DataConfig(seq_len=16), limit)
        targets = windows.targets[windows.targets != IGNORE]
        text = text_of(corpus, targets).removesuffix("<|endoftext|>")
        assert size == len(text.replace("<|endoftext|>", "").encode())
        assert text_of(corpus, shard.val[1:]).startswith(text)
        assert torch.equal(windows.tokens[1:, 0], windows.targets[:-1, -1]) and windows.tokens.min() >= 0
        if limit == 0:
            assert len(targets) == len(shard.val) - 1


def test_own_validation_text_is_used_whole(prose, tmp_path):
    val = write_prose(tmp_path / "val.txt", 2000, seed=5)
    corpus = prepare(config(prose, val_sources=(str(val),)))
    assert [len(s.val) > 0 for s in corpus.shards] == [False, True]
    held_out = text_of(corpus, corpus.shards[1].val).split("<|endoftext|>")[1:-1]
    assert Counter(held_out) == Counter(text.pieces([val.read_text()]))
    assert text_of(corpus, corpus.shards[0].train).replace("<|endoftext|>", "") == prose.read_text()


def test_conversations_become_turns(tmp_path):
    talk = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}
    corpus = prepare(
        config(write_jsonl(tmp_path / "c.jsonl", [talk, {"text": "plain"}, {"text": "x"}, {"text": "y"}] * 3), val_fraction=0.01)
    )
    assert corpus.chat
    assert "<|endoftext|><|user|>hi<|end|><|assistant|>ho<|end|><|endoftext|>" in text_of(corpus, corpus.shards[0].talks.tokens)
    talks = corpus.shards[0].talks
    assert len(talks.tokens) == len(talks.said) == 1 + talks.lengths.sum() and len(talks.lengths) == 3
    assert text_of(corpus, talks.tokens[talks.said == 1]) == "ho<|end|>" * 3
    assert "plain<|endoftext|>x" in text_of(corpus, corpus.shards[0].train)


def test_a_recipe_names_sources_and_weights(prose, tmp_path):
    (tmp_path / "recipe.toml").write_text('[[sources]]\npath = "prose.txt"\nweight = 2\n[[sources]]\npath = "stdlib"\n')
    a, b = sources.parse_sources((str(tmp_path / "recipe.toml"),))
    assert (a.path, a.weight) == (tmp_path / "prose.txt", 2.0) and (b.name, b.path, b.weight) == ("stdlib", None, None)


def test_the_standard_library_is_real_text_without_its_tests():
    paths = [str(p) for p in sources.files(sources.Source("stdlib", None, None)).files]
    assert any(p.endswith("argparse.py") for p in paths)
    assert not any("/test/" in p or "site-packages" in p for p in paths)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('{"text": "a"}\n{"txt": "b"}', "d.jsonl:2: no 'text' field"),
        ('{"text": 3}', "d.jsonl:1: text is not a string"),
        ("not json", "d.jsonl:1: Expecting value"),
        ('{"messages": [{"role": "robot", "content": "x"}]}', "d.jsonl:1: role 'robot'"),
        ('{"messages": [{"role": "user"}]}', "d.jsonl:1: no 'content' field"),
        ("", "no text in it"),
        ('{"text": "only one"}', "validation needs another"),
    ],
)
def test_bad_text_is_named_with_its_line(tmp_path, lines, message):
    (tmp_path / "d.jsonl").write_text(lines)
    with pytest.raises(data.DataError) as e:
        prepare(config(tmp_path / "d.jsonl", on_bad="stop"))
    assert message in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("missing.txt", "no such file"),
        ("prose.txt:zero", "not a weight"),
        ("prose.txt:-1", "a weight must be above 0"),
        ("picture.png", "cannot read .png"),
        ("missing.toml", "no such file"),
        ("bad.toml", "not a recipe"),
        ("", "no such file"),
        (":0.5", "no such file"),
        ("prose.txt:", "'' is not a weight"),
        ("prose.txt:0", "a weight must be above 0"),
        ("prose.txt:nan", "a weight must be above 0"),
        ("prose.txt:inf", "a weight must be above 0"),
        ("prose.txt:1e308", "a weight must be above 0"),
        ("bad.toml:2", "a recipe has weights of its own"),
        ("pipe.txt", "neither a file nor a folder"),
        ("x" * 5000, "no such file"),
        ("~nobody-has-this-name/x.txt", "no such file"),
    ],
)
def test_bad_sources_are_named(prose, tmp_path, source, message):
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "picture.png").write_text("x")
    (tmp_path / "bad.toml").write_text("[[sources]]\nname = 'x'")
    with pytest.raises(data.DataError) as e:
        sources.parse_sources((source,))
    assert message in str(e.value) and "\n" not in str(e.value)


PATH = '[[sources]]\npath = "prose.txt"\n'


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (PATH + "wieght = 2", "r.toml, source 1: not a recipe; 'wieght' means nothing here, did you mean 'weight'?"),
        (PATH + PATH + "pth = 2", "r.toml, source 2: not a recipe; 'pth' means nothing here, did you mean 'path'?"),
        ('[[source]]\npath = "prose.txt"', "r.toml: not a recipe; 'source' means nothing here, did you mean 'sources'?"),
        *(
            (f"{PATH}weight = {w}", "r.toml, source 1: a weight must be above 0")
            for w in ("0", "-1", "nan", "inf", "1e308", '"2"', "true", "[1]", "1e400")
        ),
        ("[[sources]]\nweight = 1", "r.toml, source 1: not a recipe; path must be a text"),
        ("[[sources]]\npath = 3", "r.toml, source 1: not a recipe; path must be a text"),
        ('[[sources]]\npath = ""', "r.toml, source 1, : no such file"),
        ('[[sources]]\npath = "a\\u0000b"', "no such file"),
        ('[[sources]]\npath = "nowhere.txt"', "r.toml, source 1, nowhere.txt: no such file"),
        ("sources = 3", "not a recipe"),
        ("sources = []", "not a recipe"),
        ('sources = ["prose.txt"]', "not a recipe"),
        ("", "not a recipe"),
        ("x = " + "[" * 100_000, "not a recipe"),
        ("\x00\x01", "not a recipe"),
    ],
)
def test_recipes_are_checked_as_the_command_line_is(prose, tmp_path, recipe, message):
    (tmp_path / "r.toml").write_text(recipe)
    with pytest.raises(data.DataError) as e:
        sources.parse_sources((str(tmp_path / "r.toml"),))
    assert message in str(e.value) and "\n" not in str(e.value)


def test_validation_sources_are_blamed_by_their_own_flag(prose):
    with pytest.raises(data.DataError, match="^--data.val-sources nowhere.txt: no such file"):
        prepare(config(prose, val_sources=("nowhere.txt",)))


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["a/notes.txt", "b/notes.txt"], ["a/notes.txt", "b/notes.txt"]),
        (["a/notes.txt", "b/other.txt"], ["notes.txt", "other.txt"]),
        (["a/notes.txt", "a/notes.txt", "a/../a/notes.txt"], ["notes.txt", "notes.txt#2", "notes.txt#3"]),
        (["a/x/notes.txt", "b/x/notes.txt", "b/other.txt"], ["a/x/notes.txt", "b/x/notes.txt", "other.txt"]),
        (["a/x/notes.txt", "b/x/notes.txt", "b/notes.txt"], ["a/x/notes.txt", "b/x/notes.txt", "b/notes.txt"]),
        (["a/x", "b/x", "stdlib", "a/stdlib"], ["a/x", "b/x", "stdlib", "a/stdlib"]),
        (["a", "b"], ["a", "b"]),
    ],
)
def test_sources_have_names_of_their_own(tmp_path, paths, names):
    for path in paths:
        if path != "stdlib":
            (tmp_path / path).mkdir(parents=True, exist_ok=True)
    found = sources.with_names(sources.parse_sources(tuple(paths)))
    assert [s.name for s in found] == names


def test_the_folder_one_is_in_and_odd_names_have_names(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "a\nb.txt").write_text("x")
    monkeypatch.chdir(tmp_path / "here")
    assert [s.name for s in sources.with_names(sources.parse_sources((".", "a\nb.txt")))] == ["here", "a\ufffdb.txt"]


def test_sources_of_one_name_are_validated_and_mixed_apart(tmp_path):
    for i, folder in enumerate("ab"):
        (tmp_path / folder).mkdir()
        write_prose(tmp_path / folder / "notes.txt", 6000, seed=i)
    cfg = config("a/notes.txt:1", "b/notes.txt:3", val_fraction=0.3)
    corpus = prepare(cfg)
    assert data.batches(corpus, cfg).shares == {"a/notes.txt": 0.25, "b/notes.txt": 0.75}
    assert len({s.name for s in corpus.shards}) == 2


def write_notes(folder, *sizes: int) -> list[str]:
    folder.mkdir()
    for i, size in enumerate(sizes):
        (folder / f"{i}.md").write_text(f"{i}" * size)
    return [str(folder / f"{i}.md") for i in range(len(sizes))]


@pytest.mark.parametrize("weight", ["", ":2"])
def test_sources_shorter_than_a_sequence_are_read_as_one(prose, tmp_path, weight):
    notes = write_notes(tmp_path / "notes", 9, 8, 7)
    cfg, said = config(f"{prose}{weight}", *notes, val_sources=(str(write_prose(tmp_path / "v.txt", 500, 3)),)), []
    corpus = prepare(cfg)
    order = data.batches(corpus, cfg, say=said.append)
    assert said == ["mixture    0.md, 1.md, 2.md: each shorter than a sequence, read as one source"]
    assert list(order.shares) == ["prose.txt", "0.md and 2 more"]
    if weight:
        assert order.shares["prose.txt"] == pytest.approx(2 / 5, abs=1e-3)  # a source without a weight has 1
    epoch = windows_of(order, -(-round(order.steps_per_epoch * 8) // 8))
    together = np.concatenate([s.train for s in corpus.shards[1:]])[:17]
    assert together.tolist() in epoch.tolist()


def test_a_source_too_short_for_anything_is_left_out_with_a_word(prose, tmp_path):
    (note,) = write_notes(tmp_path / "notes", 5)
    val, said = (str(write_prose(tmp_path / "v.txt", 500, 3)),), []
    with_note, without = (
        data.batches(prepare(c), c, say=said.append) for c in (config(prose, note, val_sources=val), config(prose, val_sources=val))
    )
    assert said == ["left out   0.md: 6 training tokens, less than one sequence of 16"]
    assert with_note.steps_per_epoch == without.steps_per_epoch and with_note.shares == {"prose.txt": 1.0}


def test_a_weight_too_small_to_be_drawn_gets_one_sequence_of_a_block_and_it_is_said(tmp_path):
    a, b = write_prose(tmp_path / "a.txt", 4000, 1), write_prose(tmp_path / "b.txt", 4000, 2)
    cfg, said = config(f"{a}:1", f"{b}:1e-7"), []
    order = data.batches(prepare(cfg), cfg, say=said.append)
    assert said == ["mixture    b.txt: a weight of 1e-07 is less than one sequence in 1,024; it gets one"]
    assert order.shares == {"a.txt": 1023 / 1024, "b.txt": 1 / 1024}


@pytest.mark.parametrize("talks", [False, True])
def test_bits_per_byte_are_those_of_the_characters(tmp_path, talks):
    records = [{"text": f"text {i}. " * 9} for i in range(60)]
    if talks:
        records = [{"messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": f"a{i}"}]} for i in range(60)]
    cfg = config(write_jsonl(tmp_path / "d.jsonl", records), val_fraction=0.3)
    cfg = replace(cfg, model=replace(TINY, vocab_size=512), eval=replace(cfg.eval, max_tokens=0))
    params = model.init(cfg.model, 0, device=torch.device("cpu"), dtype=torch.float32)
    params["head"]["weight"].zero_()  # every token then costs log2(512) = 9 bits, and a character of these texts is a token and a byte
    found = evals.evaluate(params, prepare(cfg), cfg, torch.device("cpu"))
    assert found["val_bpb"] == pytest.approx(9) and found["val_loss"] == pytest.approx(9 * math.log(2))


def test_a_text_shorter_than_a_sequence_is_an_error(tmp_path):
    path = write_jsonl(tmp_path / "d.jsonl", [{"text": "short"}, {"text": "texts"}])
    cfg = config(path, n=512)
    with pytest.raises(data.DataError, match="--data.seq-len"):
        data.batches(prepare(cfg), cfg)


def test_a_given_tokenizer_sets_the_vocabulary(prose, tmp_path):
    from hyperlm import tokenizer as tok

    tok.train_bpe([prose.read_text()], 400).save(str(tmp_path / "t.json"))
    cfg = config(prose)
    cfg = data.with_vocabulary(replace(cfg, data=replace(cfg.data, tokenizer=str(tmp_path / "t.json"))))
    assert cfg.model.vocab_size == 448 or cfg.model.vocab_size % 64 == 0
    assert prepare(cfg).shards[0].train.max() < cfg.model.vocab_size


def given(cfg: Config, path) -> Config:
    return data.with_vocabulary(replace(cfg, data=replace(cfg.data, tokenizer=str(path))))


def test_a_given_tokenizer_cuts_and_pads_no_document(prose, tmp_path):
    tokenizer = tok.byte_tokenizer()
    tokenizer.enable_truncation(7)
    tokenizer.enable_padding(length=100)
    tokenizer.save(str(tmp_path / "t.json"))
    own, with_file = prepare(config(prose)).shards[0], prepare(given(config(prose), tmp_path / "t.json")).shards[0]
    assert np.array_equal(own.train, with_file.train) and np.array_equal(own.val, with_file.val)


def test_a_given_tokenizer_that_loses_letters_is_refused_and_one_that_loses_case_is_said(prose, tmp_path):
    lower, lossy = tok.byte_tokenizer(), tok.byte_tokenizer()
    lower.normalizer = normalizers.Lowercase()
    lossy.normalizer = normalizers.Replace("e", "")
    said = []
    for tokenizer, name in ((lower, "lower.json"), (lossy, "lossy.json")):
        tokenizer.save(str(tmp_path / name))
    data.prepare(given(config(prose), tmp_path / "lower.json"), say=said.append)
    assert any(
        line.startswith(f"tokenizer  {tmp_path / 'lower.json'} does not keep all of prose.txt: ") and "comes back as" in line
        for line in said
    )
    again = []
    data.prepare(given(config(prose), tmp_path / "lower.json"), say=again.append)
    assert again[-1].endswith("(cached)") and {line for line in said if line.startswith("tokenizer")} <= set(again)
    with pytest.raises(tok.TokenizerError, match="does not give this text back"):
        prepare(given(config(prose), tmp_path / "lossy.json"))


def test_a_character_that_a_tokenizer_lacks_is_found_wherever_it_is(tmp_path, monkeypatch):
    """Long after the beginning, which is tried whole."""
    monkeypatch.setattr(selection, "AT_ONCE", 2000)
    (tmp_path / "p.txt").write_text("all is plain here.\n\n" * 2000 + "and here is a Q.\n")
    lacking = tok.byte_tokenizer()
    lacking.normalizer = normalizers.Replace("Q", "")
    lacking.save(str(tmp_path / "t.json"))
    with pytest.raises(tok.TokenizerError, match="does not give this text back.*Q"):
        prepare(given(config(tmp_path / "p.txt", val_fraction=0.2), tmp_path / "t.json"))


def test_a_vocabulary_larger_than_the_model_has_rows_is_an_error(prose, tmp_path):
    tok.train_bpe([prose.read_text()], 400).save(str(tmp_path / "t.json"))
    cfg = given(config(prose), tmp_path / "t.json")
    with pytest.raises(tok.TokenizerError, match="--model.vocab-size 300"):
        prepare(replace(cfg, model=replace(cfg.model, vocab_size=300)))


def test_a_limit_on_text_that_leaves_nothing_is_refused():
    for value in (1e-9, float("inf"), float("nan"), -1):
        with pytest.raises(ConfigError, match="--data.max-mib"):
            resolve(replace(Config(), data=DataConfig(max_mib=value)))
