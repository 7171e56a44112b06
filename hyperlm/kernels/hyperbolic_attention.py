"""Exact hyperbolic attention in Triton, in O(N) memory: forward, backward, and one query against a long cache.

The weight of key j for query i is g_ij^-beta, normalised over j, where z = cosh d = t t' - s . s' and g is z itself ("logcosh") or e^d =
(z + root) / (1 + TIP), root = sqrt(z^2 - 1 + TIP^2) ("distance", with its rounded tip). All in logarithms to base 2. The weights are at
most 1, but where beta log z passes 87 all of a row could vanish, so each row is scaled: by t^beta, with which all is well while the
weights of a row are within 2^80 of that, as they are up to R_MAX for beta below 11; a block of rows of which one is not starts again, each
row scaled by the largest weight seen so far, as in FlashAttention (Dao et al. 2022). So every beta is exact.

The backward pass computes weights anew from the row sums, twice: once a block of queries (ds_q, dt_q, and the exact mean of dP over each
row), once a block of keys (ds_k, dt_k, dv, d_beta), so that nothing is added up in memory and the result does not depend on the order of
programs. Two differences of large terms are guarded. The score's gradients p (dP - mean) sum to zero over a row; the mean do . o that the
pass begins with is off by what rounding did to o and to the weights that it is a sum of, so what the sum is instead of zero is taken out at
the end. And along the radius the gradients of s and t nearly cancel; dz is rounded for the product that gives ds, not for dt, so ds is
given the radial part sum dz (t t' - z) that follows from fp32 numbers.

z = t t' - s . s' costs one instruction a pair if nothing has to be negated after the product: the forward pass negates s_q beforehand;
where s is needed as it is, z is -1 times -t t' + s . s', which folds into the instructions that take it (a minus sign is a subtraction of
its own).

B batch, H heads of queries, N queries, M keys, G heads of queries a head of keys, K and V head dims; queries are the last N of M positions.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hyperlm.kernels.differentiation import Function, gradients
from hyperlm.kernels.launch import NEWER, cdiv, is_hopper, launch
from hyperlm.kernels.layout import token_major
from hyperlm.kernels.reference.attention import TIP
from hyperlm.kernels.special import exp2, log2, rsqrt

EPS2 = tl.constexpr(TIP * TIP)
LN2 = tl.constexpr(math.log(2))
LARGEST = tl.constexpr(2.0**80)  # sum of weights; or its inverse, the smallest: no weight that matters then left the range of fp32
SPLIT = 512  # keys that a program reads when there is one query


@triton.jit
def log_distance(z, EXACT: tl.constexpr):
    """log2 of z + root, and 1 / root, which is d ln (z + root) / dz."""
    w = tl.maximum(tl.fma(z, z, EPS2 - 1), EPS2)
    inverse = rsqrt(w, EXACT)
    return log2(tl.fma(w, inverse, z), EXACT), inverse


@triton.jit
def log_weight(z, DISTANCE: tl.constexpr, EXACT: tl.constexpr):
    """log2 g of z = cosh d, but for a constant factor of g, which cancels."""
    if DISTANCE:
        logs, _ = log_distance(z, EXACT)
        return logs
    return log2(z, EXACT)


@triton.jit
def weights(z, beta, log_sums, seen, DISTANCE: tl.constexpr, MASK: tl.constexpr, EXACT: tl.constexpr):
    """The weight p, p d ln g / dz, and log2 of the first for the distance, of the second for logcosh: there it is p / z, and p follows
    from it without a division; for the distance it is p / root."""
    if DISTANCE:
        logs, slope = log_distance(z, EXACT)
        log_p = -beta * logs - log_sums
        p = exp2(log_p, EXACT)
        if MASK:
            p = tl.where(seen, p, 0.0)
        return p, p * slope, log_p
    log_p = -(beta + 1) * log2(z, EXACT) - log_sums
    p_slope = exp2(log_p, EXACT)
    if MASK:
        p_slope = tl.where(seen, p_slope, 0.0)
    return p_slope * z, p_slope, log_p


@triton.jit
def along(d_s, s, amount):
    """d_s, with `amount` as its product with s: what it was by rounded numbers is taken out."""
    s = s.to(tl.float32)
    return d_s + ((amount - tl.sum(d_s * s, 1)) / tl.maximum(tl.sum(s * s, 1), 1e-12))[:, None] * s


@triton.jit
def tile(base, first, inside, stride, ROWS: tl.constexpr, WIDTH: tl.constexpr, EVEN: tl.constexpr):
    """Rows from `first` on of a matrix of which one row is `stride` from the next, zero where not inside; EVEN: all are."""
    numbers = base + tl.cast(first, tl.int64) * stride + (tl.arange(0, ROWS)[:, None] * stride + tl.arange(0, WIDTH)[None, :])
    if EVEN:
        return tl.load(numbers)
    return tl.load(numbers, mask=inside[:, None], other=0.0)


@triton.jit
def vector(numbers, inside, beyond: tl.constexpr, EVEN: tl.constexpr):
    if EVEN:
        return tl.load(numbers)
    return tl.load(numbers, mask=inside, other=beyond)


@triton.jit
def attend(
    acc, total, lost, least, t_q, s_q, i, k, v, t_k, beta, start, end, M, stride_k, stride_v,
    K: tl.constexpr, V: tl.constexpr, BN: tl.constexpr, DISTANCE: tl.constexpr, RUNNING: tl.constexpr, MASK: tl.constexpr,
    EVEN: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """Take in keys start .. end: of each row the sum of weighted values and of weights, relative to 2^-least; and what the weights near
    the diagonal lost by rounding: in a row of a few keys, it would be all of the error of their mean.

    RUNNING: least, the least beta log2 g so far, follows what comes.
    """
    for first in tl.range(start, end, BN, num_stages=1 if RUNNING or MASK else None):
        j = first + tl.arange(0, BN)
        there = j < M
        minus = tl.dot(s_q, tl.trans(tile(k, first, there, stride_k, BN, K, EVEN)), input_precision="ieee")
        z = tl.fma(t_q[:, None], vector(t_k + j, there, 1.0, EVEN)[None, :], minus)
        logs = log_weight(z, DISTANCE, EXACT)
        if MASK:
            logs = tl.where(j[None, :] <= i[:, None], logs, float("inf"))
        if RUNNING:
            now = tl.minimum(least, beta * tl.min(logs, 1))
            shrink = exp2(now - least, EXACT)
            total, lost, acc, least = total * shrink, lost * shrink, acc * shrink[:, None], now
        values = tile(v, first, there, stride_v, BN, V, EVEN)
        p = exp2(tl.fma(-beta, logs, least[:, None]), EXACT)
        rounded = p.to(values.dtype)
        total += tl.sum(p, 1)
        if MASK:
            lost += tl.sum(p - rounded.to(tl.float32), 1)
        acc = tl.dot(rounded, values, acc, input_precision="tf32x3")
    return acc, total, lost, least


@triton.jit
def forward(
    t_q, s_q, t_k, s_k, v, beta, o, log_sums, N, M, H, G,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, tk_b, tk_h,
    K: tl.constexpr, V: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, DISTANCE: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """o (B, N, H, V), and log2 of the sum of g^-beta of each row, (B, H, N)."""
    EXACT: tl.constexpr = s_k.dtype.element_ty == tl.float32
    block, head = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)  # long rows first
    b, h = (head // H).to(tl.int64), head % H
    n = block * BM + tl.arange(0, BM)
    inside = n < N
    i = n + (M - N)  # position
    rows = -tile(s_q + b * q_b + h * q_h, block * BM, inside, q_n, BM, K, False)
    times = tl.load(t_q + head.to(tl.int64) * N + n, mask=inside, other=1.0)
    temperature = tl.load(beta + h)
    s_k, v, t_k = s_k + b * k_b + (h // G) * k_h, v + b * v_b + (h // G) * v_h, t_k + b * tk_b + (h // G) * tk_h
    acc, total, lost = tl.zeros((BM, V), tl.float32), tl.zeros((BM,), tl.float32), tl.zeros((BM,), tl.float32)
    least = temperature * tl.log2(times)
    all_see = (block * BM + M - N + 1) // BN * BN  # keys that every row of the block may look at, in whole blocks
    end = min(M, block * BM + M - N + BM)
    acc, total, lost, least = attend(
        acc,
        total,
        lost,
        least,
        times,
        rows,
        i,
        s_k,
        v,
        t_k,
        temperature,
        0,
        all_see,
        M,
        k_n,
        v_n,
        K,
        V,
        BN,
        DISTANCE,
        False,
        False,
        EVEN,
        EXACT,
    )
    acc, total, lost, least = attend(
        acc,
        total,
        lost,
        least,
        times,
        rows,
        i,
        s_k,
        v,
        t_k,
        temperature,
        all_see,
        end,
        M,
        k_n,
        v_n,
        K,
        V,
        BN,
        DISTANCE,
        False,
        True,
        EVEN,
        EXACT,
    )
    if (tl.max(total, 0) > LARGEST) | (tl.min(total, 0) < 1 / LARGEST):
        acc, total, lost = tl.zeros((BM, V), tl.float32), tl.zeros((BM,), tl.float32), tl.zeros((BM,), tl.float32)
        least = tl.full((BM,), float("inf"), tl.float32)
        acc, total, lost, least = attend(
            acc,
            total,
            lost,
            least,
            times,
            rows,
            i,
            s_k,
            v,
            t_k,
            temperature,
            0,
            all_see,
            M,
            k_n,
            v_n,
            K,
            V,
            BN,
            DISTANCE,
            True,
            False,
            EVEN,
            EXACT,
        )
        acc, total, lost, least = attend(
            acc,
            total,
            lost,
            least,
            times,
            rows,
            i,
            s_k,
            v,
            t_k,
            temperature,
            all_see,
            end,
            M,
            k_n,
            v_n,
            K,
            V,
            BN,
            DISTANCE,
            True,
            True,
            EVEN,
            EXACT,
        )
    tl.store(log_sums + head.to(tl.int64) * N + n, tl.log2(total) - least, mask=inside)
    to = o + ((b * N + n.to(tl.int64)[:, None]) * H + h) * V + tl.arange(0, V)[None, :]
    tl.store(to, (acc / (total - lost)[:, None]).to(o.dtype.element_ty), mask=inside[:, None])


@triton.jit
def pull_queries(
    d_s, d_t, turned, off, sum_t, sum_z, t_q, s_q, d_o, log_sum, delta, i, k, v, t_k, beta, start, end, M, stride_k, stride_v,
    K: tl.constexpr, V: tl.constexpr, BN: tl.constexpr, DISTANCE: tl.constexpr, MASK: tl.constexpr, EVEN: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Add what keys start .. end contribute to a block of queries: with dz for -1/beta of the gradient of z, the sums of dz s, dz t and dz
    z, of the score's gradient, and of what that sum, were it zero, would not have added to the second and third."""
    for first in tl.range(start, end, BN, num_stages=1 if MASK else None):
        j = first + tl.arange(0, BN)
        there = j < M
        keys, times = tile(k, first, there, stride_k, BN, K, EVEN), vector(t_k + j, there, 1.0, EVEN)
        z = -1.0 * tl.fma(-t_q[:, None], times[None, :], tl.dot(s_q, tl.trans(keys), input_precision="ieee"))
        d_p = tl.dot(d_o, tl.trans(tile(v, first, there, stride_v, BN, V, EVEN)), input_precision="tf32x3") - delta[:, None]
        p, p_slope, _ = weights(z, beta, log_sum[:, None], j[None, :] <= i[:, None], DISTANCE, MASK, EXACT)
        d_z = p_slope * d_p
        d_s = tl.dot(d_z.to(keys.dtype), keys, d_s, input_precision="tf32x3")
        d_t += tl.sum(d_z * times[None, :], 1)
        sum_t += tl.sum(p_slope * times[None, :], 1)
        turned += tl.sum(d_z * z, 1)
        if DISTANCE:  # otherwise, d_z z is the score's gradient p d_p, and p_slope z is p
            off += tl.sum(p * d_p, 1)
            sum_z += tl.sum(p_slope * z, 1)
    return d_s, d_t, turned, off, sum_t, sum_z


