"""Hyperbolic language models: train them, measure them, talk to them.

The functions for use from Python, each described in hyperlm/api.py:

    model = hyperlm.load("runs/x")                    a run, as trained by train.py; without a name the newest
    hyperlm.encode(model, "text")                     tokens (N,)
    hyperlm.logits(model, "text")                     (N, V): row n is what the model expects after the first n tokens of the text
    hyperlm.generate(model, "def ", max_tokens=64)    how it goes on
    hyperlm.radii(model, "text")                      {layer: {"q": (H, N), "k": (H, N)}}
    training = hyperlm.prepare(config)                text, batches, first state and step of a run, for a loop of one's own
    hyperlm.model_of(training, state)                 what it has made so far

They are imported when they are first used: `import hyperlm` itself takes no time, and needs no other package.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hyperlm.api import Model, Training, encode, generate, load, logits, model_of, prepare, radii

__version__ = "0.5.0"
__all__ = ["Model", "Training", "__version__", "encode", "generate", "load", "logits", "model_of", "prepare", "radii"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from hyperlm import api

        return getattr(api, name)
    raise AttributeError(f"module 'hyperlm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
