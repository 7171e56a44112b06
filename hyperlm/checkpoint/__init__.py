"""Checkpoints: atomic, asynchronous, versioned, checksummed.

runs/<name>/checkpoints/step_00000100/ holds params and opt (arrays), and meta (counters, settings, schedule, checksums, format version, and
a digest of all that). The newest are kept, and the best by validation loss. What comes back is verified: meta against its digest, settings
against those of the run, shapes and dtypes against the declaration, bytes against the checksums; and what does not match is named.

folder.py: what lies in that folder; meta.py: what a checkpoint says of itself; storage.py: writing and reading, through orbax, which is
imported when a checkpoint is first written or read.
"""

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from hyperlm.checkpoint.folder import CheckpointError, clear_away, folder_of, latest, require_room, steps, way_on
from hyperlm.checkpoint.meta import WRITERS, Facts, Which, best, chosen, read_meta, require_same_run, settings
from hyperlm.startup import signals_held

if TYPE_CHECKING:
    from hyperlm.checkpoint.storage import Writer, close, finish, manager, restore, save, writing

WITH_ORBAX = ["Writer", "close", "finish", "manager", "restore", "save", "writing"]
__all__ = [
    "WRITERS", "CheckpointError", "Facts", "Which", "Writer", "best", "chosen", "clear_away", "close", "finish", "folder_of", "latest",
    "manager", "read_meta", "require_room", "require_same_run", "restore", "save", "settings", "steps", "way_on", "writing",
]  # fmt: skip

if find_spec("orbax") is None:  # told when a command starts, not when its first checkpoint is due
    raise ModuleNotFoundError("No module named 'orbax'", name="orbax")


def __getattr__(name: str) -> Any:
    if name not in WITH_ORBAX:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with signals_held():
        from hyperlm.checkpoint import storage
    globals().update({name: getattr(storage, name) for name in WITH_ORBAX})
    return globals()[name]
