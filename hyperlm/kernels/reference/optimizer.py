"""Sums and norms of gradients; AdamW with 8-bit moments; and gradients in 8 bits."""

from collections.abc import Sequence
from enum import IntEnum

import torch
import torch.nn.functional as F
from torch import Tensor

from hyperlm.random import random_bits, uniform

QUANT_BLOCK = 256  # numbers that share a scale
PARTS = 4  # tensors that are added up before they are sent in 8 bits
CODED = QUANT_BLOCK + 4  # bytes of a block in 8 bits: codes, and their scale in fp32
ROW = 2 * QUANT_BLOCK + 8  # bytes of a block of moments: codes of m, codes of v, and both scales in fp32
COUNTERS = QUANT_BLOCK // 4  # of a block's random bits, 16 a number
# From the counters that round weights to those of an update's other random bits.
M_STREAM, V_STREAM, CORRECTION_STREAM = (stream << 40 for stream in (1, 2, 3))


def accumulate(total: Tensor, x: Tensor) -> None:
    """total += x, in place; total in fp32, x in any dtype and of the same shape."""
    total.add_(x)


def copy_to_host(x: Tensor, to: Tensor) -> None:
    """Copy a few numbers, fp32, to host memory, which is pinned where x is on a GPU; there they have come when what was launched before is
    done."""
    to.copy_(x, non_blocking=True)


def norm(parts: Sequence[Tensor]) -> Tensor:
    """Euclidean norm over all of these, fp32 scalar on their device."""
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(parts, 2, dtype=torch.float32)))


