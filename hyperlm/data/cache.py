"""Folders of the cache: written whole or not at all, checked when they are read, and made again where they are damaged.

Nothing here knows what the files hold. A folder's meta.json has the size of every other file, a checksum of each of its blocks, and a
digest of itself. While a folder is written it has another name, `<name>.<random>`, and beside it there is `<name>.<random>.lock`, locked as
long as the process lives.
"""

import json
import os
import random
import re
import secrets
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from hyperlm.files import digest, read_json

FORMAT = 3  # conversations apart from texts, with what of them the assistant says
BLOCK = 1 << 20  # bytes under one checksum
SAMPLE = 4  # blocks of a folder, beside the first and last of each file, that are checked at every start
META = "meta.json"
LARGEST = 1 << 28  # bytes that no meta.json has
TEMPORARY = re.compile(r"([0-9a-f]{24}\.[0-9a-f]{8})(\.lock|\.old)?")


def seal(folder: Path, meta: dict[str, Any]) -> None:
    """Write meta.json, with the checksums of all that is in the folder."""
    entries = {path.name: {"size": path.stat().st_size, "blocks": checksums(path)} for path in sorted(folder.iterdir())}
    meta = {"format": FORMAT, **meta, "entries": entries}
    (folder / META).write_text(json.dumps({**meta, "digest": digest(meta)}))


def checksums(path: Path) -> list[int]:
    with open(path, "rb") as file:
        return [zlib.crc32(block) for block in iter(lambda: file.read(BLOCK), b"")]


def read_meta(folder: Path) -> dict[str, Any] | None:
    """What meta.json says; None if it is not there, or not as it was written."""
    try:
        meta = read_json(folder / META, LARGEST)
        return meta if meta.pop("digest") == digest(meta) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def damage(folder: Path, whole: bool = False) -> list[str]:
    """What in a folder is not as it was written, each in words that begin with the file's name.

    Args:
        whole: check every block, not only sizes and a sample.
    """
    meta = read_meta(folder)
    if meta is None:
        return [f"{META} is missing or damaged"]
    large = [(name, i) for name, entry in meta["entries"].items() for i in range(1, len(entry["blocks"]) - 1)]
    sample = set(large if whole else random.sample(large, min(SAMPLE, len(large))))
    faults = []
    for name, entry in meta["entries"].items():
        count = len(entry["blocks"])
        chosen = [i for i in range(count) if i in (0, count - 1) or (name, i) in sample]
        if wrong := disagreement(folder / name, entry["size"], entry["blocks"], chosen):
            faults.append(f"{name} {wrong}")
    return faults


def disagreement(path: Path, size: int, checksums: list[int], chosen: list[int]) -> str:
    """How a file differs from what is known of it, as far as its size and the chosen blocks tell."""
    try:
        if not path.is_file():
            return "is missing"
        with open(path, "rb") as file:
            if (now := os.fstat(file.fileno()).st_size) != size:
                return f"has {now:,} bytes instead of {size:,}"
            for i in chosen:
                file.seek(i * BLOCK)
                if zlib.crc32(file.read(BLOCK)) != checksums[i]:
                    return "does not match its checksum"
    except OSError as e:
        return f"cannot be read ({e.strerror})"
    return ""


def verify(root: Path) -> Iterator[str]:
    """Check all of a cache, every byte: each damaged entry by name. Folders of format 1, which had no checksums, are passed over."""
    for folder in sorted(root.iterdir()) if root.is_dir() else []:
        if re.fullmatch("[0-9a-f]{24}", folder.name) and not unsealed(folder):
            yield from (f"{folder.name}/{wrong}" for wrong in damage(folder, whole=True))


def unsealed(folder: Path) -> bool:
    """Whether it is of format 1."""
    try:
        meta = read_json(folder / META, LARGEST)
        return meta["format"] == 1 and "digest" not in meta
    except (OSError, ValueError, KeyError, TypeError):
        return False


@contextmanager
def writing(folder: Path) -> Iterator[Path]:
    """A temporary folder to write into, which takes the place of `folder` at the end, or is gone if that was not reached."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    part, lock = claim(folder)
    try:
        part.mkdir()
        yield part
        install(part, folder)
    finally:
        remove(part)
        remove(
            Path(lock.lock_file)
        )  # while it is held, so that nobody takes it for one that was left; on Windows, which refuses that, `release` does
        lock.release()


def claim(folder: Path) -> tuple[Path, FileLock]:
    """A name that is free for a temporary folder, and its lock."""
    while True:
        part = folder.with_name(f"{folder.name}.{secrets.token_hex(4)}")
        lock = FileLock(f"{part}.lock", timeout=0)
        with suppress(Timeout):  # another process was sweeping just then, and took it for one that was left
            lock.acquire()
            if os.path.lexists(lock.lock_file):
                return part, lock
            lock.release()


def install(part: Path, folder: Path) -> None:
    """Put a folder in its place; what is there and damaged makes way. Processes that have it mapped keep what they have."""
    for _ in range(9):
        try:
            os.replace(part, folder)
            return
        except OSError:
            if not os.path.lexists(folder):
                raise
        if not damage(folder, whole=True):  # another process was faster: its result is the same
            return
        with suppress(FileNotFoundError):
            os.rename(folder, f"{part}.old")
        remove(Path(f"{part}.old"))
    os.replace(part, folder)


def sweep(root: Path) -> None:
    """Remove what killed processes left half written, and nothing of living ones."""
    with suppress(OSError):
        for name in sorted(os.listdir(root)):
            if not (match := TEMPORARY.fullmatch(name)):
                continue
            part, path = root / match[1], root / f"{match[1]}.lock"
            if not path.exists():  # a lock is made before its folder and goes after it
                remove(root / name)
                continue
            lock = FileLock(path, timeout=0)
            with suppress(Timeout), lock:
                remove(part)
                remove(Path(f"{part}.old"))
                remove(path)


def remove(path: Path) -> None:
    """A folder or file, as far as that is possible."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()
