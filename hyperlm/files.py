"""Small files that are read back with suspicion, and digests that tell whether something is what it was."""

import hashlib
import json
import math
import stat
from pathlib import Path
from typing import Any

SMALL = 1 << 20  # bytes that no file of settings has: what is larger is something else


def read_small(path: Path, limit: int = SMALL) -> str:
    """The text of a file of at most `limit` bytes, which a hostile one cannot make wait or fill memory.

    Raises:
        FileNotFoundError, ValueError (of what it is instead), OSError.
    """
    facts = path.stat()
    if not stat.S_ISREG(facts.st_mode):
        raise ValueError("not a regular file")
    if facts.st_size > limit:
        raise ValueError(f"{facts.st_size:,} bytes")
    return path.read_text(encoding="utf-8")


def read_json(path: Path, limit: int = SMALL) -> Any:
    """The values of a JSON file of at most `limit` bytes.

    Raises:
        FileNotFoundError, ValueError (damage of any kind), OSError.
    """
    try:
        return json.loads(read_small(path, limit))
    except RecursionError as e:
        raise ValueError("nested too deeply") from e


def digest(values: Any) -> str:
    """128 bits that tell whether JSON values are what they were, whatever the order of keys."""
    return hashlib.blake2b(json.dumps(values, sort_keys=True).encode(), digest_size=16).hexdigest()


def file_digest(path: Path) -> str:
    """128 bits of a file's content; empty if there is no file that can be read."""
    try:
        if not path.is_file():  # nor a FIFO, which would be waited for
            return ""
        with open(path, "rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    except OSError:
        return ""


def finite(value: Any) -> Any:
    """`value` with None for numbers that JSON lacks."""
    if isinstance(value, dict):
        return {name: finite(x) for name, x in value.items()}
    if isinstance(value, list | tuple):
        return [finite(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
