"""The folder of a run's checkpoints: where each step is, which are whole, what interrupted saves left; and errors that say what to do."""

import errno
import shutil
import time
from pathlib import Path

from hyperlm.env import readable
from hyperlm.errors import HyperlmError
from hyperlm.startup import command

PREFIX, DIGITS = "step", 8
ITEMS = ("params", "opt", "meta")
REMOVED = "removed"  # where checkpoints go that are no longer kept, at once and whole, before they are deleted
NOT_DAMAGE = {errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO}


class CheckpointError(HyperlmError, RuntimeError):
    """A checkpoint that cannot be written or read; the message says which and what to do."""


def folder_of(run: Path, step: int | None = None) -> Path:
    """runs/x/checkpoints, or the folder of one step in it."""
    folder = run / "checkpoints"
    return folder if step is None else folder / f"{PREFIX}_{step:0{DIGITS}d}"


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
    if not (complete := steps(run)):
        raise CheckpointError(
            f"{run} has no checkpoint: it ended before its first save; remove it (rm -r {run}) and start again, or choose another --name"
        )
    return complete[-1]


def is_complete(path: Path) -> bool:
    return all((path / item).is_dir() for item in ITEMS)


def clear_away(run: Path) -> None:
    """Make room and order before a run goes on: what interrupted saves and removals left is deleted; a checkpoint of which a part is
    missing is set aside, or the storage layer would not write that step again."""
    delete_removed(run)
    for path in folder_of(run).glob("*.orbax-checkpoint-tmp*"):
        shutil.rmtree(path, ignore_errors=True)
    for path in folder_of(run).glob(f"{PREFIX}_*"):
        if path.is_dir() and not is_complete(path):
            aside = path.with_name(f"incomplete-{path.name}-{time.time_ns()}")
            path.rename(aside)
            print(f"checkpoint {path} lacks a part: set aside as {aside.name}")


def delete_removed(run: Path) -> None:
    """Finish the removal of what is no longer kept, which a kill may have interrupted."""
    shutil.rmtree(folder_of(run) / REMOVED, ignore_errors=True)


def require_room(folder: Path, need: int) -> None:
    """Found out before anything is computed, not when the first checkpoint is due.

    Args:
        folder: where checkpoints will be; it need not exist yet.
        need: bytes of one.

    Raises:
        CheckpointError: if the disk has less.
    """
    existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    if (free := shutil.disk_usage(existing).free) < need:
        raise CheckpointError(
            f"a checkpoint of this run takes {readable(need)}, and {readable(free)} are free in {existing}: "
            "make room, or start where there is more"
        )


# -- errors ----------------------------------------------------------------------------------------------------------------------------


def write_error(run: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"a checkpoint could not be written to {folder_of(run)} ({first_line(error)}); {way_on(run)}")


def way_on(run: Path) -> str:
    """What an error that ends a run tells of how to go on."""
    if good := steps(run):
        resume = f"{command('train')} --resume {run}"
        return f"the last good checkpoint is {folder_of(run, good[-1])}: mend that, then go on with {resume}"
    return f"there is no checkpoint yet: mend that, remove {run} and start again"


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


def first_line(error: Exception) -> str:
    text = str(error)
    if "No space left on device" in text or "ENOSPC" in text:
        return "no space left on the disk"
    return (text.splitlines() or [type(error).__name__])[0][:160]
