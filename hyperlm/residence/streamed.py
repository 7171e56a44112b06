"""Weights to compute with while the parameters are in host memory: they come to the device as they are read, blocks in order."""

from collections import deque
from collections.abc import Iterator

import torch

from hyperlm import tree
from hyperlm.precision import compute_copy
from hyperlm.residence import STREAMED, slab
from hyperlm.residence.lanes import Lane, Ring
from hyperlm.tree import Tree


class Streamed:
    """Packed blocks in host memory, to be iterated over: each is on the device, in what it computes with, until the next but one is asked for."""

    def __init__(self, blocks: list[Tree], dtype: torch.dtype, device: torch.device) -> None:
        self.blocks, self.dtype = blocks, dtype
        self.main, self.into = Lane(device, own=False), Lane(device)
        self.ring = Ring(STREAMED, max(slab.size(block) for block in blocks), device)

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

        for _ in range(STREAMED):
            fetch()
        while coming:
            stored, number, ready = coming.popleft()
            self.main.wait(ready)
            try:
                yield compute_copy(stored, self.dtype)
            finally:  # after the last block too, though nobody asks for another
                self.ring.free[number] = (self.main.mark(),)
            fetch()


class Visiting:
    """Weights of which embedding and head come when they are asked for, and stay until the other is."""

    def __init__(self, params: Tree, dtype: torch.dtype, device: torch.device) -> None:
        self.params, self.dtype, self.device = params, dtype, device
        self.blocks = Streamed(params["blocks"], dtype, device)
        self.here: dict[str, Tree] = {}

    def __getitem__(self, stage: str) -> Tree:
        if stage == "blocks":
            return self.blocks
        if stage not in self.here:
            self.here.clear()
            self.here[stage] = on_device(self.params[stage], self.dtype, self.device)
        return self.here[stage]


def on_device(stage: Tree, dtype: torch.dtype, device: torch.device) -> Tree:
    return compute_copy(tree.map(lambda p: p.to(device), stage), dtype)


def streamed(params: Tree, dtype: torch.dtype, device: torch.device, *, keep_ends: bool) -> Tree | Visiting:
    """Weights for `model.hidden` and its like from packed `params` in host memory, blocks on their way. keep_ends: embedding and head stay on
    `device`, which is faster where there is room for both."""
    if not keep_ends:
        return Visiting(params, dtype, device)
    ends = {name: on_device(params[name], dtype, device) for name in ("embed", "head")}
    return {"embed": ends["embed"], "blocks": Streamed(params["blocks"], dtype, device), "head": ends["head"]}