def in_blocks(x: Tensor) -> Tensor:
    """Numbers of any shape as (blocks, QUANT_BLOCK), fp32, with zeros at the end."""
    blocks = -(-x.numel() // QUANT_BLOCK)
    return F.pad(x.flatten().float(), (0, blocks * QUANT_BLOCK - x.numel())).view(blocks, QUANT_BLOCK)


def squared_codes(x: Tensor, largest: Tensor, chance: Tensor) -> Tensor:
    """Codes c, int8, such that sign (c / 127)^2 largest is x on average over `chance`: rounded up or down at random."""
    y = x.abs() * (127**2 / largest.clamp(min=1e-30))
    low = y.sqrt().floor().clamp(max=126)
    return (x.sign() * (low + (chance * (2 * low + 1) < y - low * low))).to(torch.int8)


def encode8(parts: Sequence[Tensor], base: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of at most PARTS tensors in 8 bits: of a block sign (c / 127)^2 max |x|, right on average.

    Rounding is by the random bits of the counters from `base` + `offset` on, int64 scalars (see `hyperlm.random`).

    Returns:
        (ceil(n / QUANT_BLOCK), CODED) uint8 of n numbers of any shape, and fp32 numbers that add up to the sum of their squares.
    """
    wide = in_blocks(parts[0])
    for x in parts[1:]:
        wide = wide + in_blocks(x)
    largest = wide.abs().amax(1, keepdim=True)
    codes = squared_codes(wide, largest, uniform(random_bits(base + offset, wide.shape)))
    return torch.cat([codes.view(torch.uint8), largest.view(torch.uint8)], 1), wide.square().sum(1)


def squared(codes: Tensor, largest: Tensor) -> Tensor:
    """The inverse of `squared_codes`, of bytes."""
    c = codes.view(torch.int8).float()
    return c * c.abs() * (largest / 127**2)


def decode8(coded: Tensor) -> Tensor:
    """The inverse of `encode8`: (blocks, QUANT_BLOCK) fp32."""
    return squared(coded[:, :QUANT_BLOCK], coded.view(torch.float32)[:, QUANT_BLOCK // 4 :])


class UpdatePart(IntEnum):
    """What an update changes; see `adamw8`."""

    FULL = 0  # weights and moments
    MOMENTS = 1
    WEIGHTS = 2
    CORRECT = 3  # moments; and weights, which WEIGHTS moved with factor 1, to where the factor wants them
    ROLLBACK = 4  # weights back to where they were before WEIGHTS


def adam_step(
    weight: Tensor, grad: Tensor, old_m: Tensor, old_v: Tensor, factor: Tensor, rates: Tensor, decay: bool, part: UpdatePart
) -> tuple[Tensor, Tensor, Tensor]:
    """Weights and both moments after `part` of an update, in fp32 and before rounding; see `adamw8`."""
    shrink, beta1, beta2, rate, root = rates
    shrink = shrink if decay else 1

    def next_moments(g: Tensor) -> tuple[Tensor, Tensor]:
        return beta1 * old_m + (1 - beta1) * g, beta2 * old_v + (1 - beta2) * g * g

    def displacement(m: Tensor, v: Tensor) -> Tensor:
        return rate * m / (v.sqrt() * root + 1e-8)

    m, v = next_moments(torch.where(factor > 0, grad * factor, 0))
    if part in (UpdatePart.FULL, UpdatePart.WEIGHTS):
        weight = weight * shrink - displacement(m, v)
    elif part in (UpdatePart.CORRECT, UpdatePart.ROLLBACK):
        weight = weight + displacement(*next_moments(grad))
        weight = weight - displacement(m, v) if part == UpdatePart.CORRECT else weight / shrink
    return weight, m, v


def adamw8(
    w: Tensor,
    g: Tensor,
    moments: Tensor,
    factor: Tensor,
    rates: Tensor,
    base: Tensor,
    offset: Tensor,
    decay: bool,
    part: UpdatePart = UpdatePart.FULL,
) -> None:
    """AdamW in place on matrices in bf16, with moments that take a byte each; and on vectors in fp32, with moments in fp32.

    In a block of QUANT_BLOCK numbers, m is sign (c / 127)^2 max |m| and v is (c / 255)^4 max v, with c a byte: fine where numbers are
    small, as in Dettmers et al. 2022. A v above zero never becomes zero. Weights and moments are rounded up or down at random such that
    their expectation is exact: what is less than half a step is not lost, as to the nearest it would be. Rounding is by the random bits of
    the counters from `base` + `offset` on (see `hyperlm.random`).

    An update can be made in two parts, with the bits that it would have as one: WEIGHTS, and later MOMENTS. Where WEIGHTS was made with
    factor 1 and the factor turns out to be another, CORRECT makes the moments' part and moves the weights to where they should be, up to
    one more rounding; ROLLBACK takes them back.

    Args:
        w: bf16 or fp32, any contiguous shape of n numbers.
        g: as many, bf16 or fp32, or as `encode8` returns them; multiplied by factor.
        moments: (ceil(n / QUANT_BLOCK), ROW) uint8; of w in fp32, m and v, (2, ...) fp32; zeros at first.
        factor: fp32 scalar on the device of the others. By 0, g counts as 0 even where it is not finite; and WEIGHTS changes nothing.
        rates: (5,) fp32: 1 - learning rate * weight decay, beta1, beta2, learning rate / (1 - beta1^t), 1 / sqrt(1 - beta2^t).
        base, offset: int64 scalars, the counter of the first number at step 0, and how far from there it is at this one.
        decay: whether weight decay acts.
        part: of the update, if not all of it.
    """
    touches_weights = part != UpdatePart.MOMENTS
    touches_moments = part not in (UpdatePart.WEIGHTS, UpdatePart.ROLLBACK)
    if w.dtype == torch.float32:
        weight, *both = adam_step(w, g.float(), *moments, factor, rates, decay, part)
        if touches_weights:
            w.copy_(torch.where(factor > 0, weight, w) if part == UpdatePart.WEIGHTS else weight)
        if touches_moments:
            moments.copy_(torch.stack(both))
        return

    n = w.numel()
    codes, scales = moments[:, : 2 * QUANT_BLOCK], moments.view(torch.float32)[:, QUANT_BLOCK // 2 :]
    c_v = codes[:, QUANT_BLOCK:].float()
    grad = decode8(g) if g.dtype == torch.uint8 else in_blocks(g)
    old_m, old_v = squared(codes[:, :QUANT_BLOCK], scales[:, :1]), c_v * c_v * (c_v * c_v) * (scales[:, 1:] / 255**4)
    weight, m, v = adam_step(in_blocks(w), grad, old_m, old_v, factor, rates, decay, part)
    start = base + offset
    if touches_weights:
        again = 0 if part in (UpdatePart.FULL, UpdatePart.WEIGHTS) else CORRECTION_STREAM  # not the bits that rounded the weights before
        rounded = (weight.view(torch.int32) + random_bits(start + again, c_v.shape).int()) & -65536
        rounded = rounded.view(torch.float32).flatten()[:n].view(w.shape)
        w.copy_(torch.where(factor > 0, rounded, w) if part == UpdatePart.WEIGHTS else rounded)
    if touches_moments:
        largest_m, largest_v = m.abs().amax(1, keepdim=True), v.amax(1, keepdim=True)
        codes[:, :QUANT_BLOCK] = squared_codes(m, largest_m, uniform(random_bits(start + M_STREAM, c_v.shape))).view(torch.uint8)
        y = v * (255**4 / largest_v.clamp(min=1e-28))
        low = y.sqrt().sqrt().floor().clamp(max=254)
        under, over = low**4, (low + 1) ** 4
        chance = uniform(random_bits(start + V_STREAM, c_v.shape))
        code = (low + (chance * (over - under) < y - under)).clamp(min=1)
        codes[:, QUANT_BLOCK:] = torch.where(v > 0, code, 0).to(torch.uint8)
        scales[:, :1], scales[:, 1:] = largest_m, largest_v
