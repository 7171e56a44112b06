"""Tokenizers: byte-level BPE trained on a corpus, raw bytes, or a given tokenizer.json; all as one `tokenizers.Tokenizer`.

The tokenizer travels with a run as tokenizer.json. Text that looks like a special token is encoded as ordinary text: special tokens are
put in by id alone.
"""

import os
import stat
import sys
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from hyperlm.errors import HyperlmError

END_OF_TEXT = "<|endoftext|>"
ROLES = ("system", "user", "assistant", "tool")
END_OF_TURN = "<|end|>"
TOOL = "<|tool|>"
SPECIALS = [END_OF_TEXT, "<|system|>", "<|user|>", "<|assistant|>", END_OF_TURN, TOOL]  # the order of ids in tokenizers that there are
# Of conversations, for transformers: the ids that `turn` gives, and which of them the assistant says; tool calls as in data/rows.py.
TEMPLATE = (
    "{% macro text_of(message) %}"
    "{% set said %}{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content or [] %}{{ part.text }}{% endfor %}{% endif %}{% endset %}{{ said }}"
    "{% for call in message.tool_calls or [] %}{% set f = call.function or call %}{% if said or not loop.first %}{{ '\\n' }}{% endif %}"
    "{{ '{\"name\": ' }}{{ f.name | tojson }}{{ ', \"arguments\": ' }}"
    "{% if f.arguments is string %}{{ f.arguments }}{% else %}{{ (f.arguments or {}) | tojson }}{% endif %}{{ '}' }}{% endfor %}"
    "{% endmacro %}"
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + ('system' if message.role == 'developer' else message.role) + '|>' }}"
    "{% if message.role == 'assistant' %}{% generation %}{{ text_of(message) + '<|end|>' }}{% endgeneration %}"
    "{% else %}{{ text_of(message) + '<|end|>' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
FOREIGN_ENDS = ("<|end_of_text|>", "</s>", "<eos>")  # what other tokenizers call the end of a text
LARGEST_FILE = 64 << 20  # bytes of a tokenizer.json; those of the largest vocabularies take about 35 MB
LARGEST_ID = 1 << 24  # an embedding has a row for every id up to the largest one


class TokenizerError(HyperlmError, ValueError):
    """A tokenizer that cannot be used."""


