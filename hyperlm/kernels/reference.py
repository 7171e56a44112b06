"""Every operation of the dispatch table in plain torch: the truth that faster kernels are checked against, and the fallback everywhere.

Axes: B batch, H heads, N sequence, M keys, K head dim, V value dim, C channels. Half-precision inputs are computed in fp32 and results
come back in the dtype of the values; float64 stays float64, so that each function is its own oracle.
"""

from collections.abc import Sequence
from enum import IntEnum

import torch
import torch.nn.functional as F
from torch import Tensor

from hyperlm.geometry import R_MAX, R_MIN, arcosh1p, direction, lift_rounded, rotate

CHUNK = 64  # positions handled as one small quadratic problem in linear attention
EPS = 1e-6  # of every RMSNorm
TIP = 0.1  # rounding of the distance's tip, see geometry.arcosh1p: its square is 50 times the error of cosh d in a bf16 product at R_MAX


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype that values of `dtype` are accumulated in: fp32, or fp64 for fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def widen(x: Tensor) -> Tensor:
    return x.to(wide(x.dtype))


def causal_conv(x: Tensor, weight: Tensor, heads: int, tail: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Depthwise causal convolution of projected queries, keys and values, then SiLU.

    Args:
        x: (B, N, 3 H K).
        weight: (W, 3 H K); row W-1 multiplies the present position.
        tail: (B, W-1, 3 H K), the inputs before `x`; zeros if None.

    Returns:
        q, k, v (B, H, N, K), and the last W-1 inputs as the next tail.
    """
    width = weight.shape[0]
    if tail is None:
        tail = x.new_zeros(x.shape[0], width - 1, x.shape[2])
    padded = torch.cat([tail.to(x.dtype), x], 1)
    n = x.shape[1]
    y = F.silu(sum(padded[:, i : i + n] * weight[i] for i in range(width)))
    q, k, v = y.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    return q, k, v, padded[:, n:]


def tangent_features(
    x: Tensor, weight: Tensor, r: Tensor, beta: Tensor, tail: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`causal_conv`, and of its queries and keys the features elu(beta r u) + 1 in the tangent space, u their directions.

    Args:
        r: (B, 2 H, N), wide; radii of the queries of each head, then of its keys.
        beta: (H,), wide.
    """
    q, k, v, tail = causal_conv(x, weight, beta.shape[0], tail)
    r_q, r_k = r.chunk(2, 1)

    def features(y: Tensor, r: Tensor) -> Tensor:
        return (F.elu(direction(widen(y)) * (beta[:, None] * r)[..., None]) + 1).to(y.dtype)

    return features(q, r_q), features(k, r_k), v, tail


def hyperbolic_points(
    x: Tensor, weight: Tensor, r: Tensor, cos: Tensor, sin: Tensor, tail: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`causal_conv`, and its queries and keys lifted to the hyperboloid: their directions, rotated, at radii r.

    Args:
        r: (B, 2 H, N), wide; radii of the queries of each head, then of its keys.
        cos, sin: (N, K/2) of the rotary embedding, fp32.

    Returns:
        t_q (B, H, N), wide, and s_q (B, H, N, K), rounded to the dtype of x before t is computed; t_k, s_k, v; and the next tail.
    """
    q, k, v, tail = causal_conv(x, weight, r.shape[1] // 2, tail)
    points = (lift_rounded(rotate(direction(widen(y)), cos, sin), radius, y.dtype) for y, radius in zip((q, k), r.chunk(2, 1), strict=True))
    (t_q, s_q), (t_k, s_k) = points
    return t_q, s_q, t_k, s_k, v, tail


def radii(product: Tensor, radius_bias: Tensor, decay_bias: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """What the products of a token with a few weights mean: the radii of heads, and how much they forget.

    Args:
        product: (B, N, G + H).
        radius_bias: (G,), wide.
        decay_bias: (H,), wide, if there are decays.

    Returns:
        r = R_MIN + (R_MAX - R_MIN) sigmoid(product + bias) of the first G, (B, G, N), and log_decay = -softplus(product + bias) of the others,
        (B, H, N); both wide.
    """
    x, y = widen(product).tensor_split([len(radius_bias)], -1)
    r = R_MIN + (R_MAX - R_MIN) * torch.sigmoid(x + radius_bias)
    return r.mT, None if decay_bias is None else -F.softplus(y + decay_bias).mT.contiguous()


def norm_gate(o: Tensor, weight: Tensor, gate: Tensor) -> Tensor:
    """RMSNorm of each head, times the SiLU of an output gate: o (B, H, N, V), weight (H, V), gate (B, N, H V) -> (B, N, H V)."""
    o = F.rms_norm(o.transpose(1, 2), (o.shape[-1],), eps=EPS) * weight.to(o.dtype)
    return o.flatten(2) * F.silu(gate)


def readout(o: Tensor, weight: Tensor, gate: Tensor, out: Tensor, result: Tensor | None = None) -> Tensor:
    """`norm_gate` times the output projection, out (D, H V) -> (B, N, D).

    result: what this returns, if it is known: then it need not be found again, and gradients alone are wanted.
    """
    return F.linear(norm_gate(o, weight, gate), out)


def hyperbolic_attention(t_q: Tensor, s_q: Tensor, t_k: Tensor, s_k: Tensor, v: Tensor, beta: Tensor, score: str) -> Tensor:
    """Causal softmax attention whose scores are hyperbolic: S_ij = -beta log cosh d(q_i, k_j), or -beta d(q_i, k_j).

    cosh d = t_q t_k - s_q . s_k, with the product of times outside the matrix product, in fp32: together with times computed from the
    rounded s this keeps cosh d >= 1 up to fp32 rounding.

    Args:
        t_q, t_k: (B, H, N), (B, H, M), fp32; time coordinates. The queries are the last N of the M positions.
        s_q, s_k: (B, H, N, K), (B, H, M, K); space coordinates.
        v: (B, H, M, V). Of t_k, s_k and v there may be fewer heads, each for H / heads neighbouring heads of queries.
        beta: (H,), positive, fp32.
        score: "logcosh" or "distance" (with a rounded tip, so that its gradient is finite where points coincide).

    Returns:
        (B, H, N, V) in the dtype of v.
    """
    n, m, group = s_q.shape[-2], s_k.shape[-2], s_q.shape[1] // s_k.shape[1]
    if group > 1:
        t_k, s_k, v = (x.repeat_interleave(group, 1) for x in (t_k, s_k, v))
    z = t_q[..., :, None] * t_k[..., None, :] - widen(s_q) @ widen(s_k).mT
    w = z - 1
    w = w + (w.clamp(min=0) - w).detach()  # coincident points may come out closer than 0 by rounding: their gradient must not depend on it
    d = torch.log1p(w) if score == "logcosh" else arcosh1p(w, TIP)
    past = torch.ones(n, m, dtype=torch.bool, device=v.device).tril(m - n)
    p = torch.softmax((-beta[:, None, None] * d).masked_fill(~past, -torch.inf), -1)
    return p.to(v.dtype) @ v


def softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal softmax attention with scores q . k, by torch's fused kernels.

    Args:
        q: (B, H, N, K); the queries are the last N of the M positions.
        k, v: (B, H, M, K), (B, H, M, V).

    Returns:
        (B, H, N, V).
    """
    n, m = q.shape[-2], k.shape[-2]
    past = None
    if 1 < n < m:  # torch's own causal mask would align the first positions, not the last
        past = torch.ones(n, m, dtype=torch.bool, device=q.device).tril(m - n)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=past, is_causal=n == m and n > 1, scale=1.0)


def scan(log_a: Tensor, b: Tensor, h: Tensor | None = None) -> Tensor:
    """Linear recurrence h_n = exp(log_a_n) h_{n-1} + b_n along the axis before the last, in log2 N parallel steps.

    Args:
        log_a: (..., N, C) or (..., N, 1), at most 0.
        b: (..., N, C).
        h: (..., C), the state before the first position; zeros if None.

    Returns:
        Every state, (..., N, C). Reference: Hillis & Steele 1986.
    """
    if h is not None:
        first = b[..., :1, :] + torch.exp(log_a[..., :1, :]) * h[..., None, :]
        b = torch.cat([first, b[..., 1:, :]], -2)
    shift, n = 1, b.shape[-2]
    while shift < n:  # each state now sums the last `shift` inputs; join it with the one `shift` before
        b = torch.cat([b[..., :shift, :], b[..., shift:, :] + torch.exp(log_a[..., shift:, :]) * b[..., :-shift, :]], -2)
        log_a = torch.cat([log_a[..., :shift, :], log_a[..., shift:, :] + log_a[..., :-shift, :]], -2)
        shift *= 2
    return b


def linear_attention(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None = None, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Causal linear attention with a scalar decay per head, o_i = sum_{j<=i} exp(G_i - G_j) (q_i . k_j) v_j, in chunks.

    G is the running sum of `log_decay`. Inside a chunk the sum is quadratic; between chunks it goes through a K x V state, carried by
    `scan`. There is no normaliser: the norm that follows in the model cancels it.

    Args:
        q, k: (B, H, N, K), features.
        v: (B, H, N, V).
        log_decay: (B, H, N), at most 0, wide; no decay if None.
        state: (B, H, K, V), fp32, what came before; zeros if None.

    Returns:
        o (B, H, N, V) in the dtype of v, and the final state (B, H, K, V). Reference: Katharopoulos et al. 2020; Yang et al. 2024 (chunks).
    """
    dtype, n = v.dtype, v.shape[2]
    q, k, v = widen(q), widen(k), widen(v)
    log_decay = v.new_zeros(v.shape[:3]) if log_decay is None else log_decay
    size = min(CHUNK, n)
    pad = -n % size  # zero keys with decay 1 leave the state alone
    q, k, v = (F.pad(x, (0, 0, 0, pad)).unflatten(2, (-1, size)) for x in (q, k, v))
    g = F.pad(log_decay, (0, pad)).unflatten(2, (-1, size)).cumsum(-1)  # (B, H, chunks, size)

    past = torch.ones(size, size, dtype=torch.bool, device=v.device).tril()
    decay = torch.exp((g[..., :, None] - g[..., None, :]).masked_fill(~past, -torch.inf))
    inside = ((q @ k.mT) * decay) @ v

    added = (k * torch.exp(g[..., -1:] - g)[..., None]).mT @ v  # what each chunk leaves behind, (B, H, chunks, K, V)
    start = added.new_zeros(added[:, :, 0].shape) if state is None else state.to(added.dtype)
    after = scan(g[..., -1:], added.flatten(-2), start.flatten(-2)).unflatten(-1, added.shape[-2:])
    before = torch.cat([start[:, :, None], after[:, :, :-1]], 2)
    across = (q * torch.exp(g)[..., None]) @ before

    o = (inside + across).flatten(2, 3)[:, :, :n]
    return o.to(dtype), after[:, :, -1]


def linear_attention_step(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One position of `linear_attention` in its recurrent form: q, k (B, H, K), v (B, H, V), log_decay (B, H) -> o (B, H, V), state."""
    dtype = v.dtype
    q, k, v = widen(q), widen(k), widen(v)
    state = torch.exp(log_decay)[..., None, None] * state + k[..., :, None] * v[..., None, :]
    return (q[..., None, :] @ state).squeeze(-2).to(dtype), state


def tangent_step(
    x: Tensor, weight: Tensor, r: Tensor, beta: Tensor, log_decay: Tensor, state: Tensor, tail: Tensor, norm: Tensor, gate: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`tangent_features`, `linear_attention` and `norm_gate` of one token.

    Args:
        x: (B, 3 H K), projected.
        weight, beta, tail: as for `tangent_features`.
        r: (B, 2 H), wide.
        log_decay: (B, H), wide.
        state: (B, H, K, K), wide.
        norm, gate: (H, K), (B, H K), as for `norm_gate`.

    Returns:
        y (B, H K), the next state and the next tail.
    """
    q, k, v, tail = tangent_features(x[:, None], weight, r[..., None], beta, tail)
    o, state = linear_attention_step(q[:, :, 0], k[:, :, 0], v[:, :, 0], log_decay, state)
    return norm_gate(o[:, :, None], norm, gate[:, None])[:, 0], state, tail


def add(x: Tensor, y: Tensor) -> Tensor:
    """x + y, wide."""
    return widen(x) + y


def add_norm(x: Tensor, y: Tensor | None, weight: Tensor, dtype: torch.dtype, values: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """What a branch adds to the residual stream, and its RMSNorm for the next branch.

    Args:
        x: (B, N, D), the stream, wide.
        y: (B, N, D), what the branch found; None for nothing.
        weight: (D,), wide.
        dtype: of the norm.
        values: (B, N, D) in any dtype, the stream where x is hollow: zeros without memory, which only receive its gradient.

    Returns:
        The stream with y, which without y is x as it is; and its norm times weight.
    """
    stream = x if values is None else x + values
    stream = stream if y is None else stream + y
    read = stream.view_as(
        stream
    )  # the norm's part of a gradient is added up by itself, which gives the same bits whether x is hollow or not
    return x if y is None else stream, F.rms_norm(read, read.shape[-1:], weight.to(read.dtype), eps=EPS).to(dtype)


def mlp(x: Tensor, up: Tensor, down: Tensor, y: Tensor | None = None) -> Tensor:
    """Two products with GELU between them, x times the standard normal distribution function of x. Reference: Hendrycks and Gimpel 2016.

    Args:
        x: (..., R).
        up, down: (F, R) and (S, F).
        y: as `result` of `readout`.

    Returns:
        gelu(x up^T) down^T, (..., S).
    """
    return F.linear(F.gelu(F.linear(x, up)), down)


# -- the loss, and gradients -----------------------------------------------------------------------------------------------------------


def take_logits(logits: Tensor, first: int, targets: Tensor, log_z: Tensor, picked: Tensor) -> None:
    """Take in a chunk of logits (T, C): of T tokens, for numbers `first` .. first + C - 1 of a vocabulary.

    Args:
        targets: (T,) int64.
        log_z: (T,), wide; in place, the logarithm of the sum of exponentials of all logits so far, at first -inf.
        picked: (T,), wide; the logit of the target is added if it is among them.
    """
    x, place = widen(logits), targets - first
    there = (place >= 0) & (place < x.shape[1])
    log_z.copy_(torch.logaddexp(log_z, torch.logsumexp(x, -1)))
    picked += torch.where(there, x.gather(1, torch.where(there, place, 0)[:, None])[:, 0], 0)


def pull_logits(logits: Tensor, first: int, targets: Tensor, log_z: Tensor) -> None:
    """Replace the logits of a chunk by the gradient of the cross entropies: exp(logit - log_z), less 1 for the target. Arguments as in `take_logits`."""
    p, place = widen(logits).sub_(log_z[:, None]).exp_(), targets - first
    there = (place >= 0) & (place < p.shape[1])
    p.scatter_add_(1, torch.where(there, place, 0)[:, None], -there[:, None].to(p.dtype))
    if p is not logits:
        logits.copy_(p)


def accumulate(total: Tensor, x: Tensor) -> None:
    """total += x, in place; total in fp32, x in any dtype and of the same shape."""
    total.add_(x)


def tell(x: Tensor, to: Tensor) -> None:
    """Copy a few numbers, fp32, to host memory, which is pinned where x is on a GPU; there they have come when what was launched before is done."""
    to.copy_(x, non_blocking=True)


def norm(parts: Sequence[Tensor]) -> Tensor:
    """Euclidean norm over all of these, fp32 scalar on their device."""
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(parts, 2, dtype=torch.float32)))


# -- 8 bits ----------------------------------------------------------------------------------------------------------------------------

BLOCK = 256  # numbers that share a scale
PARTS = 4  # tensors that are added up before they are sent in 8 bits
CODED = BLOCK + 4  # bytes of a block in 8 bits: codes, and their scale in fp32
ROW = 2 * BLOCK + 8  # bytes of a block of moments: codes of m, codes of v, and both scales in fp32
MULTIPLIERS = (-49064778989728563, -4265267296055464877)  # of the 64-bit finaliser of MurmurHash3 (Appleby 2011)
COUNTERS = BLOCK // 4  # of a block's noise
FOR_M, FOR_V, AGAIN = (stream << 40 for stream in (1, 2, 3))  # from the counters of what rounds weights to those of an update's other noise
APART = -7046029254386353131  # odd: multiples of it, counters of different streams, are far from each other


def noise(counter: Tensor) -> Tensor:
    """64 random bits, int64, that are a function of each counter (int64): counter-based, as in Salmon et al. 2011."""
    for multiplier in MULTIPLIERS:
        counter = (counter ^ ((counter >> 33) & 0x7FFFFFFF)) * multiplier
    return counter ^ ((counter >> 33) & 0x7FFFFFFF)


def in_blocks(x: Tensor) -> Tensor:
    """Numbers of any shape as (blocks, BLOCK), fp32, with zeros at the end."""
    blocks = -(-x.numel() // BLOCK)
    return F.pad(x.flatten().float(), (0, blocks * BLOCK - x.numel())).view(blocks, BLOCK)


def chances(start: Tensor, blocks: int) -> Tensor:
    """16 random bits for each number of so many blocks, (blocks, BLOCK) int64: a quarter of the `noise` of a counter, from `start` on."""
    bits = noise(start + torch.arange(blocks * COUNTERS, device=start.device))
    return torch.stack([(bits >> below) & 0xFFFF for below in (0, 16, 32, 48)], 1).view(blocks, BLOCK)


def share(bits: Tensor) -> Tensor:
    """16 bits as numbers in [0, 1)."""
    return bits.float() * (1 / 65536)


def squared_codes(x: Tensor, largest: Tensor, chance: Tensor) -> Tensor:
    """Codes c, int8, such that sign (c / 127)^2 largest is x on average over `chance`: rounded up or down at random."""
    y = x.abs() * (127**2 / largest.clamp(min=1e-30))
    low = y.sqrt().floor().clamp(max=126)
    return (x.sign() * (low + (chance * (2 * low + 1) < y - low * low))).to(torch.int8)


def encode8(parts: Sequence[Tensor], origin: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of at most PARTS tensors in 8 bits: of a block sign (c / 127)^2 max |x|, right on average.

    The noise is a function of `origin` + `shift`, int64 scalars.

    Returns:
        (ceil(n / BLOCK), CODED) uint8 of n numbers of any shape, and fp32 numbers that add up to the sum of their squares.
    """
    wide = in_blocks(parts[0])
    for x in parts[1:]:
        wide = wide + in_blocks(x)
    largest = wide.abs().amax(1, keepdim=True)
    codes = squared_codes(wide, largest, share(chances(origin + shift, len(wide))))
    return torch.cat([codes.view(torch.uint8), largest.view(torch.uint8)], 1), wide.square().sum(1)


def squared(codes: Tensor, largest: Tensor) -> Tensor:
    """The inverse of `squared_codes`, of bytes."""
    c = codes.view(torch.int8).float()
    return c * c.abs() * (largest / 127**2)


def decode8(coded: Tensor) -> Tensor:
    """The inverse of `encode8`: (blocks, BLOCK) fp32."""
    return squared(coded[:, :BLOCK], coded.view(torch.float32)[:, BLOCK // 4 :])


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
    origin: Tensor,
    shift: Tensor,
    decay: bool,
    part: UpdatePart = UpdatePart.FULL,
) -> None:
    """AdamW in place on matrices in bf16, with moments that take a byte each; and on vectors in fp32, with moments in fp32.

    In a block of BLOCK numbers, m is sign (c / 127)^2 max |m| and v is (c / 255)^4 max v, with c a byte: fine where numbers are small, as in
    Dettmers et al. 2022. A v above zero never becomes zero. Weights and moments are rounded up or down at random such that their expectation
    is exact: what is less than half a step is not lost, as to the nearest it would be. The noise is a function of `origin` + `shift`.

    An update can be made in two parts, with the bits that it would have as one: WEIGHTS, and later MOMENTS. Where WEIGHTS was made with factor 1
    and the factor turns out to be another, CORRECT makes the moments' part and moves the weights to where they should be, up to one more
    rounding; ROLLBACK takes them back.

    Args:
        w: bf16 or fp32, any contiguous shape of n numbers.
        g: as many, bf16 or fp32, or as `encode8` returns them; multiplied by factor.
        moments: (ceil(n / BLOCK), ROW) uint8; of w in fp32, m and v, (2, ...) fp32; zeros at first.
        factor: fp32 scalar on the device of the others. By 0, g counts as 0 even where it is not finite; and WEIGHTS changes nothing.
        rates: (5,) fp32: 1 - learning rate * weight decay, beta1, beta2, learning rate / (1 - beta1^t), 1 / sqrt(1 - beta2^t).
        origin, shift: int64 scalars, the counter of the first number at one step, and how far it is at this one.
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
    codes, scales = moments[:, : 2 * BLOCK], moments.view(torch.float32)[:, BLOCK // 2 :]
    c_v = codes[:, BLOCK:].float()
    grad = decode8(g) if g.dtype == torch.uint8 else in_blocks(g)
    old_m, old_v = squared(codes[:, :BLOCK], scales[:, :1]), c_v * c_v * (c_v * c_v) * (scales[:, 1:] / 255**4)
    weight, m, v = adam_step(in_blocks(w), grad, old_m, old_v, factor, rates, decay, part)
    start = origin + shift
    if touches_weights:
        again = 0 if part in (UpdatePart.FULL, UpdatePart.WEIGHTS) else AGAIN  # not the noise that rounded the weights before
        rounded = (weight.view(torch.int32) + chances(start + again, len(moments)).int()) & -65536
        rounded = rounded.view(torch.float32).flatten()[:n].view(w.shape)
        w.copy_(torch.where(factor > 0, rounded, w) if part == UpdatePart.WEIGHTS else rounded)
    if touches_moments:
        largest_m, largest_v = m.abs().amax(1, keepdim=True), v.amax(1, keepdim=True)
        codes[:, :BLOCK] = squared_codes(m, largest_m, share(chances(start + FOR_M, len(moments)))).view(torch.uint8)
        y = v * (255**4 / largest_v.clamp(min=1e-28))
        low = y.sqrt().sqrt().floor().clamp(max=254)
        under, over = low**4, (low + 1) ** 4
        chance = share(chances(start + FOR_V, len(moments)))
        code = (low + (chance * (over - under) < y - under)).clamp(min=1)
        codes[:, BLOCK:] = torch.where(v > 0, code, 0).to(torch.uint8)
        scales[:, :1], scales[:, 1:] = largest_m, largest_v
