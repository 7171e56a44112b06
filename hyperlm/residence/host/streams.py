"""What a device does at the same time: CUDA streams and events, and the buffers that they fill in turn. On a CPU everything happens in
order."""

from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from hyperlm.residence.flat import allocate

Event = torch.cuda.Event | None


class Stream:
    """A sequence of operations: made inside `with stream.use()`, after what `stream.wait` was told to wait for."""

    def __init__(self, device: torch.device, *, separate: bool = True, priority: int = 0) -> None:
        self.stream = None
        if device.type == "cuda":
            self.stream = torch.cuda.Stream(device, priority=priority) if separate else torch.cuda.current_stream(device)

    def use(self) -> AbstractContextManager:
        return torch.cuda.stream(self.stream)

    def record(self) -> Event:
        """What has been given to the stream so far, for others to wait for."""
        return None if self.stream is None else self.stream.record_event()

    def wait(self, *events: Event) -> None:
        for event in events:
            if event is not None and self.stream is not None:
                self.stream.wait_event(event)


def read_async(x: Tensor, stream: Stream, copy_to_host: Callable[[Tensor, Tensor], None]) -> Callable[[], list[float]]:
    """Send a vector of a few numbers home on `stream`, the current one, by `copy_to_host` of the dispatch table; the function returned
    waits for them."""
    at_home = torch.empty(x.shape, pin_memory=stream.stream is not None)
    copy_to_host(x, at_home)
    sent = stream.record()

    def wait() -> list[float]:
        if sent is not None:
            sent.synchronize()
        return at_home.tolist()

    return wait


class InFlight:
    """Tensors that another stream still reads: memory of theirs may only be used again after that."""

    def __init__(self, main: Stream) -> None:
        self.main = main
        self.tensors: deque[tuple[Event, Any]] = deque()

    def add(self, until: Event, tensors: Any) -> None:
        self.tensors.append((until, tensors))

    def drain(self, keep: int = 0) -> None:
        """Forget all but the newest `keep`, once they have been read."""
        while len(self.tensors) > keep:
            until, _ = self.tensors.popleft()
            self.main.wait(until)


class Ring:
    """Buffers of device memory that are used in turn; `free` holds what has to happen before each is used again."""

    def __init__(self, count: int, size: int, device: torch.device) -> None:
        self.buffers = [allocate(size, device) for _ in range(count)]
        # What the allocator hands out may still be read by operations that were given to the current stream before.
        self.free: list[tuple[Event, ...]] = [(Stream(device, separate=False).record(),)] * count
        self.next = 0

    def take(self, stream: Stream) -> tuple[Tensor, int]:
        """The next buffer, for `stream` to fill, and its number."""
        number = self.next
        self.next = (number + 1) % len(self.buffers)
        stream.wait(*self.free[number])
        return self.buffers[number], number