def byte_level(vocab: dict[str, int], merges: list[tuple[str, str]]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def ready(tokenizer: Tokenizer) -> Tokenizer:
    """Add what is missing of our special tokens, keep text from being read as any, and cut or pad no text whatever the file says.

    One that has ends of turns stays without TOOL: it may be that of a run of an earlier version, whose model has no row for another id.
    """
    tokenizer.no_truncation()
    tokenizer.no_padding()
    ends = [END_OF_TEXT, *FOREIGN_ENDS]
    has_end = any(tokenizer.token_to_id(name) is not None for name in ends)
    given = {END_OF_TEXT} if has_end else set()
    if tokenizer.token_to_id(END_OF_TURN) is not None:
        given.add(TOOL)
    tokenizer.add_special_tokens([name for name in SPECIALS if name not in given])
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


def read(path: str | Path) -> bytes:
    """The bytes of a tokenizer.json.

    Raises:
        TokenizerError: if there is none, or what is there can be none.
    """
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise TokenizerError(f"{path} is not a tokenizer.json (it is no regular file)")
        if status.st_size > LARGEST_FILE:
            raise TokenizerError(f"{path} is not a tokenizer.json (it has {status.st_size >> 20} MiB, more than any)")
        return Path(path).read_bytes()
    except FileNotFoundError as e:
        raise TokenizerError(f"{path}: no such file; a tokenizer is bpe, bytes or the path of a tokenizer.json") from e
    except OSError as e:
        raise TokenizerError(f"{path}: cannot be read ({e.strerror})") from e


def load(path: str | Path) -> Tokenizer:
    """Read a tokenizer.json.

    Raises:
        TokenizerError: if it is missing, not a tokenizer, or one whose ids are no rows of an embedding.
    """
    raw = read(path)
    try:
        tokenizer = ready(Tokenizer.from_str(raw.decode("utf-8-sig")))
    except BaseException as e:
        raise reported(e, f"{path} is not a tokenizer.json") from e
    ids = tokenizer.get_vocab().values()
    if max(ids) >= LARGEST_ID:
        raise TokenizerError(f"{path}: has a token with id {max(ids):,}; an embedding would need a row for each id up to that one")
    if len(set(ids)) < len(ids):
        raise TokenizerError(
            f"{path}: two tokens have the same id, or get it where special tokens are added into gaps: number them without gaps"
        )
    return tokenizer


def reported(error: BaseException, what: str) -> BaseException:
    """A TokenizerError for what the library raises, plain Exception or a panic of its Rust; any other BaseException as it is."""
    if isinstance(error, Exception) or type(error).__name__ == "PanicException":
        return TokenizerError(f"{what} ({(str(error).splitlines() or ['no reason given'])[0][:200]})")
    return error


def save(tokenizer: Tokenizer, path: str | Path) -> None:
    """Write a tokenizer.json; unlike the library's own, a failure is an OSError that names the file."""
    Path(path).write_bytes(tokenizer.to_str(pretty=True).encode())


def settings(tokenizer: Tokenizer, *, chat: bool) -> dict[str, object]:
    """What transformers reads beside a tokenizer.json, as tokenizer_config.json; with a template of conversations if `chat`."""
    end = tokenizer.id_to_token(end_of_text(tokenizer))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": end, "eos_token": END_OF_TURN if chat else end, "pad_token": end}
    return {**settings, "clean_up_tokenization_spaces": False, **({"chat_template": TEMPLATE} if chat else {})}


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """The largest id and one: rows that an embedding needs. Ids may have gaps, so that there may be fewer tokens."""
    return max(tokenizer.get_vocab().values()) + 1


def encode(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    """Ids of each text, without special tokens.

    Raises:
        TokenizerError: if the tokenizer has no token for something in them, and none for what is unknown.
    """
    try:
        return [encoding.ids for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
    except BaseException as e:
        raise reported(e, "the tokenizer cannot encode this text") from e


def losses(tokenizer: Tokenizer, texts: list[str]) -> str:
    """What encoding and decoding changes in `texts`: one example of what case, spacing or accents it does not keep, "" for nothing.

    Raises:
        TokenizerError: if letters are lost or unknown.
    """
    changed = ""
    for text, ids in zip(texts, encode(tokenizer, texts), strict=True):
        back = tokenizer.decode(ids, skip_special_tokens=False)
        if back == text:
            continue
        if bare(back) != bare(text):
            shown = example(text, back)
            raise TokenizerError(f"the tokenizer does not give this text back: {shown}; it needs a token for every character or byte")
        changed = changed or example(text, back)
    return changed


def bare(text: str) -> str:
    """Letters without their case, accents and spacing."""
    return "".join(c for c in unicodedata.normalize("NFKD", text.casefold()) if not c.isspace() and not unicodedata.combining(c))


def example(text: str, back: str) -> str:
    """Where two texts begin to differ."""
    at = len(os.path.commonprefix([text, back]))
    window = slice(max(0, at - 10), at + 20)
    return f"{text[window]!r} comes back as {back[window]!r}"


def clean(text: str) -> str:
    """Text with U+FFFD for lone surrogates, which no encoding has."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def end_of_text(tokenizer: Tokenizer) -> int:
    """Id of the token between documents."""
    return next(i for name in (END_OF_TEXT, *FOREIGN_ENDS) if (i := tokenizer.token_to_id(name)) is not None)


def stop_ids(tokenizer: Tokenizer) -> set[int]:
    """Ids that end a reply: of the end of a text or a turn, and of roles, since what follows these is somebody else's."""
    return {i for name in (*SPECIALS, *FOREIGN_ENDS) if (i := tokenizer.token_to_id(name)) is not None}


def turn(tokenizer: Tokenizer, role: str, content: str) -> list[int]:
    """One message of a conversation: its role's token, the text, the end-of-turn token."""
    return turn_of(tokenizer, role, encode(tokenizer, [content])[0])


def turn_of(tokenizer: Tokenizer, role: str, ids: list[int]) -> list[int]:
    """The turn of a text that is encoded."""
    return [*opening(tokenizer, role), *ids, tokenizer.token_to_id(END_OF_TURN)]  # type: ignore[list-item]  # every tokenizer here has it


def opening(tokenizer: Tokenizer, role: str) -> list[int]:
    """The token after which `role` speaks.

    Raises:
        TokenizerError: if the tokenizer has none for it.
    """
    if (token := tokenizer.token_to_id(f"<|{role}|>")) is None:
        raise TokenizerError(f"the tokenizer has no <|{role}|>, being of an earlier version: leave out such messages, or train it anew")
    return [token]


def stream(tokenizer: Tokenizer, ids: Iterable[int]) -> Iterator[str]:
    """Text of `ids` as it becomes certain: bytes of an unfinished character wait for the rest."""
    decoder = decoders.DecodeStream(skip_special_tokens=True)
    for token in ids:
        if text := decoder.step(tokenizer, token):
            yield text
