"""Special functions by the GPU's approximate instructions; if EXACT, and in the interpreter, which has none, by ordinary ones.

Triton's own log2 is a polynomial of 13 instructions, its division a sequence of several, and an instruction that minds denormal numbers is
followed by three that do: these take and give zero for them. Errors (PTX manual): lg2.approx 2^-22 absolute for arguments between 1/2 and
2 and relative elsewhere, ex2.approx 2^-22 relative, rsqrt.approx 2^-22.9 relative, sqrt.approx and rcp.approx 2^-23 relative.
"""

import triton
import triton.language as tl

APPROXIMATE = tl.constexpr(not triton.knobs.runtime.interpret)


@triton.jit
def instruction(x, ASSEMBLY: tl.constexpr):
    return tl.inline_asm_elementwise(ASSEMBLY, "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def log2(x, EXACT: tl.constexpr):
    if APPROXIMATE and not EXACT:
        return instruction(x, "lg2.approx.ftz.f32 $0, $1;")
    return tl.log2(x)


@triton.jit
def exp2(x, EXACT: tl.constexpr):
    if APPROXIMATE and not EXACT:
        return instruction(x, "ex2.approx.ftz.f32 $0, $1;")
    return tl.exp2(x)


@triton.jit
def rsqrt(x, EXACT: tl.constexpr):
    if APPROXIMATE and not EXACT:
        return instruction(x, "rsqrt.approx.ftz.f32 $0, $1;")
    return tl.rsqrt(x)


@triton.jit
def sqrt(x, EXACT: tl.constexpr):
    if APPROXIMATE and not EXACT:
        return instruction(x, "sqrt.approx.ftz.f32 $0, $1;")
    return tl.sqrt_rn(x)


@triton.jit
def reciprocal(x, EXACT: tl.constexpr):
    if APPROXIMATE and not EXACT:
        return instruction(x, "rcp.approx.ftz.f32 $0, $1;")
    return 1 / x


@triton.jit
def exp(x, EXACT: tl.constexpr):
    """To 2^-21 relative between -1 and 1, and beyond as much less as x is larger."""
    return exp2(x * 1.4426950408889634, EXACT)


@triton.jit
def sigmoid(x, EXACT: tl.constexpr):
    return reciprocal(1 + exp(-x, EXACT), EXACT)
