"""AdamW with 8-bit moments and bf16 weights in Triton, one pass over everything, in place; and gradients in 8 bits."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hyperlm.kernels import reference, special
from hyperlm.kernels.launch import cdiv, launch
from hyperlm.kernels.reference import BLOCK, CODED, MULTIPLIERS, ROW

ROWS = 4  # blocks that a program updates
FIRST, SECOND = (tl.constexpr(x) for x in MULTIPLIERS)
ALL, MOMENTS, WEIGHTS, CORRECTION, UNDO = (
    tl.constexpr(x) for x in (reference.ALL, reference.MOMENTS, reference.WEIGHTS, reference.CORRECTION, reference.UNDO)
)


@triton.jit
def noise(x):
    """64 random bits for each counter; see `reference.noise`."""
    x = (x ^ ((x >> 33) & 0x7FFFFFFF)) * FIRST
    x = (x ^ ((x >> 33) & 0x7FFFFFFF)) * SECOND
    return x ^ ((x >> 33) & 0x7FFFFFFF)


@triton.jit
def share(bits, BELOW: tl.constexpr):
    """16 of the bits, from BELOW on, as a number in [0, 1)."""
    return ((bits >> BELOW) & 0xFFFF).to(tl.float32) * (1 / 65536)


@triton.jit
def squared_codes(x, largest, bits):
    """Codes (ROWS, BLOCK) uint8 of x; see `reference.squared_codes`."""
    y = tl.abs(x) * (127**2 / tl.maximum(largest, 1e-30))[:, None]
    low = tl.minimum(tl.floor(special.sqrt(y, False)), 126)
    code = low + (share(bits, 32) * (2 * low + 1) < y - low * low).to(tl.float32)
    return tl.where(x < 0, -code, code).to(tl.int32).to(tl.uint8)


@triton.jit
def squared(codes, scale, there):
    """The numbers whose codes are at these addresses."""
    c = tl.load(codes, mask=there[:, None], other=0).to(tl.int8, bitcast=True).to(tl.float32)
    return c * tl.abs(c) * (tl.load(scale, mask=there, other=0.0) / 127**2)[:, None]


@triton.jit
def encode(x, codes, scales, origin, N, BLOCK: tl.constexpr, CODED: tl.constexpr, ROWS: tl.constexpr):
    block = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    at = block[:, None] * BLOCK + columns[None, :]
    there = block * BLOCK < N
    numbers = tl.load(x + at, mask=at < N, other=0.0).to(tl.float32)
    largest = tl.max(tl.abs(numbers), 1)
    tl.store(codes + block[:, None] * CODED + columns[None, :], squared_codes(numbers, largest, noise(tl.load(origin) + at)), mask=there[:, None])
    tl.store(scales + block * (CODED // 4) + BLOCK // 4, largest, mask=there)


@triton.jit
def drawn(m, v, rates):
    """How far the weights move."""
    return tl.load(rates + 3) * m * special.reciprocal(special.sqrt(v, False) * tl.load(rates + 4) + 1e-8, False)


@triton.jit
def moved(weight, found, old_m, old_v, factor, rates, DECAY: tl.constexpr, WHAT: tl.constexpr):
    """See `reference.moved`."""
    beta1, beta2 = tl.load(rates + 1), tl.load(rates + 2)
    grad = tl.where(tl.load(factor) > 0, found * tl.load(factor), 0.0)
    m = beta1 * old_m + (1 - beta1) * grad
    v = beta2 * old_v + (1 - beta2) * grad * grad
    if WHAT == ALL or WHAT == WEIGHTS:
        if DECAY:
            weight *= tl.load(rates)
        weight -= drawn(m, v, rates)
    elif WHAT == CORRECTION or WHAT == UNDO:
        weight += drawn(beta1 * old_m + (1 - beta1) * found, beta2 * old_v + (1 - beta2) * found * found, rates)
        if WHAT == CORRECTION:
            weight -= drawn(m, v, rates)
        elif DECAY:
            weight /= tl.load(rates)
    return weight, m, v


@triton.jit
def update(
    w, g, g_scales, codes, scales, factor, rates, origin, shift, N,
    BLOCK: tl.constexpr, CODED: tl.constexpr, ROW: tl.constexpr, ROWS: tl.constexpr, DECAY: tl.constexpr, DECODE: tl.constexpr, WHAT: tl.constexpr,
):  # fmt: skip
    """See `reference.adamw8`. DECODE: the gradient is in 8 bits."""
    block = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    at = block[:, None] * BLOCK + columns[None, :]
    inside, there = at < N, block * BLOCK < N
    first = codes + block[:, None] * ROW + columns[None, :]
    scale = scales + block * (ROW // 4) + BLOCK // 2

    if DECODE:
        found = squared(g + block[:, None] * CODED + columns[None, :], g_scales + block * (CODED // 4) + BLOCK // 4, there)
    else:
        found = tl.load(g + at, mask=inside, other=0.0).to(tl.float32)
    old_m = squared(first, scale, there)
    c = tl.load(first + BLOCK, mask=there[:, None], other=0).to(tl.float32)
    old_v = c * c * (c * c) * (tl.load(scale + 1, mask=there, other=0.0) / 255**4)[:, None]
    bits = noise(tl.load(origin) + tl.load(shift) + at)
    kept = tl.load(w + at, mask=inside, other=0.0)
    weight, m, v = moved(kept.to(tl.float32), found, old_m, old_v, factor, rates, DECAY, WHAT)
    if WHAT != MOMENTS:
        again = bits
        if WHAT == CORRECTION or WHAT == UNDO:  # not the noise that rounded the weights before
            again = noise(bits)
        cut = (weight.to(tl.int32, bitcast=True) + ((again >> 16) & 0xFFFF).to(tl.int32)) & -65536
        rounded = cut.to(tl.float32, bitcast=True).to(w.dtype.element_ty)
        if WHAT == WEIGHTS:
            rounded = tl.where(tl.load(factor) > 0, rounded, kept)
        tl.store(w + at, rounded, mask=inside)
    if WHAT == ALL or WHAT == MOMENTS or WHAT == CORRECTION:
        largest = tl.max(tl.abs(m), 1)
        tl.store(scale, largest, mask=there)
        tl.store(first, squared_codes(m, largest, bits), mask=there[:, None])

        largest = tl.max(v, 1)
        tl.store(scale + 1, largest, mask=there)
        y = v * (255**4 / tl.maximum(largest, 1e-28))[:, None]
        low = tl.minimum(tl.floor(special.sqrt(special.sqrt(y, False), False)), 254)
        under, over = low * low, (low + 1) * (low + 1)
        code = low + (share(bits, 48) * (over * over - under * under) < y - under * under).to(tl.float32)
        code = tl.where(v > 0, tl.maximum(code, 1), 0)
        tl.store(first + BLOCK, code.to(tl.int32).to(tl.uint8), mask=there[:, None])


@triton.jit
def update_wide(w, g, moments, factor, rates, N, DECAY: tl.constexpr, WHAT: tl.constexpr, BLOCK: tl.constexpr):
    """The same for weights and moments (2, N) in fp32."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < N
    kept, found = tl.load(w + at, mask=inside, other=0.0), tl.load(g + at, mask=inside, other=0.0).to(tl.float32)
    old_m, old_v = tl.load(moments + at, mask=inside, other=0.0), tl.load(moments + N + at, mask=inside, other=0.0)
    weight, m, v = moved(kept, found, old_m, old_v, factor, rates, DECAY, WHAT)
    if WHAT == WEIGHTS:
        weight = tl.where(tl.load(factor) > 0, weight, kept)
    if WHAT != MOMENTS:
        tl.store(w + at, weight, mask=inside)
    if WHAT == ALL or WHAT == MOMENTS or WHAT == CORRECTION:
        tl.store(moments + at, m, mask=inside)
        tl.store(moments + N + at, v, mask=inside)


