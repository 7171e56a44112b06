"""Checkpoints through orbax: atomic, asynchronous, versioned, checksummed. The one importer of orbax and jax.

runs/<name>/checkpoints/step_00000100/ holds params and opt (arrays), and meta (counters, settings, schedule, checksums, format version, and a
digest of all that). The newest are kept, and the best by validation loss. What comes back is verified: meta against its digest, settings against
those of the run, shapes and dtypes against the declaration, bytes against the checksums; and what does not match is named.
"""

import errno
import logging
import math
import os
import shutil
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before jax is imported: it must never touch the GPU

import absl.logging
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import torch
from torch import Tensor

from hyperlm import model, tree
from hyperlm.config import Config, ConfigError, another_run, flag_of, from_dict, resolve, to_dict
from hyperlm.env import readable
from hyperlm.files import digest, read_json
from hyperlm.optim import Schedule, stored
from hyperlm.stages import from_stages, names, stages
from hyperlm.startup import command
from hyperlm.state import State, require_settled
from hyperlm.tree import Tree

FORMAT = 4
WRITERS = {
    1: "a version before 0.1",
    2: "version 0.1",
    3: "version 0.2 or 0.3",
}  # of earlier formats. Weights of 2 and 3 are read as well; see `train.resume`
NOTHING = {"config": None, "schedule": None, "tokenizer": None, "loss": None}  # what format 2 does not say
WORST = 1e30  # validation loss in format 2 where there was none
PREFIX, DIGITS = "step", 8
Which = Literal["latest", "best"]  # checkpoint of a run: the newest, or the one with the lowest validation loss
ITEMS = ("params", "opt", "meta")
REMOVED = "removed"  # where checkpoints go that are no longer kept, at once and whole, before they are deleted
META = 1 << 28  # bytes that no meta has
NOT_DAMAGE = {errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO}

# Failures reach us as exceptions; the threads and tasks that meet them need not print them as well.
absl.logging.set_verbosity(absl.logging.FATAL)
logging.getLogger("asyncio").setLevel(logging.CRITICAL)


def unraisable(event: Any, default: Callable = sys.unraisablehook) -> None:
    """Leave out what the storage layer's threads say, many hundred times, after a failure that has already been reported."""
    if "Event loop is closed" not in str(event.exc_value):
        default(event)


sys.unraisablehook = unraisable


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read; the message says which and what to do."""


def folder_of(run: Path, step: int | None = None) -> Path:
    """runs/x/checkpoints, or the folder of one step in it."""
    folder = run / "checkpoints"
    return folder if step is None else folder / f"{PREFIX}_{step:0{DIGITS}d}"


def handlers() -> dict[str, Any]:
    array = {"use_ocdbt": True, "use_compression": False}  # random bits do not compress, and it is three times faster
    return {
        "params": ocp.PyTreeCheckpointHandler(**array),
        "opt": ocp.PyTreeCheckpointHandler(**array),
        "meta": ocp.JsonCheckpointHandler(),
    }


@dataclass(frozen=True)
class Facts:
    """What a checkpoint says of its run, beside the state."""

    config: Config
    schedule: Schedule
    fingerprint: str  # of the text: a resumed run must have the same
    tokenizer: str  # digest of the file beside the checkpoints
    chat: bool  # the text has conversations


@dataclass
class Retention:
    """Which checkpoints stay: the newest `keep`, the best by validation loss, and what cannot be read, which is not ours to judge."""

    keep: int
    val_losses: dict[int, float | None]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        kept = self.kept()
        return [checkpoint.step in kept or checkpoint.step not in self.val_losses for checkpoint in checkpoints]

    def kept(self) -> set[int]:
        """The steps that stay, of all that were ever known: what leaves was neither among the newest nor the best, and never will be."""
        return {*sorted(self.val_losses)[-self.keep :], *lowest(self.val_losses)}


def lowest(val_losses: dict[int, float | None]) -> list[int]:
    """The step with the lowest finite validation loss, the newest of equals; none where there is none."""
    finite = [(loss, -step) for step, loss in val_losses.items() if loss is not None and math.isfinite(loss)]
    return [-min(finite)[1]] if finite else []


class Writer(NamedTuple):
    """Writes the checkpoints of a run."""

    run: Path
    storage: ocp.CheckpointManager
    retention: Retention
    losses: dict[int, float]  # on training text, of the checkpoints that there are


def manager(run: Path, keep: int) -> Writer:
    """The writer of a run's checkpoints; leftovers of interrupted saves and removals are deleted."""
    metas = readable_metas(run)
    retention = Retention(keep, {step: meta["val_loss"] for step, meta in metas.items()})
    options = ocp.CheckpointManagerOptions(
        step_prefix=PREFIX,
        step_format_fixed_length=DIGITS,
        cleanup_tmp_directories=True,
        todelete_subdir=REMOVED,
        preservation_policy=retention,
    )
    clear_away(run)
    storage = ocp.CheckpointManager(folder_of(run).absolute(), options=options, item_handlers=handlers())
    return Writer(run, storage, retention, {step: meta["loss"] for step, meta in metas.items() if meta["loss"] is not None})


