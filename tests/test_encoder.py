"""The fast encoder: the same ids and the same files as tokenizers gives, or none of its own."""

import json
from itertools import chain, count

import numpy as np
import pytest
from conftest import write_prose
from test_data import config, write_jsonl
from test_tokenizer import TEXT, written
from tokenizers import Tokenizer, normalizers

from hyperlm import data, encoder
from hyperlm import tokenizer as tok
from hyperlm.data import selection


def never(line: str) -> None:
    pytest.fail(line)


class Fake:
    """In place of fastokens: what tokenizers gives, but for the n-th text of all that `wrong` (n, text) is true of."""

    def __init__(self, wrong):
        self.wrong, self.number = wrong, count()
        self.Tokenizer = self

    def from_json_str(self, text):
        self.tokenizer = tok.ready(Tokenizer.from_str(text))
        return self

    def encode_batch_flat(self, texts, split_special_tokens):
        assert split_special_tokens
        ids = [
            [0, *i] if self.wrong(next(self.number), text) else i for text, i in zip(texts, tok.encode(self.tokenizer, texts), strict=True)
        ]
        return np.array(list(chain.from_iterable(ids)), "<u4").tobytes(), np.cumsum([0, *map(len, ids)]).astype("<u8").tobytes()


@pytest.fixture
def texts(tmp_path):
    """Forty documents that are encoded in batches of about three."""
    with pytest.MonkeyPatch.context() as during:
        during.setattr(selection, "AT_ONCE", 1000)
        yield write_jsonl(tmp_path / "d.jsonl", [{"text": f"{i} {TEXT} " + f"word{i} " * 40} for i in range(40)])


def prepared(source, cache, monkeypatch, module, **options) -> tuple[dict[str, bytes], list[str]]:
    """The files of a new cache, but for its checksums, and what was said of the tokenizer."""
    monkeypatch.setattr(encoder, "fastokens", module)
    said = []
    corpus = data.prepare(config(source, cache=str(cache), **options), say=said.append)
    files = {path.name: path.read_bytes() for path in (cache / corpus.fingerprint).iterdir()}
    return files, [line for line in said if line.startswith("tokenizer")]


def test_the_files_are_the_same_to_the_bit(texts, tmp_path, monkeypatch):
    fastokens = pytest.importorskip("fastokens", reason="the extra `fast` is not installed")
    talk = [{"role": "user", "content": TEXT}, {"role": "assistant", "content": "yes <|end|>"}]
    write_jsonl(tmp_path / "talks.jsonl", [{"messages": talk * i} for i in range(1, 20)])
    write_prose(tmp_path / "prose.txt")
    (tmp_path / "all.toml").write_text("".join(f'[[sources]]\npath = "{name}"\n' for name in ("d.jsonl", "talks.jsonl", "prose.txt")))
    for options in ({"tokenizer": "bytes"}, {"tokenizer": "bpe"}):
        ours = (
            prepared(tmp_path / "all.toml", tmp_path / f"{module is None}{options['tokenizer']}", monkeypatch, module)
            for module in (fastokens, None)
        )
        assert next(ours) == next(ours)


TORTURED, CHECKED_FIRST = len(encoder.TORTURE), 3
WRONG = {
    "in its test": lambda n, text: n == TORTURED - 1,
    "in the first batch": lambda n, text: text.startswith("0 ") and n < TORTURED + CHECKED_FIRST,
    "long after the beginning": lambda n, text: int(text.split()[0] if text[:1].isdigit() and n >= TORTURED else 0) >= 24,
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG.keys())
def test_where_it_differs_everything_is_encoded_by_tokenizers(texts, tmp_path, monkeypatch, wrong):
    expected, _ = prepared(texts, tmp_path / "slow", monkeypatch, None)
    files, said = prepared(texts, tmp_path / "fast", monkeypatch, Fake(wrong))
    assert files == expected
    assert (
        len(said) == 1
        and "by tokenizers, slowly" in said[0]
        and "fastokens has other ids than tokenizers for" in said[0]
        and "\n" not in said[0]
    )


