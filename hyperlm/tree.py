"""Pytrees: nested dicts and lists of tensors. The one importer of a pytree library.

A leaf's path is its keys joined by "/": `blocks/3/mixer.out`. Trees keep the order in which the model declares its parameters; code that
must not depend on it (checkpoints) goes by path.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils import _pytree

Tree = Any


def map(fn: Callable, tree: Tree, *rest: Tree) -> Tree:
    """Apply `fn` leaf by leaf; the trees in `rest` have the structure of `tree`."""
    return _pytree.tree_map(fn, tree, *rest)


def leaves(tree: Tree) -> list[Any]:
    """The leaves, in order."""
    return _pytree.tree_leaves(tree)


def path_of(keys: tuple) -> str:
    return "/".join(str(k.key if hasattr(k, "key") else k.idx) for k in keys)


def map_with_path(fn: Callable[..., Any], tree: Tree, *rest: Tree) -> Tree:
    """`map`, with the leaf's path as the first argument of `fn`."""
    return _pytree.tree_map_with_path(lambda keys, *xs: fn(path_of(keys), *xs), tree, *rest)


def by_path(tree: Tree) -> dict[str, Any]:
    """The leaves as {path: leaf}, in order."""
    return {path_of(keys): leaf for keys, leaf in _pytree.tree_leaves_with_path(tree)}


def unflatten(values: list[Any], like: Tree) -> Tree:
    """The inverse of `leaves`: `values` in the structure of `like`."""
    return _pytree.tree_unflatten(values, _pytree.tree_structure(like))


def count(tree: Tree) -> int:
    """Number of elements in all leaves; a leaf is anything with a `shape`."""
    return sum(torch.Size(leaf.shape).numel() for leaf in leaves(tree))
