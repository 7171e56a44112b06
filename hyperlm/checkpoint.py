"""Checkpoints through orbax: atomic, asynchronous, versioned, checksummed. The one importer of orbax and jax.

runs/<name>/checkpoints/step_00000100/ holds params and opt (arrays), and meta (counters, checksums, format version). The newest are kept,
and the best by validation loss. What comes back is verified: shapes and dtypes against the declaration, bytes against the checksums.
"""

import logging
import os
import shutil
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before jax is imported: it must never touch the GPU

import absl.logging
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import torch
from torch import Tensor

from configs import Config
from hyperlm import model, tree
from hyperlm.data import Corpus
from hyperlm.env import GIB
from hyperlm.optim import optimizer, stored
from hyperlm.stages import from_stages, names, stages
from hyperlm.state import State
from hyperlm.tree import Tree

FORMAT = 2
WORST = 1e30  # validation loss of a checkpoint that has none: never the best, and valid JSON
PREFIX, DIGITS = "step", 8

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


def manager(run: Path, keep: int) -> ocp.CheckpointManager:
    """The writer of a run's checkpoints; leftovers of interrupted saves are removed."""
    policy = ocp.checkpoint_managers
    options = ocp.CheckpointManagerOptions(
        step_prefix=PREFIX,
        step_format_fixed_length=DIGITS,
        cleanup_tmp_directories=True,
        best_fn=lambda metrics: metrics["val_loss"],
        best_mode="min",
        preservation_policy=policy.AnyPreservationPolicy(
            [policy.LatestN(keep), policy.BestN(get_metric_fn=lambda metrics: metrics["val_loss"], reverse=True, n=1)]
        ),
    )
    return ocp.CheckpointManager(folder_of(run).absolute(), options=options, item_handlers=handlers())


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


def save(writer: ocp.CheckpointManager, state: State, corpus: Corpus, val_loss: float | None, *, in_place: bool = False) -> None:
    """Start writing `state`, which has no pending update; returns once it is copied. `finish` waits for it.

    Args:
        corpus: its fingerprint is stored, since a resumed run must have the same text; and whether it has conversations.
        val_loss: if it was evaluated at this very step.
        in_place: write it from where it is, in host memory, and wait: no memory for a second copy is needed.

    Raises:
        CheckpointError: if this or the previous save failed.
    """
    finish(writer)  # before copying: never two copies of the state in host memory
    trees = {name: tree.map(lambda x: to_numpy(x, not in_place), t) for name, t in (("params", state.params), ("opt", state.opt_state))}
    meta = {
        "format": FORMAT,
        **{name: getattr(state, name) for name in ("step", "updates", "tokens", "seed", "clipped")},
        "fingerprint": corpus.fingerprint,
        "chat": corpus.chat,
        "val_loss": WORST if val_loss is None else val_loss,
        "checksums": {name: tree.by_path(tree.map(checksum, t)) for name, t in trees.items()},
    }
    items = {name: ocp.args.PyTreeSave(t) for name, t in trees.items()}
    need, free = sum(x.nbytes for t in trees.values() for x in tree.leaves(t)), shutil.disk_usage(writer.directory).free
    if need > free:  # found out before anything is half written
        raise write_error(writer, OSError(f"no space left on the disk: it needs {need / GIB:.2f} GiB, {free / GIB:.2f} are free"))
    try:
        started = writer.save(
            state.step,
            args=ocp.args.Composite(**items, meta=ocp.args.JsonSave(meta)),
            metrics={"val_loss": meta["val_loss"]},
        )
    except Exception as e:  # whatever the storage layer raises
        raise write_error(writer, e) from e
    if not started:
        raise CheckpointError(f"{folder_of(Path(writer.directory).parent, state.step)} was not written: a checkpoint of that step or later exists")
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
            f"a checkpoint of this run takes {need / GIB:.2f} GiB, and {free / GIB:.2f} are free in {there}: make room, or start where there is more"
        )


def finish(writer: ocp.CheckpointManager) -> None:
    """Wait until the last save is on disk.

    Raises:
        CheckpointError: if it failed.
    """
    try:
        writer.wait_until_finished()
    except Exception as e:
        raise write_error(writer, e) from e


def write_error(writer: ocp.CheckpointManager, error: Exception) -> CheckpointError:
    run = Path(writer.directory).parent
    good = steps(run)
    last = f"the last good one is step {good[-1]}: mend that, then go on with python train.py --resume {run}" if good else "there is no earlier one"
    return CheckpointError(f"a checkpoint could not be written to {writer.directory} ({first_line(error)}); {last}")


