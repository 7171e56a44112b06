"""The memory layout that the Triton kernels read: token-major."""

from torch import Tensor


def token_major(x: Tensor) -> Tensor:
    """(B, H, N, K) -> (B, N, H, K) with a head's numbers contiguous and one stride a token; copies only if it must."""
    x = x.transpose(1, 2)
    b, n, h, k = x.shape
    aligned = x.storage_offset() * x.element_size() % 16 == 0
    ok = aligned and x.stride(3) == 1 and (h == 1 or x.stride(2) == k) and (b == 1 or x.stride(0) == n * x.stride(1))
    return x if ok and n > 1 else x.contiguous().flatten().view(b, n, h, k)  # flatten: a single token may have any stride
