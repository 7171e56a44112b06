"""Causal linear attention with a scalar decay per head, in Triton: one function for the output and all three gradients.

With G the running sum of the log decays and w_ij = exp(-|G_i - G_j|), the output and the gradients are four sums of one form:

    o_i  = sum_{j<=i} w_ij (q_i . k_j)  v_j        forward in time
    dq_i = sum_{j<=i} w_ij (do_i . v_j) k_j        forward
    dk_j = sum_{i>=j} w_ij (v_j . do_i) q_i        backward in time
    dv_j = sum_{i>=j} w_ij (k_j . q_i)  do_i       backward

so that `walk` computes each: chunk by chunk through a sequence, with the sum over all earlier chunks in a state that stays in registers.
The gradients run as one launch of `backward_sweep` (two where K and V differ). Long sequences on few heads are cut into segments that are
walked at the same time; `segment_sums` and `carry` find the state at the start of each first, from one more reading of two of the inputs.

Within a chunk w_ij = write_j / write_i (i >= j, forward in time), so that a decay costs a multiplication a number and not one a pair.
Where a chunk forgets more than the range of bf16 holds, which `decay_factors` finds out first, its whole segment is walked in shorter
chunks from the difference of every pair.

The gradient of a log decay at n is the sum over all pairs that it lies between, sum_{i>=n} (q_i . dq_i - k_i . dk_i). So that rounding
errors do not pile up along the sequence, that sum starts anew every MARK positions, from <S, R>: the state S of all that came before there
and the state R of all that comes after.

Layout: token-major, (B, N, H, K); a head's numbers are contiguous. B batch, H heads, N sequence, K and V head dims, C chunk.
"""

import math
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hyperlm.kernels.differentiation import Function, gradients
from hyperlm.kernels.launch import NEWER, cdiv, is_hopper, launch
from hyperlm.kernels.layout import token_major

LOG2E = tl.constexpr(math.log2(math.e))
MARK = 512
FAINTEST = tl.constexpr(2.0**-80)  # that a chunk may multiply a number with
ROLE_DQ, ROLE_DK, ROLE_DV = (tl.constexpr(i) for i in range(3))


@triton.jit
def load(numbers, mask, EVEN: tl.constexpr, beyond: tl.constexpr = 0.0):
    """Numbers of a chunk, and `beyond` where it reaches beyond the end; EVEN: it never does."""
    if EVEN:
        return tl.load(numbers)
    return tl.load(numbers, mask=mask, other=beyond)


@triton.jit
def store(to, numbers, mask, EVEN: tl.constexpr):
    if EVEN:
        tl.store(to, numbers)
    else:
        tl.store(to, numbers, mask=mask)


@triton.jit
def scanned(decay, inside, EVEN: tl.constexpr):
    """The running sum of a chunk's log2 decays, (C,), and their total."""
    steps = load(decay, inside, EVEN) * LOG2E
    return tl.cumsum(steps, 0), tl.sum(steps, 0)


