"""What a checkpoint says of itself beside its arrays: counters, settings, schedule, losses, checksums; verified by digest and by run."""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from hyperlm.checkpoint.folder import CheckpointError, folder_of, latest, steps, unreadable
from hyperlm.config import Config, ConfigError, another_run, flag_of, from_dict, resolve, to_dict
from hyperlm.files import digest, read_json
from hyperlm.optim import Schedule
from hyperlm.state import State

FORMAT = 4
WRITERS = {
    1: "a version before 0.1",
    2: "version 0.1",
    3: "version 0.2 or 0.3",
}  # of earlier formats. Weights of 2 and 3 are read as well; see `launch.resume`
NOTHING = {"config": None, "schedule": None, "tokenizer": None, "loss": None}  # what format 2 does not say
WORST = 1e30  # validation loss in format 2 where there was none
META = 1 << 28  # bytes that no meta has
COUNTERS = ("step", "updates", "tokens", "seed", "clipped")  # fields of `State`
Which = Literal["latest", "best"]  # checkpoint of a run: the newest, or the one with the lowest validation loss


@dataclass(frozen=True)
class Facts:
    """What a checkpoint says of its run, beside the state."""

    config: Config
    schedule: Schedule
    fingerprint: str  # of the text: a resumed run must have the same
    tokenizer: str  # digest of the file beside the checkpoints
    chat: bool  # the text has conversations


def meta_of(state: State, facts: Facts, val_loss: float | None, loss: float | None, checksums: dict[str, dict[str, int]]) -> dict[str, Any]:
    """The meta of a checkpoint of `state`, with its digest. Losses as `storage.save` takes them; checksums by item and path."""
    meta = {
        "format": FORMAT,
        **{name: getattr(state, name) for name in COUNTERS},
        "config": to_dict(facts.config),
        "schedule": asdict(facts.schedule),
        "fingerprint": facts.fingerprint,
        "tokenizer": facts.tokenizer,
        "chat": facts.chat,
        "val_loss": val_loss,
        "loss": loss,
        "checksums": checksums,
    }
    return {**meta, "digest": digest(meta)}


def read_meta(run: Path, step: int) -> dict[str, Any]:
    """The meta of a checkpoint, verified; of format 2, which had no digest, with what it says.

    Raises:
        CheckpointError: if it is missing, damaged or of a format that this version does not read.
    """
    path = folder_of(run, step)
    try:
        meta = read_json(path / "meta" / "metadata", META)
        if not isinstance(meta, dict) or type(meta.get("format")) is not int:
            raise ValueError("its meta has no format")
        if meta["format"] > FORMAT:
            raise CheckpointError(
                f"{path} has format {meta['format']}, and this version reads up to {FORMAT}: a newer version of hyperlm wrote it"
            )
        if meta["format"] < 2:
            raise CheckpointError(f"{path} has format {meta['format']}: {WRITERS[1]} of hyperlm wrote it, and reads it")
        if meta["format"] == 2 and "digest" not in meta:
            meta |= NOTHING | {"val_loss": None if meta["val_loss"] == WORST else meta["val_loss"]}
        elif meta.pop("digest", None) != digest(meta):
            raise ValueError("its meta does not match its digest")
        if meta["step"] != step:
            raise ValueError(f"its meta is of step {meta['step']}")
        if not 0 <= meta["updates"] <= step:
            raise ValueError(f"{meta['updates']} updates in {step} steps")
        return meta
    except CheckpointError:
        raise
    except Exception as e:  # a file that is missing, no JSON, or JSON of another shape
        raise unreadable(run, step, e) from e


def readable_metas(run: Path) -> dict[int, dict[str, Any]]:
    """The meta of each checkpoint that has one which can be read."""
    metas = {}
    for step in steps(run):
        try:
            metas[step] = read_meta(run, step)
        except CheckpointError:
            continue
    return metas


def settings(run: Path) -> tuple[int, Config] | None:
    """The newest step whose meta can be read, and the settings in it, where config.json cannot be; None if there is none."""
    for step, meta in sorted(readable_metas(run).items(), reverse=True):
        try:
            return step, resolve(from_dict(meta["config"]))
        except ConfigError:
            continue
    return None


def require_same_run(run: Path, step: int, meta: dict[str, Any], config: Config) -> None:
    """Raises CheckpointError if a checkpoint is not of the run that `config` describes."""
    if meta["config"] is None:
        changes = {} if meta["seed"] == config.train.seed else {"train.seed": (meta["seed"], config.train.seed)}
    else:
        changes = another_run(from_dict(meta["config"]), config)
    for name, (written, said) in changes.items():
        raise CheckpointError(
            f"{run / 'config.json'} says --{flag_of(name)} {said}, and {folder_of(run, step)} was written with {written}: "
            "config.json is of another run; put the right one in its place, or remove it, "
            "and --resume takes the settings from the checkpoint"
        )


# -- which of them ---------------------------------------------------------------------------------------------------------------------


def lowest(val_losses: dict[int, float | None]) -> list[int]:
    """The step with the lowest finite validation loss, the newest of equals; none where there is none."""
    finite = [(loss, -step) for step, loss in val_losses.items() if loss is not None and math.isfinite(loss)]
    return [-min(finite)[1]] if finite else []


def best(run: Path) -> int:
    """The step with the lowest validation loss of those that can be read; the newest where none was evaluated."""
    last = latest(run)
    return next(iter(lowest({step: meta["val_loss"] for step, meta in readable_metas(run).items()})), last)


def chosen(run: Path, which: Which) -> int:
    """The step of the newest checkpoint or of the best one.

    Raises:
        CheckpointError: if there is none.
        ValueError: on another word.
    """
    if which not in get_args(Which):
        raise ValueError(f"checkpoint {which!r}: choose from {', '.join(get_args(Which))}")
    return best(run) if which == "best" else latest(run)
