"""Attention: points and features of tokens, and what a token reads of those before it.

Axes: B batch, H heads, N sequence, M keys, K head dim, V value dim, C channels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from hyperlm.geometry import R_MAX, R_MIN, arcosh1p, direction, lift_rounded, rotate
from hyperlm.kernels.reference.frame import norm_gate
from hyperlm.precision import widen

CHUNK = 64  # positions handled as one small quadratic problem in linear attention
TIP = 0.1  # rounding of the distance's tip, see geometry.arcosh1p: its square is 50 times the error of cosh d in a bf16 product at R_MAX


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
        r = R_MIN + (R_MAX - R_MIN) sigmoid(product + bias) of the first G, (B, G, N), and log_decay = -softplus(product + bias) of the
        others,
        (B, H, N); both wide.
    """
    x, y = widen(product).tensor_split([len(radius_bias)], -1)
    r = R_MIN + (R_MAX - R_MIN) * torch.sigmoid(x + radius_bias)
    return r.mT, None if decay_bias is None else -F.softplus(y + decay_bias).mT.contiguous()


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
