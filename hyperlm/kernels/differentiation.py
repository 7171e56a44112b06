"""Backward passes that launch kernels, made safe for torch.func.

Inside `torch.func.grad` a backward pass receives wrapped tensors, which have no memory that a kernel could read. A second autograd.Function
around the launch unwraps them.
"""

from collections.abc import Callable
from typing import Any

import torch


class Launch(torch.autograd.Function):
    @staticmethod
    def forward(fn: Callable, *args: Any) -> Any:
        return fn(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Any) -> None:
        raise NotImplementedError("the Triton kernels can be differentiated once; use --kernels torch for more")


def gradients(fn: Callable, *args: Any) -> Any:
    """fn(*args), tensors from tensors, not to be differentiated again."""
    # the condition under which torch.autograd.Function itself takes another path
    if torch._C._are_functorch_transforms_active() or torch.is_grad_enabled():
        return Launch.apply(fn, *args)
    return fn(*args)
