"""The command `hyperlm`: train.py, bench.py and chat.py from any folder. Imports nothing slow, so that it answers at once."""

import importlib
import sys
from difflib import get_close_matches
from typing import NoReturn

from hyperlm import __version__, startup

WORDS = {  # what each runs: a script, and the arguments that it begins with
    "train": ("train",),
    "bench": ("bench",),
    "chat": ("chat",),
    "doctor": ("train", "--doctor"),
}
HELP = """\
hyperlm {version}: train, measure and talk to hyperbolic language models

  hyperlm train --preset small   train a model; --resume runs/x goes on with it
  hyperlm chat [runs/x]          talk to a run, the newest by default
  hyperlm bench phase7 phase8    measure models and runs side by side
  hyperlm doctor                 check whether this machine can train

Each takes --help, and reads and writes runs/ in the current folder. They are
train.py, chat.py and bench.py, with their presets in configs.py, from
{scripts}"""


def main() -> NoReturn:
    """Run what the command line names. In sys.argv and in messages its name is then `hyperlm train`.

    A script finds the modules beside it first, as if Python had been given its path: presets are those of the configs.py that belongs to
    it, whatever the current folder and PYTHONPATH hold.
    """
    startup.quiet()
    word, *rest = sys.argv[1:] or ["--help"]
    if word in ("--help", "-h"):
        print(HELP.format(version=__version__, scripts=startup.SCRIPTS))
        sys.exit(0)
    if word == "--version":
        print(f"hyperlm {__version__}")
        sys.exit(0)
    if word not in WORDS:
        near = get_close_matches(word, WORDS, 1)
        remedy = f"did you mean {near[0]}?" if near else f"choose from {', '.join(WORDS)}"
        print(f"error: hyperlm {word}: no such command; {remedy}", file=sys.stderr)
        sys.exit(2)
    script, *first = WORDS[word]
    sys.argv[:] = [f"hyperlm {script}", *first, *rest]
    sys.path.insert(0, str(startup.SCRIPTS))
    module = importlib.import_module(script)
    from hyperlm import cli  # imports torch, as the script has by now

    cli.end(cli.run(module.main))