@triton.jit
def decay_factors(decay, write, totals, B, N, H, segment, C: tl.constexpr, CHUNKS: tl.constexpr):
    """What the decays (B, H, N) multiply numbers with, chunk by chunk of each segment: w_ij = write_j / write_i.

    write: forward and backward in time, (2, B, H, N).
    totals: the decay over each chunk, between two ones, (B, H, segments, chunks of a segment + 2).
    """
    segments, chunks = tl.cdiv(N, segment), tl.cdiv(segment, C)
    blocks = tl.cdiv(chunks, CHUNKS)
    block, place = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    index, head = place % segments, (place // segments).to(tl.int64)
    chunk = block * CHUNKS + tl.arange(0, CHUNKS)
    at = chunk[:, None] * C + tl.arange(0, C)[None, :]
    inside = at < min(segment, N - index * segment)
    where = write + head * N + index * segment + at
    steps = tl.load(decay + head * N + index * segment + at, mask=inside, other=0.0) * LOG2E
    since = tl.cumsum(steps, 1)  # the start of the chunk
    total = tl.sum(steps, 1)
    until = total[:, None] - since  # its end
    tl.store(where, tl.exp2(tl.minimum(-since, 120.0)), mask=inside)  # larger ones are not used, thanks to `is_steep`
    tl.store(where + tl.cast(B * H, tl.int64) * N, tl.exp2(tl.minimum(-until, 120.0)), mask=inside)
    totals += (head * segments + index) * (chunks + 2)
    tl.store(totals + 1 + chunk, tl.exp2(total), mask=chunk < chunks)
    if block == 0:
        tl.store(totals, 1.0)
        tl.store(totals + chunks + 1, 1.0)


@triton.jit
def is_steep(totals, chunks):
    """Whether a chunk of a segment forgets so much that a factor for each position would leave the range of bf16."""
    least = 1.0
    for block in range(tl.cdiv(chunks, 512)):
        chunk = block * 512 + tl.arange(0, 512)
        least = min(least, tl.min(tl.load(totals + 1 + chunk, mask=chunk < chunks, other=1.0), 0))
    return least < FAINTEST


@triton.jit
def walk_chunks(
    query, key, value, out, partner, shares, decay, write, totals, border, marks, left, head, index, part_k, part_v,
    B, N, H, segment, s_query, s_key, s_value, s_partner,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr,
    BACKWARD: tl.constexpr, SWAPPED: tl.constexpr, LEFT: tl.constexpr,
    DECAY: tl.constexpr, STEEP: tl.constexpr, STATES: tl.constexpr, EVEN: tl.constexpr, MARK: tl.constexpr,
):  # fmt: skip
    """One of the four sums, over one segment of one head; see `forward_sweep` and `backward_sweep` for the arguments.

    Within a chunk w_ij = write_j / write_i, which costs a multiplication a number; STEEP: from the difference of every pair, at any decay.
    SWAPPED: stored states (border) are (V, K), and the walk is one of those that leave marks and shares.
    LEFT: the state after the last step is wanted.
    """
    segments = tl.cdiv(N, segment)
    b, h, start = (head // H).to(tl.int64), head % H, index * segment
    c, ks, vs = tl.arange(0, C), part_k * KEYS + tl.arange(0, KEYS), part_v * VALUES + tl.arange(0, VALUES)
    origin = b * N + start  # in tokens
    query += origin * s_query + h * K
    key += origin * s_key + h * K
    value += origin * s_value + h * V
    out += ((part_k * B * N + origin) * H + h) * V
    in_query, in_key = c[:, None] * s_query + ks[None, :], c[:, None] * s_key + ks[None, :]  # from the first number of a chunk
    in_value, in_out = c[:, None] * s_value + vs[None, :], c[:, None] * (H * V) + vs[None, :]
    in_state = ks[:, None] + vs[None, :] * K if SWAPPED else ks[:, None] * V + vs[None, :]
    in_partner = c[:, None] * s_partner + vs[None, :]
    same = tl.zeros((KEYS,), tl.int32)  # one number for every row of the state
    if DECAY:
        decay += head.to(tl.int64) * N + start
        write += (tl.cast(B * H, tl.int64) * (1 if BACKWARD else 0) + head) * N + start
        totals += (head.to(tl.int64) * segments + index) * (tl.cdiv(segment, C) + 2)
        if SWAPPED:
            partner += origin * s_partner + h * V
            shares += ((part_k * (V // VALUES) + part_v) * tl.cast(B * H, tl.int64) + head) * N + start
            marks += head.to(tl.int64) * ((N - 1) // MARK) * (K * V)

    state = tl.zeros((KEYS, VALUES), tl.float32)
    if STATES:
        border += (head.to(tl.int64) * segments + index) * (K * V)
        state = tl.load(border + in_state)

    length = min(segment, N - start)
    chunks = tl.cdiv(length, C)
    reached = c[:, None] <= c[None, :] if BACKWARD else c[:, None] >= c[None, :]
    for step in range(chunks):
        chunk = tl.cast(chunks - 1 - step if BACKWARD else step, tl.int64)
        at = chunk * C
        inside = c < length - at
        mask = inside[:, None]
        if DECAY and SWAPPED:  # no product takes it, so that it is not loaded ahead; hence early
            partner_c = load(partner + at * s_partner + in_partner, mask, EVEN)
        query_c = load(query + at * s_query + in_query, mask, EVEN)
        key_c = load(key + at * s_key + in_key, mask, EVEN)
        value_c = load(value + at * s_value + in_value, mask, EVEN)
        if DECAY and not STEEP:
            state *= tl.load(totals + chunk + (2 if BACKWARD else 0) + same)[
                :, None
            ]  # over the chunk before this one; the first time, by one
            write_c = load(write + at + c, inside, EVEN, 1.0)
            value_c = (value_c * write_c[:, None]).to(value_c.dtype)
        read_state = state.to(query_c.dtype)
        if DECAY and SWAPPED:
            position = start + chunk.to(tl.int32) * C + (C if BACKWARD else 0)
            if (position % MARK == 0) & (position > 0) & (position < N):
                row = (position // MARK - 1) * K + ks  # addresses are computed here, so as not to occupy registers in the meantime
                tl.store(marks + row[:, None] * V + vs[None, :], read_state)
        pairs = tl.dot(query_c, tl.trans(key_c), input_precision="tf32x3")
        y = tl.dot(query_c, read_state, input_precision="tf32x3")
        if DECAY and STEEP:
            running, total = scanned(decay + at + c, inside, EVEN)
            if BACKWARD:
                running = total - running
            pairs *= tl.exp2(tl.where(reached, running[:, None] - running[None, :], -float("inf")))
            y = tl.dot(pairs.to(value_c.dtype), value_c, y * tl.exp2(running)[:, None], input_precision="tf32x3")
            value_c = (value_c * tl.exp2(total - running)[:, None]).to(value_c.dtype)
            state = tl.dot(tl.trans(key_c), value_c, state * tl.exp2(total), input_precision="tf32x3")
        else:
            y = tl.dot(tl.where(reached, pairs, 0.0).to(value_c.dtype), value_c, y, input_precision="tf32x3")
            state = tl.dot(tl.trans(key_c), value_c, state, input_precision="tf32x3")
            if DECAY:
                y *= (1 / write_c)[:, None]
        store(out + at * (H * V) + in_out, y.to(out.dtype.element_ty), mask, EVEN)
        if DECAY and SWAPPED:
            store(shares + at + c, tl.sum(y * partner_c, 1), inside, EVEN)

    if LEFT:
        if DECAY and not STEEP:
            state *= tl.load(totals + (1 if BACKWARD else chunks) + same)[:, None]
        if index == (0 if BACKWARD else segments - 1):
            tl.store(left + head.to(tl.int64) * (K * V) + in_state, state)


@triton.jit
def walk(
    query, key, value, out, partner, shares, decay, write, totals, border, marks, left, head, index, part_k, part_v,
    B, N, H, segment, s_query, s_key, s_value, s_partner,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr,
    BACKWARD: tl.constexpr, SWAPPED: tl.constexpr, LEFT: tl.constexpr,
    DECAY: tl.constexpr, STATES: tl.constexpr, EVEN: tl.constexpr, MARK: tl.constexpr,
):  # fmt: skip
    """`walk_chunks`, in the way that the decays of this segment allow."""
    steep = False
    if DECAY:
        chunks = tl.cdiv(segment, C)
        steep = is_steep(totals + (head.to(tl.int64) * tl.cdiv(N, segment) + index) * (chunks + 2), chunks)
    if steep:
        walk_chunks(
            query, key, value, out, partner, shares, decay, write, totals, border, marks, left, head, index, part_k, part_v, B, N, H,
            segment,
            s_query, s_key, s_value, s_partner, K, V, 16, KEYS, VALUES, BACKWARD, SWAPPED, LEFT, DECAY, True, STATES, EVEN, MARK,
        )  # fmt: skip
    else:
        walk_chunks(
            query, key, value, out, partner, shares, decay, write, totals, border, marks, left, head, index, part_k, part_v, B, N, H,
            segment,
            s_query, s_key, s_value, s_partner, K, V, C, KEYS, VALUES, BACKWARD, SWAPPED, LEFT, DECAY, False, STATES, EVEN, MARK,
        )  # fmt: skip


@triton.jit
def place(program, N, segment, K: tl.constexpr, V: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr):
    """Which head, segment, part of K and part of V a program works on."""
    part_v, program = program % (V // VALUES), program // (V // VALUES)
    part_k, program = program % (K // KEYS), program // (K // KEYS)
    segments = tl.cdiv(N, segment)
    return program // segments, program % segments, part_k, part_v


@triton.jit
def forward_sweep(
    q, k, v, decay, write, totals, starts, o, last, B, N, H, segment, stride_q, stride_k, stride_v,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr,
    DECAY: tl.constexpr, STARTS: tl.constexpr, EVEN: tl.constexpr, MARK: tl.constexpr,
):  # fmt: skip
    """The output, and where it leaves the state, last (B, H, K, V).

    A program computes VALUES of the V numbers, from KEYS of the K. Sums are linear in what is compared, so that where KEYS < K the outputs
    are parts, (K/KEYS, B, N, H, V), to be added up. starts: the state before each segment, (B, H, segments, K, V), with STARTS.
    """
    head, index, part_k, part_v = place(tl.program_id(0), N, segment, K, V, KEYS, VALUES)
    walk(
        q, k, v, o, None, None, decay, write, totals, starts, None, last, head, index, part_k, part_v, B, N, H, segment,
        stride_q, stride_k, stride_v, 0, K, V, C, KEYS, VALUES, False, False, True, DECAY, STARTS, EVEN, MARK,
    )  # fmt: skip


@triton.jit
def backward_sweep(
    q, k, v, do, decay, write, totals, starts, ends, dq, dk, dv, rows, columns, marks, first,
    B, N, H, segment, stride_q, stride_k, stride_v, stride_do,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr,
    ROLE: tl.constexpr, ROLES: tl.constexpr, DECAY: tl.constexpr, STARTS: tl.constexpr, ENDS: tl.constexpr, EVEN: tl.constexpr,
    MARK: tl.constexpr,
):  # fmt: skip
    """ROLES of the gradients, from ROLE on; K is the width of what is compared, V of what is summed; parts as in `forward_sweep`.

    starts, ends: states (B, H, segments, K of q, V of v), with STARTS before each segment, with ENDS after it.
    rows, columns: (parts, B, H, N), shares of q . dq and k . dk.
    marks: (2, B, H, marks, V of v, K of q), transposed states before (ROLE_DQ) and after (ROLE_DK) every MARK positions.
    first: (B, H, K of q, V of v), where ROLE_DV leaves the state.
    """
    role = ROLE + tl.program_id(0) % ROLES
    head, index, part_k, part_v = place(tl.program_id(0) // ROLES, N, segment, K, V, KEYS, VALUES)
    # The branches repeat the walk, each with pointers known when it is compiled: chosen at run time, their alignment would be unknown.
    if role == ROLE_DQ:
        walk(
            do, v, k, dq, q, rows, decay, write, totals, starts, marks, None, head, index, part_k, part_v, B, N, H, segment,
            stride_do, stride_v, stride_k, stride_q, K, V, C, KEYS, VALUES, False, True, False, DECAY, STARTS, EVEN, MARK,
        )  # fmt: skip
    elif role == ROLE_DK:
        after = marks
        if DECAY:
            after += tl.cast(B * H, tl.int64) * ((N - 1) // MARK) * (K * V)
        walk(
            v, do, q, dk, k, columns, decay, write, totals, ends, after, None, head, index, part_k, part_v, B, N, H, segment,
            stride_v, stride_do, stride_q, stride_k, K, V, C, KEYS, VALUES, True, True, False, DECAY, ENDS, EVEN, MARK,
        )  # fmt: skip
    else:
        walk(
            k, q, do, dv, None, None, decay, write, totals, ends, None, first, head, index, part_k, part_v, B, N, H, segment,
            stride_k, stride_q, stride_do, 0, K, V, C, KEYS, VALUES, True, False, True, DECAY, ENDS, EVEN, MARK,
        )  # fmt: skip


@triton.jit
def segment_sums(
    key, value, decay, sums, totals, N, H, segment, stride_key, stride_value,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr, DECAY: tl.constexpr,
    BACKWARD: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """What each segment adds to the state, (B, H, segments, K, V), and its log2 decay, (B, H, segments)."""
    segments = tl.cdiv(N, segment)
    head, index, part_k, part_v = place(tl.program_id(0), N, segment, K, V, KEYS, VALUES)
    b, h = (head // H).to(tl.int64), head % H
    c, ks, vs = tl.arange(0, C), part_k * KEYS + tl.arange(0, KEYS), part_v * VALUES + tl.arange(0, VALUES)
    origin = b * N + index * segment
    key += origin * stride_key + h * K
    value += origin * stride_value + h * V
    in_key, in_value = c[:, None] * stride_key + ks[None, :], c[:, None] * stride_value + vs[None, :]
    if DECAY:
        decay += head.to(tl.int64) * N + index * segment

    state = tl.zeros((KEYS, VALUES), tl.float32)
    log_total = 0.0
    length = min(segment, N - index * segment)
    chunks = tl.cdiv(length, C)
    for step in range(chunks):
        at = tl.cast(chunks - 1 - step if BACKWARD else step, tl.int64) * C
        inside = c < length - at
        mask = inside[:, None]
        key_c = load(key + at * stride_key + in_key, mask, EVEN)
        value_c = load(value + at * stride_value + in_value, mask, EVEN)
        if DECAY:
            running, total = scanned(decay + at + c, inside, EVEN)
            state *= tl.exp2(total)
            log_total += total
            value_c = (value_c * tl.exp2(running if BACKWARD else total - running)[:, None]).to(value_c.dtype)
        state = tl.dot(tl.trans(key_c), value_c, state, input_precision="tf32x3")
    slot = head.to(tl.int64) * segments + index
    tl.store(sums + (slot * K + ks[:, None]) * V + vs[None, :], state)
    if DECAY:
        if part_v == 0 and part_k == 0:
            tl.store(totals + slot, log_total)


@triton.jit
def carry(
    sums,
    totals,
    initial,
    segments,
    SIZE: tl.constexpr,
    ELEMENTS: tl.constexpr,
    DECAY: tl.constexpr,
    INITIAL: tl.constexpr,
    BACKWARD: tl.constexpr,
):
    """Turn what each segment adds, (B, H, segments, SIZE), into the state before it (after it, if BACKWARD), in place."""
    blocks: tl.constexpr = SIZE // ELEMENTS
    head = (tl.program_id(0) // blocks).to(tl.int64)
    at = (tl.program_id(0) % blocks) * ELEMENTS + tl.arange(0, ELEMENTS)
    state = tl.zeros((ELEMENTS,), tl.float32)
    if INITIAL:
        state = tl.load(initial + head * SIZE + at)
    for step in range(segments):
        slot = head * segments + (segments - 1 - step if BACKWARD else step)
        added = tl.load(sums + slot * SIZE + at)
        tl.store(sums + slot * SIZE + at, state)
        if DECAY:
            state *= tl.exp2(tl.load(totals + slot))
        state += added


@triton.jit
def inner(x, y, SIZE: tl.constexpr, ELEMENTS: tl.constexpr):
    """Inner product of two stored states."""
    total = tl.zeros((ELEMENTS,), tl.float32)
    for block in range(SIZE // ELEMENTS):
        at = block * ELEMENTS + tl.arange(0, ELEMENTS)
        total += tl.load(x + at).to(tl.float32) * tl.load(y + at).to(tl.float32)
    return tl.sum(total, 0)


@triton.jit
def decay_gradient(
    rows,
    columns,
    marks,
    last,
    d_last,
    d_decay,
    B,
    N,
    H,
    parts,
    SIZE: tl.constexpr,
    LAST: tl.constexpr,
    MARK: tl.constexpr,
    ELEMENTS: tl.constexpr,
):
    """d_decay_n = sum_{i>=n} (rows_i - columns_i) in each stretch of MARK positions, plus what lies beyond its end."""
    n_marks = (N - 1) // MARK
    head, stretch = tl.program_id(0) // (n_marks + 1), tl.program_id(0) % (n_marks + 1)
    beyond = 0.0
    if stretch < n_marks:
        before = marks + (head.to(tl.int64) * n_marks + stretch) * SIZE
        beyond = inner(before, before + tl.cast(B * H, tl.int64) * n_marks * SIZE, SIZE, ELEMENTS)
    elif LAST:
        beyond = inner(last + head.to(tl.int64) * SIZE, d_last + head.to(tl.int64) * SIZE, SIZE, ELEMENTS)
    n = stretch * MARK + tl.arange(0, MARK)
    where = head.to(tl.int64) * N + n
    x = tl.zeros((MARK,), tl.float32)
    for part in range(parts):
        share = where + part * tl.cast(B * H, tl.int64) * N
        x += tl.load(rows + share, mask=n < N, other=0.0) - tl.load(columns + share, mask=n < N, other=0.0)
    tl.store(d_decay + where, tl.cumsum(x, 0, reverse=True) + beyond, mask=n < N)


# -- which shape of work ---------------------------------------------------------------------------------------------------------------


class Config(NamedTuple):
    """C positions a chunk, KEYS x VALUES of the state a program, and how a program is run."""

    C: int
    KEYS: int
    VALUES: int
    warps: int
    stages: int
    registers: int | None = None


def config(K: int, V: int, dtype: torch.dtype, hopper: bool, decay: bool, even: bool, backward: bool = False) -> Config:
    """The shipped configuration for keys of width K and values of width V: none spills registers.

    even: no chunk reaches beyond the end of its segment.

    Measured on an H200, (B, H, N, K) = (8, 16, 4096, 64), forward: 0.077 ms with 3 stages, 0.119 with 2; without decay. On an H100 at K =
    128, forward and backward with decay: 1.35 ms with 2 stages, though a quarter of that waits for loads; 1.57 with 3, whose shared memory
    leaves room for one program on a multiprocessor instead of two; 1.92 and 2.36 with chunks of 32; 2.98 with KEYS 64.
    """
    if dtype == torch.float32:
        return Config(16, 32, 16, 8, 1)
    if not hopper:
        return Config(32, K, min(V, K // 2 if decay else 64), 4, 2) if K <= 64 else Config(32, min(K, 128), 32, 8, 2)
    if K <= 64:
        crowded = K == V == 64 and even and not NEWER  # three programs on a multiprocessor rather than two
        return Config(64, K, min(V, 32), 4, 3, 168 if crowded else None) if backward else Config(64, K, min(V, 64), 4, 3)
    return Config(64, 64 if NEWER and decay and backward else 128, min(V, 64 if even and not decay and not NEWER else 32), 4, 2)


def chunk_length(dtype: torch.dtype, hopper: bool) -> int:
    return config(64, 64, dtype, hopper, False, False).C


@lru_cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def segment_length(heads: int, n: int, device: torch.device) -> int:
    """Positions in a segment: all of them where `heads` walks keep the device busy, and else few enough that there are two walks a
    multiprocessor, but at least MARK."""
    processors = multiprocessors(device)
    if heads >= 0.75 * processors:
        return n
    parts = cdiv(2 * processors, heads)
    return cdiv(cdiv(n, parts), MARK) * MARK


def division(heads: int, n: int, device: torch.device) -> str:
    """How sequences of length n are divided, in words, for `heads` heads x batch."""
    segment = segment_length(heads, n, device)
    return (
        f"a sweep for each of {heads} heads x batch"
        if segment >= n
        else f"{heads} heads x batch in {cdiv(n, segment)} segments of {segment:,}"
    )


def choose(x: Tensor, K: int, V: int, segment: int, decay: Tensor | None, backward: bool = False) -> tuple[Config, bool]:
    """The configuration for inputs like x (B, N, H, any), and whether no chunk reaches beyond the end of its segment."""
    hopper = is_hopper(x.device)
    C = chunk_length(x.dtype, hopper)
    even = x.shape[1] % C == segment % C == 0
    return config(K, V, x.dtype, hopper, decay is not None, even, backward), even


# -- differentiable --------------------------------------------------------------------------------------------------------------------


def states(key: Tensor, value: Tensor, decay: Tensor | None, initial: Tensor | None, segment: int, backward: bool) -> Tensor | None:
    """States at the borders of segments, (B, H, segments, K, V) fp32; None where all are zero."""
    (b, n, h, k), v = key.shape, value.shape[-1]
    parts = cdiv(n, segment)
    if parts == 1:
        return initial
    c, even = choose(key, k, v, segment, decay)
    sums = torch.empty(b, h, parts, k, v, device=key.device)
    totals = torch.empty(b, h, parts, device=key.device)
    launch(
        segment_sums, (b * h * parts * (k // c.KEYS) * (v // c.VALUES),),
        key, value, decay, sums, totals, n, h, segment, key.stride(1), value.stride(1),
        K=k, V=v, C=c.C, KEYS=c.KEYS, VALUES=c.VALUES, DECAY=decay is not None, BACKWARD=backward, EVEN=even,
        warps=c.warps, stages=c.stages, registers=c.registers,
    )  # fmt: skip
    launch(
        carry, (b * h * (k * v // 512),),
        sums, totals, initial, parts, SIZE=k * v, ELEMENTS=512, DECAY=decay is not None, INITIAL=initial is not None, BACKWARD=backward,
    )  # fmt: skip
    return sums


def factors_of(decay: Tensor | None, segment: int, C: int) -> tuple[Tensor | None, Tensor | None]:
    """`decay_factors` of decays (B, H, N): write and totals."""
    if decay is None:
        return None, None
    (b, h, n), segments, chunks = decay.shape, cdiv(decay.shape[2], segment), cdiv(segment, C)
    write = torch.empty(2, b, h, n, device=decay.device)
    totals = torch.empty(b, h, segments, chunks + 2, device=decay.device)
    launch(decay_factors, (b * h * segments * cdiv(chunks, 32),), decay, write, totals, b, n, h, segment, C=C, CHUNKS=32)
    return write, totals


def parts_like(x: Tensor, width: int, parts: int) -> Tensor:
    """Room for a result (B, N, H, width) in `parts` that are still to be added up, (parts, B, N, H, width)."""
    return torch.empty(parts, *x.shape[:3], width, device=x.device, dtype=x.dtype if parts == 1 else torch.float32)


def add_up(parts: Tensor, dtype: torch.dtype) -> Tensor:
    return parts[0] if len(parts) == 1 else parts.sum(0).to(dtype)


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    write: Tensor | None,
    totals: Tensor | None,
    last: Tensor,
    starts: Tensor | None,
    has_state: bool,
    do: Tensor | None,
    d_last: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v, decay and the initial state, token-major."""
    (b, n, h, kd), vd = q.shape, v.shape[-1]
    do = torch.zeros(b, n, h, vd, device=q.device, dtype=v.dtype) if do is None else token_major(do.transpose(1, 2))
    d_last = None if d_last is None else d_last.contiguous()
    segment = segment_length(b * h, n, q.device)
    ends = states(q, do, decay, d_last, segment, backward=True)
    first = torch.empty_like(last)
    # what compares values and sums keys (dq and dk), and the other way (dv)
    (to_k, even), (to_v, _) = (choose(q, *widths, segment, decay, backward=True) for widths in ((vd, kd), (kd, vd)))
    dq, dk, dv = parts_like(q, kd, vd // to_k.KEYS), parts_like(q, kd, vd // to_k.KEYS), parts_like(q, vd, kd // to_v.KEYS)
    rows = columns = marks = d_decay = None
    if decay is not None:
        parts = (vd // to_k.KEYS) * (kd // to_k.VALUES)
        rows, columns = torch.empty(2, parts, b, h, n, device=q.device)
        marks = torch.empty(2, b, h, (n - 1) // MARK, vd, kd, device=q.device, dtype=q.dtype)
    launches = [(0, 3, vd, kd, to_k)] if kd == vd else [(0, 2, vd, kd, to_k), (2, 1, kd, vd, to_v)]
    for role, roles, width, summed, c in launches:
        launch(
            backward_sweep, (b * h * cdiv(n, segment) * (width // c.KEYS) * (summed // c.VALUES) * roles,),
            q, k, v, do, decay, write, totals, starts, ends, dq, dk, dv, rows, columns, marks, first,
            b, n, h, segment, q.stride(1), k.stride(1), v.stride(1), do.stride(1),
            K=width, V=summed, C=c.C, KEYS=c.KEYS, VALUES=c.VALUES, ROLE=role, ROLES=roles, DECAY=decay is not None,
            STARTS=starts is not None, ENDS=ends is not None, EVEN=even, MARK=MARK, warps=c.warps, stages=c.stages, registers=c.registers,
        )  # fmt: skip
    if decay is not None:
        d_decay = torch.empty_like(decay)
        launch(
            decay_gradient, (b * h * ((n - 1) // MARK + 1),),
            rows, columns, marks, last, d_last, d_decay, b, n, h, parts, SIZE=kd * vd, LAST=d_last is not None, MARK=MARK, ELEMENTS=512,
        )  # fmt: skip
    return add_up(dq, q.dtype), add_up(dk, k.dtype), add_up(dv, v.dtype), d_decay, first if has_state else None


class LinearAttention(Function):
    """(q, k, v, log_decay, state) token-major -> o (B, N, H, V), final state (B, H, K, V), and for the backward pass: states at the starts
    of segments (None for one segment), factors of the decay."""

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, state: Tensor | None) -> tuple[Tensor | None, ...]:
        (b, n, h, kd), vd = q.shape, v.shape[-1]
        segment = segment_length(b * h, n, q.device)
        starts = states(k, v, decay, state, segment, backward=False)
        c, even = choose(q, kd, vd, segment, decay)
        write, totals = factors_of(decay, segment, c.C)
        o = parts_like(q, vd, kd // c.KEYS)
        last = torch.empty(b, h, kd, vd, device=q.device)
        launch(
            forward_sweep, (b * h * cdiv(n, segment) * (kd // c.KEYS) * (vd // c.VALUES),),
            q, k, v, decay, write, totals, starts, o, last, b, n, h, segment, q.stride(1), k.stride(1), v.stride(1),
            K=kd, V=vd, C=c.C, KEYS=c.KEYS, VALUES=c.VALUES, DECAY=decay is not None, STARTS=starts is not None, EVEN=even, MARK=MARK,
            warps=c.warps, stages=c.stages, registers=c.registers,
        )  # fmt: skip
        return add_up(o, v.dtype), last, None if starts is state else starts, write, totals

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: tuple) -> None:
        q, k, v, decay, state = inputs
        _, last, starts, *factors = output
        ctx.mark_non_differentiable(*(x for x in (starts, *factors) if x is not None))
        ctx.save_for_backward(q, k, v, decay, *factors, last, state if starts is None else starts)
        ctx.has_state = state is not None
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, do: Tensor | None, d_last: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        return gradients(backward, *ctx.saved_tensors, ctx.has_state, do, d_last)


def linear_attention(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None = None, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`reference.linear_attention`, in bf16 or fp32."""
    decay = None if log_decay is None else log_decay.contiguous()
    state = None if state is None else state.contiguous()
    o, last, *_ = LinearAttention.apply(token_major(q), token_major(k), token_major(v), decay, state)
    return o.transpose(1, 2), last