def delete_removed(run: Path) -> None:
    """Finish the removal of what is no longer kept, which a kill may have interrupted."""
    shutil.rmtree(folder_of(run) / REMOVED, ignore_errors=True)


def clear_away(run: Path) -> None:
    """Make room and order before a run goes on: what interrupted saves and removals left is deleted; a checkpoint of which a part is missing
    is set aside, or the storage layer would not write that step again."""
    delete_removed(run)
    for path in folder_of(run).glob("*.orbax-checkpoint-tmp*"):
        shutil.rmtree(path, ignore_errors=True)
    for path in folder_of(run).glob(f"{PREFIX}_*"):
        if path.is_dir() and not is_complete(path):
            aside = path.with_name(f"incomplete-{path.name}-{time.time_ns()}")
            path.rename(aside)
            print(f"checkpoint {path} lacks a part: set aside as {aside.name}")


def is_complete(path: Path) -> bool:
    return all((path / item).is_dir() for item in ITEMS)


@contextmanager
def writing(run: Path, keep: int) -> Iterator[Writer]:
    """The writer of a run's checkpoints. What is being written when an error ends the run still counts."""
    writer = manager(run, keep)
    try:
        yield writer
    except Exception:
        with suppress(CheckpointError):
            finish(writer)
        raise
    close(writer)


def close(writer: Writer) -> None:
    """Wait for the last save, and end the threads that write."""
    finish(writer)
    writer.storage.close()


class Settled(np.ndarray):
    """An array that nobody writes to while it is saved: the storage layer, which copies every array to be sure, need not."""

    def __deepcopy__(self, memo: dict) -> "Settled":
        return self


def to_numpy(x: Tensor, copy: bool) -> np.ndarray:
    x = x.detach().to("cpu", copy=copy)
    return (x.view(torch.int16).numpy().view(ml_dtypes.bfloat16) if x.dtype == torch.bfloat16 else x.numpy()).view(Settled)


def to_tensor(x: np.ndarray) -> Tensor:
    x = np.array(x)  # what is read cannot be written to
    return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16) if x.dtype == ml_dtypes.bfloat16 else torch.from_numpy(x)


def checksum(x: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(x).view(np.uint8).data)


