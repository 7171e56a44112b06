"""Tokenizers: exact round trips, special tokens that no text can forge, streaming."""

import errno
import json
import os
import time

import pytest
from tokenizers import pre_tokenizers

from hyperlm import tokenizer as tok

TEXT = "def f(x):\n\treturn 'ñ🙂' # naïve — 日本\r\n\n  <|endoftext|> <|user|>\x00"
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())


@pytest.fixture(params=["bytes", "bpe"])
def tokenizer(request):
    return (
        tok.byte_tokenizer()
        if request.param == "bytes"
        else tok.train_bpe(["def f(x): return x\n" * 20, "for i in range(10):\n" * 20], 300)
    )


def test_every_text_survives_a_round_trip(tokenizer):
    ids = tokenizer.encode(TEXT, add_special_tokens=False).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == TEXT


def test_text_that_looks_like_a_special_token_is_text(tokenizer):
    special = {tokenizer.token_to_id(name) for name in tok.SPECIALS}
    assert None not in special
    assert not special & set(tokenizer.encode(TEXT, add_special_tokens=False).ids)


def test_bytes_are_one_token_each():
    tokenizer = tok.byte_tokenizer()
    assert len(tokenizer.encode(TEXT, add_special_tokens=False).ids) == len(TEXT.encode())
    assert tokenizer.get_vocab_size() == 256 + len(tok.SPECIALS)


def test_bpe_keeps_to_its_size_and_shortens_text():
    tokenizer = tok.train_bpe(["the cat sat on the mat. " * 50], 280)
    assert tokenizer.get_vocab_size() <= 280
    assert len(tokenizer.encode("the cat sat", add_special_tokens=False).ids) < 11


def test_streamed_text_is_the_text_and_never_half_a_character():
    tokenizer = tok.byte_tokenizer()
    ids = tokenizer.encode("a🙂é日", add_special_tokens=False).ids
    pieces = list(tok.stream(tokenizer, ids))
    assert "".join(pieces) == "a🙂é日" and "�" not in "".join(pieces)


def test_a_saved_tokenizer_comes_back_the_same(tokenizer, tmp_path):
    tokenizer.save(str(tmp_path / "t.json"))
    again = tok.load(tmp_path / "t.json")
    assert again.encode(TEXT, add_special_tokens=False).ids == tokenizer.encode(TEXT, add_special_tokens=False).ids
    assert tok.end_of_text(again) == tok.end_of_text(tokenizer)


def test_turns_of_a_conversation_are_framed_by_their_tokens():
    tokenizer = tok.byte_tokenizer()
    ids = tok.turn(tokenizer, "user", "hi")
    assert ids == [tokenizer.token_to_id("<|user|>"), *tokenizer.encode("hi").ids, tokenizer.token_to_id("<|end|>")]


def test_a_foreign_tokenizer_gains_what_it_lacks(tmp_path):
    plain = tok.byte_level({"a": 0, "b": 1, "</s>": 2}, [])
    plain.add_special_tokens(["</s>"])
    plain.save(str(tmp_path / "t.json"))
    loaded = tok.load(tmp_path / "t.json")
    assert tok.end_of_text(loaded) == 2 and loaded.token_to_id("<|user|>") is not None


# -- a given tokenizer.json ----------------------------------------------------------------------------------------------------------


def written(path, **changes):
    """A tokenizer.json of bytes without special tokens, with some of its parts replaced."""
    values = json.loads(tok.byte_level({char: i for i, char in enumerate(ALPHABET)}, []).to_str())
    for key, value in changes.items():
        values["model" if key == "vocab" else key] = {**values["model"], "vocab": value} if key == "vocab" else value
    path.write_text(json.dumps(values))
    return path


def test_truncation_and_padding_of_a_file_do_nothing(tmp_path):
    cut = {"direction": "Right", "max_length": 7, "strategy": "LongestFirst", "stride": 0}
    pad = {"strategy": {"Fixed": 100}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0, "pad_token": "!"}
    tokenizer = tok.load(written(tmp_path / "t.json", truncation=cut, padding=pad))
    for length in (3, 50, 500):
        assert tok.encode(tokenizer, ["a" * length]) == [[ALPHABET.index("a")] * length]


