"""Talk to a run: it answers, or where its data was text alone, goes on with yours.

    python chat.py                          the newest run; /help lists commands
    python chat.py runs/x --prompt "def "   one text, then the end

The newest is the run that saved last.
"""

if __name__ == "__main__":
    from hyperlm import startup

    startup.quiet()  # before the slow imports

import re
import signal
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from hyperlm import cli, conversation, runs, sample, terminal, trained
from hyperlm import tokenizer as tok
from hyperlm.checkpoint import Which
from hyperlm.config import ConfigError
from hyperlm.conversation import ConversationError, Message
from hyperlm.sample import Sampling
from hyperlm.session import Session, checked_seed, described, obey, respond, show
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
    checkpoint: Which = "latest"
    """Newest checkpoint, or the one with the lowest validation loss."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:n."""
    kernels: Literal["auto", "torch", "triton"] = "auto"
    """Kernel backend."""


def talk(start: Session) -> None:
    """Read what a person writes, and obey or answer it, until /quit or the end of input."""
    now, chat = start, start.model.chat
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
                if order:
                    now = obey(now, order[1], order[2] or "")
                elif line.strip() or not chat:
                    now = respond(now, (*now.messages, Message("user", line)))
            except (ConversationError, ConfigError, TokenizerError) as e:
                note(str(e))


def main(argv: list[str]) -> int:
    command = cli.parse(Command, argv, description=__doc__)
    sampling, seed = sample.checked(command.sampling), checked_seed(command.seed)
    if command.max_tokens < 1:
        raise ConfigError(f"--max-tokens {command.max_tokens}: must be at least 1")
    if "" in command.stop:
        raise ConfigError("--stop '': must not be empty, or every text ends at once")
    if command.prompt is None and sys.stdin is None:
        raise cli.UsageError("there is no input to read: give --prompt")
    run = Path(command.run) if command.run else runs.newest()
    model = trained.load_model(run, command.checkpoint, command.device, command.kernels)
    print(f"{run}, {model.config.model.kind}, step {model.step}, on {model.device}", file=sys.stderr)
    decode, state = sample.decoder(model.params, model.config.model, kernels=command.kernels), conversation.nothing_read(model)
    try:
        if command.prompt is None:
            talk(Session(model, decode, state, sampling, seed, command.stop, command.max_tokens))
            return 0
        prompt = tok.clean(command.prompt)
        if not model.chat:
            show(prompt)
        messages, random = (Message("user", prompt),), sample.generator(seed)
        answer = conversation.answer(
            model, state, messages, sampling, random, decode=decode, limit=command.max_tokens, stops=command.stop, show=show
        )
        print()
        note(described(answer, command.max_tokens))
    except sample.NotFinite as e:
        remedy = "try --checkpoint best" if command.checkpoint == "latest" else "train it anew with a lower --optim.lr"
        raise runs.RunError(f"the weights of {run}, step {model.step}, give {e}: the run diverged; {remedy}") from e
    return 0


if __name__ == "__main__":
    cli.end(cli.run(main))
