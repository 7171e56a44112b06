"""The special functions of kernels against float64: approximate instructions on a GPU, ordinary ones in Triton's interpreter."""

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl

from hyperlm.kernels import special
from hyperlm.kernels.reference.attention import TIP

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
COUNT = 1 << 14


@triton.jit
def apply(x, y, FUNCTION: tl.constexpr, EXACT: tl.constexpr, COUNT: tl.constexpr):
    at = tl.arange(0, COUNT)
    tl.store(y + at, FUNCTION(tl.load(x + at), EXACT))


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("log2", 1.0, 2.0),
        ("log2", 2.0, 1e5),
        ("log2", 1e-30, 0.5),
        ("exp2", -120.0, 0.0),
        ("exp2", 0.0, 120.0),
        ("rsqrt", TIP**2, 1.0),
        ("rsqrt", 1.0, 1e6),
        ("sqrt", 0.0, 1e-12),
        ("sqrt", 0.0, 1e9),
        ("reciprocal", 1e-8, 1e-3),
        ("exp", -1.0, 1.0),
        ("sigmoid", -1.0, 20.0),
    ],
)
def test_special_functions_are_right_to_2_to_the_minus_21(name, low, high, exact):
    """Relative to the result, but for log2 near 1, whose result vanishes: there, absolute."""
    x = torch.linspace(low, high, COUNT, dtype=torch.float64).float().to(DEVICE)
    y = torch.empty_like(x)
    apply[(1,)](x, y, FUNCTION=getattr(special, name), EXACT=exact, COUNT=COUNT)
    truth = getattr(torch, name)(x.double())
    size = truth.abs().clamp(min=1.0) if name == "log2" else truth
    assert ((y.double() - truth).abs() <= 2.0**-21 * size).all()
    if exact:
        torch.testing.assert_close(y, truth.float(), rtol=1e-6, atol=1e-7)