def test_a_vocabulary_with_gaps_reaches_to_its_largest_id(tmp_path):
    vocab = {char: i if i < 250 else 1000 + i for i, char in enumerate(ALPHABET)}
    added = [
        {
            "id": 2000,
            "content": "<|endoftext|>",
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
    ]
    tokenizer = tok.load(written(tmp_path / "t.json", vocab=vocab, added_tokens=added))
    ids = tok.encode(tokenizer, [TEXT])[0]
    assert max(max(ids), *tok.stop_ids(tokenizer)) < tok.vocabulary_size(tokenizer) and tok.vocabulary_size(tokenizer) > 1255
    assert tokenizer.decode(ids, skip_special_tokens=False) == TEXT


PIPE, FOLDER = object(), object()
HOSTILE = {
    "missing": (None, "no such file"),
    "a pipe": (PIPE, "no regular file"),
    "a folder": (FOLDER, "no regular file"),
    "empty": ("", "is not a tokenizer.json"),
    "an empty object": ("{}", "is not a tokenizer.json"),
    "not JSON": ("x", "is not a tokenizer.json"),
    "not UTF-8": (b"\xff\xfe{}", "is not a tokenizer.json"),
    "null": ("null", "is not a tokenizer.json"),
    "deep": ("[" * 1_000_000, "is not a tokenizer.json"),
    "deep objects": ('{"a":' * 1_000_000, "is not a tokenizer.json"),
    "large": (b" " * ((64 << 20) + 1), "it has 64 MiB, more than any"),
    "an id of 4e9": ({"vocab": {"a": 0, "b": 4_000_000_000}}, "has a token with id 4,000,000,000"),
    "an id of 5e9": ({"vocab": {"a": 0, "b": 5_000_000_000}}, "is not a tokenizer.json"),
    "a negative id": ({"vocab": {"a": -1}}, "is not a tokenizer.json"),
    "an id of 2**24": ({"vocab": {"a": 0, "b": 1 << 24}}, "has a token with id 16,777,216"),
    "ids that are words": ({"vocab": {"a": "0"}}, "is not a tokenizer.json"),
    "two tokens of one id": ({"vocab": {"a": 0, "b": 0}}, "two tokens have the same id"),
    "gaps where special tokens fall": ({"vocab": {"a": 0, "b": 4}}, "two tokens have the same id"),
    "a vocabulary that is a list": ({"vocab": [1]}, "is not a tokenizer.json"),
    "no model": ({"model": None}, "is not a tokenizer.json"),
    "a model of numbers": ({"model": 3}, "is not a tokenizer.json"),
    "added tokens of numbers": ({"added_tokens": 3}, "is not a tokenizer.json"),
    "an unknown decoder": ({"decoder": {"type": "Unknown"}}, "is not a tokenizer.json"),
}


@pytest.mark.parametrize(("content", "message"), HOSTILE.values(), ids=HOSTILE.keys())
def test_a_file_that_is_no_tokenizer_is_one_line_in_a_second(tmp_path, content, message):
    path = tmp_path / "t.json"
    if content is PIPE:
        os.mkfifo(path)
    elif content is FOLDER:
        path.mkdir()
    elif isinstance(content, dict):
        written(path, **content)
    elif content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    started = time.monotonic()
    with pytest.raises(tok.TokenizerError) as e:
        tok.load(path)
    assert str(path) in str(e.value) and message in str(e.value) and "\n" not in str(e.value) and time.monotonic() - started < 2


def test_what_a_tokenizer_cannot_encode_is_an_error(tmp_path):
    model = {"type": "Unigram", "unk_id": None, "vocab": [["a", -1.0]], "byte_fallback": False}
    tokenizer = tok.load(written(tmp_path / "t.json", model=model, pre_tokenizer=None, decoder=None))
    with pytest.raises(tok.TokenizerError, match="cannot encode this text"):
        tok.encode(tokenizer, ["ab"])


LOWER = {"type": "Lowercase"}
WORDS = {"type": "WordLevel", "vocab": {"a": 0, "word": 1, "[UNK]": 2}, "unk_token": "[UNK]"}


@pytest.mark.parametrize(
    ("changes", "text", "found"),
    [
        ({}, TEXT, ""),
        (
            {"normalizer": LOWER},
            "Hello",
            "'Hello' comes back as 'hello'",
        ),
        ({"normalizer": {"type": "Strip", "strip_left": True, "strip_right": True}}, " a ", "' a ' comes back as 'a'"),
        ({"normalizer": {"type": "NFD"}}, "é", "'é' comes back as 'e\u0301'"),
        ({"vocab": {"a": 0, "b": 1}}, "abc", None),
        ({"model": WORDS, "pre_tokenizer": {"type": "Whitespace"}, "decoder": None}, "a strange word", None),
        ({"model": WORDS, "pre_tokenizer": {"type": "Whitespace"}, "decoder": None}, "a  word", "'a  word' comes back as 'a word'"),
        ({"normalizer": {"type": "Replace", "pattern": {"String": "b"}, "content": ""}}, "abc", None),
    ],
)
def test_what_a_tokenizer_loses_is_shown_and_letters_must_not_be_lost(tmp_path, changes, text, found):
    tokenizer = tok.load(written(tmp_path / "t.json", **changes))
    if found is None:
        with pytest.raises(tok.TokenizerError, match="does not give this text back: .* comes back as ") as e:
            tok.losses(tokenizer, ["a", text])
        assert "\n" not in str(e.value)
    else:
        assert tok.losses(tokenizer, ["a", text]) == found


def test_a_reply_ends_at_any_special_token_and_at_nothing_else(tokenizer):
    assert tok.stop_ids(tokenizer) == {tokenizer.token_to_id(name) for name in tok.SPECIALS}
    assert not tok.stop_ids(tokenizer) & set(tok.encode(tokenizer, [TEXT])[0])


@pytest.mark.parametrize(
    ("text", "cleaned"), [(TEXT, TEXT), ("a\ud800b", "a\ufffdb"), ("\udc80", "\ufffd"), ("\ud83d\ude42", "🙂"), ("", "")]
)
def test_clean_text_can_be_encoded(text, cleaned):
    assert tok.clean(text) == cleaned and tok.byte_tokenizer().encode(tok.clean(text)).ids is not None


def test_a_full_disk_is_an_os_error_that_names_the_file(tmp_path):
    with pytest.raises(OSError) as e:
        tok.save(tok.byte_tokenizer(), "/dev/full" if os.path.exists("/dev/full") else tmp_path / "none" / "t.json")
    assert e.value.filename or e.value.errno == errno.ENOSPC


def test_a_bad_file_is_one_clear_line(tmp_path):
    (tmp_path / "bad.json").write_text("{}")
    for path in ("missing.json", "bad.json"):
        with pytest.raises(tok.TokenizerError) as e:
            tok.load(tmp_path / path)
        assert path in str(e.value) and "\n" not in str(e.value)
