"""A function of tensors, recorded in a CUDA graph once and replayed: its hundreds of launches cost the CPU the time of one."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

WARM_UPS = 2  # calls before recording: compiling, and what libraries allocate at first


def cuda_graphed(fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn` of CUDA tensors, recorded at the first call with tensors of given shapes and dtypes.

    What `fn` reads besides its arguments must stay where it is in memory, and what it returns is overwritten by the next call. It must
    not wait for the device.
    """
    graphs: dict[tuple, tuple[torch.cuda.CUDAGraph, list[Tensor], Any]] = {}

    def record(inputs: tuple[Tensor, ...]) -> tuple[torch.cuda.CUDAGraph, list[Tensor], Any]:
        static = [x.clone() for x in inputs]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                fn(*static)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads may go on allocating
            out = fn(*static)
        return graph, static, out

    def call(*inputs: Tensor) -> Any:
        key = tuple((x.shape, x.dtype) for x in inputs)
        if key not in graphs:
            graphs[key] = record(inputs)
        graph, static, out = graphs[key]
        for x, y in zip(static, inputs, strict=True):
            x.copy_(y, non_blocking=True)
        graph.replay()
        return out

    return call
