"""Pieces of a stage, so that some of it can move while the rest is computed with."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hyperlm import tree
from hyperlm.kernels.reference import BLOCK
from hyperlm.residence import PIECE, slab
from hyperlm.tree import Tree


@dataclass(frozen=True)
class Part:
    """Blocks first .. last of a leaf, of BLOCK numbers each."""

    leaf: int
    first: int
    last: int
    whole: bool  # they are all of the leaf


def pieces_of(leaves: list[Tensor]) -> list[list[Part]]:
    """The leaves of a stage, in order, in pieces of at most PIECE numbers."""
    pieces: list[list[Part]] = [[]]
    room = most = PIECE // BLOCK
    for index, leaf in enumerate(leaves):
        first, end = 0, -(-leaf.numel() // BLOCK)
        while first < end:
            if room == 0 or (leaf.dim() < 2 and end > room):  # vectors stay whole
                pieces.append([])
                room = most
            last = min(end, first + room) if leaf.dim() > 1 else end
            pieces[-1].append(Part(index, first, last, (first, last) == (0, end)))
            room, first = max(0, room - (last - first)), last
    return pieces


def cut(leaf: Tensor, part: Part) -> Tensor:
    """The numbers of a part; of moments in 8 bits, its rows."""
    if part.whole:
        return leaf
    return leaf[part.first : part.last] if leaf.dtype == torch.uint8 else leaf.view(-1)[part.first * BLOCK : part.last * BLOCK]


def place(view: Tensor) -> tuple[int, int]:
    """Where in its storage a view begins and ends, in bytes."""
    start = view.storage_offset() * view.element_size()
    return start, start + view.nbytes


def most_of(trees: tuple[Tree, ...], pieces: list[list[Part]]) -> int:
    """Bytes of the largest piece, of all these trees together."""

    def size(leaves: list[Tensor], piece: list[Part]) -> int:
        cuts = [cut(leaves[part.leaf], part) for part in piece]
        return slab.padded(place(cuts[-1])[1] - place(cuts[0])[0])

    return max(sum(size(tree.leaves(own), piece) for own in trees) for piece in pieces)
