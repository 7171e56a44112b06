"""AdamW with 8-bit moments and bf16 weights in Triton, one pass over everything, in place; and gradients in 8 bits.

A GPU's conversions between integers and floats, and its `floor`, are an eighth as fast as an addition, and these kernels would have ten of
them a number. Added to 2^23, a smaller whole number is the last bits of what comes out: that converts it exactly, either way.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from hyperlm.kernels import special
from hyperlm.kernels.launch import cdiv, launch
from hyperlm.kernels.reference import optimizer as reference
from hyperlm.kernels.reference.optimizer import CODED, PARTS, QUANT_BLOCK, ROW, UpdatePart
from hyperlm.random import MULTIPLIERS

ROWS, WARPS = 2, 1  # blocks that a program updates, and its warps
CODED_ROWS, CODED_WARPS = 8, 2  # blocks that a program codes, and its warps
VECTOR_ELEMENTS = 1024  # numbers in fp32 that a program updates
FIRST, SECOND = (tl.constexpr(x) for x in MULTIPLIERS)
FULL, MOMENTS, WEIGHTS, CORRECT, ROLLBACK = (tl.constexpr(part.value) for part in UpdatePart)
M_STREAM, V_STREAM, CORRECTION_STREAM = (tl.constexpr(x) for x in (reference.M_STREAM, reference.V_STREAM, reference.CORRECTION_STREAM))


@triton.jit
def fmix64(x):
    """See `random.fmix64`."""
    x = (x ^ ((x >> 33) & 0x7FFFFFFF)) * FIRST
    x = (x ^ ((x >> 33) & 0x7FFFFFFF)) * SECOND
    return x ^ ((x >> 33) & 0x7FFFFFFF)


@triton.jit
def number(x):
    """Integers from 0 to 2^23 - 1, as fp32."""
    return (x.to(tl.int32) | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0


@triton.jit
def byte(x):
    """The last 8 bits of whole numbers below 2^22, negative ones too."""
    return (x + 12582912.0).to(tl.int32, bitcast=True).to(tl.uint8)  # 3 * 2^22


@triton.jit
def whole(x):
    """The largest whole number not above x, which is from 0 to 2^22."""
    nearest = (x + 8388608.0) - 8388608.0
    return nearest - (nearest > x).to(tl.float32)


@triton.jit
def random_bits(start, block, BLOCK: tl.constexpr):
    """16 for each number of these blocks, (ROWS, BLOCK) int32; see `random.random_bits`."""
    fours = block[:, None] * (BLOCK // 4) + tl.arange(0, BLOCK // 4)[None, :]
    bits = fmix64(start + fours)
    low, high = bits.to(tl.int32), (bits >> 32).to(tl.int32)
    even, odd = tl.interleave(low & 0xFFFF, high & 0xFFFF), tl.interleave((low >> 16) & 0xFFFF, (high >> 16) & 0xFFFF)
    return tl.interleave(even, odd)


@triton.jit
def uniform(bits):
    """16 bits as a number in [0, 1)."""
    return number(bits) * (1 / 65536)


@triton.jit
def squared_codes(x, largest, bits):
    """Codes (ROWS, BLOCK) uint8 of x; see `reference.squared_codes`."""
    y = tl.abs(x) * (127**2 / tl.maximum(largest, 1e-30))[:, None]
    low = tl.minimum(whole(special.sqrt(y, False)), 126)
    code = low + (uniform(bits) * (2 * low + 1) < y - low * low).to(tl.float32)
    return byte(tl.where(x < 0, -code, code))


@triton.jit
def squared(codes, scale, there):
    """The numbers whose codes are at these addresses."""
    c = number(tl.load(codes, mask=there[:, None], other=0) ^ 0x80) - 128  # signed
    return c * tl.abs(c) * (tl.load(scale, mask=there, other=0.0) / 127**2)[:, None]


@triton.jit
def widened(x, at, inside):
    return tl.load(x + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def encode(
    x, x1, x2, x3, codes, scales, squares, base, offset, N,
    COUNT: tl.constexpr, BLOCK: tl.constexpr, CODED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """See `reference.encode8`. COUNT: how many parts there are; squares: of each program, its part of the sum of squares."""
    block = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    at = block[:, None] * BLOCK + columns[None, :]
    inside, there = at < N, block * BLOCK < N
    numbers = widened(x, at, inside)
    if COUNT > 1:
        numbers += widened(x1, at, inside)
    if COUNT > 2:
        numbers += widened(x2, at, inside)
    if COUNT > 3:
        numbers += widened(x3, at, inside)
    tl.store(squares + tl.program_id(0), tl.sum(tl.sum(numbers * numbers, 1), 0))
    largest = tl.max(tl.abs(numbers), 1)
    bits = random_bits(tl.load(base) + tl.load(offset), block, BLOCK)
    tl.store(codes + block[:, None] * CODED + columns[None, :], squared_codes(numbers, largest, bits), mask=there[:, None])
    tl.store(scales + block * (CODED // 4) + BLOCK // 4, largest, mask=there)


@triton.jit
def displacement(m, v, rates):
    return tl.load(rates + 3) * m * special.reciprocal(special.sqrt(v, False) * tl.load(rates + 4) + 1e-8, False)


@triton.jit
def adam_step(weight, grad, old_m, old_v, factor, rates, DECAY: tl.constexpr, PART: tl.constexpr):
    """See `reference.adam_step`."""
    beta1, beta2 = tl.load(rates + 1), tl.load(rates + 2)
    scaled = tl.where(tl.load(factor) > 0, grad * tl.load(factor), 0.0)
    m = beta1 * old_m + (1 - beta1) * scaled
    v = beta2 * old_v + (1 - beta2) * scaled * scaled
    if PART == FULL or PART == WEIGHTS:
        if DECAY:
            weight *= tl.load(rates)
        weight -= displacement(m, v, rates)
    elif PART == CORRECT or PART == ROLLBACK:
        weight += displacement(beta1 * old_m + (1 - beta1) * grad, beta2 * old_v + (1 - beta2) * grad * grad, rates)
        if PART == CORRECT:
            weight -= displacement(m, v, rates)
        elif DECAY:
            weight /= tl.load(rates)
    return weight, m, v


@triton.jit
def update(
    w, g, g_scales, codes, scales, factor, rates, base, offset, N,
    BLOCK: tl.constexpr, CODED: tl.constexpr, ROW: tl.constexpr, ROWS: tl.constexpr, DECAY: tl.constexpr, DECODE: tl.constexpr,
    PART: tl.constexpr,
):  # fmt: skip
    """See `reference.adamw8`. DECODE: the gradient is in 8 bits."""
    block = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    at = block[:, None] * BLOCK + columns[None, :]
    inside, there = at < N, block * BLOCK < N
    first = codes + block[:, None] * ROW + columns[None, :]
    scale = scales + block * (ROW // 4) + BLOCK // 2

    if DECODE:
        grad = squared(g + block[:, None] * CODED + columns[None, :], g_scales + block * (CODED // 4) + BLOCK // 4, there)
    else:
        grad = tl.load(g + at, mask=inside, other=0.0).to(tl.float32)
    old_m = squared(first, scale, there)
    c = number(tl.load(first + BLOCK, mask=there[:, None], other=0))
    old_v = c * c * (c * c) * (tl.load(scale + 1, mask=there, other=0.0) / 255**4)[:, None]
    start = tl.load(base) + tl.load(offset)
    old_weight = tl.load(w + at, mask=inside, other=0.0)
    weight, m, v = adam_step(old_weight.to(tl.float32), grad, old_m, old_v, factor, rates, DECAY, PART)
    if PART != MOMENTS:
        by = start
        if PART == CORRECT or PART == ROLLBACK:  # not the bits that rounded the weights before
            by += CORRECTION_STREAM
        cut = (weight.to(tl.int32, bitcast=True) + random_bits(by, block, BLOCK)) & -65536
        rounded = cut.to(tl.float32, bitcast=True).to(w.dtype.element_ty)
        if PART == WEIGHTS:
            rounded = tl.where(tl.load(factor) > 0, rounded, old_weight)
        tl.store(w + at, rounded, mask=inside)
    if PART == FULL or PART == MOMENTS or PART == CORRECT:
        largest = tl.max(tl.abs(m), 1)
        tl.store(scale, largest, mask=there)
        tl.store(first, squared_codes(m, largest, random_bits(start + M_STREAM, block, BLOCK)), mask=there[:, None])

        largest = tl.max(v, 1)
        tl.store(scale + 1, largest, mask=there)
        y = v * (255**4 / tl.maximum(largest, 1e-28))[:, None]
        low = tl.minimum(whole(special.sqrt(special.sqrt(y, False), False)), 254)
        under, over = low * low, (low + 1) * (low + 1)
        code = low + (uniform(random_bits(start + V_STREAM, block, BLOCK)) * (over * over - under * under) < y - under * under).to(
            tl.float32
        )
        code = tl.where(v > 0, tl.maximum(code, 1), 0)
        tl.store(first + BLOCK, byte(code), mask=there[:, None])


@triton.jit
def update_vector(w, g, moments, factor, rates, N, DECAY: tl.constexpr, PART: tl.constexpr, ELEMENTS: tl.constexpr):
    """The same for weights and moments (2, N) in fp32."""
    at = tl.program_id(0) * ELEMENTS + tl.arange(0, ELEMENTS)
    inside = at < N
    old_weight, grad = tl.load(w + at, mask=inside, other=0.0), tl.load(g + at, mask=inside, other=0.0).to(tl.float32)
    old_m, old_v = tl.load(moments + at, mask=inside, other=0.0), tl.load(moments + N + at, mask=inside, other=0.0)
    weight, m, v = adam_step(old_weight, grad, old_m, old_v, factor, rates, DECAY, PART)
    if PART == WEIGHTS:
        weight = tl.where(tl.load(factor) > 0, weight, old_weight)
    if PART != MOMENTS:
        tl.store(w + at, weight, mask=inside)
    if PART == FULL or PART == MOMENTS or PART == CORRECT:
        tl.store(moments + at, m, mask=inside)
        tl.store(moments + N + at, v, mask=inside)


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
    """`reference.adamw8`."""
    if w.dtype == torch.float32:
        grid = (cdiv(w.numel(), VECTOR_ELEMENTS),)
        launch(update_vector, grid, w, g, moments, factor, rates, w.numel(), DECAY=decay, PART=int(part), ELEMENTS=VECTOR_ELEMENTS)
        return
    coded = g.dtype == torch.uint8
    launch(
        update, (cdiv(len(moments), ROWS),),
        w, g, g.view(torch.float32) if coded else None, moments, moments.view(torch.float32), factor, rates, base, offset, w.numel(),
        BLOCK=QUANT_BLOCK, CODED=CODED, ROW=ROW, ROWS=ROWS, DECAY=decay, DECODE=coded, PART=int(part), warps=WARPS,
    )  # fmt: skip


def encode8(parts: Sequence[Tensor], base: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """`reference.encode8`."""
    parts = [x.contiguous() for x in parts]
    first, device = parts[0], parts[0].device
    coded = torch.empty(cdiv(first.numel(), QUANT_BLOCK), CODED, dtype=torch.uint8, device=device)
    programs = cdiv(len(coded), CODED_ROWS)
    squares = torch.empty(programs, device=device)
    launch(
        encode, (programs,),
        *parts, *[None] * (PARTS - len(parts)), coded, coded.view(torch.float32), squares, base, offset, first.numel(),
        COUNT=len(parts), BLOCK=QUANT_BLOCK, CODED=CODED, ROWS=CODED_ROWS, warps=CODED_WARPS,
    )  # fmt: skip
    return coded, squares
