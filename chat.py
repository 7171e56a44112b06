"""Talk to a run, the newest by default: it answers where its data had conversations, or goes on with what you write.

    python chat.py                            a session; /help lists its commands, Ctrl-C ends an answer, /quit ends
    python chat.py runs/x --prompt "def "     one text, then the end
"""

if __name__ == "__main__":
    from hyperlm import startup

    startup.quiet()  # before the slow imports

import difflib
import re
import signal
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import torch
import tyro

from hyperlm import checkpoint, cli, conversation, env, runs, sample, terminal, trained
from hyperlm import tokenizer as tok
from hyperlm.config import ConfigError
from hyperlm.conversation import Answer, ConversationError, LoadedModel, Message
from hyperlm.sample import Sampling
from hyperlm.terminal import note
from hyperlm.tokenizer import TokenizerError


@dataclass(frozen=True)
class Command:
    run: Annotated[str, tyro.conf.Positional] = ""
    """Folder of the run; the newest by default."""
    prompt: str | None = None
    """Write one text that goes on from this, and end."""
    sampling: Annotated[Sampling, tyro.conf.arg(name="")] = field(default_factory=Sampling)
    stop: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """End the text before this string; may be given several times."""
    max_tokens: int = 256
    """Longest reply."""
    seed: int | None = None
    """The same seed gives the same answer to the same conversation; by default it differs each time."""
    checkpoint: Literal["latest", "best"] = "latest"
    """Newest checkpoint, or the one with the lowest validation loss."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:n."""
    kernels: Literal["auto", "torch", "triton"] = "auto"
    """Kernel backend."""


def load(command: Command) -> LoadedModel:
    run = Path(command.run) if command.run else runs.newest()
    config = runs.read_config(run)
    device = env.pick_device(command.device)
    env.prepare(device)
    step = checkpoint.best(run) if command.checkpoint == "best" else checkpoint.latest(run)
    tokenizer = trained.load_tokenizer(run, step, config)  # before the weights, which may take long
    found = trained.load(run, step, config, device)
    print(f"{run}, {config.model.kind}, step {step}, on {device}", file=sys.stderr)
    decode = sample.decoder(found.weights, config.model, kernels=command.kernels)
    return LoadedModel(found.weights, decode, replace(config, kernels=command.kernels), tokenizer, found.chat, f"{run}, step {step}")


# -- one answer ------------------------------------------------------------------------------------------------------------------------


def show(piece: str) -> None:
    print(sample.printable(piece), end="", flush=True)


def generator(seed: int | None) -> torch.Generator:
    random = torch.Generator()
    if seed is None:
        random.seed()
    else:
        random.manual_seed(seed)
    return random


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


# -- a session -------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Session:
    """A conversation and how it goes on."""

    loaded: LoadedModel
    state: conversation.State
    how: Sampling
    seed: int | None
    stops: tuple[str, ...]
    max_tokens: int
    messages: tuple[Message, ...] = ()
    file: Path | None = None  # that it was saved to or loaded from


def session(start: Session) -> None:
    """Read what a person writes, and obey or answer it, until /quit or the end of input."""
    now, chat = start, start.loaded.chat
    if not chat:
        note("this model continues text: write how one begins; an empty line goes on")
    note("/help lists commands, Ctrl-C ends an answer, /quit the session")
    read = terminal.reader("> " if chat else "text> ")
    with terminal.ctrl_c(signal.SIG_IGN):  # between an answer and the prompt: one more Ctrl-C than was needed
        while True:
            try:
                line = read()
            except EOFError:
                print()
                return
            order = re.fullmatch(r"/(\w[\w-]*)(?:\s+(.*?))?\s*", line, re.DOTALL)
            try:
                if order and order[1] == "quit":
                    return
                elif order:
                    now = obey(now, order[1], order[2] or "")
                elif line.strip() or not chat:
                    now = respond(now, (*now.messages, Message("user", line)))
            except (ConversationError, ConfigError, TokenizerError) as e:
                note(str(e))


