"""Files of folders and of .zip archives: which are used, which are left out and why, and how each is opened. What is in them is for
formats.py."""

import gzip
import os
import sys
import sysconfig
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple

from hyperlm.data.documents import DataError
from hyperlm.env import progress

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

PACKED = {".gz": gzip.open, ".zst": zstd.open}
# Folders that hold no text of one's own; hidden ones, virtual environments and those marked as caches are known by other signs.
FOREIGN = {"node_modules", "__pycache__", "site-packages", "__MACOSX"}
SHOWN = 6  # suffixes that are counted by name

# Left out of the standard library: tests, and what is tables rather than code. Of what is left, 3 % is in tables, in Python 3.11 to 3.13.
NOT_STDLIB = {
    *("test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "idlelib", "lib2to3", "turtledemo", "distutils"),
    *("encodings", "pydoc_data", "html/entities.py", "html/__init__.py", "http/__init__.py", "curses/has_key.py", "re/_casefix.py"),
    *("locale.py", "mimetypes.py", "opcode.py", "_opcode_metadata.py", "pickletools.py", "stat.py", "stringprep.py", "token.py"),
    *("_compat_pickle.py",),
}
NOT_STDLIB_BEGINS = ("_sysconfigdata", "config-")  # of this machine


class File(NamedTuple):
    """A file, or a member of an archive."""

    path: Path
    member: str = ""

    def __str__(self) -> str:
        return f"{self.path}/{self.member}" if self.member else str(self.path)

    @property
    def name(self) -> str:
        return PurePosixPath(self.member).name or self.path.name

    @property
    def suffix(self) -> str:
        """What it holds, in lower case: `.jsonl` of `Talks.JSONL.gz`."""
        return suffix_of(self.name)


class Listing(NamedTuple):
    """Files that are used, in order, and how many there are of each suffix, used and left out."""

    files: list[File]
    used: Counter[str]
    left_out: Counter[str]

    def __str__(self) -> str:
        parts = [counted(self.used)] if self.used else []
        return "; ".join(parts + ([f"left out {counted(self.left_out)}"] if self.left_out else []))


def counted(counts: Counter[str]) -> str:
    """`120 .md, 30 .txt and 2 more`, the most first."""
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    rest = sum(count for _, count in ranked[SHOWN:])
    return ", ".join(f"{count:,} {what}" for what, count in ranked[:SHOWN]) + (f" and {rest:,} more" if rest else "")


def unpacked(name: str) -> str:
    """A name in lower case, without the suffix of what it is packed in."""
    name = name.lower()
    return name.removesuffix(next((suffix for suffix in PACKED if name.endswith(suffix)), ""))


def suffix_of(name: str) -> str:
    suffix = PurePosixPath(unpacked(name)).suffix
    return "" if suffix == ".zip" and not name.lower().endswith(suffix) else suffix  # an archive that is packed again is not opened


def shown_suffix(name: str) -> str:
    """The suffix with what it is packed in, or in words that there is none."""
    return (suffix_of(name) + name.lower()[len(unpacked(name)) :]) or "without a suffix"


# -- which files -----------------------------------------------------------------------------------------------------------------------

Walk = Iterable[tuple[str, list[str], list[str]]]  # (folder, folders in it, files in it); folders taken out of the second are not visited


def listed(root: Path, known: Iterable[str]) -> Listing:
    """Every file of a folder or of an archive whose suffix is known.

    Raises:
        OSError: on a folder that cannot be read; DataError on a damaged archive.
    """
    listing = Listing([], Counter(), Counter())
    if os.path.isdir(root):
        choose(
            progress(walk(root), f"listing {root.name}", unit=" folders"),
            lambda folder, name: File(Path(folder, name)),
            {*known, ".zip"},
            listing,
        )
    else:
        listing.files.append(File(root))
    files: list[File] = []
    for file in sorted(listing.files):
        if file.suffix != ".zip":
            files.append(file)
            continue
        listing.used[".zip"] -= 1
        members = Listing([], listing.used, listing.left_out)
        with archive_at(file.path) as archive:
            choose(walk_archive(archive), lambda folder, name, at=file.path: File(at, f"{folder}{name}"), set(known), members)
        files += sorted(members.files)
    return Listing(files, +listing.used, listing.left_out)


def choose(tree: Walk, file_of: Callable[[str, str], File], known: set[str], into: Listing) -> None:
    for folder, below, names in tree:
        for name in list(below):
            file = file_of(folder, name)
            if why := foreign(name) or ("linked folder" if not file.member and file.path.is_symlink() else ""):
                below.remove(name)
                into.left_out[why] += 1
        if why := marked(names):
            below.clear()
            into.left_out[why] += 1
            continue
        for name in dataset(names):
            file = file_of(folder, name)
            if name.startswith("."):
                into.left_out["hidden"] += 1
            elif file.suffix not in known or not (file.member or file.path.is_file()):
                into.left_out[shown_suffix(name)] += 1
            else:
                into.files.append(file)
                into.used[shown_suffix(name)] += 1


def foreign(name: str) -> str:
    """Why a folder of this name is left out; "" if it is not."""
    return "hidden" if name.startswith(".") else name if name in FOREIGN else ""


def marked(names: list[str]) -> str:
    """Why a folder that has these files is left out; "" if it is not."""
    return "virtual environment" if "pyvenv.cfg" in names else "cache" if "CACHEDIR.TAG" in names else ""


def dataset(names: list[str]) -> list[str]:
    """Without what a saved Hugging Face dataset has beside its rows: descriptions, and what was computed from it."""
    if not {"dataset_info.json", "dataset_dict.json"} & set(names):
        return names
    about = {"dataset_info.json", "dataset_dict.json", "state.json"}
    return [name for name in names if name not in about and not (name.startswith("cache-") and name.endswith(".arrow"))]


def walk(root: Path) -> Walk:
    def fail(e: OSError) -> None:
        raise e

    return os.walk(root, onerror=fail)


def walk_archive(archive: zipfile.ZipFile) -> Walk:
    """Of an archive as os.walk does of a folder; names of folders end in "/"."""
    folders: dict[str, tuple[dict[str, None], list[str]]] = {"": ({}, [])}
    for name in dict.fromkeys(archive.namelist()):
        *above, last = name.split("/")
        for depth in range(len(above)):
            folders.setdefault("".join(f"{part}/" for part in above[:depth]), ({}, []))[0][above[depth]] = None
        if last:
            folders.setdefault("".join(f"{part}/" for part in above), ({}, []))[1].append(last)
    waiting = [""]
    while waiting:
        folder = waiting.pop()
        below, names = list(folders.get(folder, ({}, []))[0]), folders.get(folder, ({}, []))[1]
        yield folder, below, names
        waiting += [f"{folder}{name}/" for name in below]


def standard_library(root: Path | None = None) -> list[File]:
    """Code of the standard library; by default of the Python that runs."""
    root = root or Path(sysconfig.get_paths()["stdlib"])

    def ours(path: str, name: str) -> bool:
        return not ({name, path} & NOT_STDLIB or name.startswith(NOT_STDLIB_BEGINS))

    files = []
    for folder, below, names in walk(root):
        at = Path(folder).relative_to(root)
        below[:] = [name for name in below if ours(at.joinpath(name).as_posix(), name)]
        files += [File(Path(folder, name)) for name in names if name.endswith(".py") and ours(at.joinpath(name).as_posix(), name)]
    return sorted(files)


# -- opening ---------------------------------------------------------------------------------------------------------------------------


Open = Callable[[], AbstractContextManager[BinaryIO]]  # unpacked as it is read, from the start and as often as it takes


@contextmanager
def opening(path: Path) -> Iterator[Callable[[File], AbstractContextManager[BinaryIO]]]:
    """How a file, or each member of an archive, is opened.

    Raises:
        DataError: on an archive that is damaged or a member that is encrypted.
    """
    if path.suffix.lower() != ".zip":
        yield opened
        return
    with archive_at(path) as archive:
        yield partial(opened, archive=archive)


@contextmanager
def opened(file: File, archive: zipfile.ZipFile | None = None) -> Iterator[BinaryIO]:
    if archive and archive.getinfo(file.member).flag_bits & 1:
        raise DataError(f"{file}: it is encrypted; unpack the archive first")
    opener = next((opener for suffix, opener in PACKED.items() if file.name.lower().endswith(suffix)), nullcontext)
    with archive.open(file.member) if archive else open(file.path, "rb") as raw, opener(raw) as stream:
        yield stream


def archive_at(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except (zipfile.BadZipFile, NotImplementedError, ValueError) as e:
        raise DataError(f"{path}: damaged, or no archive ({e})") from e
