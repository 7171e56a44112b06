"""The dispatch table: OPS[op][backend] is a function; every backend of an op has the signature of its `torch` reference."""

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch

from hyperlm.kernels import reference

OPS: dict[str, dict[str, Callable]] = {
    "causal_conv": {"torch": reference.causal_conv},
    "hyperbolic_attention": {"torch": reference.hyperbolic_attention},
    "linear_attention": {"torch": reference.linear_attention},
    "linear_attention_step": {"torch": reference.linear_attention_step},
    "scan": {"torch": reference.scan},
    "softmax_attention": {"torch": reference.softmax_attention},
}


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


def unusable(op: str, backend: str, device: torch.device) -> str:
    """Why `backend` cannot run `op` on `device`; empty if it can."""
    if backend not in OPS[op]:
        return f"no {backend} kernel for {op}"
    if backend == "triton" and device.type != "cuda":
        return "Triton needs a CUDA device"
    return ""


@lru_cache
def select(op: str, device: torch.device, kernels: str = "auto") -> Choice:
    """Choose the backend of `op` on `device`: the one asked for, or with "auto" Triton where it can run and torch elsewhere.

    Raises:
        KernelError: if the backend asked for cannot run; nothing is replaced silently.
    """
    if kernels == "auto":
        reason = unusable(op, "triton", device)
        return Choice(op, "torch", reason) if reason else Choice(op, "triton", "fastest here")
    if reason := unusable(op, kernels, device):
        raise KernelError(f"--kernels {kernels}: {reason}; use --kernels auto")
    return Choice(op, kernels, "asked for")


@lru_cache
def table(device: torch.device, kernels: str = "auto") -> dict[str, Callable]:
    """{op: function} for every op on `device`."""
    return {op: select(op, device, kernels).fn for op in OPS}
