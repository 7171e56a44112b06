"""Tokenizers: byte-level BPE trained on a corpus, raw bytes, or a given tokenizer.json; all as one `tokenizers.Tokenizer`.

The tokenizer travels with a run as tokenizer.json. Text that looks like a special token is encoded as ordinary text: special tokens are
put in by id alone.
"""

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_TEXT = "<|endoftext|>"
ROLES = ("system", "user", "assistant")
END_OF_TURN = "<|end|>"
SPECIALS = [END_OF_TEXT, *(f"<|{role}|>" for role in ROLES), END_OF_TURN]
FOREIGN_ENDS = ("<|end_of_text|>", "</s>", "<eos>")  # what other tokenizers call the end of a text


class TokenizerError(ValueError):
    """A tokenizer that cannot be used."""


def byte_level(vocab: dict[str, int], merges: list[tuple[str, str]]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def ready(tokenizer: Tokenizer) -> Tokenizer:
    """Add what is missing of our special tokens, and keep text from being read as any."""
    ends = [END_OF_TEXT, *FOREIGN_ENDS]
    has_end = any(tokenizer.token_to_id(name) is not None for name in ends)
    tokenizer.add_special_tokens([name for name in SPECIALS if not (name == END_OF_TEXT and has_end)])
    tokenizer.encode_special_tokens = True
    return tokenizer


def byte_tokenizer() -> Tokenizer:
    """One token a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    return ready(byte_level({char: i for i, char in enumerate(alphabet)}, []))


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE with at most `vocab_size` tokens, special tokens included; fewer where the text has no more pairs that repeat."""
    tokenizer = byte_level({}, [])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=sys.stderr.isatty(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return ready(tokenizer)


def load(path: str | Path) -> Tokenizer:
    """Read a tokenizer.json.

    Raises:
        TokenizerError: if it is missing or not a tokenizer.
    """
    if not Path(path).is_file():
        raise TokenizerError(f"--data.tokenizer {path}: no such file; give bpe, bytes or the path of a tokenizer.json")
    try:
        return ready(Tokenizer.from_file(str(path)))
    except Exception as e:  # the library raises plain Exception
        raise TokenizerError(f"{path} is not a tokenizer.json ({str(e).splitlines()[0]})") from e


def end_of_text(tokenizer: Tokenizer) -> int:
    """Id of the token between documents."""
    return next(i for name in (END_OF_TEXT, *FOREIGN_ENDS) if (i := tokenizer.token_to_id(name)) is not None)


def turn(tokenizer: Tokenizer, role: str, content: str) -> list[int]:
    """One message of a conversation: its role's token, the text, the end-of-turn token."""
    return [*opening(tokenizer, role), *tokenizer.encode(content, add_special_tokens=False).ids, tokenizer.token_to_id(END_OF_TURN)]


def opening(tokenizer: Tokenizer, role: str) -> list[int]:
    """The token after which `role` speaks."""
    return [tokenizer.token_to_id(f"<|{role}|>")]


def stream(tokenizer: Tokenizer, ids: Iterable[int]) -> Iterator[str]:
    """Text of `ids` as it becomes certain: bytes of an unfinished character wait for the rest."""
    decoder = decoders.DecodeStream(skip_special_tokens=True)
    for token in ids:
        if text := decoder.step(tokenizer, token):
            yield text