@triton.jit
def backward_queries(
    t_q, s_q, t_k, s_k, v, beta, o, d_o, log_sums, delta, d_tq, d_sq, N, M, H, G,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, tk_b, tk_h, do_n,
    K: tl.constexpr, V: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, DISTANCE: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """d_sq (B, N, H, K), d_tq (B, H, N), and delta (B, H, N), the mean of dP over a row."""
    EXACT: tl.constexpr = s_k.dtype.element_ty == tl.float32
    block, head = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)
    b, h = (head // H).to(tl.int64), head % H
    n = block * BM + tl.arange(0, BM)
    inside = n < N
    i = n + (M - N)
    rows = tile(s_q + b * q_b + h * q_h, block * BM, inside, q_n, BM, K, False)
    at = head.to(tl.int64) * N + n
    times, log_sum = tl.load(t_q + at, mask=inside, other=1.0), tl.load(log_sums + at, mask=inside, other=0.0)
    d_out = tile(d_o + (b * N * do_n + h * V), block * BM, inside, do_n, BM, V, False)
    out = tile(o + (b * N * H + h) * V, block * BM, inside, H * V, BM, V, False)
    mean = tl.sum(d_out.to(tl.float32) * out.to(tl.float32), 1)
    temperature = tl.load(beta + h)
    s_k, v, t_k = s_k + b * k_b + (h // G) * k_h, v + b * v_b + (h // G) * v_h, t_k + b * tk_b + (h // G) * tk_h
    d_s, d_t, turned = tl.zeros((BM, K), tl.float32), tl.zeros((BM,), tl.float32), tl.zeros((BM,), tl.float32)
    off, sum_t, sum_z = tl.zeros((BM,), tl.float32), tl.zeros((BM,), tl.float32), tl.zeros((BM,), tl.float32)
    all_see = (block * BM + M - N + 1) // BN * BN
    end = min(M, block * BM + M - N + BM)
    d_s, d_t, turned, off, sum_t, sum_z = pull_queries(
        d_s, d_t, turned, off, sum_t, sum_z, times, rows, d_out, log_sum, mean, i, s_k, v, t_k, temperature, 0, all_see, M, k_n, v_n,
        K, V, BN, DISTANCE, False, EVEN, EXACT,
    )  # fmt: skip
    d_s, d_t, turned, off, sum_t, sum_z = pull_queries(
        d_s, d_t, turned, off, sum_t, sum_z, times, rows, d_out, log_sum, mean, i, s_k, v, t_k, temperature, all_see, end, M, k_n, v_n,
        K, V, BN, DISTANCE, True, EVEN, EXACT,
    )  # fmt: skip
    if not DISTANCE:
        off, sum_z = turned, tl.full((BM,), 1.0, tl.float32)
    d_t -= off * sum_t
    turned -= off * sum_z
    tl.store(delta + at, mean + off, mask=inside)
    tl.store(d_tq + at, -temperature * d_t, mask=inside)
    to = d_sq + ((b * N + n.to(tl.int64)[:, None]) * H + h) * K + tl.arange(0, K)[None, :]
    tl.store(to, (temperature * along(d_s, rows, times * d_t - turned)).to(d_sq.dtype.element_ty), mask=inside[:, None])


@triton.jit
def pull_keys(
    d_s, turned, d_v, d_beta, t_k, s_k, v, j, q, d_o, t_q, log_sums, delta, beta, start, end, N, offset, stride_q, stride_do,
    K: tl.constexpr, V: tl.constexpr, BM: tl.constexpr, DISTANCE: tl.constexpr, MASK: tl.constexpr, EVEN: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Add what queries start .. end contribute to the gradients of a block of keys. All products are transposed: keys are rows."""
    for first in range(start, end, BM):
        n = first + tl.arange(0, BM)
        there = n < N
        queries, times = tile(q, first, there, stride_q, BM, K, EVEN), vector(t_q + n, there, 1.0, EVEN)
        z = -1.0 * tl.fma(-t_k[:, None], times[None, :], tl.dot(s_k, tl.trans(queries), input_precision="ieee"))
        d_out = tile(d_o, first, there, stride_do, BM, V, EVEN)  # zero beyond the last query, and so is all that follows from it
        d_p = tl.dot(v, tl.trans(d_out), input_precision="tf32x3") - vector(delta + n, there, 0.0, EVEN)[None, :]
        log_sum = vector(log_sums + n, there, 0.0, EVEN)
        p, p_slope, log_p = weights(z, beta, log_sum[None, :], j[:, None] <= n[None, :] + offset, DISTANCE, MASK, EXACT)
        d_z = p_slope * d_p
        d_v = tl.dot(p.to(d_out.dtype), d_out, d_v, input_precision="tf32x3")
        d_s = tl.dot(d_z.to(queries.dtype), queries, d_s, input_precision="tf32x3")
        turned += tl.sum(d_z * z, 1)
        # of d_score log2 g, taken from log_p: what else that holds is the same along a row, over which d_score sums to zero
        d_beta += tl.sum((p * d_p if DISTANCE else d_z * z) * log_p, 1)
    return d_s, turned, d_v, d_beta


@triton.jit
def backward_keys(
    t_q, s_q, t_k, s_k, v, beta, d_o, log_sums, delta, d_tk, d_sk, d_v, d_beta, N, M, H, G,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, tk_b, tk_h, do_n,
    K: tl.constexpr, V: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, DISTANCE: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """d_sk (B, M, H, K), d_tk (B, H, M) and d_v (B, M, H, V): what each head of queries contributes; and parts of d_beta (B, H, blocks)."""
    EXACT: tl.constexpr = s_k.dtype.element_ty == tl.float32
    block, head = tl.program_id(0), tl.program_id(1)
    b, h = (head // H).to(tl.int64), head % H
    j = block * BN + tl.arange(0, BN)
    inside = j < M
    keys = tile(s_k + b * k_b + (h // G) * k_h, block * BN, inside, k_n, BN, K, False)
    values = tile(v + b * v_b + (h // G) * v_h, block * BN, inside, v_n, BN, V, False)
    times = tl.load(t_k + b * tk_b + (h // G) * tk_h + j, mask=inside, other=1.0)
    d_s, dv = tl.zeros((BN, K), tl.float32), tl.zeros((BN, V), tl.float32)
    turned, d_b = tl.zeros((BN,), tl.float32), tl.zeros((BN,), tl.float32)
    offset = M - N
    start = max(0, block * BN - offset) // BM * BM
    all_seen = min(
        tl.cdiv(max(0, block * BN + BN - 1 - offset), BM) * BM, tl.cdiv(N, BM) * BM
    )  # queries from here on look at the whole block
    temperature = tl.load(beta + h)
    s_q += b * q_b + h * q_h
    d_o += b * N * do_n + h * V
    t_q += head.to(tl.int64) * N
    log_sums += head.to(tl.int64) * N
    delta += head.to(tl.int64) * N
    d_s, turned, dv, d_b = pull_keys(
        d_s, turned, dv, d_b, times, keys, values, j, s_q, d_o, t_q, log_sums, delta, temperature, start, all_seen, N, offset,
        q_n, do_n, K, V, BM, DISTANCE, True, EVEN, EXACT,
    )  # fmt: skip
    d_s, turned, dv, d_b = pull_keys(
        d_s, turned, dv, d_b, times, keys, values, j, s_q, d_o, t_q, log_sums, delta, temperature, all_seen, N, N, offset,
        q_n, do_n, K, V, BM, DISTANCE, False, EVEN, EXACT,
    )  # fmt: skip
    row = ((b * M + j.to(tl.int64)) * H + h)[:, None]
    d_t = (turned + tl.sum(d_s * keys.to(tl.float32), 1)) / times
    tl.store(d_beta + head * tl.num_programs(0) + block, tl.sum(d_b, 0) * LN2 / (temperature if DISTANCE else temperature + 1))
    tl.store(d_tk + head.to(tl.int64) * M + j, -temperature * d_t, mask=inside)
    tl.store(d_sk + row * K + tl.arange(0, K)[None, :], (temperature * d_s).to(d_sk.dtype.element_ty), mask=inside[:, None])
    tl.store(d_v + row * V + tl.arange(0, V)[None, :], dv.to(d_v.dtype.element_ty), mask=inside[:, None])


@triton.jit
def one_query(
    t_q, s_q, t_k, s_k, v, beta, sums, totals, leasts, M, H, G, q_b, q_h, k_b, k_h, k_n, v_b, v_h, v_n, tk_b, tk_h,
    K: tl.constexpr, V: tl.constexpr, BN: tl.constexpr, SPLIT: tl.constexpr, DISTANCE: tl.constexpr,
):  # fmt: skip
    """What SPLIT of the keys contribute to a single query: sums (B, H, splits, V), totals and leasts (B, H, splits)."""
    EXACT: tl.constexpr = s_k.dtype.element_ty == tl.float32
    split, head = tl.program_id(0), tl.program_id(1)
    b, h = (head // H).to(tl.int64), head % H
    query = tl.load(s_q + b * q_b + h * q_h + tl.arange(0, K)).to(tl.float32)
    time, temperature = tl.load(t_q + head), tl.load(beta + h)
    s_k, v, t_k = s_k + b * k_b + (h // G) * k_h, v + b * v_b + (h // G) * v_h, t_k + b * tk_b + (h // G) * tk_h
    acc, total, least = tl.zeros((V,), tl.float32), 0.0, float("inf")
    for first in range(split * SPLIT, min(M, split * SPLIT + SPLIT), BN):
        j = first + tl.arange(0, BN)
        there = j < M
        keys, values = tile(s_k, first, there, k_n, BN, K, False).to(tl.float32), tile(v, first, there, v_n, BN, V, False).to(tl.float32)
        logs = log_weight(time * tl.load(t_k + j, mask=there, other=1.0) - tl.sum(keys * query[None, :], 1), DISTANCE, EXACT)
        logs = tl.where(there, logs, float("inf"))
        now = tl.minimum(least, temperature * tl.min(logs, 0))
        p = exp2(now - temperature * logs, EXACT)
        shrink = exp2(now - least, EXACT)
        acc = acc * shrink + tl.sum(p[:, None] * values, 0)
        total = total * shrink + tl.sum(p, 0)
        least = now
    at = head.to(tl.int64) * tl.num_programs(0) + split
    tl.store(sums + at * V + tl.arange(0, V), acc)
    tl.store(totals + at, total)
    tl.store(leasts + at, least)


@triton.jit
def join(sums, totals, leasts, o, splits, V: tl.constexpr, SPLITS: tl.constexpr):
    """o (B, H, V) from the sums of each split."""
    head = tl.program_id(0).to(tl.int64)
    acc, total, least = tl.zeros((V,), tl.float32), 0.0, float("inf")
    for first in range(0, splits, SPLITS):
        split = first + tl.arange(0, SPLITS)
        there = split < splits
        own = tl.load(leasts + head * splits + split, mask=there, other=float("inf"))
        now = tl.minimum(least, tl.min(own, 0))
        weight, shrink = exp2(now - own, True), exp2(now - least, True)
        part = tl.load(sums + (head * splits + split)[:, None] * V + tl.arange(0, V)[None, :], mask=there[:, None], other=0.0)
        acc = acc * shrink + tl.sum(part * weight[:, None], 0)
        total = total * shrink + tl.sum(tl.load(totals + head * splits + split, mask=there, other=0.0) * weight, 0)
        least = now
    tl.store(o + head * V + tl.arange(0, V), (acc / total).to(o.dtype.element_ty))


# -- configurations --------------------------------------------------------------------------------------------------------------------


class Config(NamedTuple):
    """Queries x keys of a tile, and how a program is run."""

    BM: int
    BN: int
    warps: int
    stages: int
    registers: int | None = None  # the most that a thread may use


HOPPER = {
    "forward": {64: Config(64, 64, 4, 3, 168), 128: Config(64, 64, 4, 3), 256: Config(32, 32, 4, 1)},
    "backward_queries": {64: Config(64, 64, 4, 3), 128: Config(64, 32, 4, 3), 256: Config(16, 32, 8, 1)},
    "backward_keys": {64: Config(64, 64, 4, 2), 128: Config(32, 64, 4, 1 if NEWER else 2), 256: Config(32, 16, 8, 1)},
}
HOPPER_UNEVEN = {  # masks take registers
    "forward": {64: Config(64, 64, 4, 2), 128: Config(64, 32, 4, 2), 256: Config(32, 32, 8, 1)},
    "backward_queries": {64: Config(64, 32, 4, 2), 128: Config(32, 32, 8, 1), 256: Config(16, 32, 8, 1)},
    "backward_keys": {64: Config(32, 64, 4, 2), 128: Config(32, 32, 4, 1), 256: Config(16, 16, 8, 1)},
}
OTHERS = {
    "forward": {64: Config(64, 64, 4, 3), 128: Config(64, 32, 4, 2), 256: Config(64, 32, 8, 2)},
    "backward_queries": {64: Config(64, 32, 4, 2), 128: Config(32, 32, 8, 1), 256: Config(16, 16, 8, 1)},
    "backward_keys": {64: Config(32, 64, 4, 1), 128: Config(32, 32, 4, 1), 256: Config(32, 16, 8, 1)},
}


def is_even(n: int, m: int) -> bool:
    """Whether n queries and m keys are whole tiles of every configuration."""
    return n % 64 == m % 64 == 0


def config(kernel: str, K: int, dtype: torch.dtype, hopper: bool, even: bool) -> Config:
    """The shipped configuration of `forward`, `backward_queries` or `backward_keys` for heads of width K."""
    if dtype == torch.float32:
        return Config(16, 16, 4 if kernel == "forward" and K == 64 else 8, 1)
    return ((HOPPER if even else HOPPER_UNEVEN) if hopper else OTHERS)[kernel][max(K, 64)]


def keys_at_once(K: int) -> int:
    """Keys that `one_query` reads at a time."""
    return max(16, 2048 // K)


# -- differentiable --------------------------------------------------------------------------------------------------------------------


def strided(x: Tensor) -> Tensor:
    """x (B, H, N, K) such that a row's numbers are contiguous and start at addresses that 16 bytes divide; copies only if it must."""
    aligned = x.data_ptr() % 16 == 0 and all(x.stride(i) * x.element_size() % 16 == 0 for i in range(3))
    return x if x.stride(3) == 1 and aligned else x.contiguous()


def strides(s_q: Tensor, t_k: Tensor, s_k: Tensor, v: Tensor) -> tuple[int, ...]:
    return *s_q.stride()[:3], *s_k.stride()[:3], *v.stride()[:3], *t_k.stride()[:2]


def backward(
    t_q: Tensor, s_q: Tensor, t_k: Tensor, s_k: Tensor, v: Tensor, beta: Tensor, o: Tensor, log_sums: Tensor, distance: bool, d_o: Tensor
) -> tuple[Tensor | None, ...]:
    """Gradients of t_q, s_q, t_k, s_k, v, beta, and of `distance` (None)."""
    (b, h, n, k), (_, heads, m, width), device = s_q.shape, v.shape, s_q.device
    d_o = token_major(d_o.transpose(1, 2))
    group, even = h // heads, is_even(n, m)
    delta, d_tq, d_tk = torch.empty_like(log_sums), torch.empty(b, h, n, device=device), torch.empty(b, h, m, device=device)
    d_sq = torch.empty(b, n, h, k, device=device, dtype=v.dtype)
    d_sk, d_v = (torch.empty(b, m, h, size, device=device, dtype=v.dtype if group == 1 else torch.float32) for size in (k, width))
    common = (n, m, h, group, *strides(s_q, t_k, s_k, v), d_o.stride(1))
    c = config("backward_queries", max(k, width), v.dtype, is_hopper(device), even)
    launch(
        backward_queries, (cdiv(n, c.BM), b * h),
        t_q, s_q, t_k, s_k, v, beta, o, d_o, log_sums, delta, d_tq, d_sq, *common,
        K=k, V=width, BM=c.BM, BN=c.BN, DISTANCE=distance, EVEN=even, warps=c.warps, stages=c.stages, registers=c.registers,
    )  # fmt: skip
    c = config("backward_keys", max(k, width), v.dtype, is_hopper(device), even)
    d_beta = torch.empty(b, h, cdiv(m, c.BN), device=device)
    launch(
        backward_keys, (cdiv(m, c.BN), b * h),
        t_q, s_q, t_k, s_k, v, beta, d_o, log_sums, delta, d_tk, d_sk, d_v, d_beta, *common,
        K=k, V=width, BM=c.BM, BN=c.BN, DISTANCE=distance, EVEN=even, warps=c.warps, stages=c.stages, registers=c.registers,
    )  # fmt: skip
    d_sk, d_v = d_sk.transpose(1, 2), d_v.transpose(1, 2)
    if group > 1:
        d_tk, d_sk, d_v = (x.unflatten(1, (heads, group)).sum(2) for x in (d_tk, d_sk, d_v))
    return d_tq, d_sq.transpose(1, 2), d_tk, d_sk.to(v.dtype), d_v.to(v.dtype), d_beta.sum((0, 2)), None


class HyperbolicAttention(Function):
    """(t_q, s_q, t_k, s_k, v, beta, distance) -> o (B, N, H, V), and the log2 sums of rows (B, H, N) for the backward pass."""

    @staticmethod
    def forward(t_q: Tensor, s_q: Tensor, t_k: Tensor, s_k: Tensor, v: Tensor, beta: Tensor, distance: bool) -> tuple[Tensor, Tensor]:
        (b, h, n, k), (_, heads, m, width) = s_q.shape, v.shape
        o, log_sums = torch.empty(b, n, h, width, device=v.device, dtype=v.dtype), torch.empty(b, h, n, device=v.device)
        even = is_even(n, m)
        c = config("forward", max(k, width), v.dtype, is_hopper(v.device), even)
        launch(
            forward, (cdiv(n, c.BM), b * h),
            t_q, s_q, t_k, s_k, v, beta, o, log_sums, n, m, h, h // heads, *strides(s_q, t_k, s_k, v),
            K=k, V=width, BM=c.BM, BN=c.BN, DISTANCE=distance, EVEN=even, warps=c.warps, stages=c.stages, registers=c.registers,
        )  # fmt: skip
        return o, log_sums

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: tuple) -> None:
        *tensors, ctx.distance = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *output)

    @staticmethod
    def backward(ctx, d_o: Tensor, _: None) -> tuple[Tensor | None, ...]:
        return gradients(backward, *ctx.saved_tensors, ctx.distance, d_o)


def decode(t_q: Tensor, s_q: Tensor, t_k: Tensor, s_k: Tensor, v: Tensor, beta: Tensor, distance: bool) -> Tensor:
    """o (B, 1, H, V) of one query, not differentiable. The keys are split, so that few heads fill a GPU too."""
    (b, h, _, k), (_, heads, m, width), device = s_q.shape, v.shape, v.device
    splits = cdiv(m, SPLIT)
    sums = torch.empty(b, h, splits, width, device=device)
    totals, leasts = torch.empty(2, b, h, splits, device=device)
    launch(
        one_query, (splits, b * h),
        t_q, s_q, t_k, s_k, v, beta, sums, totals, leasts, m, h, h // heads,
        *s_q.stride()[:2], *s_k.stride()[:3], *v.stride()[:3], *t_k.stride()[:2],
        K=k, V=width, BN=keys_at_once(max(k, width)), SPLIT=SPLIT, DISTANCE=distance,
    )  # fmt: skip
    o = torch.empty(b, 1, h, width, device=device, dtype=v.dtype)
    launch(join, (b * h,), sums, totals, leasts, o, splits, V=width, SPLITS=16)
    return o


def hyperbolic_attention(t_q: Tensor, s_q: Tensor, t_k: Tensor, s_k: Tensor, v: Tensor, beta: Tensor, score: str) -> Tensor:
    """`reference.hyperbolic_attention`, in bf16 or fp32; also with fewer heads of keys than of queries."""
    t_k = t_k if t_k.stride(-1) == 1 else t_k.contiguous()
    inputs = (t_q.contiguous(), strided(s_q), t_k, strided(s_k), strided(v), beta.contiguous(), score == "distance")
    if s_q.shape[2] == 1 and not (torch.is_grad_enabled() and any(x.requires_grad for x in inputs[:-1])):
        return decode(*inputs).transpose(1, 2)
    return HyperbolicAttention.apply(*inputs)[0].transpose(1, 2)