def respond(now: Session, messages: tuple[Message, ...]) -> Session:
    """Print the answer to `messages` as it comes. Ctrl-C ends it: what was said so far is said; where that is nothing, `messages` are not either."""
    with terminal.interruptions() as interrupted:
        answer = conversation.answer(
            now.loaded,
            now.state,
            messages,
            now.how,
            generator(now.seed),
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


# -- commands of a session -------------------------------------------------------------------------------------------------------------


def explain(now: Session, value: str) -> Session:
    width = max(len(f"/{name} {order.argument}") for name, order in ORDERS.items())
    for name, order in ORDERS.items():
        note(f"{f'/{name} {order.argument}':<{width}}  {order.help}")
    note("Enter sends; Alt-Enter, or Enter after a backslash, begins another line")
    return now


def set_system(now: Session, value: str) -> Session:
    if not now.loaded.chat:
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
    if system_turn(messages) and not now.loaded.chat:
        raise ConversationError(f"{path} has a system turn, and this model continues text: it knows none")
    note(f"[{len(messages)} messages loaded from {path}]")
    return replace(now, messages=messages, file=path)


def again(now: Session, value: str) -> Session:
    asked = without_last(now.messages, "assistant")
    if not asked or asked[-1].role != "user":
        raise ConversationError("there is no answer to draw again")
    return respond(now, asked)


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
    if value and not value.isdecimal():
        raise ConversationError("/seed needs a whole number, such as /seed 1, or nothing for other answers each time")
    return replace(now, seed=checked_seed(int(value)) if value else None)


class Order(NamedTuple):
    argument: str
    help: str
    run: Callable[[Session, str], Session]


def setting(name: str, attribute: str, example: str, help: str) -> Order:
    """The command that sets one value of `Sampling`, or tells it."""

    def run(now: Session, value: str) -> Session:
        how = now.how
        try:
            if value:
                how = sample.checked(replace(how, **{attribute: type(getattr(how, attribute))(value)}))
        except ValueError as e:  # ConfigError is one
            raise ConversationError(f"/{name} needs a number {sample.BOUNDS[attribute][1]}, such as /{name} {example}") from e
        note(f"[{attribute.replace('_', ' ')} {getattr(how, attribute)}]")
        return replace(now, how=how)

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


# -- the command -----------------------------------------------------------------------------------------------------------------------


def checked_seed(seed: int | None) -> int | None:
    if seed is not None and not 0 <= seed < 1 << 64:
        raise ConfigError(f"--seed {seed}: must be at least 0 and below 2^64")
    return seed


def main(argv: list[str]) -> int:
    command = cli.parse(Command, argv, description=__doc__)
    how, seed = sample.checked(command.sampling), checked_seed(command.seed)
    if command.max_tokens < 1:
        raise ConfigError(f"--max-tokens {command.max_tokens}: must be at least 1")
    if "" in command.stop:
        raise ConfigError("--stop '': must not be empty, or every text ends at once")
    if command.prompt is None and sys.stdin is None:
        raise cli.UsageError("there is no input to read: give --prompt")
    loaded = load(command)
    state = conversation.nothing_read(loaded)
    try:
        if command.prompt is None:
            session(Session(loaded, state, how, seed, command.stop, command.max_tokens))
            return 0
        prompt = tok.clean(command.prompt)
        if not loaded.chat:
            show(prompt)
        asked = (Message("user", prompt),)
        answer = conversation.answer(loaded, state, asked, how, generator(seed), limit=command.max_tokens, stops=command.stop, show=show)
        print()
        note(described(answer, command.max_tokens))
    except sample.NotFinite as e:
        remedy = "try --checkpoint best" if command.checkpoint == "latest" else "train it anew with a lower --optim.lr"
        raise runs.RunError(f"the weights of {loaded.name}, give {e}: the run diverged; {remedy}") from e
    return 0


if __name__ == "__main__":
    cli.end(cli.run(main))
