"""Which documents are used, and on which side: by a hash of their content, and near the share that was asked for.

Documents of several sources are decided on together; what is held out is trained on nowhere.
"""

import hashlib
from array import array
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, TypeVar

import numpy as np

from hyperlm.data.documents import DataError, Document
from hyperlm.data.duplicates import SLOTS, originals, signatures
from hyperlm.data.sources import Readings, Source, documents
from hyperlm.env import progress

T = TypeVar("T")
AT_ONCE = 1 << 20  # characters of the documents that are worked on together
LEAST = 64  # bytes of a document that is divided, on either side


class Selection(NamedTuple):
    """Of one source, for each of its documents (there are n)."""

    hashes: np.ndarray  # (n, 2) uint64, of the content: the first decides what is used, the second what is held out
    size: np.ndarray  # (n,) int64, bytes that are used of each
    use: np.ndarray  # (n,) bool
    val: np.ndarray  # (n,) bool, held out; false where it is not used
    divided: tuple[int, float] | None = None  # a document whose beginning, of this share, is trained on and whose rest is held out
    signatures: np.ndarray | None = None  # (n, SLOTS) uint16, as long as near copies are looked for

    @property
    def used(self) -> int:
        """Bytes."""
        return int(self.size[self.use].sum())

    @property
    def train(self) -> np.ndarray:
        return self.use & ~self.val

    @property
    def order(self) -> np.ndarray:
        """64 bits a document; validation documents stand in this order, so that any prefix is a fair sample."""
        return self.hashes[:, 1]

    def digest(self) -> bytes:
        """Of the documents that are used, and how."""
        divided = self.divided and (int(self.use[: self.divided[0]].sum()), self.divided[1])
        h = hashlib.blake2b(repr((int(self.use.sum()), divided)).encode(), digest_size=16)
        for column in (self.hashes, self.size, self.val):
            h.update(column[self.use].tobytes())
        return h.digest()


def content_hash(document: Document) -> bytes:
    return hashlib.blake2b(repr(document.messages).encode() + document.raw, digest_size=16).digest()


def batched(items: Iterable[T], length: Callable[[T], int]) -> Iterator[list[T]]:
    """Items of about AT_ONCE together, by the length of each."""
    batch, size = [], 0
    for item in items:
        batch.append(item)
        size += length(item)
        if size >= AT_ONCE:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def select(source: Source, readings: Readings, dedup: bool = False) -> Selection:
    """Hash every document; all are used, and none is held out yet. With `dedup` they have signatures."""
    digests, sizes, signed = bytearray(), array("q"), bytearray()
    with progress(desc=f"reading {source.name}", unit="B", unit_scale=True) as bar:
        for batch in batched(documents(source, readings), lambda document: len(document.content)):
            for document in batch:
                digests += content_hash(document)
                sizes.append(len(document.raw))
            if dedup:
                signed += signatures([document.compared_text for document in batch]).tobytes()
            bar.update(sum(sizes[-len(batch) :]))
    hashes, size = np.frombuffer(digests, np.uint64).reshape(-1, 2), np.frombuffer(sizes, np.int64)
    rows = np.frombuffer(signed, np.uint16).reshape(-1, SLOTS) if dedup else None
    return Selection(hashes, size, np.ones(len(size), bool), np.zeros(len(size), bool), signatures=rows)


def without_near_copies(
    selections: list[Selection], held_out: list[Selection], say: Callable[[str], None]
) -> tuple[list[Selection], list[Selection]]:
    """Selections without the documents that nearly copy one of `held_out` or an earlier one; those of `held_out` stay. Signatures go."""
    signed = [s.signatures if s.use.all() else s.signatures[s.use] for s in (*held_out, *selections)]
    given = sum(map(len, signed[: len(held_out)]))
    original_of = originals(signed[0] if len(signed) == 1 else np.concatenate(signed), given)[given:]
    selected, start = [], 0
    for s in selections:
        use = s.use.copy()
        use[s.use] = original_of[start : start + s.use.sum()] < 0
        start += s.use.sum()
        selected.append(s._replace(use=use, signatures=None))
    copies = original_of >= 0
    near = f", {(copies & (original_of < given)).sum():,} of them of what is held out" if given else ""
    say(f"dedup      {copies.sum():,} of {len(original_of):,} documents left out, near copies of others{near}")
    return selected, [s._replace(signatures=None) for s in held_out]


def limited(selection: Selection, max_mib: float) -> Selection:
    """As many of its documents as `max_mib` allows (0 for all)."""
    if not max_mib:
        return selection
    which = np.flatnonzero(selection.use)
    use, size = selection.use.copy(), selection.size.copy()
    use[which], size[which] = limit(selection.hashes[which, 0], size[which], int(max_mib * (1 << 20)))
    return selection._replace(use=use, size=size)


