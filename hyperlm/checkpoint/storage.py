"""The arrays of checkpoints, written and read through orbax. The one importer of orbax and jax, which take a second: see `__init__`."""

import logging
import os
import shutil
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before jax is imported: it must never touch the GPU

import absl.logging
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import torch
from torch import Tensor

from hyperlm import model, tree
from hyperlm.checkpoint.folder import (
    DIGITS,
    PREFIX,
    REMOVED,
    CheckpointError,
    clear_away,
    delete_removed,
    folder_of,
    unreadable,
    write_error,
)
from hyperlm.checkpoint.meta import COUNTERS, Facts, lowest, meta_of, read_meta, readable_metas, require_same_run
from hyperlm.config import Config
from hyperlm.env import readable
from hyperlm.optim import stored
from hyperlm.stages import from_stages, names, stages
from hyperlm.state import State, require_flushed
from hyperlm.tree import Tree

# Failures reach us as exceptions; the threads and tasks that meet them need not print them as well.
absl.logging.set_verbosity(absl.logging.FATAL)
logging.getLogger("asyncio").setLevel(logging.CRITICAL)


def unraisable(event: Any, default: Callable = sys.unraisablehook) -> None:
    """Leave out what the storage layer's threads say, many hundred times, after a failure that has already been reported."""
    if "Event loop is closed" not in str(event.exc_value):
        default(event)


sys.unraisablehook = unraisable


def handlers() -> dict[str, Any]:
    array = {"use_ocdbt": True, "use_compression": False}  # random bits do not compress, and it is three times faster
    return {
        "params": ocp.PyTreeCheckpointHandler(**array),
        "opt": ocp.PyTreeCheckpointHandler(**array),
        "meta": ocp.JsonCheckpointHandler(),
    }


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

    def __deepcopy__(self, memo: dict | None) -> "Settled":
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
    require_flushed(state)
    finish(writer)  # before copying: never two copies of the state in host memory
    trees = {name: tree.map(lambda x: to_numpy(x, not in_place), t) for name, t in (("params", state.params), ("opt", state.opt_state))}
    checksums = {name: tree.by_path(tree.map(checksum, t)) for name, t in trees.items()}
    meta = meta_of(state, facts, val_loss, loss, checksums)
    items = {name: ocp.args.PyTreeSave(t) for name, t in trees.items()}
    need, free = sum(x.nbytes for t in trees.values() for x in tree.leaves(t)), shutil.disk_usage(folder_of(writer.run)).free
    if need > free:  # found out before anything is half written
        raise write_error(writer.run, OSError(f"no space left on the disk: it needs {readable(need)}, {readable(free)} are free"))
    writer.retention.val_losses[state.step] = val_loss
    try:
        started = writer.storage.save(state.step, args=ocp.args.Composite(**items, meta=ocp.args.JsonSave(meta)))
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
                    restored = reader.restore(path.absolute(), args=ocp.args.Composite(**{name: ocp.args.PyTreeRestore(item=item)}))
                    arrays, sums = tree.by_path(restored[name]), meta["checksums"][name]
                    return place(
                        tree.map_with_path(lambda p, x: verified(f"{name}/{prefix}{p}", arrays[prefix + p], x, sums[prefix + p]), like)
                    )

                return from_stages([stage(f"{above}{top}/", part) for top, part in zip(names(like), stages(like), strict=True)])

            params = read("params", expected["params"], "")
            opt_state = {part: read("opt", like, f"{part}/") for part, like in expected["opt"].items()} if with_opt else None
    except Exception as e:  # storage errors of any kind
        raise unreadable(run, step, e) from e
    return State(params, opt_state, **{name: meta[name] for name in COUNTERS}), meta


def require_same_leaves(path: Path, name: str, expected: set[str], written: set[str]) -> None:
    """Raises CheckpointError where a checkpoint lacks a leaf or has one too many: the settings agree, so it is of another version."""
    if expected != written:
        (leaf, *_) = sorted(expected ^ written)
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
