"""The dispatch table: OPS[name] is an operation, with its reference in torch and, mostly, a kernel in Triton of the same signature."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal, NamedTuple

import torch

from hyperlm.errors import HyperlmError
from hyperlm.kernels import reference

try:
    import triton
except ImportError:  # it exists for Linux alone
    HAVE_TRITON = INTERPRETED = False
    KERNELS: dict[str, Callable] = {}
else:
    HAVE_TRITON = True
    INTERPRETED = triton.knobs.runtime.interpret  # TRITON_INTERPRET=1: kernels run on a CPU, slowly, to be checked
    from hyperlm.kernels import (
        adamw8,
        add_norm,
        convolution,
        cross_entropy,
        decoding,
        gradients,
        hyperbolic_attention,
        linear_attention,
        mlp,
        radii,
        readout,
        scan,
    )

    KERNELS = {
        fn.__name__: fn
        for fn in (
            gradients.accumulate,
            adamw8.adamw8,
            add_norm.add,
            add_norm.add_norm,
            convolution.causal_conv,
            adamw8.encode8,
            hyperbolic_attention.hyperbolic_attention,
            convolution.hyperbolic_points,
            linear_attention.linear_attention,
            mlp.mlp,
            gradients.norm,
            cross_entropy.cross_entropy_backward,
            radii.radii,
            readout.readout,
            scan.scan,
            cross_entropy.online_logsumexp,
            convolution.tangent_features,
            decoding.tangent_step,
            gradients.copy_to_host,
        )
    }


@dataclass(frozen=True)
class Op:
    """An operation, and what a plan of memory must know of it."""

    reference: Callable
    triton: Callable | None
    per_head: bool = False  # the kernel is built for HEAD_DIMS alone
    fused: bool = False  # the reference itself is a fused kernel, of torch
    saves: Literal["inputs_outputs", "intermediates"] = "inputs_outputs"  # for the backward pass, where it is fused
    cache_output: bool = False  # the last output is for a cache, and not saved

    def backend(self, name: str) -> Callable | None:
        return {"torch": self.reference, "triton": self.triton}[name]


OPS: dict[str, Op] = {
    "accumulate": Op(reference.accumulate, KERNELS.get("accumulate")),
    "adamw8": Op(reference.adamw8, KERNELS.get("adamw8")),
    "add": Op(reference.add, KERNELS.get("add"), saves="intermediates"),
    "add_norm": Op(reference.add_norm, KERNELS.get("add_norm")),
    "causal_conv": Op(reference.causal_conv, KERNELS.get("causal_conv"), per_head=True, cache_output=True),
    "copy_to_host": Op(reference.copy_to_host, KERNELS.get("copy_to_host")),
    "cross_entropy_backward": Op(reference.cross_entropy_backward, KERNELS.get("cross_entropy_backward")),
    "encode8": Op(reference.encode8, KERNELS.get("encode8")),
    "hyperbolic_attention": Op(reference.hyperbolic_attention, KERNELS.get("hyperbolic_attention"), per_head=True),
    "hyperbolic_points": Op(reference.hyperbolic_points, KERNELS.get("hyperbolic_points"), per_head=True, cache_output=True),
    "linear_attention": Op(reference.linear_attention, KERNELS.get("linear_attention"), per_head=True, cache_output=True),
    "mlp": Op(reference.mlp, KERNELS.get("mlp"), saves="intermediates"),
    "norm": Op(reference.norm, KERNELS.get("norm")),
    "online_logsumexp": Op(reference.online_logsumexp, KERNELS.get("online_logsumexp")),
    "radii": Op(reference.radii, KERNELS.get("radii")),
    "readout": Op(reference.readout, KERNELS.get("readout"), per_head=True),
    "scan": Op(reference.scan, KERNELS.get("scan")),
    "softmax_attention": Op(reference.softmax_attention, None, fused=True),
    "tangent_features": Op(reference.tangent_features, KERNELS.get("tangent_features"), per_head=True, cache_output=True),
    "tangent_step": Op(reference.tangent_step, KERNELS.get("tangent_step"), per_head=True),
}
HEAD_DIMS = (32, 64, 128, 256)  # that the Triton kernels are built for


class KernelError(HyperlmError, ValueError):
    """A backend that was asked for by name and cannot run here."""


class Choice(NamedTuple):
    """What runs an op, and why."""

    op: str
    backend: str
    reason: str

    @property
    def fn(self) -> Callable:
        fn = OPS[self.op].backend(self.backend)
        assert fn is not None  # or it would not have been chosen
        return fn


def unusable(op: str, backend: str, device: torch.device, head_dim: int = 64, dtype: torch.dtype = torch.float32) -> str:
    """Why `backend` cannot run `op` on `device`; empty if it can."""
    if backend == "triton":
        if not HAVE_TRITON:
            return "Triton is not installed"
        if device.type != "cuda" and not INTERPRETED:
            return "Triton needs a CUDA device"
    if OPS[op].backend(backend) is None:
        return f"no {backend} kernel for {op}"
    if backend == "triton":
        if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
            return "the Triton kernels need compute capability 8.0"
        if OPS[op].per_head and head_dim not in HEAD_DIMS:
            return f"head_dim {head_dim} is none of {', '.join(map(str, HEAD_DIMS))}"
        if dtype not in (torch.bfloat16, torch.float32):
            return f"{str(dtype).removeprefix('torch.')} is neither bfloat16 nor float32"
    return ""


@lru_cache
def select(op: str, device: torch.device, kernels: str = "auto", head_dim: int = 64, dtype: torch.dtype = torch.float32) -> Choice:
    """Choose the backend of `op` on `device`: the one asked for, or with "auto" Triton where it can run and torch elsewhere.

    Args:
        head_dim, dtype: of the heads, and of what is computed with.

    Raises:
        KernelError: if the backend asked for cannot run; nothing is replaced silently.
    """
    if kernels == "auto":
        reason = unusable(op, "triton", device, head_dim, dtype) or ("an interpreter is slow" if INTERPRETED else "")
        return Choice(op, "torch", reason) if reason else Choice(op, "triton", "fastest here")
    if reason := unusable(op, kernels, device, head_dim, dtype):
        raise KernelError(f"--kernels {kernels}: {reason}; use --kernels auto")
    return Choice(op, kernels, "asked for")


def summary(choices: list[Choice]) -> str:
    """Which kernels run, in a line: how many are in Triton, and which are not, and why."""
    reasons: dict[str, list[str]] = {}
    for c in choices:
        if c.backend == "torch":
            reasons.setdefault(c.reason, []).append(c.op)
    fast = sum(c.backend == "triton" for c in choices)
    parts = [f"triton: {fast} of {len(choices)}"] if fast else []
    for reason, ops in reasons.items():
        parts.append(f"torch: {'all' if len(ops) == len(choices) else ', '.join(ops)} ({reason})")
    return "; ".join(parts)


def division(choice: Choice, heads: int, n: int, device: torch.device) -> str:
    """How `heads` (heads x batch) sequences of length n are divided among programs, where that depends on them; else empty."""
    if (choice.op, choice.backend) == ("linear_attention", "triton"):
        return linear_attention.division(heads, n, device)
    return ""


@lru_cache
def table(
    ops: tuple[str, ...], device: torch.device, kernels: str = "auto", head_dim: int = 64, dtype: torch.dtype = torch.float32
) -> dict[str, Callable]:
    """{op: function} for each of `ops`."""
    return {op: select(op, device, kernels, head_dim, dtype).fn for op in ops}


def keep_out_of_compilation() -> None:
    """From now on compiled code calls kernels as they are. Not before something is compiled: it imports the compiler, which takes a second."""
    for name, op in OPS.items():
        if op.triton is not None:
            OPS[name] = replace(op, triton=torch.compiler.disable(op.triton))
    select.cache_clear()
    table.cache_clear()
