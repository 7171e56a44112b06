"""Lanes: what a device does at the same time. CUDA streams and events; on a CPU everything happens in order, and nothing needs to wait."""

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from hyperlm.residence.slab import allocate

Event = torch.cuda.Event | None


class Lane:
    """A sequence of operations: made inside `with lane.open()`, after what `lane.wait` was told to wait for."""

    def __init__(self, device: torch.device, *, own: bool = True, priority: int = 0) -> None:
        self.stream = None
        if device.type == "cuda":
            self.stream = torch.cuda.Stream(device, priority=priority) if own else torch.cuda.current_stream(device)

    def open(self) -> AbstractContextManager:
        return torch.cuda.stream(self.stream)

    def mark(self) -> Event:
        """What has been given to the lane so far, for others to wait for."""
        return None if self.stream is None else self.stream.record_event()

    def wait(self, *events: Event) -> None:
        for event in events:
            if event is not None:
                self.stream.wait_event(event)


def told(x: Tensor, lane: Lane, tell: Callable[[Tensor, Tensor], None]) -> Callable[[], list[float]]:
    """Send a vector of a few numbers home on `lane`, the current one, by `tell` of the dispatch table; the function returned waits for them."""
    at_home = torch.empty(x.shape, pin_memory=lane.stream is not None)
    tell(x, at_home)
    sent = lane.mark()

    def wait() -> list[float]:
        if sent is not None:
            sent.synchronize()
        return at_home.tolist()

    return wait


class Ring:
    """Buffers of device memory that are used in turn; `free` holds what has to happen before each is used again."""

    def __init__(self, count: int, size: int, device: torch.device) -> None:
        self.buffers = [allocate(size, device) for _ in range(count)]
        # What the allocator hands out may still be read by operations that were given to the current stream before.
        self.free: list[tuple[Event, ...]] = [(Lane(device, own=False).mark(),)] * count
        self.next = 0

    def take(self, lane: Lane) -> tuple[Tensor, int]:
        """The next buffer, for `lane` to fill, and its number."""
        number = self.next
        self.next = (number + 1) % len(self.buffers)
        lane.wait(*self.free[number])
        return self.buffers[number], number
