"""Every shipped kernel configuration compiles for the architectures it is meant for, without spilling registers, in the shared memory there is.

No GPU is needed. As a script (in a process where Triton does not interpret) this file compiles them and prints what they use, as JSON.
"""

import ast
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import pytest

from hyperlm import kernels

SHARED = {80: 99 << 10, 90: 227 << 10}  # bytes a program may have; those for 8.0 also run on 8.6 and 8.9, which have the least
INTS = "i32"
# What may spill registers: wide heads in fp32, a path for checking, not for speed; streams wider than 4096, on newer Triton; and of the
# hyperbolic kernels a few numbers that wait outside of the loops, which is faster than every configuration without.
MAY_SPILL = r"(forward|backward_queries|backward_keys), (128|256), fp32|add_norm_backward, 8192"
COMMON = r"90: (?!.*(, (32|128|256)\b|, fp32|, 8192)).*"  # heads of 64 in bf16: a tenth of all, which take minutes where none is cached
MAY_SPILL_OUTSIDE_LOOPS = r"(forward|backward_queries|backward_keys), \d+, "


def builds():
    """(name, kernel, types and constants of its arguments, warps, stages, capability, registers if limited), the heaviest variant of each."""
    import torch

    from hyperlm.kernels import adamw8, add_norm, convolution, cross_entropy, decoding, gradients, mlp, radii, readout, scan
    from hyperlm.kernels import hyperbolic_attention as ha
    from hyperlm.kernels import linear_attention as la
    from hyperlm.kernels.reference import optimizer as reference

    for capability in SHARED:
        for k in kernels.HEAD_DIMS:
            for dtype, name in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
                x, f = f"*{name}", "*fp32"
                sizes = dict.fromkeys(("B", "N", "H", "segment", "stride_q", "stride_k", "stride_v"), INTS)
                common = (
                    sizes
                    | dict.fromkeys(("q", "k", "v"), x)
                    | dict.fromkeys(("decay", "write", "totals", "starts"), f)
                    | dict(STARTS=True, MARK=la.MARK)
                )
                pulls = dict.fromkeys(("do", "dq", "dk", "dv", "marks"), x) | dict.fromkeys(("ends", "rows", "columns", "first"), f)
                pulls |= dict(stride_do=INTS, ROLE=0, ROLES=3, ENDS=True)
                sweeps = (la.backward_sweep, pulls), (la.forward_sweep, dict(o=x, last=f))
                for (kernel, more), decay, even in product(sweeps, (False, True), (True, False)):
                    c = la.config(k, k, dtype, capability == 90, decay, even, backward=kernel is la.backward_sweep)
                    shape = dict(K=k, V=k, C=c.C, KEYS=c.KEYS, VALUES=c.VALUES, DECAY=decay, EVEN=even)
                    yield (
                        f"{kernel.__name__}, {k}, {name}{', decay' * decay}{', even' * even}",
                        kernel,
                        common | shape | more,
                        c.warps,
                        c.stages,
                        capability,
                        c.registers,
                    )
                strides = dict.fromkeys(("q_b", "q_h", "k_b", "k_h", "k_n", "v_b", "v_h", "v_n", "tk_b", "tk_h"), INTS)
                common = dict.fromkeys(("s_q", "s_k", "v"), x) | dict(t_q=f, t_k=f, beta=f, M=INTS, H=INTS, G=INTS, K=k, V=k) | strides
                many = common | dict(log_sums=f, N=INTS, q_n=INTS)
                pulled = many | dict(d_o=x, delta=f, do_n=INTS)
                for kernel, more in (
                    (ha.forward, many | dict(o=x)),
                    (ha.backward_queries, pulled | dict(o=x, d_sq=x, d_tq=f)),
                    (ha.backward_keys, pulled | dict(d_sk=x, d_v=x, d_tk=f, d_beta=f)),
                ):
                    for distance, even in product((False, True), repeat=2):
                        if even and (capability != 90 or dtype == torch.float32):
                            continue  # the configuration is that of the uneven
                        c = ha.config(kernel.__name__, k, dtype, capability == 90, even)
                        block = dict(BM=c.BM, BN=c.BN, DISTANCE=distance, EVEN=even)
                        title = f"{kernel.__name__}, {k}, {name}{', distance' * distance}{', even' * even}"
                        yield title, kernel, more | block, c.warps, c.stages, capability, c.registers
                args = common | dict.fromkeys(("sums", "totals", "leasts"), f) | dict(BN=ha.keys_at_once(k), SPLIT=ha.SPLIT, DISTANCE=True)
                yield f"one_query, {k}, {name}", ha.one_query, args, 4, 3, capability
                args = dict.fromkeys(("sums", "totals", "leasts"), f) | dict(o=x, splits=INTS, V=k, SPLITS=16)
                yield f"join, {k}, {name}", ha.join, args, 4, 3, capability
                args = dict(key=x, value=x, decay=f, sums=f, totals=f, BACKWARD=True) | dict.fromkeys(
                    ("N", "H", "segment", "stride_key", "stride_value"), INTS
                )
                yield f"segment_sums, {k}, {name}", la.segment_sums, args | shape, c.warps, c.stages, capability
                for lift in (convolution.FEATURES.value, convolution.POINTS.value):
                    args = dict.fromkeys(("x", "weight", "tail"), x) | dict.fromkeys(("r", "beta", "cos", "sin"), f)
                    args |= dict.fromkeys(("B", "N", "H", "row_stride"), INTS) | dict(K=k, TAIL=True, LIFT=lift)
                    rows, warps = convolution.tile(k, dtype, lift)
                    yield (
                        f"convolve {lift}, {k}, {name}",
                        convolution.convolve,
                        args | dict(out=x, times=f, part_stride=INTS, ROWS=rows),
                        warps,
                        3,
                        capability,
                    )
                    w = convolution.walk(512, 32, k, dtype, lift)
                    out = dict.fromkeys(("dq", "dk", "dv", "dx"), x) | dict.fromkeys(("d_times", "d_weight", "d_r", "d_beta"), f)
                    title, shape = f"convolve_backward {lift}, {k}, {name}", dict(HEADS=w.heads, ROWS=w.rows)
                    yield title, convolution.convolve_backward, args | out | shape, w.warps, 3, capability
                args = dict(o=x, weight=x, gate=x, T=INTS, H=INTS, stride_o=INTS, V=k, ROWS=readout.rows(k))
                yield f"norm_gate, {k}, {name}", readout.norm_gate_forward, args | dict(y=x), 4, 3, capability
                out = dict(y=x, d=x, do=x, d_weight=f, TILES=readout.TILES, RECOMPUTE=True)
                yield f"norm_gate_backward, {k}, {name}", readout.norm_gate_backward, args | out, 4, 3, capability
                args = dict.fromkeys(("x", "weight", "tail", "next_tail", "norm", "gate", "y"), x) | dict.fromkeys(
                    ("r", "beta", "log_decay", "state"), f
                )
                yield f"step, {k}, {name}", decoding.step_kernel, args | dict(H=INTS, K=k, KEYS=decoding.keys(k)), 4, 3, capability
            args = (
                dict.fromkeys(("rows", "columns", "last", "d_last", "d_decay"), f)
                | dict(marks=x)
                | dict.fromkeys(("B", "N", "H", "parts"), INTS)
            )
            shape = dict(SIZE=k * k, LAST=True, MARK=la.MARK, ELEMENTS=512)
            yield f"decay_gradient, {k}", la.decay_gradient, args | shape, 4, 3, capability
        args = dict.fromkeys(("decay", "write", "totals"), f) | dict.fromkeys(("B", "N", "H", "segment"), INTS)
        yield "decay_factors", la.decay_factors, args | dict(C=64, CHUNKS=32), 4, 3, capability
        args = dict(sums=f, totals=f, initial=f, segments=INTS, SIZE=1024, ELEMENTS=512, DECAY=True, INITIAL=True, BACKWARD=True)
        yield "carry", la.carry, args, 4, 3, capability
        args = dict(log_a=f, start=f, h=f, N=INTS, C=INTS, ROWS=scan.ROWS, CHANNELS=scan.CHANNELS, START=True)
        yield "scan", scan.scan_forward, args | dict(b=f), 4, 3, capability
        yield "scan_backward", scan.scan_backward, args | dict(dh=f, d_log_a=f, db=f, d_start=f), 4, 3, capability
        for d in (512, 4096, 8192):
            shape = dict(T=INTS, D=INTS, WIDTH=d)
            args = dict(x=f, y="*bf16", weight=f, out=f, n="*bf16") | shape
            yield f"add_norm, {d}", add_norm.add_norm_forward, args | dict(ADD=True), add_norm.warps(d), 3, capability
            args = (
                dict(out=f, weight=f, d_out=f, d_n="*bf16", dx=f, dy="*bf16", d_weight=f)
                | shape
                | dict(TOKENS=add_norm.TOKENS, ADD=True, STREAM=True)
            )
            yield f"add_norm_backward, {d}", add_norm.add_norm_backward, args, add_norm.warps(d), 1, capability
        yield "add", add_norm.sum_of, dict(x="*bf16", y="*bf16", out=f, N=INTS, ELEMENTS=add_norm.ELEMENTS, ADD=True), 8, 3, capability
        args = dict(x="*bf16", N=INTS, ELEMENTS=mlp.ELEMENTS)
        yield "gelu", mlp.gelu_forward, args | dict(y="*bf16"), 8, 3, capability
        yield "gelu_backward", mlp.gelu_backward, args | dict(d="*bf16", RECOMPUTE=True), 8, 3, capability
        sizes = dict.fromkeys(("T", "N", "G", "H", "stride"), INTS) | dict(TOKENS=radii.TOKENS, COLUMNS=radii.COLUMNS)
        args = dict(product="*bf16") | dict.fromkeys(("radius_bias", "decay_bias"), f) | sizes
        yield "radii", radii.forward, args | dict(r=f, log_decay=f), 4, 3, capability
        yield "radii_backward", radii.backward_of, args | dict(d_r=f, d_log_decay=f, d_product="*bf16", d_bias=f), 4, 3, capability
        args = dict(logits="*bf16", targets="*i64", log_z=f, first=INTS, C=INTS, ELEMENTS=cross_entropy.ELEMENTS)
        yield "online_logsumexp", cross_entropy.logsumexp_kernel, args | dict(target_logit=f), 8, 3, capability
        yield "cross_entropy_backward", cross_entropy.gradient_kernel, args, 8, 3, capability
        yield "accumulate", add_norm.sum_of, dict(x=f, y="*bf16", out=f, N=INTS, ELEMENTS=add_norm.ELEMENTS, ADD=True), 8, 3, capability
        args = dict(x="*bf16", sums=f, N=INTS, ELEMENTS=gradients.ELEMENTS, TILES=gradients.TILES)
        yield "norm", gradients.square, args, 8, 3, capability
        shape = dict(BLOCK=reference.QUANT_BLOCK, CODED=reference.CODED, ROWS=adamw8.ROWS)
        args = dict(w="*bf16", g="*u8", g_scales=f, codes="*u8", scales=f, factor=f, rates=f, base="*i64", offset="*i64", N=INTS)
        yield (
            "adamw8",
            adamw8.update,
            args | shape | dict(ROW=reference.ROW, DECAY=True, DECODE=True, PART=reference.UpdatePart.CORRECT.value),
            adamw8.WARPS,
            3,
            capability,
        )
        wide = dict.fromkeys(("w", "g", "moments", "factor", "rates"), f) | dict(N=INTS, DECAY=True)
        wide |= dict(PART=reference.UpdatePart.CORRECT.value, ELEMENTS=adamw8.VECTOR_ELEMENTS)
        yield "adamw8 of vectors", adamw8.update_vector, wide, 4, 3, capability
        coded = dict.fromkeys(("x", "x1", "x2", "x3"), "*bf16") | dict(
            codes="*u8", scales=f, squares=f, base="*i64", offset="*i64", N=INTS, COUNT=reference.PARTS
        )
        yield "encode8", adamw8.encode, coded | shape | dict(ROWS=adamw8.CODED_ROWS), adamw8.CODED_WARPS, 3, capability


