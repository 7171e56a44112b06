"""A conversation with a model: what was said, as text, and the model's state, which is always that of reading this text afresh.

So nothing needs to be undone: whatever is taken back, cut off or read from a file, `catch_up` goes on from what the model has read if
the text begins with it, and reads afresh if not. A model whose data had no conversations has one text instead, which both sides write.
"""

import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from hyperlm import env, sample
from hyperlm import tokenizer as tok
from hyperlm.data.rows import document_of
from hyperlm.errors import HyperlmError
from hyperlm.files import read_json
from hyperlm.model import Cache
from hyperlm.sample import Sampling
from hyperlm.trained import Model

LARGEST_FILE = 64 << 20  # bytes of a saved conversation


class ConversationError(HyperlmError, ValueError):
    """A conversation that cannot be had, read or written; the message says what to do."""


class Message(NamedTuple):
    role: str  # one of tok.ROLES
    content: str


class State(NamedTuple):
    """A model that has read `ids`. One that is caught up or answered from is consumed: its cache is written in place."""

    ids: list[int]
    logits: Tensor
    cache: Cache


Ending = Literal["end", "stop", "length", "loop", "interrupt"]  # its own, a stop string, the longest reply, a loop, a person


class Answer(NamedTuple):
    """What a model said, how that ended, and what it took."""

    text: str
    ending: Ending
    state: State
    tokens: int
    first: float  # seconds to the first token, reading included
    seconds: float  # from then to the end


def never() -> bool:
    return False


# -- reading ---------------------------------------------------------------------------------------------------------------------------


def nothing_read(model: Model) -> State:
    return State([], torch.empty(0), sample.empty_cache(model.params, model.config.model))


def token_ids(model: Model, messages: Sequence[Message]) -> list[int]:
    """What a model reads before it answers: the end of the text before, the messages, and in a conversation the start of its turn."""
    end = tok.end_of_text(model.tokenizer)
    if not model.chat:
        return [end, *tok.encode(model.tokenizer, ["".join(message.content for message in messages)])[0]]
    turns = [token for message in messages for token in tok.turn(model.tokenizer, *message)]
    return [end, *turns, *tok.opening(model.tokenizer, "assistant")]


def catch_up(model: Model, state: State, ids: list[int], interrupted: Callable[[], bool] = never) -> State:
    """The state after `ids`: goes on from `state` if they begin with what it has read, else afresh. Interrupted, it has read fewer."""
    if ids[: len(state.ids)] != state.ids:
        state = nothing_read(model)
    with env.progress(total=len(ids), initial=len(state.ids), desc="reading", unit=" tokens") as bar:
        for start in range(len(state.ids), len(ids), sample.PREFILL):
            if interrupted():
                break
            piece = ids[start : start + sample.PREFILL]
            logits, cache = sample.prefill(model.params, piece, state.cache, model.config.model, kernels=model.config.kernels)
            state = State([*state.ids, *piece], logits, cache)
            bar.update(len(piece))
    return state


# -- answering -------------------------------------------------------------------------------------------------------------------------


def answer(
    model: Model,
    state: State,
    messages: Sequence[Message],
    sampling: Sampling,
    generator: torch.Generator,
    *,
    decode: sample.Decode,
    limit: int,
    stops: Sequence[str] = (),
    show: Callable[[str], None],
    interrupted: Callable[[], bool] = never,
) -> Answer:
    """Read `messages` and answer them, token by token until one ends the turn or the text, or something else does: see `Ending`.

    Args:
        state: of the same model, whatever it has read. It is consumed; the answer has the next.
        decode: `sample.decoder` of the model.
        limit: the most tokens.
        stops: strings before which the text ends.
        show: is given each piece of the text as soon as it is certain.
        interrupted: asked after each piece of reading and each token.

    Raises:
        sample.NotFinite: if there are no probabilities to draw from.
    """
    begun, first, count = time.monotonic(), 0.0, 0
    ids = token_ids(model, messages)
    state = catch_up(model, state, ids, interrupted)
    if state.ids != ids:
        return Answer("", "interrupt", state, 0, 0.0, 0.0)
    ending: Ending = "stop"  # unless the tokens end before one of the strings is there

    def tokens() -> Iterator[int]:
        nonlocal state, ending, count, first
        drawn = sample.generate(
            state.logits,
            state.cache,
            sampling,
            generator,
            stop=tok.stop_ids(model.tokenizer),
            usable=tok.vocabulary_size(model.tokenizer),
            decode=decode,
            before=ids,
        )
        for count, (token, logits, cache) in enumerate(drawn, 1):
            first = first or time.monotonic() - begun
            state = State([*state.ids, token], logits, cache)
            yield token
            if interrupted():
                ending = "interrupt"
                return
            if count == limit:
                ending = "length"
                return
        ending = "end"

    text = ""
    for piece in sample.until(tok.stream(model.tokenizer, tokens()), stops):
        show(piece)
        text += piece
        if sample.repeats(text):
            ending = "loop"
            break
    return Answer(text, ending, state, count, first, time.monotonic() - begun - first)


# -- files -----------------------------------------------------------------------------------------------------------------------------


def save(messages: Sequence[Message], path: Path, *, over: bool = False) -> None:
    """Write a conversation, whole or not at all, as a line that train.py reads too: {"messages": [{"role": ..., "content": ...}, ...]}.

    Args:
        over: whether a file that is there may be replaced.

    Raises:
        ConversationError: if there is one that may not, or the file cannot be written.
    """
    if not over and os.path.lexists(path):
        raise ConversationError(f"{path} exists, and is not from this conversation: choose another name")
    values = {"messages": [message._asdict() for message in messages]}
    # Control characters, which are within strings alone, as escapes: the file may be shown in a terminal.
    text = sample.CONTROLS.sub(lambda match: f"\\u{ord(match[0]):04x}", json.dumps(values, ensure_ascii=False))
    part = ""
    try:
        with tempfile.NamedTemporaryFile("wb", dir=path.parent, prefix=path.name, suffix=".part", delete=False) as file:
            part = file.name
            file.write(text.encode() + b"\n")
        os.replace(part, path)
    except OSError as e:
        with suppress(OSError):
            os.unlink(part)
        raise ConversationError(f"{path} could not be written ({e.strerror})") from e


def load(path: Path) -> tuple[Message, ...]:
    """Read what `save` wrote, or another conversation of a form that is trained on.

    Raises:
        ConversationError: if it is missing or no conversation.
    """
    try:
        messages = document_of(read_json(path, LARGEST_FILE)).messages
        if not messages:
            raise ValueError("it has no messages")
        return tuple(Message(*turn) for turn in messages)
    except OSError as e:
        raise ConversationError(f"{path} cannot be read ({e.strerror})") from e
    except ValueError as e:
        raise ConversationError(f"{path} is no conversation ({str(e)[:100]})") from e