def save(writer: Writer, state: State, facts: Facts, val_loss: float | None, loss: float | None, *, in_place: bool = False) -> None:
    """Start writing `state`; returns once it is copied. `finish` waits for it.

    Args:
        val_loss: if it was evaluated at this very step.
        loss: nats a token on training text, by which later states are judged.
        in_place: write it from where it is, in host memory, and wait: no memory for a second copy is needed.

    Raises:
        CheckpointError: if this or the previous save failed.
        StaleState: if `state` was consumed, or has an update pending.
    """
    require_settled(state)
    finish(writer)  # before copying: never two copies of the state in host memory
    trees = {name: tree.map(lambda x: to_numpy(x, not in_place), t) for name, t in (("params", state.params), ("opt", state.opt_state))}
    meta = {
        "format": FORMAT,
        **{name: getattr(state, name) for name in ("step", "updates", "tokens", "seed", "clipped")},
        "config": to_dict(facts.config),
        "schedule": asdict(facts.schedule),
        "fingerprint": facts.fingerprint,
        "tokenizer": facts.tokenizer,
        "chat": facts.chat,
        "val_loss": val_loss,
        "loss": loss,
        "checksums": {name: tree.by_path(tree.map(checksum, t)) for name, t in trees.items()},
    }
    items = {name: ocp.args.PyTreeSave(t) for name, t in trees.items()}
    need, free = sum(x.nbytes for t in trees.values() for x in tree.leaves(t)), shutil.disk_usage(folder_of(writer.run)).free
    if need > free:  # found out before anything is half written
        raise write_error(writer.run, OSError(f"no space left on the disk: it needs {readable(need)}, {readable(free)} are free"))
    writer.retention.val_losses[state.step] = val_loss
    try:
        started = writer.storage.save(
            state.step, args=ocp.args.Composite(**items, meta=ocp.args.JsonSave({**meta, "digest": digest(meta)}))
        )
    except Exception as e:  # whatever the storage layer raises
        raise write_error(writer.run, e) from e
    if not started:
        raise CheckpointError(f"{folder_of(writer.run, state.step)} was not written: a checkpoint of that step or later exists")
    if loss is not None:
        writer.losses[state.step] = loss
    for gone in set(writer.losses) - writer.retention.kept():
        del writer.losses[gone]
    if in_place:
        finish(writer)


def require_room(folder: Path, need: int) -> None:
    """Found out before anything is computed, not when the first checkpoint is due.

    Args:
        folder: where checkpoints will be; it need not exist yet.
        need: bytes of one.

    Raises:
        CheckpointError: if the disk has less.
    """
    there = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    if (free := shutil.disk_usage(there).free) < need:
        raise CheckpointError(
            f"a checkpoint of this run takes {readable(need)}, and {readable(free)} are free in {there}: make room, or start where there is more"
        )


def finish(writer: Writer) -> None:
    """Wait until the last save is on disk.

    Raises:
        CheckpointError: if it failed.
    """
    try:
        writer.storage.wait_until_finished()
    except Exception as e:
        raise write_error(writer.run, e) from e
    delete_removed(writer.run)


def write_error(run: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"a checkpoint could not be written to {folder_of(run)} ({first_line(error)}); {way_on(run)}")


def way_on(run: Path) -> str:
    """What an error that ends a run tells of how to go on."""
    if good := steps(run):
        return f"the last good checkpoint is {folder_of(run, good[-1])}: mend that, then go on with {command('train')} --resume {run}"
    return f"there is no checkpoint yet: mend that, remove {run} and start again"


def first_line(error: Exception) -> str:
    text = str(error)
    if "No space left on device" in text or "ENOSPC" in text:
        return "no space left on the disk"
    return (text.splitlines() or [type(error).__name__])[0][:160]


# -- what there is ---------------------------------------------------------------------------------------------------------------------


def steps(run: Path) -> list[int]:
    """Steps that have a checkpoint, in order. What an interrupted removal left of one is none."""
    names = (p.name.removeprefix(f"{PREFIX}_") for p in folder_of(run).glob(f"{PREFIX}_*") if is_complete(p))
    return sorted(int(name) for name in names if name.isdigit() and len(name) == DIGITS)


def latest(run: Path) -> int:
    """The newest step with a checkpoint.

    Raises:
        CheckpointError: if there is none.
    """
    if not run.is_dir():
        raise CheckpointError(f"{run}: no such run; `ls runs` shows those that exist")
    if not (found := steps(run)):
        raise CheckpointError(
            f"{run} has no checkpoint: it ended before its first save; remove it (rm -r {run}) and start again, or choose another --name"
        )
    return found[-1]


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


def readable_metas(run: Path) -> dict[int, dict[str, Any]]:
    """The meta of each checkpoint that has one which can be read."""
    metas = {}
    for step in steps(run):
        try:
            metas[step] = read_meta(run, step)
        except CheckpointError:
            continue
    return metas


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
            f"{run / 'config.json'} says --{flag_of(name)} {said}, and {folder_of(run, step)} was written with {written}: config.json is of another run; "
            "put the right one in its place, or remove it, and --resume takes the settings from the checkpoint"
        )


# -- reading -----------------------------------------------------------------------------------------------------------------------------


