"""Is this machine fit for training? What it has, which kernels it can run, and a small numerical check."""

from pathlib import Path

import torch

from hyperlm import env, kernels
from hyperlm.data import verify_cache
from hyperlm.geometry import direction, lift
from hyperlm.kernels import OPS, reference


def relative_error(x: torch.Tensor, truth: torch.Tensor) -> float:
    """|x - truth| / |truth| in fp64; nan where x is not finite."""
    x = x.detach().double().cpu()
    return float((x - truth).norm() / truth.norm()) if bool(x.isfinite().all()) else float("nan")


def numerical_errors(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Relative error of both attentions and of their gradients on `device` in `dtype`, against the reference in fp64 on the CPU."""
    generator = torch.Generator().manual_seed(0)
    b, h, n, k = 2, 2, 100, 32

    def attention7(q, k, v, fn=reference.hyperbolic_attention):
        t_q, s_q = lift(direction(q), torch.full(q.shape[:-1], 1.5, dtype=q.dtype, device=q.device))
        t_k, s_k = lift(direction(k), torch.full(k.shape[:-1], 0.5, dtype=k.dtype, device=k.device))
        return fn(t_q, s_q, t_k, s_k, v, torch.full((h,), 4.0, dtype=q.dtype, device=q.device), "logcosh")

    def attention8(q, k, v, fn=reference.linear_attention):
        return fn(q, k, v, torch.full(q.shape[:-1], -0.1, dtype=q.dtype, device=q.device))[0]

    inputs = [torch.randn(b, h, n, k, generator=generator, dtype=torch.float64).to(dtype).double() for _ in range(3)]
    errors = {}
    for name, op, attention in (
        ("hyperbolic attention", "hyperbolic_attention", attention7),
        ("linear attention", "linear_attention", attention8),
    ):
        results = []
        for fn, at, as_ in (
            (OPS[op].reference, torch.device("cpu"), torch.float64),
            (kernels.select(op, device, head_dim=k).fn, device, torch.float32),
        ):
            leaves = [x.to(at, as_).requires_grad_() for x in inputs]
            out = attention(*leaves, fn=fn)
            results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
        truth, output = results
        errors[name] = max(relative_error(x, y.detach()) for x, y in zip(output, truth, strict=True))
    return errors


def check(device: torch.device, cache: Path) -> int:
    """Print the report; 0 if training can run here, 1 if not. Every byte of the tokenised text in the folder `cache` is checked too."""
    for name, value in env.describe(device).items():
        print(f"{name:<18} {value}")
    for op in OPS:
        print(f"kernel             {op}: " + ", ".join(f"{b} ({kernels.unusable(op, b, device) or 'usable'})" for b in ("torch", "triton")))
    fine = True
    try:
        for name, error in numerical_errors(device, env.compute_dtype(device)).items():
            good = error < 1e-2  # false for nan
            fine &= good
            print(f"check              {name}, outputs and gradients: relative error {error:.1e} {'ok' if good else 'TOO LARGE'}")
    except RuntimeError as e:
        fine = False
        print(f"check              failed: {str(e).splitlines()[0]}")
    for wrong in verify_cache(cache):
        fine = False
        print(f"cache              {cache}/{wrong}; delete {cache / wrong.split('/')[0]}, and it is made again")
    print("training can run here" if fine else "training cannot run here")
    return 0 if fine else 1
