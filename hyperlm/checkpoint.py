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
from hyperlm.state import State
from hyperlm.tree import Tree

FORMAT = 1
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


def to_numpy(x: Tensor) -> np.ndarray:
    """A copy in host memory, so that training may go on while it is written."""
    x = x.detach().to("cpu", copy=True)
    return x.view(torch.int16).numpy().view(ml_dtypes.bfloat16) if x.dtype == torch.bfloat16 else x.numpy()


def to_tensor(x: np.ndarray, device: torch.device) -> Tensor:
    if x.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16).to(device)
    return torch.from_numpy(np.array(x)).to(device)


def checksum(x: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(x).view(np.uint8).data)


def save(writer: ocp.CheckpointManager, state: State, corpus: Corpus, val_loss: float | None) -> None:
    """Start writing `state`; returns once it is copied. `finish` waits for it.

    Args:
        corpus: its fingerprint is stored, since a resumed run must have the same text; and whether it has conversations.
        val_loss: if it was evaluated at this very step.

    Raises:
        CheckpointError: if this or the previous save failed.
    """
    finish(writer)  # before copying: never two copies of the state in host memory
    trees = {"params": tree.map(to_numpy, state.params), "opt": tree.map(to_numpy, state.opt_state)}
    meta = {
        "format": FORMAT,
        **{name: getattr(state, name) for name in ("step", "updates", "tokens", "seed")},
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


def restore(run: Path, step: int, config: Config, device: torch.device, *, with_opt: bool = True) -> tuple[State, dict[str, Any]]:
    """Read the checkpoint of `step` and verify it.

    Returns:
        The state (opt_state None unless `with_opt`), and the stored meta.

    Raises:
        CheckpointError: if it is missing, damaged, or of another shape than `config` declares.
    """
    path = folder_of(run, step)
    items = {"params": ocp.args.PyTreeRestore(), "meta": ocp.args.JsonRestore()} | ({"opt": ocp.args.PyTreeRestore()} if with_opt else {})
    try:
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler(**handlers())) as reader:
            found = reader.restore(path.absolute(), args=ocp.args.Composite(**items))
        meta = found["meta"]
        if meta["format"] != FORMAT:
            raise CheckpointError(f"{path} has format {meta['format']}, and this version reads {FORMAT}")
        expected = dict(zip(("params", "opt"), stored(model.declaration(config.model), optimizer(config.optim, 1)), strict=True))
        trees = {name: verified(found[name], expected[name], meta["checksums"][name], name, device) for name in items if name != "meta"}
        counters = {name: int(meta[name]) for name in ("step", "updates", "tokens", "seed")}
    except CheckpointError:
        raise
    except Exception as e:  # storage and JSON errors of any kind mean the same here
        raise damaged(run, step, first_line(e)) from e
    return State(trees["params"], trees.get("opt"), **counters), meta


def verified(found: Tree, expected: Tree, checksums: dict[str, int], name: str, device: torch.device) -> Tree:
    """`found` in the structure of `expected` (tensors on the meta device), as tensors. Goes by path: libraries order dicts differently."""
    arrays = tree.by_path(found)

    def check(path: str, like: Tensor) -> Tensor:
        x = arrays.pop(path, None)
        if x is None:
            raise ValueError(f"{name}/{path} is missing")
        if tuple(x.shape) != like.shape:
            raise ValueError(f"{name}/{path} has shape {tuple(x.shape)}, not {tuple(like.shape)}")
        if checksum(x) != checksums[path]:
            raise ValueError(f"the checksum of {name}/{path} does not match")
        if (tensor := to_tensor(x, device)).dtype != like.dtype:
            raise ValueError(f"{name}/{path} is {tensor.dtype}, not {like.dtype}".replace("torch.", ""))
        return tensor

    tensors = tree.map_with_path(check, expected)
    if arrays:
        raise ValueError(f"{name}/{next(iter(arrays))} is not part of this model")
    return tensors


def damaged(run: Path, step: int, why: str) -> CheckpointError:
    earlier = [s for s in steps(run) if s < step]
    remedy = f"delete it to go on from step {earlier[-1]}" if earlier else "there is no earlier one: start again under another --name"
    return CheckpointError(f"{folder_of(run, step)} is damaged ({why}); {remedy}")
