"""A session of chat.py: a conversation, how it goes on, and the commands that change either: functions from a session to the next."""

import difflib
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from hyperlm import conversation, sample, terminal
from hyperlm.config import ConfigError
from hyperlm.conversation import Answer, ConversationError, Message
from hyperlm.sample import Decode, Sampling
from hyperlm.terminal import note
from hyperlm.trained import Model


@dataclass(frozen=True)
class Session:
    """A conversation and how it goes on."""

    model: Model
    decode: Decode
    state: conversation.State
    sampling: Sampling
    seed: int | None
    stops: tuple[str, ...]
    max_tokens: int
    messages: tuple[Message, ...] = ()
    file: Path | None = None  # that it was saved to or loaded from


def show(piece: str) -> None:
    print(sample.printable(piece), end="", flush=True)


def described(answer: Answer, limit: int) -> str:
    """What an answer took; and in a line of its own, where the text does not tell, why it ended."""
    rate = max(answer.tokens - 1, 0) / max(answer.seconds, 1e-9)  # the first token's time is that of reading
    took = f"[{answer.first:.2f} s to the first token, {rate:.0f} tokens/s, {answer.tokens} tokens, context {len(answer.state.ids)}]"
    why = {
        "length": f"\n[cut off at --max-tokens {limit}]",
        "loop": "\n[stopped, as it repeats itself: try --temperature or --repetition-penalty]",
        "interrupt": "\n[stopped by you]",
    }
    return took + why.get(answer.ending, "")


def respond(now: Session, messages: tuple[Message, ...]) -> Session:
    """Print the answer to `messages` as it comes. Ctrl-C ends it: what was said till then stays; if that is nothing, `messages` do not."""
    with terminal.interruptions() as interrupted:
        answer = conversation.answer(
            now.model,
            now.state,
            messages,
            now.sampling,
            sample.generator(now.seed),
            decode=now.decode,
            limit=now.max_tokens,
            stops=now.stops,
            show=show,
            interrupted=interrupted,
        )
    print()
    if answer.ending == "interrupt" and not answer.text:
        note("[stopped before the first word: the conversation is as it was]")
        return replace(now, state=answer.state)
    note(described(answer, now.max_tokens))
    return replace(now, state=answer.state, messages=(*messages, Message("assistant", answer.text)))


def without_last(messages: tuple[Message, ...], role: str) -> tuple[Message, ...]:
    return messages[:-1] if messages and messages[-1].role == role else messages


def system_turn(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    return tuple(message for message in messages[:1] if message.role == "system")


def checked_seed(seed: int | None) -> int | None:
    if seed is not None and not 0 <= seed < 1 << 64:
        raise ConfigError(f"--seed {seed}: must be at least 0 and below 2^64")
    return seed


# -- commands --------------------------------------------------------------------------------------------------------------------------


def explain(now: Session, value: str) -> Session:
    width = max(len(f"/{name} {order.argument}") for name, order in ORDERS.items())
    for name, order in ORDERS.items():
        note(f"{f'/{name} {order.argument}':<{width}}  {order.help}")
    note("Enter sends; Alt-Enter, or Enter after a backslash, begins another line")
    return now


def set_system(now: Session, value: str) -> Session:
    if not now.model.chat:
        raise ConversationError("this model continues text: it knows no system turn")
    note(f"[{'system turn set' if value else 'no system turn'}; the conversation starts afresh]")
    return replace(now, messages=(Message("system", value),) if value else (), file=None)


def save(now: Session, value: str) -> Session:
    path = Path(value).expanduser() if value else now.file
    if path is None:
        raise ConversationError("/save needs a file, such as /save talk.jsonl")
    conversation.save(now.messages, path, over=path == now.file)
    note(f"[{len(now.messages)} messages saved to {path}]")
    return replace(now, file=path)


def load_messages(now: Session, value: str) -> Session:
    if not value:
        raise ConversationError("/load needs a file, such as /load talk.jsonl")
    path = Path(value).expanduser()
    messages = conversation.load(path)
    if system_turn(messages) and not now.model.chat:
        raise ConversationError(f"{path} has a system turn, and this model continues text: it knows none")
    note(f"[{len(messages)} messages loaded from {path}]")
    return replace(now, messages=messages, file=path)


def again(now: Session, value: str) -> Session:
    question = without_last(now.messages, "assistant")
    if not question or question[-1].role != "user":
        raise ConversationError("there is no answer to draw again")
    return respond(now, question)


def undo(now: Session, value: str) -> Session:
    left = without_last(without_last(now.messages, "assistant"), "user")
    if left == now.messages:
        raise ConversationError("there is nothing to take back")
    note("[the last exchange is taken back]")
    return replace(now, messages=left)


def forget(now: Session, value: str) -> Session:
    kept = system_turn(now.messages)
    note(f"[the conversation starts afresh{', the system turn stays' if kept else ''}]")
    return replace(now, messages=kept, file=None)


def set_seed(now: Session, value: str) -> Session:
    if value and not (value.isdecimal() and len(value) <= 20 and int(value) < 1 << 64):
        raise ConversationError("/seed needs a whole number below 2^64, such as /seed 1, or nothing for other answers each time")
    return replace(now, seed=int(value) if value else None)


class Order(NamedTuple):
    argument: str
    help: str
    run: Callable[[Session, str], Session]


def setting(name: str, attribute: str, example: str, help: str) -> Order:
    """The command that sets one value of `Sampling`, or tells it."""

    def run(now: Session, value: str) -> Session:
        sampling = now.sampling
        try:
            if value:
                sampling = sample.checked(replace(sampling, **{attribute: type(getattr(sampling, attribute))(value)}))
        except ValueError as e:  # ConfigError is one
            raise ConversationError(f"/{name} needs a number {sample.BOUNDS[attribute][1]}, such as /{name} {example}") from e
        note(f"[{attribute.replace('_', ' ')} {getattr(sampling, attribute)}]")
        return replace(now, sampling=sampling)

    return Order("X", help, run)


ORDERS = {
    "help": Order("", "this list", explain),
    "system": Order("TEXT", "begin a new conversation with this instruction", set_system),
    "save": Order("FILE", "write the conversation; as a .jsonl, train.py reads it too", save),
    "load": Order("FILE", "go on with a conversation that was saved", load_messages),
    "regen": Order("", "draw the last answer again", again),
    "undo": Order("", "take the last exchange back", undo),
    "reset": Order("", "forget what was said, but for the system turn", forget),
    "temp": setting("temp", "temperature", "0.5", "temperature: 0 for the most probable token always"),
    "top-p": setting("top-p", "top_p", "0.9", "the fewest tokens that have this probability; 1 for all"),
    "top-k": setting("top-k", "top_k", "40", "the most probable tokens; 0 for all"),
    "min-p": setting("min-p", "min_p", "0.05", "tokens with this share of the highest probability; 0 for all"),
    "penalty": setting("penalty", "repetition_penalty", "1.2", "make tokens said lately less probable; 1 for none"),
    "seed": Order("N", "the same seed gives the same answer; none, another each time", set_seed),
    "quit": Order("", "end, as Ctrl-D does", lambda now, value: now),
}


def obey(now: Session, name: str, value: str) -> Session:
    if name not in ORDERS:
        near = difflib.get_close_matches(name, ORDERS, 1)
        known = textwrap.fill(" ".join(f"/{name}" for name in ORDERS), 79, break_on_hyphens=False)
        raise ConversationError(f"/{name} is no command{f'; did you mean /{near[0]}?' if near else ':'}\n{known}")
    return ORDERS[name].run(now, value)
