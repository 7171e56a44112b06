"""Pieces of a stage, so that some of it can move while the rest is computed with."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from hyperlm import tree
from hyperlm.kernels.reference.optimizer import QUANT_BLOCK
from hyperlm.residence import slab
from hyperlm.tree import Tree


@dataclass(frozen=True)
class Part:
    """Blocks first .. last of a leaf, of QUANT_BLOCK numbers each."""

    leaf: int
    first: int
    last: int
    whole: bool  # they are all of the leaf


def pieces_of(leaves: list[Tensor], numbers: int) -> list[list[Part]]:
    """The leaves of a stage, in order, in pieces of about so many numbers."""
    pieces: list[list[Part]] = [[]]
    room = most = max(1, numbers // QUANT_BLOCK)
    for index, leaf in enumerate(leaves):
        first, end = 0, -(-leaf.numel() // QUANT_BLOCK)
        while first < end:
            if room == 0 or (leaf.dim() < 2 and end > room):  # vectors stay whole
                pieces.append([])
                room = most
            last = min(end, first + room) if leaf.dim() > 1 else end
            pieces[-1].append(Part(index, first, last, (first, last) == (0, end)))
            room, first = max(0, room - (last - first)), last
    return pieces


def cut(leaf: Tensor, part: Part) -> Tensor:
    """The numbers of a part; of what is in 8 bits, its rows."""
    if part.whole:
        return leaf
    return leaf[part.first : part.last] if leaf.dtype == torch.uint8 else leaf.view(-1)[part.first * QUANT_BLOCK : part.last * QUANT_BLOCK]


class Cut(NamedTuple):
    """What a piece has of a packed tree."""

    views: list[Tensor]  # of each part
    memory: Tensor  # from the first byte of the first to the last of the last, uint8


def cut_up(stage: Tree, pieces: list[list[Part]]) -> list[Cut]:
    """A packed stage, or a tree like it, in pieces."""
    leaves, whole = tree.leaves(stage), slab.slab(stage)

    def of(piece: list[Part]) -> Cut:
        views = [cut(leaves[part.leaf], part) for part in piece]
        start = views[0].storage_offset() * views[0].element_size()
        end = views[-1].storage_offset() * views[-1].element_size() + views[-1].nbytes
        return Cut(views, whole[start:end])

    return [of(piece) for piece in pieces]


def copy_in(memory: Tensor, model: Cut) -> Cut:
    """The same views, in `memory`."""
    start = model.memory.storage_offset()

    def moved(x: Tensor) -> Tensor:
        at = x.storage_offset() * x.element_size() - start
        return memory[at : at + x.nbytes].view(x.dtype).view(x.shape)

    return Cut([moved(x) for x in model.views], memory[: model.memory.nbytes])
