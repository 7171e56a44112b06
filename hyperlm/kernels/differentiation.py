"""What gradients have in common: calling them quickly, backward passes that are safe under torch.func, and products.

Inside `torch.func.grad` a backward pass receives wrapped tensors, which have no memory that a kernel could read. A second autograd.Function
around the launch unwraps them.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Function(torch.autograd.Function):
    """An autograd.Function with a `setup_context`. For these torch binds arguments to the signature of `forward` at every call, which
    takes longer than a launch; here they are given by position."""

    @classmethod
    def apply(cls, *args: Any) -> Any:
        if torch._C._are_functorch_transforms_active():
            return super().apply(*args)
        return super(torch.autograd.Function, cls).apply(*args)  # type: ignore[misc]  # that of torch._C


class Launch(Function):
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


def linear_vjp(d: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The vector-Jacobian product of a linear map: the gradients of x (..., C) and weight (D, C) from d (..., D), that of x weight^T."""
    return d @ weight, weight_gradient(d, x)


def weight_gradient(d: Tensor, x: Tensor) -> Tensor:
    return d.flatten(0, -2).mT @ x.flatten(0, -2)
