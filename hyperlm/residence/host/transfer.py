"""Stages and gradients on their way between host and device. What learns of it is in update.py, residuals in residuals.py.

Six streams work at the same time: copies to the device, copies to the host, the same of residuals, updates, and everything else. What waits
in a stream holds up all that comes after it.
"""

import torch
from torch import Tensor

from hyperlm import tree
from hyperlm.residence import flat
from hyperlm.residence.host.buffers import Slots
from hyperlm.residence.host.streams import Event, Stream
from hyperlm.residence.program import Shape
from hyperlm.tree import Tree

Home = dict[
    str, list[Tree]
]  # what is in host memory, by name and stage: params, moments by theirs, grads that are pending and new grads; each stage a flat buffer


class Transfer:
    def __init__(self, slots: Slots, shape: Shape, device: torch.device) -> None:
        self.slots, self.shape = slots, shape
        self.main, self.h2d, self.d2h = Stream(device, separate=False), Stream(device), Stream(device)
        stages = shape.head + 1
        self.written: list[Event] = [None] * stages  # when each stage in host memory is up to date
        self.sent: list[Event] = [None] * stages  # and each gradient
        self.ready: list[Event] = [None] * stages  # when each stage on the device may be used

    def reserve(self, stage: int, stream: Stream) -> None:
        """Before `stream` overwrites a stage's buffers, or what is in them."""
        for buffer in self.shape.buffers(stage):
            stream.wait(*self.slots.free[buffer])

    def fetch(self, home: Home, stage: int) -> None:
        """Bring a stage's weights to the device."""
        self.reserve(stage, self.h2d)
        self.h2d.wait(self.written[stage])
        with self.h2d.use():
            self.slots.memory[stage].copy_(flat.buffer(home["params"][stage]), non_blocking=True)
        self.ready[stage] = self.h2d.record()

    def release(self, stage: int) -> None:
        """The main stream has no more use of a stage on the device."""
        for buffer in self.shape.buffers(stage):
            self.slots.free[buffer] = (self.main.record(), self.written[stage])

    def offload(self, home: Home, stage: int, grads: list[Tensor]) -> Event:
        """Send a stage's gradient to host memory, where nothing needs the one before any more; `grads` must outlive the copy, which ends at
        the event."""
        self.d2h.wait(self.main.record())
        with self.d2h.use():
            for to, grad in zip(tree.leaves(home["new grads"][stage]), grads, strict=True):
                to.copy_(grad, non_blocking=True)
        self.sent[stage] = self.d2h.record()
        return self.sent[stage]
