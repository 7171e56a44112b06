"""Rank correlations without what else explains them, their intervals, and shares of variance: plain statistics over many rows at once.

Axes: R rows (heads), T tokens, W sequences or windows, Q queries, M keys. Sums are in fp64.
"""

import torch
from torch import Tensor

DRAWS = 1000  # of a bootstrap
NOTHING = 1e-18  # share of a variance that is rounding


def ranks(x: Tensor) -> Tensor:
    """Ranks over the last axis, (..., T) -> (..., T) fp64, less their mean; equal values share the mean of their ranks."""
    x = x.contiguous()
    ordered = x.sort(-1).values
    return (torch.searchsorted(ordered, x) + torch.searchsorted(ordered, x, right=True)).double() / 2 - x.shape[-1] / 2


def without(x: Tensor, others: Tensor) -> Tensor:
    """What is left of x (..., T), of mean 0, after least squares on `others` (C, T), of mean 0; exactly 0 where they explain all of it."""
    left = x - x @ others.mT @ torch.linalg.pinv(others @ others.mT, hermitian=True) @ others
    return torch.where(left.square().sum(-1, keepdim=True) > NOTHING * x.square().sum(-1, keepdim=True), left, 0)


def correlation(x: Tensor, y: Tensor) -> Tensor:
    """Pearson's correlation of each row of x (R, T) with y (T,), (R,), both of mean 0; nan where one of them is constant."""
    return (x @ y) / (x.square().sum(-1) * y.square().sum()).sqrt()


def spearman(x: Tensor, y: Tensor) -> Tensor:
    """Spearman's correlation of each row of x (R, T) with y (T,), (R,)."""
    return correlation(ranks(x), ranks(y))


def partial(x: Tensor, y: Tensor, others: Tensor) -> Tensor:
    """`spearman` without what `others` (C, T) explain of either: Pearson's correlation of what regressions of ranks on ranks leave."""
    others = ranks(others)
    return correlation(without(ranks(x), others), without(ranks(y), others))


def interval(x: Tensor, y: Tensor, group: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    """95 % interval of `correlation`, from a bootstrap over groups: tokens of a document are not independent. Ranks stay those of all.

    Args:
        group: (T,) int64, that of each token, from 0, all there.

    Returns:
        low and high, (R,); nan where there is one group only.
    """
    count = int(group.max()) + 1

    def sums(values: Tensor) -> Tensor:
        return values.new_zeros(*values.shape[:-1], count).index_add_(-1, group, values)

    if count < 2:
        return x.new_full((2, len(x)), torch.nan).unbind()
    drawn = torch.randint(count, (DRAWS, count), generator=torch.Generator().manual_seed(seed))
    times = torch.zeros(DRAWS, count).scatter_add_(1, drawn, torch.ones(drawn.shape)).to(x)  # how often a draw has each group
    n, sum_y, sum_yy = (sums(values) @ times.mT for values in (torch.ones_like(y), y, y * y))
    sum_x, sum_xx, sum_xy = (sums(values) @ times.mT for values in (x, x * x, x * y))  # (R, DRAWS)
    rho = (sum_xy - sum_x * sum_y / n) / ((sum_xx - sum_x**2 / n) * (sum_yy - sum_y**2 / n)).sqrt()
    return torch.quantile(rho, torch.tensor([0.025, 0.975]).to(rho), dim=-1).unbind()


def mean_and_error(sums: Tensor, counts: Tensor, group: Tensor) -> tuple[float, float]:
    """The mean a token of what adds up to `sums` (W,) over `counts` (W,) tokens, and its standard error over groups (W,) int64, from 0:
    parts of one document are not independent. The error is nan of a single group."""
    off = torch.zeros(int(group.max()) + 1, dtype=sums.dtype, device=sums.device)
    mean = sums.sum() / counts.sum()
    off.index_add_(0, group, sums - mean * counts)
    g = len(group[counts > 0].unique())
    return float(mean), float((g / (g - 1) * off.square().sum()).sqrt() / counts.sum()) if g > 1 else float("nan")


def share_explained(scores: Tensor, x: Tensor, counted: Tensor, bins: int = 64) -> Tensor:
    """The share of the variance of scores, within queries, that a function of x explains: of each query's scores their mean is taken out,
    as a softmax does, and what is fitted is a step function of x, the same for all queries of a head.

    Least squares with a constant for each query and one for each of `bins` bins with equally many pairs. Of independent scores such a fit
    explains as much as it has free constants, which is taken out (adjusted R^2).

    Args:
        scores, x: (H, Q, M).
        counted: (Q, M) bool, the pairs that count.

    Returns:
        Adjusted R^2 of each head, (H,) fp64; nan where the scores of a query do not differ, or there are too few pairs to tell.
    """
    h, q, m = scores.shape
    ordered = x[:, counted].sort(-1).values
    edges = ordered[:, torch.arange(1, bins, device=x.device) * ordered.shape[1] // bins].contiguous()
    bin_of = torch.searchsorted(edges, x.reshape(h, -1).contiguous(), right=True).view(h, q, m)
    weight = counted.double().expand(h, q, m)
    size = counted.sum(-1).double().clamp(min=1)  # (Q,)
    y = torch.where(counted, scores.double(), 0)
    y = (y - y.sum(-1, keepdim=True) / size[:, None]) * weight
    in_bin = y.new_zeros(h, q, bins).scatter_add_(-1, bin_of, weight)
    of_bin = y.new_zeros(h, q, bins).scatter_add_(-1, bin_of, y).sum(1)  # (H, bins)
    normal = torch.diag_embed(in_bin.sum(1)) - torch.einsum("hqa,hqb,q->hab", in_bin, in_bin, 1 / size)
    explained = (of_bin * (torch.linalg.pinv(normal, hermitian=True) @ of_bin[..., None])[..., 0]).sum(-1)
    total = y.square().sum((1, 2))
    scale = torch.where(counted, scores.double(), 0).square().sum((1, 2))
    pairs = counted.sum() - (counted.sum(-1) > 0).sum()  # less a constant for each query
    left = pairs - ((in_bin.sum(1) > 0).sum(-1) - 1)  # and one for each bin but one
    unexplained = (1 - explained / total) * pairs / left
    return torch.where((total > NOTHING * scale) & (left > 0), 1 - unexplained, torch.nan)