def test_where_it_never_differs_its_ids_are_used(texts, tmp_path, monkeypatch):
    fake = Fake(lambda n, text: False)
    files, said = prepared(texts, tmp_path / "fast", monkeypatch, fake)
    assert said == [] and next(fake.number) > TORTURED + 40 and files == prepared(texts, tmp_path / "slow", monkeypatch, None)[0]


@pytest.mark.parametrize("after", [0, TORTURED, TORTURED + 20], ids=["in its test", "in the first batch", "later"])
def test_where_it_fails_everything_is_encoded_by_tokenizers(texts, tmp_path, monkeypatch, after):
    def fails(n, text):
        if n >= after:
            raise RuntimeError("broken\nlines")

    files, said = prepared(texts, tmp_path / "fast", monkeypatch, Fake(fails))
    assert files == prepared(texts, tmp_path / "slow", monkeypatch, None)[0]
    assert len(said) == 1 and "fastokens cannot encode this text (broken)" in said[0] and "slowly" in said[0]


def test_a_tokenizer_that_it_cannot_read_is_said(tmp_path):
    pytest.importorskip("fastokens", reason="the extra `fast` is not installed")
    said = []
    tokenizer = tok.load(written(tmp_path / "t.json", normalizer={"type": "Lowercase"}))
    tokenizer.normalizer = normalizers.Sequence([normalizers.StripAccents(), normalizers.Lowercase()])
    assert encoder.encoder_of(tokenizer, 0, said.append).fast is None
    assert (
        len(said) == 1
        and said[0].startswith("tokenizer  encoded by tokenizers, slowly: fastokens cannot take its place (")
        and "\n" not in said[0]
    )


def test_much_text_without_it_is_told_what_would_be_faster(texts, tmp_path, monkeypatch):
    monkeypatch.setattr(encoder, "fastokens", None)
    for much, lines in ((1 << 30, 0), (100, 1)):
        monkeypatch.setattr(encoder, "MUCH", much)
        said = []
        data.prepare(config(texts, cache=str(tmp_path / f"cache{much}")), said.append)
        assert sum("pip install fastokens" in line for line in said) == lines


@pytest.mark.parametrize("name", ["bytes", "bpe"])
def test_texts_in_batches_have_the_ids_that_they_have_alone(name):
    tokenizer = tok.byte_tokenizer() if name == "bytes" else tok.train_bpe(["def f(x): return x\n" * 20], 300)
    batches = [(number, [f"{number} {TEXT}" * i for i in range(number % 4)]) for number in range(30)]
    for made in (encoder.Encoder(tokenizer), encoder.encoder_of(tokenizer, 0, never)):
        for (number, texts), (tag, ids) in zip(batches, encoder.encoded(made, iter(batches)), strict=True):
            assert (
                tag == number
                and [i.tolist() for i in ids] == [tokenizer.encode(text).ids for text in texts]
                and all(i.dtype == np.uint32 for i in ids)
            )


@pytest.mark.parametrize("at", [0, 1, 5])
def test_what_a_tokenizer_cannot_encode_is_an_error_in_any_batch(tmp_path, at):
    model = {"type": "Unigram", "unk_id": None, "vocab": [["a", -1.0]], "byte_fallback": False}
    made = encoder.Encoder(tok.load(written(tmp_path / "t.json", model=model, pre_tokenizer=None, decoder=None)))
    with pytest.raises(tok.TokenizerError, match="cannot encode this text"):
        list(encoder.encoded(made, ((i, ["b" if i == at else "a"]) for i in range(6))))


def test_a_cache_says_nothing_of_what_encoded_it(texts, tmp_path, monkeypatch):
    files, _ = prepared(texts, tmp_path / "cache", monkeypatch, Fake(lambda n, text: False))
    assert "fast" not in json.dumps(json.loads(files["meta.json"]))
