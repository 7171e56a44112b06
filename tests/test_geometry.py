"""Hyperbolic geometry against the law of cosines, the Poincaré ball, and isometries, in float64."""

import math

import pytest
import torch
from conftest import normal

from hyperlm import geometry as g
from hyperlm.kernels.reference.attention import TIP

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
        assert d.item() == pytest.approx(2 * math.asinh(half), abs=1e-9, rel=1e-9)


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


@pytest.mark.parametrize("eps", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("r", [0.0, *RADII])
def test_distance_and_its_gradient_are_zero_where_points_coincide_and_bounded_beside_it(r, dtype, eps):
    """The gradient has length 1 along the manifold; of the coordinates s, at most cosh r."""
    u = g.direction(normal(20, 8, seed=12)).to(dtype)
    s = (math.sinh(r) * u).requires_grad_()
    for offset in (0, torch.finfo(dtype).tiny, 1e-12, 1e-6, 1e-3):
        other = s.detach() + offset * normal(20, 8, seed=13).to(dtype)
        d = g.distance(g.time_of(s), s, g.time_of(other), other, eps)
        (slope,) = torch.autograd.grad(d.sum(), s)
        assert (d >= 0).all() and (slope.norm(dim=-1) <= 1.01 * math.cosh(r)).all()
        assert offset or ((d == 0).all() and (slope == 0).all())


def test_near_points_are_told_apart_in_fp32():
    """As close as 1e-3 at a radius of 3, where cosh d - 1 is 5e-7, and the products that it is the difference of are 100."""
    x, y = polar(3.0, 200, 8, seed=14), polar(3.001, 200, 8, seed=14)
    single = g.distance(*(z.float() for z in (*x, *y)))
    torch.testing.assert_close(single.double(), torch.full_like(x[0], 1e-3), rtol=0.1, atol=0)


def test_the_rounded_tip_is_where_it_is_said_to_be():
    """The score "distance" of the models, as the README describes it: difference to the true distance, and slope."""
    d = torch.tensor([0.01, 0.1, 0.5, 1.0, 8.0], dtype=torch.float64).requires_grad_()
    rounded = g.arcosh1p(torch.cosh(d) - 1, TIP)
    (slope,) = torch.autograd.grad(rounded.sum(), d)
    torch.testing.assert_close(d - rounded, torch.tensor([0.0095, 0.0586, 0.0896, 0.0937, 0.0953], dtype=torch.float64), rtol=0, atol=5e-5)
    torch.testing.assert_close(slope, torch.tensor([0.0995, 0.7077, 0.9821, 0.9964, 1.0], dtype=torch.float64), rtol=0, atol=5e-5)


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
    zero = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(g.arcosh1p(zero, eps).sum(), zero)
    assert (slope == (1 / eps if eps else 1)).all()


def test_directions_and_maps_have_finite_gradients_at_the_origin():
    x = torch.zeros(3, 4, dtype=torch.float64, requires_grad=True)
    t, s = g.exp_map(x, 4.0)
    (slope,) = torch.autograd.grad(g.direction(x).sum() + t.sum() + s.sum(), x)
    assert slope.isfinite().all()
