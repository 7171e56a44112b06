"""Causal linear attention with a scalar decay per head, in Triton: one kernel for the output and all three gradients.

With G the running sum of the log decays and w_ij = exp(-|G_i - G_j|), the output and the gradients are four sums of one form:

    o_i  = sum_{j<=i} w_ij (q_i . k_j)  v_j        forward in time
    dq_i = sum_{j<=i} w_ij (do_i . v_j) k_j        forward
    dk_j = sum_{i>=j} w_ij (v_j . do_i) q_i        backward in time
    dv_j = sum_{i>=j} w_ij (k_j . q_i)  do_i       backward

so that one function, `walk`, computes each: chunk by chunk through a sequence, with the sum over all earlier chunks in a state that stays in
registers. The gradients run as one launch of `sweep` (two where K and V differ). Long sequences on few heads are cut into segments that are walked at the same time; `segment_sums` and
`carry` find the state at the start of each first, from one more reading of two of the inputs.

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

from hyperlm.kernels.differentiation import gradients
from hyperlm.kernels.layout import token_major

LOG2E = tl.constexpr(math.log2(math.e))
MARK = 512
ROLE_O, ROLE_DQ, ROLE_DK, ROLE_DV = (tl.constexpr(i) for i in range(4))


@triton.jit
def load(numbers, mask, EVEN: tl.constexpr):
    """Numbers of a chunk, zero where it reaches beyond the end; EVEN: it never does."""
    if EVEN:
        return tl.load(numbers)
    return tl.load(numbers, mask=mask, other=0.0)


@triton.jit
def store(to, numbers, mask, EVEN: tl.constexpr):
    if EVEN:
        tl.store(to, numbers)
    else:
        tl.store(to, numbers, mask=mask)


@triton.jit
def decay_in_chunk(decay, c, inside, H, BACKWARD: tl.constexpr, EVEN: tl.constexpr):
    """Of a chunk: the running sum of log2 decays (C,), the factors that a position reads the state and writes to it with, and the total."""
    steps = load(decay + c * H, inside, EVEN) * LOG2E
    running = tl.cumsum(steps, 0)
    total = tl.sum(steps, 0)
    early, late = tl.exp2(running), tl.exp2(total - running)
    if BACKWARD:
        return -running, late, early, tl.exp2(total)
    return running, early, late, tl.exp2(total)


@triton.jit
def walk(
    query, key, value, out, partner, shares, decay, border, marks, left, head, here, part_k, part_v,
    B, N, H, segment, s_query, s_key, s_value, s_partner,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr,
    BACKWARD: tl.constexpr, SWAPPED: tl.constexpr, LEFT: tl.constexpr,
    DECAY: tl.constexpr, STATES: tl.constexpr, EVEN: tl.constexpr, MARK: tl.constexpr,
):  # fmt: skip
    """One of the four sums, over one segment of one head; see `sweep` for the arguments.

    SWAPPED: stored states (border) are (V, K), and the walk is one of those that leave marks and shares.
    LEFT: the state after the last step is wanted.
    """
    segments = tl.cdiv(N, segment)
    b, h, start = (head // H).to(tl.int64), head % H, here * segment
    c, ks, vs = tl.arange(0, C), part_k * KEYS + tl.arange(0, KEYS), part_v * VALUES + tl.arange(0, VALUES)
    origin = b * N + start  # in tokens
    query += origin * s_query + h * K
    key += origin * s_key + h * K
    value += origin * s_value + h * V
    out += ((part_k * B * N + origin) * H + h) * V
    in_query, in_key = c[:, None] * s_query + ks[None, :], c[:, None] * s_key + ks[None, :]  # from the first number of a chunk
    in_value, in_out = c[:, None] * s_value + vs[None, :], c[:, None] * (H * V) + vs[None, :]
    in_state = ks[:, None] * V + vs[None, :]
    n_marks = (N - 1) // MARK
    if DECAY:
        decay += origin * H + h
        if SWAPPED:
            partner += origin * s_partner + h * V
            shares += ((part_k * (V // VALUES) + part_v) * B * N + origin) * H + h
            marks += head.to(tl.int64) * n_marks * (K * V)

    state = tl.zeros((KEYS, VALUES), tl.float32)
    if STATES:
        border += (head.to(tl.int64) * segments + here) * (K * V)
        state = tl.load(border + (ks[:, None] + vs[None, :] * K if SWAPPED else in_state))

    length = min(segment, N - start)
    chunks = tl.cdiv(length, C)
    reached = c[:, None] <= c[None, :] if BACKWARD else c[:, None] >= c[None, :]
    for step in range(chunks):
        at = tl.cast(chunks - 1 - step if BACKWARD else step, tl.int64) * C
        inside = c < length - at
        mask = inside[:, None]
        if DECAY and SWAPPED:
            position = (start + at + (C if BACKWARD else 0)).to(tl.int32)
            if position % MARK == 0 and position > 0 and position < N:
                tl.store(marks + (position // MARK - 1).to(tl.int64) * (K * V) + in_state, state)
        query_c = load(query + at * s_query + in_query, mask, EVEN)
        key_c = load(key + at * s_key + in_key, mask, EVEN)
        value_c = load(value + at * s_value + in_value, mask, EVEN)
        pairs = tl.dot(query_c, tl.trans(key_c), input_precision="tf32x3")
        y = tl.dot(query_c, state.to(query_c.dtype), input_precision="tf32x3")
        if DECAY:
            running, read, write, total = decay_in_chunk(decay + at * H, c, inside, H, BACKWARD, EVEN)
            pairs *= tl.exp2(tl.where(reached, running[:, None] - running[None, :], -float("inf")))
            y *= read[:, None]
            state *= total
            added = (value_c * write[:, None]).to(value_c.dtype)
        else:
            pairs = tl.where(reached, pairs, 0.0)
            added = value_c
        y = tl.dot(pairs.to(value_c.dtype), value_c, y, input_precision="tf32x3")
        state = tl.dot(tl.trans(key_c), added, state, input_precision="tf32x3")
        store(out + at * (H * V) + in_out, y.to(out.dtype.element_ty), mask, EVEN)
        if DECAY and SWAPPED:
            partner_c = load(partner + at * s_partner + c[:, None] * s_partner + vs[None, :], mask, EVEN)
            store(shares + (at + c) * H, tl.sum(y * partner_c, 1), inside, EVEN)

    if LEFT:
        if here == (0 if BACKWARD else segments - 1):
            tl.store(left + head.to(tl.int64) * (K * V) + in_state, state)


@triton.jit
def sweep(
    q, k, v, do, decay, starts, ends, o, dq, dk, dv, rows, columns, marks, last, first,
    B, N, H, segment, stride_q, stride_k, stride_v, stride_do,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr,
    ROLE: tl.constexpr, ROLES: tl.constexpr, DECAY: tl.constexpr, STARTS: tl.constexpr, ENDS: tl.constexpr, EVEN: tl.constexpr, MARK: tl.constexpr,
):  # fmt: skip
    """ROLES of the four sums, from ROLE on; K is the width of what is compared, V of what is summed.

    A program computes VALUES of the V numbers, from KEYS of the K. Sums are linear in what is compared, so that where KEYS < K the outputs
    are parts, (K/KEYS, B, N, H, V), to be added up.
    starts, ends: states (B, H, segments, K of q, V of v), with STARTS before each segment, with ENDS after it.
    rows, columns: (parts, B, N, H), shares of q . dq and k . dk.
    marks: (2, B, H, marks, V of v, K of q), transposed states before (ROLE_DQ) and after (ROLE_DK) every MARK positions.
    last, first: (B, H, K of q, V of v), where the state is left by ROLE_O and ROLE_DV.
    """
    program = tl.program_id(0)
    role = ROLE + program % ROLES
    part_v = (program // ROLES) % (V // VALUES)
    part_k = (program // ROLES // (V // VALUES)) % (K // KEYS)
    segments = tl.cdiv(N, segment)
    here = (program // ROLES // (V // VALUES) // (K // KEYS)) % segments
    head = program // ROLES // (V // VALUES) // (K // KEYS) // segments
    # The branches repeat the walk, each with pointers known when it is compiled: chosen at run time, their alignment would be unknown.
    if ROLE == ROLE_O:
        walk(
            q, k, v, o, None, None, decay, starts, None, last, head, here, part_k, part_v, B, N, H, segment, stride_q, stride_k, stride_v, 0,
            K, V, C, KEYS, VALUES, False, False, True, DECAY, STARTS, EVEN, MARK,
        )  # fmt: skip
    elif role == ROLE_DQ:
        walk(
            do, v, k, dq, q, rows, decay, starts, marks, None, head, here, part_k, part_v, B, N, H, segment, stride_do, stride_v, stride_k, stride_q,
            K, V, C, KEYS, VALUES, False, True, False, DECAY, STARTS, EVEN, MARK,
        )  # fmt: skip
    elif role == ROLE_DK:
        after = marks
        if DECAY:
            after += tl.cast(B * H, tl.int64) * ((N - 1) // MARK) * (K * V)
        walk(
            v, do, q, dk, k, columns, decay, ends, after, None, head, here, part_k, part_v, B, N, H, segment, stride_v, stride_do, stride_q, stride_k,
            K, V, C, KEYS, VALUES, True, True, False, DECAY, ENDS, EVEN, MARK,
        )  # fmt: skip
    else:
        walk(
            k, q, do, dv, None, None, decay, ends, None, first, head, here, part_k, part_v, B, N, H, segment, stride_k, stride_q, stride_do, 0,
            K, V, C, KEYS, VALUES, True, False, True, DECAY, ENDS, EVEN, MARK,
        )  # fmt: skip


@triton.jit
def segment_sums(
    key, value, decay, sums, totals, N, H, segment, stride_key, stride_value,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr, DECAY: tl.constexpr, BACKWARD: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """What each segment adds to the state, (B, H, segments, K, V), and its log2 decay, (B, H, segments)."""
    program = tl.program_id(0)
    part_v = program % (V // VALUES)
    part_k = (program // (V // VALUES)) % (K // KEYS)
    segments = tl.cdiv(N, segment)
    here = (program // (V // VALUES) // (K // KEYS)) % segments
    head = program // (V // VALUES) // (K // KEYS) // segments
    b, h = (head // H).to(tl.int64), head % H
    c, ks, vs = tl.arange(0, C), part_k * KEYS + tl.arange(0, KEYS), part_v * VALUES + tl.arange(0, VALUES)
    origin = b * N + here * segment
    key += origin * stride_key + h * K
    value += origin * stride_value + h * V
    in_key, in_value = c[:, None] * stride_key + ks[None, :], c[:, None] * stride_value + vs[None, :]
    if DECAY:
        decay += origin * H + h

    state = tl.zeros((KEYS, VALUES), tl.float32)
    log_total = 0.0
    length = min(segment, N - here * segment)
    chunks = tl.cdiv(length, C)
    for step in range(chunks):
        at = tl.cast(chunks - 1 - step if BACKWARD else step, tl.int64) * C
        inside = c < length - at
        mask = inside[:, None]
        key_c = load(key + at * stride_key + in_key, mask, EVEN)
        value_c = load(value + at * stride_value + in_value, mask, EVEN)
        if DECAY:
            running, read, write, total = decay_in_chunk(decay + at * H, c, inside, H, BACKWARD, EVEN)
            state *= total
            log_total += tl.log2(total)
            value_c = (value_c * write[:, None]).to(value_c.dtype)
        state = tl.dot(tl.trans(key_c), value_c, state, input_precision="tf32x3")
    slot = head.to(tl.int64) * segments + here
    tl.store(sums + (slot * K + ks[:, None]) * V + vs[None, :], state)
    if DECAY:
        if part_v == 0 and part_k == 0:
            tl.store(totals + slot, log_total)


@triton.jit
def carry(sums, totals, initial, segments, SIZE: tl.constexpr, BLOCK: tl.constexpr, DECAY: tl.constexpr, INITIAL: tl.constexpr, BACKWARD: tl.constexpr):
    """Turn what each segment adds, (B, H, segments, SIZE), into the state before it (after it, if BACKWARD), in place."""
    blocks: tl.constexpr = SIZE // BLOCK
    head = (tl.program_id(0) // blocks).to(tl.int64)
    at = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    state = tl.zeros((BLOCK,), tl.float32)
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
def inner(x, y, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Inner product of two stored states."""
    total = tl.zeros((BLOCK,), tl.float32)
    for block in range(SIZE // BLOCK):
        at = block * BLOCK + tl.arange(0, BLOCK)
        total += tl.load(x + at) * tl.load(y + at)
    return tl.sum(total, 0)


@triton.jit
def decay_gradient(
    rows, columns, marks, last, d_last, d_decay, B, N, H, parts, SIZE: tl.constexpr, LAST: tl.constexpr, MARK: tl.constexpr, BLOCK: tl.constexpr
):
    """d_decay_n = sum_{i>=n} (rows_i - columns_i) in each stretch of MARK positions, plus what lies beyond its end."""
    n_marks = (N - 1) // MARK
    head, stretch = tl.program_id(0) // (n_marks + 1), tl.program_id(0) % (n_marks + 1)
    b, h = (head // H).to(tl.int64), head % H
    beyond = 0.0
    if stretch < n_marks:
        before = marks + (head.to(tl.int64) * n_marks + stretch) * SIZE
        beyond = inner(before, before + tl.cast(B * H, tl.int64) * n_marks * SIZE, SIZE, BLOCK)
    elif LAST:
        beyond = inner(last + head.to(tl.int64) * SIZE, d_last + head.to(tl.int64) * SIZE, SIZE, BLOCK)
    n = stretch * MARK + tl.arange(0, MARK)
    where = (b * N + n) * H + h
    x = tl.zeros((MARK,), tl.float32)
    for part in range(parts):
        share = where + part * tl.cast(B, tl.int64) * N * H
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


def config(K: int, V: int, dtype: torch.dtype, hopper: bool, backward: bool = False) -> Config:
    """The shipped configuration for keys of width K and values of width V: none spills registers.

    Measured on an H200, (B, H, N, K) = (8, 16, 4096, 64), forward: 0.077 ms with 3 stages, 0.119 with 2; without decay.
    """
    if dtype == torch.float32:
        return Config(16, 32, 32, 4, 1)
    if K <= 64:
        return Config(64, K, min(V, 32 if backward else 64), 4, 3) if hopper else Config(32, K, min(V, 64), 4, 2)
    return Config(64 if hopper else 32, min(K, 128), 32, 8, 2)


@lru_cache
def is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


@lru_cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def segment_length(heads: int, n: int, device: torch.device) -> int:
    """Positions in a segment: all of them where `heads` walks keep the device busy, and else few enough that there are two walks a
    multiprocessor, but at least MARK."""
    processors = multiprocessors(device)
    if heads >= 0.75 * processors:
        return n
    parts = triton.cdiv(2 * processors, heads)
    return triton.cdiv(triton.cdiv(n, parts), MARK) * MARK


def even(n: int, segment: int, c: Config) -> bool:
    """Whether no chunk reaches beyond the end of its segment."""
    return n % c.C == segment % c.C == 0


# -- differentiable --------------------------------------------------------------------------------------------------------------------


def states(key: Tensor, value: Tensor, decay: Tensor | None, initial: Tensor | None, segment: int, backward: bool) -> Tensor | None:
    """States at the borders of segments, (B, H, segments, K, V) fp32; None where all are zero."""
    (b, n, h, k), v = key.shape, value.shape[-1]
    parts = triton.cdiv(n, segment)
    if parts == 1:
        return initial
    c = config(k, v, key.dtype, is_hopper(key.device))
    sums = torch.empty(b, h, parts, k, v, device=key.device)
    totals = torch.empty(b, h, parts, device=key.device)
    segment_sums[(b * h * parts * (k // c.KEYS) * (v // c.VALUES),)](
        key, value, decay, sums, totals, n, h, segment, key.stride(1), value.stride(1),
        K=k, V=v, C=c.C, KEYS=c.KEYS, VALUES=c.VALUES, DECAY=decay is not None, BACKWARD=backward, EVEN=even(n, segment, c),
        num_warps=c.warps, num_stages=c.stages,
    )  # fmt: skip
    carry[(b * h * (k * v // 512),)](
        sums, totals, initial, parts, SIZE=k * v, BLOCK=512, DECAY=decay is not None, INITIAL=initial is not None, BACKWARD=backward, num_warps=4
    )
    return sums


def parts_like(x: Tensor, width: int, parts: int) -> Tensor:
    """Room for a result (B, N, H, width) in `parts` that are still to be added up, (parts, B, N, H, width)."""
    return torch.empty(parts, *x.shape[:3], width, device=x.device, dtype=x.dtype if parts == 1 else torch.float32)


def add_up(parts: Tensor, dtype: torch.dtype) -> Tensor:
    return parts[0] if len(parts) == 1 else parts.sum(0).to(dtype)


def backward(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, last: Tensor, starts: Tensor | None, do: Tensor | None, d_last: Tensor | None, has_state: bool
) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v, decay and the initial state, token-major."""
    (b, n, h, kd), vd = q.shape, v.shape[-1]
    do = torch.zeros(b, n, h, vd, device=q.device, dtype=v.dtype) if do is None else token_major(do.transpose(1, 2))
    d_last = None if d_last is None else d_last.contiguous()
    segment = segment_length(b * h, n, q.device)
    ends = states(q, do, decay, d_last, segment, backward=True)
    first = torch.empty_like(last)
    # what compares values and sums keys (dq and dk), and the other way (dv)
    to_k, to_v = (config(*widths, q.dtype, is_hopper(q.device), backward=True) for widths in ((vd, kd), (kd, vd)))
    dq, dk, dv = parts_like(q, kd, vd // to_k.KEYS), parts_like(q, kd, vd // to_k.KEYS), parts_like(q, vd, kd // to_v.KEYS)
    rows = columns = marks = d_decay = None
    if decay is not None:
        parts = (vd // to_k.KEYS) * (kd // to_k.VALUES)
        rows, columns = torch.empty(2, parts, b, n, h, device=q.device)
        marks = torch.empty(2, b, h, (n - 1) // MARK, vd, kd, device=q.device)
    launches = [(1, 3, vd, kd, to_k)] if kd == vd else [(1, 2, vd, kd, to_k), (3, 1, kd, vd, to_v)]
    for role, roles, width, summed, c in launches:
        sweep[(b * h * triton.cdiv(n, segment) * (width // c.KEYS) * (summed // c.VALUES) * roles,)](
            q, k, v, do, decay, starts, ends, None, dq, dk, dv, rows, columns, marks, None, first,
            b, n, h, segment, q.stride(1), k.stride(1), v.stride(1), do.stride(1),
            K=width, V=summed, C=c.C, KEYS=c.KEYS, VALUES=c.VALUES, ROLE=role, ROLES=roles, DECAY=decay is not None,
            STARTS=starts is not None, ENDS=ends is not None, EVEN=even(n, segment, c), MARK=MARK,
            num_warps=c.warps, num_stages=c.stages,
        )  # fmt: skip
    if decay is not None:
        d_decay = torch.empty_like(decay)
        decay_gradient[(b * h * ((n - 1) // MARK + 1),)](
            rows, columns, marks, last, d_last, d_decay, b, n, h, parts, SIZE=kd * vd, LAST=d_last is not None, MARK=MARK, BLOCK=512, num_warps=4
        )
    return add_up(dq, q.dtype), add_up(dk, k.dtype), add_up(dv, v.dtype), d_decay, first if has_state else None


class LinearAttention(torch.autograd.Function):
    """(q, k, v, log_decay, state) token-major -> o (B, N, H, V), final state (B, H, K, V), states at the starts of segments (None for one segment)."""

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, state: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        (b, n, h, kd), vd = q.shape, v.shape[-1]
        segment = segment_length(b * h, n, q.device)
        starts = states(k, v, decay, state, segment, backward=False)
        c = config(kd, vd, q.dtype, is_hopper(q.device))
        o = parts_like(q, vd, kd // c.KEYS)
        last = torch.empty(b, h, kd, vd, device=q.device)
        sweep[(b * h * triton.cdiv(n, segment) * (kd // c.KEYS) * (vd // c.VALUES),)](
            q, k, v, None, decay, starts, None, o, None, None, None, None, None, None, last, None,
            b, n, h, segment, q.stride(1), k.stride(1), v.stride(1), 0,
            K=kd, V=vd, C=c.C, KEYS=c.KEYS, VALUES=c.VALUES, ROLE=0, ROLES=1, DECAY=decay is not None,
            STARTS=starts is not None, ENDS=False, EVEN=even(n, segment, c), MARK=MARK, num_warps=c.warps, num_stages=c.stages,
        )  # fmt: skip
        return add_up(o, v.dtype), last, None if starts is state else starts

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: tuple) -> None:
        q, k, v, decay, state = inputs
        _, last, starts = output
        if starts is not None:
            ctx.mark_non_differentiable(starts)
        ctx.save_for_backward(q, k, v, decay, last, state if starts is None else starts)
        ctx.has_state = state is not None
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, do: Tensor | None, d_last: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        return gradients(backward, *ctx.saved_tensors, do, d_last, ctx.has_state)


@torch.compiler.disable  # compiled code calls it as it is
def linear_attention(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None = None, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`reference.linear_attention`, in bf16 or fp32."""
    decay = None if log_decay is None else log_decay.mT.contiguous()
    state = None if state is None else state.contiguous()
    o, last, _ = LinearAttention.apply(token_major(q), token_major(k), token_major(v), decay, state)
    return o.transpose(1, 2), last
