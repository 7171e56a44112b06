"""Special functions by the GPU's approximate instructions; in the interpreter, which has none, by ordinary ones.

Triton's own log2 is a polynomial of 13 instructions, its division a sequence of several. Errors (PTX manual): lg2.approx 2^-22 absolute
for arguments between 1/2 and 2 and relative elsewhere, rcp.approx 1 ulp, sqrt.approx 2^-23 relative.
"""

import triton
import triton.language as tl

APPROXIMATE = tl.constexpr(not triton.knobs.runtime.interpret)


@triton.jit
def log2(x):
    if APPROXIMATE:
        return tl.inline_asm_elementwise("lg2.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    return tl.log2(x)


@triton.jit
def reciprocal(x):
    if APPROXIMATE:
        return tl.inline_asm_elementwise("rcp.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    return 1 / x


@triton.jit
def sqrt(x):
    if APPROXIMATE:
        return tl.inline_asm_elementwise("sqrt.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    return tl.sqrt(x)
