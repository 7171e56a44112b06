"""Weights to compute with while the parameters are in host memory: they come to the device as they are read, blocks in order."""

from collections import deque
from collections.abc import Iterator

import torch

from hyperlm import tree
from hyperlm.precision import compute_copy
from hyperlm.residence import flat
from hyperlm.residence.host.streams import Ring, Stream
from hyperlm.tree import Tree

STREAMED = 2  # buffers on the device for blocks


class Streamed:
    """Flat blocks in host memory, to be iterated over: each is on the device, in what it computes with, until the next but one is asked
    for."""

    def __init__(self, blocks: list[Tree], dtype: torch.dtype, device: torch.device) -> None:
        self.blocks, self.dtype = blocks, dtype
        self.main, self.h2d = Stream(device, separate=False), Stream(device)
        self.ring = Ring(STREAMED, max(flat.size(block) for block in blocks), device)

    def __len__(self) -> int:
        return len(self.blocks)

    def __iter__(self) -> Iterator[Tree]:
        coming: deque = deque()
        left = iter(self.blocks)

        def fetch() -> None:
            if (block := next(left, None)) is not None:
                memory, number = self.ring.take(self.h2d)
                whole = flat.buffer(block)
                with self.h2d.use():
                    memory[: len(whole)].copy_(whole, non_blocking=True)
                coming.append((flat.views(memory, block), number, self.h2d.record()))

        for _ in range(STREAMED):
            fetch()
        while coming:
            stored, number, ready = coming.popleft()
            self.main.wait(ready)
            try:
                yield compute_copy(stored, self.dtype)
            finally:  # after the last block too, though nobody asks for another
                self.ring.free[number] = (self.main.record(),)
            fetch()


class OneEnd:
    """Weights of which embedding or head is on the device, whichever was asked for last."""

    def __init__(self, params: Tree, dtype: torch.dtype, device: torch.device) -> None:
        self.params, self.dtype, self.device = params, dtype, device
        self.blocks = Streamed(params["blocks"], dtype, device)
        self.end: dict[str, Tree] = {}

    def __getitem__(self, stage: str) -> Tree:
        if stage == "blocks":
            return self.blocks
        if stage not in self.end:
            self.end.clear()
            self.end[stage] = on_device(self.params[stage], self.dtype, self.device)
        return self.end[stage]


def on_device(stage: Tree, dtype: torch.dtype, device: torch.device) -> Tree:
    return compute_copy(tree.map(lambda p: p.to(device), stage), dtype)


def streamed(params: Tree, dtype: torch.dtype, device: torch.device, *, keep_ends: bool) -> Tree | OneEnd:
    """Weights for `model.hidden` and its like from flat `params` in host memory, blocks on their way. keep_ends: embedding and head stay on
    `device`, which is faster where there is room for both."""
    if not keep_ends:
        return OneEnd(params, dtype, device)
    ends = {name: on_device(params[name], dtype, device) for name in ("embed", "head")}
    return {"embed": ends["embed"], "blocks": Streamed(params["blocks"], dtype, device), "head": ends["head"]}