def restore(run: Path, step: int, config: Config, place: Callable[[Tree], Tree], *, with_opt: bool = True) -> tuple[State, dict[str, Any]]:
    """Read the checkpoint of `step` and verify it, stage by stage.

    Args:
        place: what becomes of each stage (of parameters, or of one of the moments), given as CPU tensors.

    Returns:
        The state (opt_state None unless `with_opt`), and the stored meta.

    Raises:
        CheckpointError: if it is missing, damaged, or of another run than `config` describes.
    """
    path = folder_of(run, step)
    meta = read_meta(run, step)
    require_same_run(run, step, meta, config)
    expected = dict(
        zip(("params", "opt") if with_opt else ("params",), stored(model.declaration(config.model), config.optim), strict=False)
    )
    for name, whole in expected.items():
        require_same_leaves(path, name, set(tree.by_path(whole)), set(meta["checksums"][name]))
    try:
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler(**handlers())) as reader:

            def read(name: str, like: Tree, above: str) -> Tree:
                """A tree like the parameters, of which the paths in item `name` begin with `above`."""

                def stage(prefix: str, like: Tree) -> Tree:
                    item = tree.map_with_path(lambda p, _: 0 if p.startswith(prefix) else ocp.PLACEHOLDER, expected[name])
                    found = reader.restore(path.absolute(), args=ocp.args.Composite(**{name: ocp.args.PyTreeRestore(item=item)}))
                    arrays, sums = tree.by_path(found[name]), meta["checksums"][name]
                    return place(
                        tree.map_with_path(lambda p, x: verified(f"{name}/{prefix}{p}", arrays[prefix + p], x, sums[prefix + p]), like)
                    )

                return from_stages([stage(f"{above}{own}/", part) for own, part in zip(names(like), stages(like), strict=True)])

            params = read("params", expected["params"], "")
            opt_state = {part: read("opt", like, f"{part}/") for part, like in expected["opt"].items()} if with_opt else None
    except Exception as e:  # storage errors of any kind
        raise unreadable(run, step, e) from e
    counters = {name: meta[name] for name in ("step", "updates", "tokens", "seed", "clipped")}
    return State(params, opt_state, **counters), meta


def require_same_leaves(path: Path, name: str, expected: set[str], found: set[str]) -> None:
    """Raises CheckpointError where a checkpoint lacks a leaf or has one too many: the settings agree, so it is of another version."""
    if expected != found:
        (leaf, *_) = sorted(expected ^ found)
        what = "lacks" if leaf in expected else "has"
        raise CheckpointError(f"{path} {what} {name}/{leaf}: another version of hyperlm wrote it, whose models have other parameters")


def verified(path: str, x: np.ndarray, like: Tensor, expected: int) -> Tensor:
    """`x` as a tensor of the shape and dtype of `like` (on the meta device), with the checksum that it had."""
    if tuple(x.shape) != like.shape:
        raise ValueError(f"{path} has shape {tuple(x.shape)}, not {tuple(like.shape)}")
    if checksum(x) != expected:
        raise ValueError(f"the checksum of {path} does not match")
    tensor = to_tensor(x)
    if tensor.dtype != like.dtype:
        raise ValueError(f"{path} is {tensor.dtype}, not {like.dtype}".replace("torch.", ""))
    return tensor


def unreadable(run: Path, step: int, error: Exception) -> CheckpointError:
    """What to say of a checkpoint that could not be read. Only one that is damaged is to be deleted."""
    path, why = folder_of(run, step), f"it has no {error}" if isinstance(error, KeyError) else first_line(error)
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno in NOT_DAMAGE) or refused(str(error)):
        return CheckpointError(f"{path} could not be read ({why}); mend that and try again")
    earlier = [s for s in steps(run) if s < step]
    remedy = f"delete it to go on from step {earlier[-1]}" if earlier else "there is no earlier one: start again under another --name"
    return CheckpointError(f"{path} is damaged ({why}); {remedy}")


def refused(text: str) -> bool:
    """Whether the storage layer says that it was not let to read, not that what it read is wrong."""
    return any(
        word in text
        for word in ("PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "Permission denied", "Too many open files", "Cannot allocate memory")
    )
