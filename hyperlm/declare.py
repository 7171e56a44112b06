"""Declaration of parameters: shape, initial values and weight decay, each stated once, on modules that hold no memory.

A skeleton is an `nn.Module` whose parameters live on the `meta` device and carry a `Spec`. Initialisation, parameter counts, memory plans
and checkpoint templates are maps over these specs; `torch.func.functional_call` runs the skeleton with real tensors.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Init = Callable[[tuple[int, ...], torch.Generator], Tensor]


@dataclass(frozen=True)
class Spec:
    """What a parameter is before it has values."""

    shape: tuple[int, ...]
    init: Init
    decay: bool


def normal(std: float) -> Init:
    return lambda shape, generator: torch.empty(shape).normal_(0, std, generator=generator)


def last_tap(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """A convolution (width, channels) that passes the present position on and ignores the earlier ones."""
    weight = torch.zeros(shape)
    weight[-1] = 1
    return weight


def constant(values: float | Sequence[float]) -> Init:
    """A number everywhere, or one value for each index of the first axis."""

    def init(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        first = torch.as_tensor(values, dtype=torch.float32)
        return first.reshape(first.shape + (1,) * (len(shape) - first.dim())).expand(shape).clone()

    return init


def declare(shape: tuple[int, ...], init: Init, *, decay: bool = False) -> nn.Parameter:
    """A parameter without memory. `decay`: whether AdamW's weight decay acts on it."""
    parameter = nn.Parameter(torch.empty(shape, device="meta"))
    parameter.spec = Spec(tuple(shape), init, decay)  # type: ignore[attr-defined]  # carried along by the skeleton
    return parameter


def matrix(out: int, into: int, std: float = 0.01) -> nn.Parameter:
    """A linear map (out, into).

    The small default makes every branch of a block small against the residual stream at first. Measured over 200 steps at d 512 (a softmax
    model, AdamW, lr 1e-3, one seed): validation loss 4.12 with 0.02, 3.92 with 0.01.
    """
    return declare((out, into), normal(std), decay=True)


def specs(skeleton: nn.Module) -> dict[str, Spec]:
    """{name: Spec} of every parameter, in order of declaration."""
    return {name: parameter.spec for name, parameter in skeleton.named_parameters()}  # type: ignore[attr-defined]


def realise(path: str, spec: Spec, seed: int) -> Tensor:
    """Initial values of one parameter, fp32 on the CPU: a function of (seed, path), whatever else is initialised and in which order."""
    digest = hashlib.blake2b(f"{seed}/{path}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    return spec.init(spec.shape, generator)
