"""Weights to compute with while the parameters are in host memory: blocks come to the device as they are read, in order."""

from collections import deque
from collections.abc import Iterator

import torch

from hyperlm import tree
from hyperlm.precision import compute_copy
from hyperlm.residence import slab
from hyperlm.residence.lanes import Lane, Ring
from hyperlm.tree import Tree

SLOTS = 2


class Streamed:
    """Packed blocks in host memory, to be iterated over: each is on the device, in what it computes with, until the next but one is asked for."""

    def __init__(self, blocks: list[Tree], dtype: torch.dtype, device: torch.device) -> None:
        self.blocks, self.dtype = blocks, dtype
        self.main, self.into = Lane(device, own=False), Lane(device)
        self.ring = Ring(SLOTS, max(slab.size(block) for block in blocks), device)

    def __len__(self) -> int:
        return len(self.blocks)

    def __iter__(self) -> Iterator[Tree]:
        coming: deque = deque()
        left = iter(self.blocks)

        def fetch() -> None:
            if (block := next(left, None)) is not None:
                memory, number = self.ring.take(self.into)
                whole = slab.slab(block)
                with self.into.open():
                    memory[: len(whole)].copy_(whole, non_blocking=True)
                coming.append((slab.views(memory, block), number, self.into.mark()))

        for _ in range(SLOTS):
            fetch()
        while coming:
            stored, number, ready = coming.popleft()
            self.main.wait(ready)
            try:
                yield compute_copy(stored, self.dtype)
            finally:  # after the last block too, though nobody asks for another
                self.ring.free[number] = (self.main.mark(),)
            fetch()


def streamed(params: Tree, dtype: torch.dtype, device: torch.device) -> Tree:
    """Weights for `model.hidden` and its like from packed `params` in host memory: embedding and head on `device`, blocks on their way."""
    ends = {name: compute_copy(tree.map(lambda p: p.to(device), params[name]), dtype) for name in ("embed", "head")}
    return {"embed": ends["embed"], "blocks": Streamed(params["blocks"], dtype, device), "head": ends["head"]}
