"""The weights of a run, to evaluate it or to talk to it."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from tokenizers import Tokenizer

from hyperlm import checkpoint, env, residence, runs
from hyperlm import tokenizer as tok
from hyperlm.config import Config
from hyperlm.files import file_digest
from hyperlm.startup import command
from hyperlm.tree import Tree


class Trained(NamedTuple):
    weights: Tree  # for `model.hidden` and its like
    step: int
    tokens: int
    fingerprint: str  # of the text
    chat: bool  # whether that had conversations


@dataclass(frozen=True)
class Model:
    """A trained model and what belongs to it."""

    config: Config
    params: Tree = field(repr=False)  # as hyperlm.model computes with them: fp32 on a CPU, matrices in bf16 on a GPU
    tokenizer: Tokenizer = field(repr=False)
    device: torch.device
    step: int  # of its training
    chat: bool  # its data had conversations


def load_model(run: Path, which: checkpoint.Which, device: str, kernels: Literal["auto", "torch", "triton"] = "auto") -> Model:
    """The model of a run, on the device of that name.

    Raises:
        RunError, CheckpointError, TokenizerError: on what is missing or damaged.
        DeviceError: if the device does not exist.
    """
    config = replace(runs.read_config(run), kernels=kernels)
    where = env.pick_device(device)
    env.prepare(where)
    step = checkpoint.chosen(run, which)
    tokenizer = load_tokenizer(run, step, config)  # before the weights, which may take long
    trained = load(run, step, config, where)
    return Model(config, trained.weights, tokenizer, where, step, trained.chat)


def load(run: Path, step: int, config: Config, device: torch.device) -> Trained:
    """Read a checkpoint's parameters: to the device if they fit it, else to host memory, from where blocks come to the device as they are
    used.

    Raises:
        CheckpointError: if it is missing or damaged.
    """
    reader = residence.reader(config, device)
    state, meta = checkpoint.restore(run, step, config, reader.store, with_opt=False)
    return Trained(reader.weights(state.params), state.step, state.tokens, meta["fingerprint"], meta["chat"])


def load_tokenizer(run: Path, step: int, config: Config) -> Tokenizer:
    """The tokenizer of a run, as it was when the checkpoint of `step` was written.

    Raises:
        CheckpointError: if that is missing, damaged, or of another run than `config` describes.
        RunError: if the tokenizer is missing, another, or has ids that the model lacks.
        TokenizerError: if its file is damaged.
    """
    meta, path = checkpoint.read_meta(run, step), run / "tokenizer.json"
    checkpoint.require_same_run(run, step, meta, config)
    if not path.is_file():
        raise runs.RunError(f"{path} is missing: restore it, or let {command('train')} --resume {run} write it again")
    if meta["tokenizer"] not in (None, file_digest(path)):
        raise runs.RunError(f"{path} is not what {run} was trained with: {command('train')} --resume {run} puts it back")
    tokenizer = tok.load(path)
    if (largest := tok.vocabulary_size(tokenizer) - 1) >= config.model.vocab_size:
        raise runs.RunError(
            f"{path} has ids up to {largest:,}, and the model a vocabulary of {config.model.vocab_size:,}: "
            "it is not this run's; restore its own"
        )
    return tokenizer
