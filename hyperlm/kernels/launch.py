"""Launching a Triton kernel without examining again what was examined before.

Triton examines every argument at every launch, to choose among the variants of a kernel that it has compiled: 100 microseconds and more for
the 40 arguments of a large one, during which a GPU has nothing to do. Here the choice is remembered.
"""

from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime.jit import JITFunction

NEWER = tuple(map(int, triton.__version__.split(".")[:2])) > (3, 6)  # Triton that gives the same program more registers and buffers
variants: dict[tuple, Any] = {}  # what a launch depends on -> the compiled kernel


def cdiv(a: int, b: int) -> int:
    """a / b rounded up. Triton has this and the next as well, for kernels too: they take 6 microseconds a call, and a large step makes
    thousands."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of 2 that is not below n."""
    return 1 << (n - 1).bit_length()


@lru_cache
def is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


def launch(
    kernel: Any, grid: tuple[int, ...], *arguments: Any, warps: int = 4, stages: int = 3, registers: int | None = None, **constants: Any
) -> None:
    """kernel[grid](*arguments, **constants), constants in the kernel's order and after all arguments.

    Args:
        warps, stages: of a program, and of its pipelined loops.
        registers: the most that a thread may use, so that more programs fit on a multiprocessor.
    """
    if not isinstance(kernel, JITFunction):  # the interpreter's
        kernel[grid](*arguments, **constants)
        return
    # Triton distinguishes dtypes, addresses that 16 divides, and integers by size and by divisibility: here, by value.
    facts = [(x.dtype, x.data_ptr() % 16) if isinstance(x, Tensor) else x for x in arguments]
    key = (kernel, torch.cuda.current_device(), warps, stages, registers, *facts, *constants.values())
    variant = variants.get(key)
    if variant is None:
        if kernel.arg_names[len(arguments) :] != list(constants):
            raise TypeError(f"{kernel.__name__} takes {kernel.arg_names[len(arguments) :]}, not {list(constants)}")
        variants[key] = kernel[grid](*arguments, **constants, num_warps=warps, num_stages=stages, maxnreg=registers)
    else:
        variant[(*grid, 1, 1)[:3]](*arguments, *constants.values())
