"""Tokenizers: exact round trips, special tokens that no text can forge, streaming."""

import pytest

from hyperlm import tokenizer as tok

TEXT = "def f(x):\n\treturn 'ñ🙂' # naïve — 日本\r\n\n  <|endoftext|> <|user|>\x00"


@pytest.fixture(params=["bytes", "bpe"])
def tokenizer(request):
    return tok.byte_tokenizer() if request.param == "bytes" else tok.train_bpe(["def f(x): return x\n" * 20, "for i in range(10):\n" * 20], 300)


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


def test_a_bad_file_is_one_clear_line(tmp_path):
    (tmp_path / "bad.json").write_text("{}")
    for path in ("missing.json", "bad.json"):
        with pytest.raises(tok.TokenizerError) as e:
            tok.load(tmp_path / path)
        assert path in str(e.value) and "\n" not in str(e.value)
