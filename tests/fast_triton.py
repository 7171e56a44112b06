"""Triton in tests, with the same results in less time: interpreted where there is no GPU, compiled where there is one.

At each launch, and at each call of one kernel's function by another, the interpreter replaces Triton's language by its own; it makes a
table to look up a single dtype; and it scans element by element. Here the language is replaced once, dtypes are remembered, and a scan goes
slice by slice. Of processes that want the same kernel compiled, one compiles it.
"""

from functools import wraps
from pathlib import Path

import numpy as np
import triton.compiler
from filelock import FileLock
from triton.runtime import interpreter


def compile_once() -> None:
    """From now on this process waits for others that compile the same kernel, and then finds it in the cache of Triton, which all share."""
    compile_alone = triton.compiler.compile

    @wraps(compile_alone)
    def compile(source, *arguments, **options):
        folder = Path(triton.knobs.cache.dir)
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f"{source.hash()}.lock"):
            return compile_alone(source, *arguments, **options)

    triton.compiler.compile = compile


def hasten_interpreter() -> None:
    """For this process, from now on. It is one in which kernels are interpreted and never compiled."""
    interpreter._patch_lang = replaced_once(interpreter._patch_lang)
    interpreter._get_np_dtype = by_name(interpreter._get_np_dtype)
    interpreter.ScanOps.generic_scan = scan_by_slices


def replaced_once(patch):
    done = set()

    def patch_lang(fn):
        languages = frozenset(id(x) for x in fn.__globals__.values() if x is interpreter.tl or x is interpreter.tl.core)
        if languages not in done:
            patch(fn)
            done.add(languages)
        return interpreter._LangPatchScope()  # with nothing to restore

    return patch_lang


def by_name(np_dtype):
    known = {}

    def get_np_dtype(dtype):
        name = dtype.scalar.name
        if name not in known:
            known[name] = np_dtype(dtype)
        return known[name]

    return get_np_dtype


def scan_by_slices(self, inputs):
    """`ScanOps.generic_scan`: the same operations on the same numbers, those of a slice together, as they do not depend on each other."""
    tensors = [x.handle.data for x in inputs]
    results = [np.zeros_like(x) for x in tensors]
    for i in range(tensors[0].shape[self.axis]):
        at, before = ((slice(None),) * self.axis + (slice(j, j + 1),) for j in (i, i - 1))
        new = tuple(self.to_tensor(x[at], given.dtype) for x, given in zip(tensors, inputs, strict=True))
        if i > 0:
            new = self.combine_fn.fn(*(self.to_tensor(x[before], given.dtype) for x, given in zip(results, inputs, strict=True)), *new)
        for result, x in zip(results, new if isinstance(new, tuple) else (new,), strict=True):
            result[at] = x.handle.data
    return [self.to_tensor(x, given.dtype) for x, given in zip(results, inputs, strict=True)]
