"""A run that starts from another one's weights (`--init`): its settings, its first state, and what is remembered of where it came from."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hyperlm import checkpoint, trained, tree
from hyperlm.config import Config, ConfigError, DataConfig, differences, flag_of
from hyperlm.optim import new_schedule, optimizer
from hyperlm.residence import Residence
from hyperlm.state import State
from hyperlm.step import init_state
from hyperlm.tree import Tree

EPOCHS = 3.0  # of new text, unless told otherwise


@dataclass(frozen=True)
class Base:
    """The run whose weights another one starts from."""

    run: Path
    config: Config
    which: checkpoint.Which  # of its checkpoints


def settings(run: Path, config: Config, preset: Config | None, *, new_text: bool) -> Config:
    """What a run from the weights of `run`, whose settings are `config`, starts with, before the command line.

    That is its shape and tokenizer, and the rest of `preset`, or where there is none of the base itself.

    Args:
        new_text: the command line names sources: nothing that was said of the base's text is kept.
    """
    data = DataConfig(seq_len=config.data.seq_len, cache=config.data.cache) if new_text else config.data
    if preset is None:
        rest = replace(config, data=data, name="")
        rest = replace(
            rest,
            train=replace(config.train, steps=0, epochs=EPOCHS, residence="auto"),
            optim=replace(config.optim, lr=0.0, warmup_steps=0, state="auto"),
        )
    else:
        rest = replace(preset, data=preset.data if new_text else replace(data, seq_len=preset.data.seq_len))
    return replace(rest, model=config.model, data=replace(rest.data, tokenizer=str(run / "tokenizer.json")))


def require_base(base: Base, config: Config) -> None:
    """Check, before anything that takes long, that a run with `config` can start from `base`.

    Raises:
        ConfigError: if `config` asks for a model or tokenizer that its weights do not fit.
        CheckpointError, RunError, TokenizerError: if it, or the tokenizer that it was trained with, is missing or damaged.
    """
    wanted = replace(config, model=replace(config.model, dropout=0.0))
    tokenizer = str(base.run / "tokenizer.json")
    have = replace(wanted, model=replace(base.config.model, dropout=0.0), data=replace(wanted.data, tokenizer=tokenizer))
    for name, (old, new) in differences(have, wanted).items():
        raise ConfigError(
            f"--{flag_of(name)} {new}: {base.run} has {old}, and its weights fit nothing else; leave it out, or train without --init"
        )
    trained.load_tokenizer(base.run, checkpoint.chosen(base.run, base.which), base.config)


def first_state(base: Base, step: int, residence: Residence) -> State:
    """The state before the first step: weights of `base` at `step`, as the optimizer keeps them and where the residence has them.

    Raises:
        CheckpointError: if it is missing or damaged.
    """
    config = residence.config
    keep = optimizer(config.optim, new_schedule(config.optim, 1), config.kernels).keep

    def kept(stage: Tree) -> Tree:
        return residence.store(tree.map(lambda p: keep(p.float()), stage))

    restored, _ = checkpoint.restore(base.run, step, base.config, kept, with_opt=False)
    return init_state(residence, restored.params)


def origin(base: Base, step: int) -> dict[str, Any]:
    """What a run remembers of the one it began with."""
    meta = checkpoint.read_meta(base.run, step)
    return {"run": str(base.run), "step": step, "tokens": meta["tokens"], "val_loss": meta["val_loss"], "text": meta["fingerprint"]}
