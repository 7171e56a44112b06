"""Hyperbolic geometry against the law of cosines, the Poincaré ball, and isometries, in float64."""

import math

import pytest
import torch
from conftest import normal

from hyperlm import geometry as g

RADII = [0.05, 0.5, 1.0, 2.0, 4.0]


def polar(r: float, *shape: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    u = normal(*shape, seed=seed)
    return g.lift(u / u.norm(dim=-1, keepdim=True), torch.full(shape[:-1], r, dtype=u.dtype))


@pytest.mark.parametrize("a", RADII)
@pytest.mark.parametrize("b", RADII)
def test_distance_obeys_the_hyperbolic_law_of_cosines(a, b):
    for angle in (0.0, 1e-3, 0.7, math.pi / 2, 3.0, math.pi):
        u, v = torch.tensor([1.0, 0.0], dtype=torch.float64), torch.tensor([math.cos(angle), math.sin(angle)], dtype=torch.float64)
        d = g.distance(*g.lift(u, torch.tensor(a, dtype=torch.float64)), *g.lift(v, torch.tensor(b, dtype=torch.float64)))
        # half-angle form, free of cancellation: sinh^2(d/2) = sinh^2((a-b)/2) + sinh a sinh b sin^2(angle/2)
        half = math.sqrt(math.sinh((a - b) / 2) ** 2 + math.sinh(a) * math.sinh(b) * math.sin(angle / 2) ** 2)
        assert d.item() == pytest.approx(2 * math.asinh(half), abs=2e-6, rel=1e-9)


@pytest.mark.parametrize("r", RADII)
def test_distance_agrees_with_the_poincare_ball(r):
    x, y = polar(r, 50, 8, seed=1), polar(1.3, 50, 8, seed=2)
    p, q = g.to_poincare(*x), g.to_poincare(*y)
    ball = torch.acosh(1 + 2 * (p - q).square().sum(-1) / ((1 - p.square().sum(-1)) * (1 - q.square().sum(-1))))
    torch.testing.assert_close(g.distance(*x, *y), ball, rtol=1e-9, atol=1e-9)


def test_distance_in_fp32_is_near_the_float64_oracle():
    for r in RADII:
        x, y = polar(r, 1000, 64, seed=3), polar(2.0, 1000, 64, seed=4)
        truth = g.distance(*x, *y)
        single = g.distance(*(z.float() for z in (*x, *y)))
        assert ((single - truth).abs() / truth).max() < 1e-4


def test_lifted_points_lie_on_the_hyperboloid_at_their_radius():
    for r in RADII:
        t, s = polar(r, 20, 16, seed=5)
        torch.testing.assert_close(t.square() - s.square().sum(-1), torch.ones_like(t))
        torch.testing.assert_close(torch.acosh(t), torch.full_like(t, r), rtol=1e-6, atol=1e-9)


def isometry(k: int, seed: int) -> torch.Tensor:
    """A Lorentz transformation (k+1, k+1): a boost, then a random rotation of space."""
    rotation = torch.eye(k + 1, dtype=torch.float64)
    rotation[1:, 1:] = torch.linalg.qr(normal(k, k, seed=seed)).Q
    boost = torch.eye(k + 1, dtype=torch.float64)
    boost[:2, :2] = torch.tensor([[math.cosh(1.1), math.sinh(1.1)], [math.sinh(1.1), math.cosh(1.1)]])
    return rotation @ boost


def test_distance_is_invariant_under_isometries():
    x, y, m = polar(1.5, 100, 6, seed=6), polar(2.5, 100, 6, seed=7), isometry(6, seed=8)

    def move(t, s):
        moved = torch.cat([t[:, None], s], -1) @ m.mT
        return moved[:, 0], moved[:, 1:]

    torch.testing.assert_close(g.distance(*move(*x), *move(*y)), g.distance(*x, *y), rtol=1e-6, atol=1e-6)


def test_exponential_and_logarithmic_map_are_inverse():
    v = normal(100, 5, seed=9) * torch.linspace(0, 1.5, 100, dtype=torch.float64)[:, None]
    t, s = g.exp_map(v)
    torch.testing.assert_close(g.log_map(t, s), v, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(torch.acosh(t), v.norm(dim=-1), rtol=1e-6, atol=2e-6)


def test_exponential_map_clips_the_radius_and_keeps_the_direction():
    v = normal(100, 5, seed=10) * 10
    t, s = g.exp_map(v, r_max=4.0)
    assert t.max() <= math.cosh(4.0) * (1 + 1e-12)
    torch.testing.assert_close(g.direction(s), g.direction(v))


def test_poincare_projection_is_inverted():
    t, s = polar(2.0, 30, 4, seed=11)
    back = g.from_poincare(g.to_poincare(t, s))
    torch.testing.assert_close(back[0], t)
    torch.testing.assert_close(back[1], s)


@pytest.mark.parametrize("eps", [0.0, 0.03])
def test_arcosh_has_the_gradient_it_promises_and_nearly_the_exact_value(eps):
    w = torch.logspace(-12, 3, 200, dtype=torch.float64).requires_grad_()
    d = g.arcosh1p(w, eps)
    (slope,) = torch.autograd.grad(d.sum(), w)
    torch.testing.assert_close(slope, 1 / torch.sqrt(w * (w + 2) + eps**2), rtol=1e-6, atol=1e-9)
    exact = 2 * torch.asinh(torch.sqrt(w / 2))
    assert ((exact - d) >= -1e-9).all() and ((exact - d) <= math.log1p(eps) + 1e-9).all()


def test_directions_and_maps_have_finite_gradients_at_the_origin():
    x = torch.zeros(3, 4, dtype=torch.float64, requires_grad=True)
    t, s = g.exp_map(x, 4.0)
    (slope,) = torch.autograd.grad(g.direction(x).sum() + t.sum() + s.sum(), x)
    assert slope.isfinite().all()
