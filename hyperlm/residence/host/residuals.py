"""Residuals of blocks, from the forward pass until the backward pass reads them: on the device, or away in host memory and back."""

import torch
from torch import Tensor

from hyperlm.residence import flat
from hyperlm.residence.host.buffers import LOADS, Shelf
from hyperlm.residence.host.streams import Event, InFlight, Ring, Stream

Key = tuple[int, int]  # block, and group of micro-batches


class Store:
    """By block and group, {name: tensor}. Streams of their own: what waits in a stream holds up all that comes after it, and these copies
    wait for the computation of a block, as those of stages do not."""

    def __init__(self, main: Stream, shelf: Shelf, resident: int, loads: int, dtype: torch.dtype, device: torch.device) -> None:
        """resident: blocks of which all stays on the device; loads: bytes of all buffers for what comes back; dtype: what a block's input
        is kept in."""
        self.main, self.h2d, self.d2h = main, Stream(device), Stream(device)
        self.device, self.shelf, self.resident, self.dtype = device, shelf, resident, dtype
        self.on_device: dict[Key, dict[str, Tensor]] = {}
        self.memory: dict[Key, Tensor] = {}  # in host memory
        self.at_home: dict[Key, tuple[dict[str, Tensor], Event]] = {}  # what of it is in use, and since when
        self.coming: dict[Key, tuple[dict[str, Tensor], int, Event]] = {}
        self.reading: int | None = None  # the buffer of what was taken last
        self.saving = InFlight(main)
        self.ring = Ring(LOADS, loads // LOADS, device)

    def save(self, key: Key, residuals: dict[str, Tensor]) -> None:
        like = {name: torch.empty_like(x, dtype=self.dtype, device="meta") for name, x in residuals.items()}
        size = flat.size(like)
        if key[0] < self.resident:
            self.on_device[key] = flat.views(self.shelf.of_block(key[0])[key[1] * size :], like)
            for name, to in self.on_device[key].items():
                to.copy_(residuals[name])
            return
        if len(self.memory.get(key, ())) < size:
            self.memory[key] = flat.allocate(size, flat.CPU, pin=self.device.type == "cuda")
        room, leaving = flat.views(self.memory[key], like), {name: x.to(self.dtype) for name, x in residuals.items()}
        self.d2h.wait(self.main.record())
        with self.d2h.use():
            for name, to in room.items():
                to.copy_(leaving[name], non_blocking=True)
        self.at_home[key] = room, self.d2h.record()
        self.saving.add(self.at_home[key][1], leaving)
        self.saving.drain(keep=2)

    def drain(self) -> None:
        """All that was saved is at home."""
        self.saving.drain()

    def load(self, key: Key) -> None:
        """Begin to bring back what is in host memory."""
        room, saved = self.at_home[key]
        size = flat.size(room)
        buffer, number = self.ring.take(self.h2d)
        self.h2d.wait(saved)
        with self.h2d.use():
            buffer[:size].copy_(self.memory[key][:size], non_blocking=True)
        self.coming[key] = flat.views(buffer, room), number, self.h2d.record()

    def take(self, key: Key) -> dict[str, Tensor]:
        """What was saved, to be read until `release`."""
        if key[0] < self.resident:
            return self.on_device.pop(key)
        residuals, self.reading, ready = self.coming.pop(key)
        self.main.wait(ready)
        return residuals

    def release(self) -> None:
        """What was taken last has been read."""
        if self.reading is not None:
            self.ring.free[self.reading] = (self.main.record(),)
            self.reading = None