def limit(order: np.ndarray, size: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Documents in this order, as long as they fit into `most` bytes and passing over those that do not: (which, bytes of each).

    Where none fits, the first is cut.
    """
    use, room = np.zeros(len(size), bool), most
    ranked = np.argsort(order, kind="stable")
    left = ranked[size[ranked] <= room]
    while len(left):
        total = np.cumsum(size[left])
        fit = int(np.searchsorted(total, room, "right"))
        use[left[:fit]] = True
        room -= int(total[fit - 1])
        left = left[fit:][size[left[fit:]] <= room]
    if len(size) and most and not use.any():
        use[ranked[0]] = True
        size = np.where(use, most, size)
    return use, size


def near(share: float, asked: float) -> bool:
    """Within a factor of two, on both sides."""
    return asked / 2 <= share <= 2 * asked and (1 - share) >= (1 - asked) / 2


def hold_out(
    selections: list[Selection], fraction: float, fetch: Callable[[int, int], Document], say: Callable[[str], None]
) -> list[Selection]:
    """Hold out about this share of the bytes.

    A document is held out if its hash is below the share, whatever else there is. Where that misses the share by a factor of two, as with
    few documents or one that is most of the text, documents are held out in the order of their hashes, passing over what is too long; and
    if nothing is short enough, the end of the longest is held out.

    Args:
        fetch: (selection, document) -> the document.
        say: is told of all but the first case.

    Raises:
        DataError: if the text is too short to be on two sides.
    """
    below = [s.use & (s.order / 2.0**64 < fraction) for s in selections]
    total = sum(s.used for s in selections)
    by_hash = sum(int(s.size[held].sum()) for s, held in zip(selections, below, strict=True)) / total
    if near(by_hash, fraction):
        return [s._replace(val=held) for s, held in zip(selections, below, strict=True)]

    contents, which = np.unique(np.concatenate([s.order[s.use] for s in selections]), return_inverse=True)  # copies go together
    size = np.bincount(which, np.concatenate([s.size[s.use] for s in selections]), len(contents))

    def holding(held: np.ndarray) -> list[Selection]:
        return [s._replace(val=s.use & np.isin(s.order, contents[held])) for s in selections]

    held, room = np.zeros(len(contents), bool), fraction * total
    for i in range(len(contents)):
        if size[i] <= room:
            held[i] = True
            room -= size[i]
    share = size[held].sum() / total
    if near(share, fraction):
        count = f"{held.sum():,} of {len(contents):,} documents"
        say(f"split      {share:.1%} of the text held out, {count}; by hash alone it would be {by_hash:.1%} instead of {fraction:.1%}")
        return holding(held)

    longest = int(np.argmax(np.where(held, 0, size)))
    source, index = next((k, int(i)) for k, s in enumerate(selections) for i in np.flatnonzero(s.use & (s.order == contents[longest])))
    document = fetch(source, index).head(int(selections[source].size[index]))
    length = len(document.raw)
    tail = min(max(room, LEAST), length / 2)
    parts = document.divide(1 - tail / length) if length >= 2 * LEAST else None
    if parts:
        what = "the text is one document" if len(contents) == 1 else "documents are few and long"
        whole = int(held.sum())
        beside = f" beside {whole} whole one{'s' * (whole > 1)}" if whole else ""
        say(f"split      {what}: the last {len(parts[1].raw):,} bytes of one are held out{beside}")
        selected = holding(held)
        selected[source] = selected[source]._replace(divided=(index, 1 - tail / length))
        return selected
    if len(contents) == 1:
        short = f"the text is one document of {length} bytes, too short to hold out its end"
        raise DataError(f"{short}, and validation needs another: add text or set --data.val-sources")
    if not held.any():
        held[int(np.argmin(size))] = True
    say(f"split      {size[held].sum() / total:.1%} of the text is held out instead of {fraction:.1%}: no documents are of a better length")
    return holding(held)


def drop_copies(training: list[Selection], validation: list[Selection], say: Callable[[str], None]) -> list[Selection]:
    """Train on nothing that is also held out."""
    contents = [s.order[s.val] for s in (*training, *validation)] + [s.order[[s.divided[0]]] for s in training if s.divided]
    held = np.unique(np.concatenate(contents))
    dropped, selected = 0, []
    for s in training:
        copies = s.train & among(s.order, held)
        if s.divided:
            copies[s.divided[0]] = False
        dropped += int(copies.sum())
        selected.append(s._replace(use=s.use & ~copies))
    if dropped:
        say(f"split      {dropped:,} document{'s' * (dropped > 1)} dropped from training: the same text is held out")
    return selected


def among(values: np.ndarray, ordered: np.ndarray) -> np.ndarray:
    """Whether each value is one of `ordered`, which are sorted; in a fifth of the memory of np.isin."""
    at = np.searchsorted(ordered, values)
    at[at == len(ordered)] = 0
    return ordered[at] == values if len(ordered) else np.zeros(len(values), bool)


def chosen(source: Source, selection: Selection, readings: Readings) -> Iterator[tuple[int, Document, bool]]:
    """Every document that is used, as (its number, the document, whether it is held out).

    Raises:
        DataError: if files are not what they were when documents were selected.
    """
    count = 0
    for i, document in enumerate(documents(source, readings)):
        if i == len(selection.size) or content_hash(document) != selection.hashes[i].tobytes():
            break
        count += 1
        if not selection.use[i]:
            continue
        document = document.head(int(selection.size[i]))
        if selection.divided and selection.divided[0] == i:
            for part, val in zip(document.divide(selection.divided[1]) or (), (False, True), strict=True):
                yield i, part, val
        else:
            yield i, document, bool(selection.val[i])
    else:
        if count == len(selection.size):
            return
    raise DataError(f"{source.name}: its text changed while it was read; start again when nothing writes there")
