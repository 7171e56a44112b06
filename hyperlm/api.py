"""hyperlm from Python: a run as a model, its logits, texts and radii; and training as a loop of one's own.

`import hyperlm` offers all of it. A thin layer: what these functions return goes on to work with hyperlm.model, hyperlm.sample,
hyperlm.evals and hyperlm.step.

Axes: N tokens, V vocabulary, H heads, A micro-batches, B batch.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hyperlm import conversation, data, env, runs, sample, trained
from hyperlm import model as decoder
from hyperlm import residence as residences
from hyperlm import tokenizer as tok
from hyperlm.batch import Batch
from hyperlm.checkpoint import Which
from hyperlm.config import Config, resolve
from hyperlm.conversation import Message
from hyperlm.data.rows import messages_of
from hyperlm.optim import new_schedule
from hyperlm.residence import Residence
from hyperlm.state import State
from hyperlm.step import Metrics, init_state, make_flush, make_step, weights
from hyperlm.trained import Model

# -- a model ---------------------------------------------------------------------------------------------------------------------------


def load(run: str | Path = "", *, checkpoint: Which = "latest", device: str = "auto") -> Model:
    """A run's model.

    Args:
        run: its folder; the one under runs/ that saved last if not given.
        checkpoint: the newest, or the one with the lowest validation loss.
        device: auto (a GPU where there is one), cpu, cuda or cuda:n. A model that does not fit a GPU stays in host memory, and visits it
            layer by layer.

    Raises:
        RunError, CheckpointError, TokenizerError: on what is missing or damaged, named in one line.
        DeviceError: if the device does not exist.
    """
    return trained.load_model(Path(run) if run else runs.newest(), checkpoint, device)


def encode(model: Model, text: str) -> Tensor:
    """The tokens (N,) int64 of a text on the model's device. The first is the end of the text before, as in training."""
    (ids,) = tok.encode(model.tokenizer, [tok.clean(text)])
    return torch.tensor([tok.end_of_text(model.tokenizer), *ids], device=model.device)


@torch.no_grad()
def logits(model: Model, text: str) -> Tensor:
    """Logits (N, V) fp32 of a text: row n is what follows the first n tokens of `encode(model, text)[1:]`, so that the last row is about
    what comes next.

    The nats a token of the text are `F.cross_entropy(logits(model, text)[:-1], encode(model, text)[1:])`.
    """
    return decoder.apply(model.params, encode(model, text)[None], model.config.model, kernels=model.config.kernels)[0].float()


@torch.no_grad()
def radii(model: Model, text: str) -> dict[int, dict[str, Tensor]]:
    """{layer: {"q": (H, N), "k": (H, N)}}: how far from the origin each head puts its queries and keys, in [0.05, 4], for each
    hyperbolic layer."""
    cfg = model.config.model
    layers = decoder.radii(model.params, encode(model, text)[None], cfg, kernels=model.config.kernels)
    return {
        layer: {name: r[0].float() for name, r in of_layer.items()} for layer, of_layer in zip(cfg.hyperbolic_layers, layers, strict=True)
    }


def generate(
    model: Model, prompt: str | Sequence[Mapping[str, str]], *, max_tokens: int = 256, seed: int | None = None, **sampling: Any
) -> str:
    """What the model writes after `prompt`, which is not part of it.

    Args:
        prompt: a text; or, for a model whose data had conversations, the turns so far, as [{"role": "user", "content": "..."}, ...],
            in the forms that are trained on.
        max_tokens: at most; it ends before that where the model ends the text or its turn.
        seed: the same one gives the same text; by default it differs each time.
        sampling: fields of `hyperlm.sample.Sampling`, such as temperature (0.8; 0 always takes the most probable token) and top_p.

    Raises:
        NotFinite: of weights that diverged.
        ConfigError: on a field of `sampling` that no distribution has.
        ValueError: on turns that cannot be read, or for a model that continues text; and on a seed that is no number of 64 bits.
    """
    if isinstance(prompt, str):
        ids = encode(model, prompt).tolist()
    else:
        if not model.chat:
            raise ValueError("this model's data had no conversations, and it continues text: give it a text")
        ids = conversation.token_ids(model, [Message(*turn) for turn in messages_of(list(prompt), "prompt")])
    checked, generator = sample.checked(sample.Sampling(**sampling)), sample.generator(seed)
    return sample.write(
        model.params, model.config.model, model.tokenizer, ids, checked, generator, max_tokens, kernels=model.config.kernels
    )


# -- training --------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Training:
    """All that a training loop needs; see `prepare`."""

    config: Config
    corpus: data.Corpus
    device: torch.device
    residence: Residence = field(repr=False)  # where parameters and moments live
    state: State  # before the first step
    batch: Callable[[int], Batch]  # tokens and targets of step 0, 1, ...: a pure function
    step: Callable[[State, Batch], tuple[State, Metrics]]
    flush: Callable[[State], State]  # what is pending of an update is made: before anything but a step reads a state


def prepare(config: Config) -> Training:
    """Read the text of `config`, and make what trains on it: the data, initial weights and step of `train.py` with these settings. Nothing
    is written but the cache of tokens.

        training = hyperlm.prepare(config)
        state = training.state
        for i in range(10):
            state, metrics = training.step(state, training.batch(i))

    A step updates its state in place: go on with the one that it returns. Metrics are those of `step.make_step`: loss (nats a token),
    grad_norm and others. The learning rate follows config.train.steps or epochs, as in a run of that length. What is trained is on
    config.train.device, unless config.train.residence says another place.

    Raises:
        ConfigError: on a setting that cannot work.
        DataError, TokenizerError, DeviceError: on text, tokenizer and device.
    """
    config = data.with_vocabulary(resolve(config))
    device = env.pick_device(config.train.device)
    env.prepare(device)
    corpus = data.prepare(config)
    order = data.batches(corpus, config)
    schedule = new_schedule(config.optim, config.train.total_steps(order.steps_per_epoch))
    residence = residences.make(config, device)
    step, flush = make_step(residence, schedule), make_flush(residence, schedule)
    return Training(config, corpus, device, residence, init_state(residence), order.at, step, flush)


def model_of(training: Training, state: State) -> Model:
    """The model as it is after a step, to generate from or to look at until the next one, which changes its weights in place.

    Raises:
        StaleState: if `state` is not the newest, or has an update pending: `training.flush` makes it.
    """
    params = weights(training.residence, state)
    return Model(training.config, params, training.corpus.tokenizer, training.device, state.step, training.corpus.chat)
