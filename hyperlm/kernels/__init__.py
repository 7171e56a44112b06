"""The dispatch table: OPS[op][backend] is a function; every backend of an op has the signature of its `torch` reference."""

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch

from hyperlm.kernels import reference

OPS: dict[str, dict[str, Callable]] = {
    "accumulate": {"torch": reference.accumulate},
    "adamw8": {"torch": reference.adamw8},
    "add": {"torch": reference.add},
    "add_norm": {"torch": reference.add_norm},
    "causal_conv": {"torch": reference.causal_conv},
    "encode8": {"torch": reference.encode8},
    "hyperbolic_attention": {"torch": reference.hyperbolic_attention},
    "hyperbolic_points": {"torch": reference.hyperbolic_points},
    "linear_attention": {"torch": reference.linear_attention},
    "mlp": {"torch": reference.mlp},
    "norm": {"torch": reference.norm},
    "pull_logits": {"torch": reference.pull_logits},
    "radii": {"torch": reference.radii},
    "readout": {"torch": reference.readout},
    "scan": {"torch": reference.scan},
    "softmax_attention": {"torch": reference.softmax_attention},
    "take_logits": {"torch": reference.take_logits},
    "tangent_features": {"torch": reference.tangent_features},
    "tangent_step": {"torch": reference.tangent_step},
    "tell": {"torch": reference.tell},
}
try:
    import triton
except ImportError:  # it exists for Linux alone
    HAVE_TRITON = INTERPRETED = False
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

    OPS["accumulate"]["triton"] = gradients.accumulate
    OPS["adamw8"]["triton"] = adamw8.adamw8
    OPS["add"]["triton"] = add_norm.add
    OPS["add_norm"]["triton"] = add_norm.add_norm
    OPS["causal_conv"]["triton"] = convolution.causal_conv
    OPS["encode8"]["triton"] = adamw8.encode8
    OPS["hyperbolic_attention"]["triton"] = hyperbolic_attention.hyperbolic_attention
    OPS["hyperbolic_points"]["triton"] = convolution.hyperbolic_points
    OPS["linear_attention"]["triton"] = linear_attention.linear_attention
    OPS["mlp"]["triton"] = mlp.mlp
    OPS["norm"]["triton"] = gradients.norm
    OPS["pull_logits"]["triton"] = cross_entropy.pull_logits
    OPS["radii"]["triton"] = radii.radii
    OPS["readout"]["triton"] = readout.readout
    OPS["scan"]["triton"] = scan.scan
    OPS["take_logits"]["triton"] = cross_entropy.take_logits
    OPS["tangent_features"]["triton"] = convolution.tangent_features
    OPS["tangent_step"]["triton"] = decoding.tangent_step
    OPS["tell"]["triton"] = gradients.tell

WITHOUT_HEADS = ("accumulate", "adamw8", "add", "add_norm", "encode8", "mlp", "norm", "pull_logits", "radii", "scan", "take_logits", "tell")
HEAD_DIMS = (32, 64, 128, 256)  # that the Triton kernels are built for


class KernelError(ValueError):
    """A backend that was asked for by name and cannot run here."""


class Choice(NamedTuple):
    """What runs an op, and why."""

    op: str
    backend: str
    reason: str

    @property
    def fn(self) -> Callable:
        return OPS[self.op][self.backend]


def unusable(op: str, backend: str, device: torch.device, head_dim: int = 64, dtype: torch.dtype = torch.float32) -> str:
    """Why `backend` cannot run `op` on `device`; empty if it can."""
    if backend == "triton":
        if not HAVE_TRITON:
            return "Triton is not installed"
        if device.type != "cuda" and not INTERPRETED:
            return "Triton needs a CUDA device"
    if backend not in OPS[op]:
        return f"no {backend} kernel for {op}"
    if backend == "triton":
        if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
            return "the Triton kernels need compute capability 8.0"
        if op not in WITHOUT_HEADS and head_dim not in HEAD_DIMS:
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
