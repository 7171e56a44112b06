"""Stages: trees like the parameters are {"embed": ..., "blocks": [...], "head": ...}, and each of these parts can live anywhere while others run."""

from collections.abc import Callable

from hyperlm.tree import Tree


def stages(params: Tree) -> list[Tree]:
    """Embedding, blocks and head, in order."""
    return [params["embed"], *params["blocks"], params["head"]]


def stage_of(params: Tree, index: int) -> Tree:
    """One of `stages`."""
    last = len(params["blocks"]) + 1
    return params["embed"] if index == 0 else params["head"] if index == last else params["blocks"][index - 1]


def from_stages(parts: list[Tree]) -> Tree:
    """The inverse of `stages`."""
    return {"embed": parts[0], "blocks": parts[1:-1], "head": parts[-1]}


def map_stages(fn: Callable[[Tree], Tree], params: Tree) -> Tree:
    """`fn` of every stage. The tree given is emptied on the way, so that no stage is in memory twice for longer than its turn."""
    parts = stages(params)
    params.clear()
    return from_stages([fn(parts.pop(0)) for _ in range(len(parts))])


def names(params: Tree) -> list[str]:
    """The path of every stage."""
    return ["embed", *(f"blocks/{layer}" for layer in range(len(params["blocks"]))), "head"]