def first_line(error: Exception) -> str:
    text = str(error)
    if "No space left on device" in text or "ENOSPC" in text:
        return "no space left on the disk"
    return (text.splitlines() or [type(error).__name__])[0][:160]


def steps(run: Path) -> list[int]:
    """Steps that have a complete checkpoint, in order."""
    names = (p.name.removeprefix(f"{PREFIX}_") for p in folder_of(run).glob(f"{PREFIX}_*") if p.is_dir())
    return sorted(int(name) for name in names if name.isdigit() and len(name) == DIGITS)


def latest(run: Path) -> int:
    """The newest step with a checkpoint.

    Raises:
        CheckpointError: if there is none.
    """
    if not run.is_dir():
        raise CheckpointError(f"{run}: no such run; `ls runs` shows those that exist")
    if not (found := steps(run)):
        raise CheckpointError(f"{run} has no checkpoint: it ended before its first save; start it again under another --name")
    return found[-1]


def best(run: Path) -> int:
    """The step with the lowest validation loss; the newest where none was evaluated."""
    last = latest(run)
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler(**handlers())) as reader:
        metas = {step: reader.restore(folder_of(run, step).absolute(), args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta for step in steps(run)}
    step = min(metas, key=lambda step: (metas[step]["val_loss"], -step))
    return step if metas[step]["val_loss"] < WORST else last


def restore(
    run: Path, step: int, config: Config, place: Callable[[Tree], Tree], *, with_opt: bool = True
) -> tuple[State, dict[str, Any]]:
    """Read the checkpoint of `step` and verify it, stage by stage.

    Args:
        place: what becomes of each stage (of parameters, or of one of the moments), given as CPU tensors.

    Returns:
        The state (opt_state None unless `with_opt`), and the stored meta.

    Raises:
        CheckpointError: if it is missing, damaged, or of another shape than `config` declares.
    """
    path = folder_of(run, step)
    expected = dict(zip(("params", "opt") if with_opt else ("params",), stored(model.declaration(config.model), optimizer(config.optim, 1))))
    try:
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler(**handlers())) as reader:
            meta = reader.restore(path.absolute(), args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta
            if meta["format"] != FORMAT:
                raise CheckpointError(f"{path} has format {meta['format']}, and this version reads {FORMAT}")
            counters = {name: int(meta[name]) for name in ("step", "updates", "tokens", "seed")} | {"clipped": bool(meta["clipped"])}

            def read(name: str, like: Tree, above: str) -> Tree:
                """A tree like the parameters, of which the paths in item `name` begin with `above`."""

                def stage(prefix: str, like: Tree) -> Tree:
                    item = tree.map_with_path(lambda p, _: 0 if p.startswith(prefix) else ocp.PLACEHOLDER, expected[name])
                    found = reader.restore(path.absolute(), args=ocp.args.Composite(**{name: ocp.args.PyTreeRestore(item=item)}))
                    arrays, sums = tree.by_path(found[name]), meta["checksums"][name]
                    return place(tree.map_with_path(lambda p, x: verified(f"{name}/{prefix}{p}", arrays[prefix + p], x, sums[prefix + p]), like))

                return from_stages([stage(f"{above}{own}/", part) for own, part in zip(names(like), stages(like), strict=True)])

            for name, whole in expected.items():
                compare(set(tree.by_path(whole)), set(meta["checksums"][name]), name)
            params = read("params", expected["params"], "")
            opt_state = {part: read("opt", like, f"{part}/") for part, like in expected["opt"].items()} if with_opt else None
    except CheckpointError:
        raise
    except Exception as e:  # storage and JSON errors of any kind mean the same here
        raise damaged(run, step, first_line(e)) from e
    return State(params, opt_state, **counters), meta


def compare(expected: set[str], found: set[str], name: str) -> None:
    """Raises ValueError where a checkpoint lacks a leaf or has one too many."""
    for path in sorted(expected - found):
        raise ValueError(f"{name}/{path} is missing")
    for path in sorted(found - expected):
        raise ValueError(f"{name}/{path} is not part of this model")


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


def damaged(run: Path, step: int, why: str) -> CheckpointError:
    earlier = [s for s in steps(run) if s < step]
    remedy = f"delete it to go on from step {earlier[-1]}" if earlier else "there is no earlier one: start again under another --name"
    return CheckpointError(f"{folder_of(run, step)} is damaged ({why}); {remedy}")
