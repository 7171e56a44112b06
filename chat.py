"""Talk to a run, the newest by default: it goes on with what you write, or answers where its data had conversations.

    python chat.py                            a session; /reset forgets, /temp 0.5 sets the temperature, /quit ends
    python chat.py runs/x --prompt "def "     one text, then the end
"""

if __name__ == "__main__":
    from hyperlm import startup

    startup.quiet()  # before the slow imports

import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import torch
import tyro
from tokenizers import Tokenizer
from torch import Tensor

from hyperlm import checkpoint, cli, env, model, runs, sample, trained
from hyperlm import tokenizer as tok
from hyperlm.config import Config, ConfigError
from hyperlm.sample import Sampling
from hyperlm.tree import Tree


@dataclass(frozen=True)
class Command:
    run: Annotated[str, tyro.conf.Positional] = ""
    """Folder of the run; the newest by default."""
    prompt: str | None = None
    """Write one text that goes on from this, and end."""
    sampling: Annotated[Sampling, tyro.conf.arg(name="")] = field(default_factory=Sampling)
    max_tokens: int = 256
    """Longest reply."""
    seed: int | None = None
    """The same seed gives the same text; by default it differs each time."""
    checkpoint: Literal["latest", "best"] = "latest"
    """Newest checkpoint, or the one with the lowest validation loss."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:n."""
    kernels: Literal["auto", "torch", "triton"] = "auto"
    """Kernel backend."""


class Speaker(NamedTuple):
    """A loaded model, and what it needs to speak."""

    params: Tree
    decode: sample.Decode
    config: Config
    tokenizer: Tokenizer
    chat: bool  # its data had conversations
    name: str  # run and step


class Memory(NamedTuple):
    """A conversation so far: what the model expects next, and its cache."""

    logits: Tensor
    cache: model.Cache


def load(command: Command) -> Speaker:
    run = Path(command.run) if command.run else runs.newest()
    config = runs.read_config(run)
    device = env.pick_device(command.device)
    env.prepare(device)
    step = checkpoint.best(run) if command.checkpoint == "best" else checkpoint.latest(run)
    tokenizer = trained.load_tokenizer(run, step, config)  # before the weights, which may take long
    found = trained.load(run, step, config, device)
    print(f"{run}, {config.model.kind}, step {step}, on {device}", file=sys.stderr)
    decode = sample.decoder(found.weights, config.model, kernels=command.kernels)
    return Speaker(found.weights, decode, replace(config, kernels=command.kernels), tokenizer, found.chat, f"{run}, step {step}")


def begin(speaker: Speaker) -> Memory:
    """The state of mind before a text: the end of the one before."""
    cache = sample.empty_cache(speaker.params, speaker.config.model)
    return read(speaker, Memory(torch.empty(0), cache), [tok.end_of_text(speaker.tokenizer)])


def read(speaker: Speaker, memory: Memory, ids: list[int]) -> Memory:
    return Memory(*sample.read(speaker.params, ids, memory.cache, speaker.config.model, kernels=speaker.config.kernels))


def reply(speaker: Speaker, memory: Memory, how: Sampling, generator: torch.Generator, limit: int) -> Iterator[tuple[int, Memory]]:
    """Tokens of a reply of at most `limit`, each with the memory after it."""
    tokens = sample.generate(
        *memory,
        how,
        generator,
        stop=tok.stop_ids(speaker.tokenizer),
        usable=tok.vocabulary_size(speaker.tokenizer),
        decode=speaker.decode,
    )
    for _, (token, logits, cache) in zip(range(limit), tokens, strict=False):
        yield token, Memory(logits, cache)


def speak(speaker: Speaker, memory: Memory, text: str, how: Sampling, generator: torch.Generator, limit: int) -> Memory:
    """Take in what a person wrote, print the reply as it comes, and return the memory after both."""
    if speaker.chat:
        ids = tok.turn(speaker.tokenizer, "user", text) + tok.opening(speaker.tokenizer, "assistant")
    else:
        (ids,) = tok.encode(speaker.tokenizer, [text])
    memory = read(speaker, memory, ids) if ids else memory

    count = 0

    def ids_of_reply() -> Iterator[int]:
        nonlocal memory, count
        for token, memory in reply(speaker, memory, how, generator, limit):
            count += 1
            yield token

    started = time.monotonic()
    for piece in tok.stream(speaker.tokenizer, ids_of_reply()):
        print(sample.printable(piece), end="", flush=True)
    print()
    if speaker.chat:
        memory = read(speaker, memory, [speaker.tokenizer.token_to_id(tok.END_OF_TURN)])
    print(f"[{count / max(1e-9, time.monotonic() - started):.0f} tokens/s]", file=sys.stderr)
    return memory


def session(speaker: Speaker, command: Command, generator: torch.Generator) -> None:
    """Read lines until /quit or the end of input."""
    how, memory = command.sampling, begin(speaker)
    print("write something; /reset forgets, /temp 0.5 sets the temperature, /quit ends", file=sys.stderr)
    while True:
        try:
            line = tok.clean(input("> "))
        except EOFError:
            print()
            return
        name, _, value = line.partition(" ")
        if name == "/quit":
            return
        if name == "/reset":
            memory = begin(speaker)
        elif name == "/temp":
            try:
                how = check(replace(how, temperature=float(value)))
            except ValueError:
                print("/temp needs a number of at least 0, such as /temp 0.5")
        elif line.startswith("/"):
            print("commands: /reset, /temp 0.5, /quit")
        elif line.strip():
            memory = speak(speaker, memory, line, how, generator, command.max_tokens)


def check(how: Sampling) -> Sampling:
    """Raises ConfigError on values that no distribution has."""
    for ok, flag, value, why in (
        (0 <= how.temperature < math.inf, "temperature", how.temperature, "must be a number of at least 0"),
        (how.top_k >= 0, "top-k", how.top_k, "must be at least 0"),
        (0 < how.top_p <= 1, "top-p", how.top_p, "must be above 0 and at most 1"),
    ):
        if not ok:
            raise ConfigError(f"--{flag} {value}: {why}")
    return how


def main(argv: list[str]) -> int:
    command = cli.parse(Command, argv, description=__doc__)
    how = check(command.sampling)
    if command.max_tokens < 1:
        raise ConfigError(f"--max-tokens {command.max_tokens}: must be at least 1")
    if command.seed is not None and not 0 <= command.seed < 1 << 64:
        raise ConfigError(f"--seed {command.seed}: must be at least 0 and below 2^64")
    if command.prompt is None and sys.stdin is None:
        raise cli.UsageError("there is no input to read: give --prompt")
    speaker = load(command)
    generator = torch.Generator()
    if command.seed is None:
        generator.seed()
    else:
        generator.manual_seed(command.seed)
    try:
        if command.prompt is None:
            session(speaker, command, generator)
        else:
            prompt = tok.clean(command.prompt)
            if not speaker.chat:
                print(sample.printable(prompt), end="", flush=True)
            speak(speaker, begin(speaker), prompt, how, generator, command.max_tokens)
    except sample.NotFinite as e:
        remedy = "try --checkpoint best" if command.checkpoint == "latest" else "train it anew with a lower --optim.lr"
        raise runs.RunError(f"the weights of {speaker.name}, give {e}: the run diverged; {remedy}") from e
    return 0


if __name__ == "__main__":
    cli.end(cli.run(main))
