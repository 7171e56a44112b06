"""Flat buffers: a stage's tensors in one piece of memory, so that one copy moves all of them."""

import mmap
import weakref

import numpy as np
import torch
from torch import Tensor

from hyperlm import tree
from hyperlm.tree import Tree

CPU, META = torch.device("cpu"), torch.device("meta")
ALIGNMENT = 512  # bytes; every leaf starts at a multiple


def padded(size: int, unit: int = ALIGNMENT) -> int:
    return -(-size // unit) * unit


def size(stage: Tree) -> int:
    """Bytes of a flat buffer of these leaves: tensors, on any device."""
    return sum(padded(leaf.nbytes) for leaf in tree.leaves(stage))


def pinned(size: int) -> Tensor:
    """Host memory that a GPU copies from and to while it computes. Registered, not allocated as such: that would round up to a power of
    two. In whole pages of its own: a driver pins pages, and lets them go, whatever else is in them."""
    room = padded(size, mmap.PAGESIZE)
    array = np.empty(room + mmap.PAGESIZE, np.uint8)  # lives as long as any tensor in it
    start = -array.ctypes.data % mmap.PAGESIZE
    runtime, address = torch.cuda.cudart(), array.ctypes.data + start
    torch.cuda.check_error(runtime.cudaHostRegister(address, room, 0))
    weakref.finalize(array, unpin, address).atexit = False
    return torch.from_numpy(array[start : start + size])


def unpin(address: int) -> None:
    torch.cuda.synchronize()  # a step returns while its last gradients and moments are still on their way here
    torch.cuda.cudart().cudaHostUnregister(address)


def allocate(size: int, device: torch.device, *, pin: bool = False) -> Tensor:
    """(size,) uint8."""
    return pinned(size) if pin else torch.empty(size, dtype=torch.uint8, device=device)


def views(memory: Tensor, stage: Tree) -> Tree:
    """Tensors like those of `stage`, laid out in `memory`."""
    leaves, at = [], 0
    for leaf in tree.leaves(stage):
        leaves.append(memory[at : at + leaf.nbytes].view(leaf.dtype).view(leaf.shape))
        at += padded(leaf.nbytes)
    return tree.unflatten(leaves, stage)


def empty(stage: Tree, device: torch.device = CPU, *, pin: bool = False) -> Tree:
    """Tensors like those of `stage` in one flat buffer, yet to be written."""
    return views(allocate(size(stage), device, pin=pin), stage)


def flatten(stage: Tree, device: torch.device = CPU, *, pin: bool = False, dtype: torch.dtype | None = None) -> Tree:
    """A copy of `stage` in one flat buffer; its leaves in `dtype`, if given."""
    like = tree.map(lambda leaf: torch.empty(leaf.shape, dtype=dtype or leaf.dtype, device="meta"), stage)
    copy = empty(like, device, pin=pin)
    for to, leaf in zip(tree.leaves(copy), tree.leaves(stage), strict=True):
        to.copy_(leaf)
    return copy


def buffer(stage: Tree) -> Tensor:
    """The memory that a flat stage lies in, (size,) uint8."""
    storage = tree.leaves(stage)[0].untyped_storage()
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage, 0, (storage.nbytes(),), (1,))
