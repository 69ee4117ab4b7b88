"""Triton kernels on numpy: Triton's own interpreter runs the bodies that are compiled for a GPU.

The interpreter that comes with Triton wants an environment variable before the first import and
torch's tensors. Here a second copy of a file's kernels is interpreted, in the same process, on
arrays; wrong in the interpreter and put right: bfloat16, whose bits it multiplies as integers and
which it rounds down.

Every case of tests.pallas_kernels.attention_cases:
    python -m tests.triton.interpreted [--cases REGEX]
"""

import argparse
import contextlib
import functools
import importlib.util
import re
import time
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import triton
import triton.language as tl
from triton.runtime import interpreter, jit

from pallas_kernels.triton import attention
from tests.pallas_kernels.attention_cases import (
    CASES,
    Implementation,
    Mismatch,
    check,
    gpu_plan,
    prepared,
)

SOURCE = Path(attention.__file__).with_name("kernels.py")
TYPES = {
    "float32": tl.float32,
    "float16": tl.float16,
    "bfloat16": tl.bfloat16,
    "int32": tl.int32,
    "int8": tl.int8,
}


def interpreted_kernels(source: Path = SOURCE) -> Any:
    """The file as a module whose kernels are interpreted."""
    spec = importlib.util.spec_from_file_location(f"interpreted_{source.stem}", source)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    with triton.knobs.runtime.scope():
        triton.knobs.runtime.interpret = True
        spec.loader.exec_module(module)
    return module


def launch_interpreted(
    kernels: Any, kernel: str, out, *arrays, grid, layout, fresh=(), num_warps, num_stages
) -> tuple[jax.Array, ...]:
    """jax_triton.launch on numpy; fresh outputs start as NaN."""
    function = getattr(kernels, kernel)
    outputs = [np.array(out), *(np.full(x.shape, np.nan, x.dtype) for x in fresh)]
    arguments = [outputs[0], *map(np.asarray, arrays), *outputs[1:]]
    grid_of_three = grid + (1,) * (3 - len(grid))
    run = interpreter.GridExecutor(function.rewrite(), function.arg_names, grid_of_three)
    with interpreting(), np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All-NaN", RuntimeWarning)  # poisoned rows
        run(*map(_pointer, arguments), None, layout=layout)
    return tuple(map(jnp.asarray, outputs))


def _pointer(array: np.ndarray) -> Any:
    address = np.array([array.ctypes.data], np.uint64)
    dtype = tl.pointer_type(TYPES[array.dtype.name])
    return tl.tensor(interpreter.TensorHandle(address, dtype), dtype)


@contextlib.contextmanager
def interpreting() -> Iterator[None]:
    """Inside, triton.language is interpreted; afterwards it compiles again.

    The interpreter itself would change it at every call of a function, and not always back.
    """
    builder = interpreter.interpreter_builder
    language: Any = types.SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
    with contextlib.ExitStack() as stack:
        stack.callback(interpreter._patch_lang(language).restore)
        nothing = interpreter._LangPatchScope()
        stack.enter_context(mock.patch.object(interpreter, "_patch_lang", return_value=nothing))
        for name, function in vars(tl).items():
            if isinstance(function, jit.JITFunction):
                replaced = interpreter.InterpretedFunction(function.fn)
                stack.enter_context(mock.patch.object(tl, name, replaced))
        for name, method in (("create_dot", _dot), ("cast_impl", _cast)):
            own = functools.partial(method, getattr(builder, name))
            stack.enter_context(mock.patch.object(builder, name, own))
        yield


def _dot(dot: Callable, a, b, *arguments) -> Any:
    if a.dtype == tl.bfloat16:
        a, b = (_handle(x.data.view(jnp.bfloat16).astype(np.float32), tl.float32) for x in (a, b))
    return dot(a, b, *arguments)


def _cast(cast: Callable, source, dtype) -> Any:
    if source.dtype.scalar == tl.float32 and dtype.scalar == tl.bfloat16:
        return _handle(source.data.astype(jnp.bfloat16).view(np.uint16), tl.bfloat16)
    return cast(source, dtype)


def _handle(array: np.ndarray, dtype) -> Any:
    return interpreter.TensorHandle(array, dtype)


def implementation(plan: Callable = gpu_plan, kernels: Any = None) -> Implementation:
    """jax_triton on numpy, not compiled."""
    kernels = interpreted_kernels() if kernels is None else kernels
    launch = functools.partial(launch_interpreted, kernels)
    function = functools.partial(attention.ragged_paged_attention, launch=launch)
    return Implementation("jax_triton", function, plan=plan)


def main() -> None:
    parser = argparse.ArgumentParser(description="Runs every attention case of the Triton kernels.")
    parser.add_argument("--cases", default="", help="only cases whose name this regex matches")
    pattern, tested, n_wrong = parser.parse_args().cases, implementation(), 0
    cases = [case for case in CASES if re.search(pattern, str(case))]
    for case in cases:
        start, verdict = time.perf_counter(), "ok"
        batch, want = prepared(case)
        try:
            check(case, batch, tested(case, batch), want)
        except Mismatch as error:
            n_wrong += 1
            verdict = str(error)
        print(f"{time.perf_counter() - start:6.2f} s  {case}: {verdict}", flush=True)
    print(f"{len(cases) - n_wrong} of {len(cases)} cases match the oracle")
    raise SystemExit(bool(n_wrong))


if __name__ == "__main__":
    main()