def spills_in_loops(assembly: str) -> int:
    """Loads and stores of the stack between a backward branch and where it leads."""
    code = [(int(m[1], 16), m[2]) for m in re.finditer(r"/\*([0-9a-f]{4,})\*/\s+([^;]*);", assembly)]
    jumps = [(int(to[1], 16), at) for at, text in code if (to := re.search(r"\bBRA\b.* (0x[0-9a-f]+)", text))]
    loops = [(to, at) for to, at in jumps if to < at]
    return sum(any(to <= at <= end for to, end in loops) for at, text in code if re.search(r"\b(LDL|STL)\b", text))


def build(name, kernel, arguments, warps, stages, capability, registers=None):
    """Compile one kernel: bytes of stack a thread (spilled registers), instructions that reach for it in loops, shared memory of a program."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia import __file__ as backend
    from triton.compiler import ASTSource

    names = kernel.arg_names
    assert set(names) == set(arguments), (name, set(names) ^ set(arguments))
    types = {n: a if isinstance(a, str) else "constexpr" for n, a in arguments.items()}
    constants = {(names.index(n),): a for n, a in arguments.items() if not isinstance(a, str)}
    aligned = {
        (names.index(n),): [["tt.divisibility", 16]]
        for n in names
        if types[n].startswith("*") or "stride" in n or re.fullmatch("(q|k|v|do)_.", n)
    }
    source = ASTSource(kernel, {n: types[n] for n in names}, constants, aligned)
    built = triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps, "num_stages": stages, "maxnreg": registers}
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        tool = Path(backend).parent / "bin" / "cuobjdump"

        def ask(option: str) -> str:
            return subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout

        stack = int(re.search(r"STACK:(\d+)", ask("-res-usage"))[1])
        spills = spills_in_loops(ask("-sass")) if stack else 0
    return {"name": name, "capability": capability, "stack": stack, "spills_in_loops": spills, "shared": built.metadata.shared}


@pytest.mark.skipif(not kernels.HAVE_TRITON, reason="Triton is not installed")
def test_every_kernel_that_is_launched_is_built():
    """Launches name their kernel, or a variable that is one of several."""
    launched = set()
    for path in Path(kernels.__file__).parent.glob("*.py"):
        calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call) and node.args]
        launched |= {call.args[0].id for call in calls if getattr(call.func, "id", "") == "launch" and isinstance(call.args[0], ast.Name)}
    assert launched - {"kernel"} <= {kernel.__name__ for _, kernel, *_ in builds()}


@pytest.mark.skipif(not kernels.HAVE_TRITON, reason="Triton is not installed")
@pytest.mark.parametrize(("chosen", "least"), [(COMMON, 50), pytest.param(".*", 450, marks=pytest.mark.slow)], ids=["common", "all"])
def test_configurations_compile_without_spills_in_the_shared_memory_there_is(chosen, least):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run([sys.executable, __file__, chosen], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) >= least
    assert [x for x in found if x["shared"] > SHARED[x["capability"]]] == []
    strict = [x for x in found if not re.match(MAY_SPILL, x["name"])]
    assert [x for x in strict if x["spills_in_loops"]] == []
    assert [x for x in strict if x["stack"] and not re.match(MAY_SPILL_OUTSIDE_LOOPS, x["name"])] == []


if __name__ == "__main__":
    with ThreadPoolExecutor(2) as pool:
        for usage in pool.map(lambda arguments: build(*arguments), (b for b in builds() if re.fullmatch(sys.argv[1], f"{b[5]}: {b[0]}"))):
            print(json.dumps(usage))