def adamw8(
    w: Tensor, g: Tensor, moments: Tensor, factor: Tensor, rates: Tensor, origin: Tensor, shift: Tensor, decay: bool, what: int = reference.ALL
) -> None:
    """`reference.adamw8`."""
    if w.dtype == torch.float32:
        launch(update_wide, (cdiv(w.numel(), 1024),), w, g, moments, factor, rates, w.numel(), DECAY=decay, WHAT=what, BLOCK=1024)
        return
    coded = g.dtype == torch.uint8
    launch(
        update, (cdiv(len(moments), ROWS),),
        w, g, g.view(torch.float32) if coded else None, moments, moments.view(torch.float32), factor, rates, origin, shift, w.numel(),
        BLOCK=BLOCK, CODED=CODED, ROW=ROW, ROWS=ROWS, DECAY=decay, DECODE=coded, WHAT=what,
    )  # fmt: skip


def encode8(x: Tensor, origin: Tensor) -> Tensor:
    """`reference.encode8`."""
    x = x.contiguous()
    coded = torch.empty(cdiv(x.numel(), BLOCK), CODED, dtype=torch.uint8, device=x.device)
    launch(encode, (cdiv(len(coded), ROWS),), x, coded, coded.view(torch.float32), origin, x.numel(), BLOCK=BLOCK, CODED=CODED, ROWS=ROWS)
    return coded
