"""Every operation of the dispatch table in plain torch: the truth that faster kernels are checked against, and the fallback everywhere.

Half-precision inputs are computed in fp32 and results come back in the dtype of the values; float64 stays float64, so that each function
is its own oracle.
"""

from hyperlm.kernels.reference.attention import (
    causal_conv,
    hyperbolic_attention,
    hyperbolic_points,
    linear_attention,
    linear_attention_step,
    radii,
    scan,
    softmax_attention,
    tangent_features,
    tangent_step,
)
from hyperlm.kernels.reference.frame import add, add_norm, mlp, norm_gate, readout
from hyperlm.kernels.reference.loss import cross_entropy_backward, online_logsumexp
from hyperlm.kernels.reference.optimizer import UpdatePart, accumulate, adamw8, copy_to_host, decode8, encode8, norm

__all__ = [
    "UpdatePart",
    "accumulate",
    "adamw8",
    "add",
    "add_norm",
    "causal_conv",
    "copy_to_host",
    "cross_entropy_backward",
    "decode8",
    "encode8",
    "hyperbolic_attention",
    "hyperbolic_points",
    "linear_attention",
    "linear_attention_step",
    "mlp",
    "norm",
    "norm_gate",
    "online_logsumexp",
    "radii",
    "readout",
    "scan",
    "softmax_attention",
    "tangent_features",
    "tangent_step",
]
