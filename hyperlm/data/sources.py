"""Sources to documents: files (.txt, .md, .py, .jsonl), folders of them, `stdlib`, and recipes (.toml) that name several."""

import json
import sysconfig
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from hyperlm.tokenizer import ROLES

SUFFIXES = (".txt", ".md", ".py", ".jsonl")
NOT_STDLIB = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
PIECE = 8192  # characters after which prose is cut at the next empty line: one file is many documents


class DataError(ValueError):
    """Text that cannot be used; the message says what, why and what to do."""


class Source(NamedTuple):
    """A place that text comes from; weight None means by size."""

    name: str
    path: Path | None  # None for the standard library
    weight: float | None


class Document(NamedTuple):
    """A text, or a conversation as (role, content) pairs."""

    text: str
    messages: tuple[tuple[str, str], ...] = ()

    @property
    def raw(self) -> bytes:
        """The bytes that bits per byte are counted on."""
        return (self.text or "".join(content for _, content in self.messages)).encode("utf-8", "replace")


def parse_sources(texts: tuple[str, ...]) -> list[Source]:
    """Read `path`, `path:weight`, `stdlib` and recipes.

    Raises:
        DataError: on a missing path, a bad weight or a bad recipe.
    """
    sources = []
    for text in texts:
        path, weight = text, None
        if ":" in text and not Path(text).exists():
            head, _, tail = text.rpartition(":")
            try:
                path, weight = head, float(tail)
            except ValueError as e:
                raise DataError(f"--data.sources {text}: no such file, and {tail!r} is not a weight") from e
            if not 0 < weight < float("inf"):
                raise DataError(f"--data.sources {text}: a weight must be above 0")
        if path.endswith(".toml"):
            sources += read_recipe(Path(path))
        else:
            sources.append(source_at(path, weight))
    return sources


def source_at(path: str, weight: float | None, base: Path = Path()) -> Source:
    if path == "stdlib":
        return Source("stdlib", None, weight)
    full = base / Path(path).expanduser()
    if not full.exists():
        raise DataError(f"--data.sources {path}: no such file or folder")
    if full.is_file() and full.suffix not in SUFFIXES:
        raise DataError(f"--data.sources {path}: cannot read {full.suffix or 'a file without suffix'}; use {' '.join(SUFFIXES)} or a recipe .toml")
    return Source(full.name, full, weight)


def read_recipe(path: Path) -> list[Source]:
    """Sources of a recipe: [[sources]] tables with `path` and an optional `weight`; paths are relative to the recipe."""
    try:
        entries = tomllib.loads(path.read_text())["sources"]
        return [source_at(entry["path"], float(entry["weight"]) if "weight" in entry else None, path.parent) for entry in entries]
    except FileNotFoundError as e:
        raise DataError(f"--data.sources {path}: no such file") from e
    except (tomllib.TOMLDecodeError, KeyError, TypeError, ValueError) as e:
        if isinstance(e, DataError):
            raise
        raise DataError(f"{path}: not a recipe ({e}); it needs [[sources]] tables with path and weight") from e


def files(source: Source) -> list[Path]:
    if source.path is None:
        root = Path(sysconfig.get_paths()["stdlib"])
        return sorted(p for p in root.rglob("*.py") if not NOT_STDLIB & set(p.relative_to(root).parts[:-1]))
    if source.path.is_file():
        return [source.path]
    return sorted(p for p in source.path.rglob("*") if p.suffix in SUFFIXES and p.is_file())


def documents(source: Source) -> Iterator[Document]:
    """Every non-empty document of a source, always in the same order."""
    for path in files(source):
        text = path.read_bytes().decode("utf-8", "replace")
        if path.suffix == ".jsonl":
            yield from jsonl_documents(path, text)
        elif path.suffix == ".py":
            yield Document(text)
        else:
            yield from (Document(piece) for piece in pieces(text))


def pieces(text: str) -> Iterator[str]:
    """Cut prose at the first empty line after PIECE characters; the pieces join to the text."""
    start = 0
    while start < len(text):
        cut = text.find("\n\n", start + PIECE)
        end = len(text) if cut < 0 else cut + 2
        yield text[start:end]
        start = end


def jsonl_documents(path: Path, text: str) -> Iterator[Document]:
    """Lines with a `text` field, or `messages` of {"role", "content"}."""
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            if "messages" in record:
                messages = tuple((m["role"], m["content"]) for m in record["messages"])
                if wrong := {role for role, _ in messages} - set(ROLES):
                    raise ValueError(f"role {wrong.pop()!r} is none of {', '.join(ROLES)}")
                yield Document("", messages)
            elif not isinstance(record["text"], str):
                raise ValueError("text is not a string")
            else:
                yield Document(record["text"])
        except KeyError as e:
            raise DataError(f"{path}:{number}: no {e} field; a line needs text, or messages with role and content") from e
        except (ValueError, TypeError) as e:
            raise DataError(f"{path}:{number}: {e}") from e
