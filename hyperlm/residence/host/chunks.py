"""Chunks of a stage, so that some of it can move while the rest is updated."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from hyperlm import tree
from hyperlm.kernels.reference.optimizer import QUANT_BLOCK
from hyperlm.residence import flat
from hyperlm.tree import Tree


@dataclass(frozen=True)
class Part:
    """Blocks first .. last of a leaf, of QUANT_BLOCK numbers each."""

    leaf: int
    first: int
    last: int
    whole: bool  # they are all of the leaf


def chunks_of(leaves: list[Tensor], numbers: int) -> list[list[Part]]:
    """The leaves of a stage, in order, in chunks of about so many numbers."""
    chunks: list[list[Part]] = [[]]
    room = most = max(1, numbers // QUANT_BLOCK)
    for index, leaf in enumerate(leaves):
        first, end = 0, -(-leaf.numel() // QUANT_BLOCK)
        while first < end:
            if room == 0 or (leaf.dim() < 2 and end > room):  # vectors stay whole
                chunks.append([])
                room = most
            last = min(end, first + room) if leaf.dim() > 1 else end
            chunks[-1].append(Part(index, first, last, (first, last) == (0, end)))
            room, first = max(0, room - (last - first)), last
    return chunks


def cut(leaf: Tensor, part: Part) -> Tensor:
    """The numbers of a part; of what is in 8 bits, its rows."""
    if part.whole:
        return leaf
    return leaf[part.first : part.last] if leaf.dtype == torch.uint8 else leaf.view(-1)[part.first * QUANT_BLOCK : part.last * QUANT_BLOCK]


class Chunk(NamedTuple):
    """What a chunk has of a flat tree."""

    views: list[Tensor]  # of each part
    memory: Tensor  # from the first byte of the first to the last of the last, uint8


def split(stage: Tree, chunks: list[list[Part]]) -> list[Chunk]:
    """A flat stage, or a tree like it, in chunks."""
    leaves, whole = tree.leaves(stage), flat.buffer(stage)

    def of(parts: list[Part]) -> Chunk:
        views = [cut(leaves[part.leaf], part) for part in parts]
        start = views[0].storage_offset() * views[0].element_size()
        end = views[-1].storage_offset() * views[-1].element_size() + views[-1].nbytes
        return Chunk(views, whole[start:end])

    return [of(parts) for parts in chunks]


def view_in(memory: Tensor, like: Chunk) -> Chunk:
    """The same views, in `memory`."""
    start = like.memory.storage_offset()

    def view(x: Tensor) -> Tensor:
        at = x.storage_offset() * x.element_size() - start
        return memory[at : at + x.nbytes].view(x.dtype).view(x.shape)

    return Chunk([view(x) for x in like.views], memory[: like.memory.nbytes])
