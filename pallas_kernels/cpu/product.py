"""x W^T on CPU where the weight has 16 bits, in C++ (product.cc) on XLA's own threads.

XLA's own products of such weights take 1.1 to 14 times the time (benchmarks/models/matmul.py),
unless the CPU has instructions for them: then XLA's are faster than float32, but for few rows.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pallas_kernels.cpu.build import KINDS
from pallas_kernels.cpu.calls import check_installed

TARGET = "fastgen_product"
WEIGHTS = ("bfloat16", "float16", "float32")
TOKENS = 32  # of which room for packed inputs is a multiple
FEW = 8  # rows, up to which memory is what a product waits for


def is_better(n_tokens: int, dtype: str) -> bool:
    """Whether XLA's own product of such a weight takes longer here. The library must be there."""
    has_instructions = dtype == "bfloat16" and check_installed() == "avx512bf16"
    return dtype in WEIGHTS[:2] and (n_tokens < FEW or not has_instructions)


def product(
    x: Float[Array, "T I"], weight: Float[Array, "O I"], *, kind: str | None = None
) -> Float[Array, "T O"]:
    """In float32: x is not rounded, the weight is widened on its way. It has no gradient.

    The target must be known to XLA: calls.check_installed.

    Args:
        kind: of CPU, one of build.KINDS; None: the best that this one is of.
    """
    if str(weight.dtype) not in WEIGHTS:
        raise ValueError(f"a weight of {weight.dtype}: the CPU's product has {', '.join(WEIGHTS)}")
    (n_tokens, n_inputs), n_outputs = x.shape, len(weight)
    if weight.shape != (n_outputs, n_inputs):
        raise ValueError(f"x is {x.shape}: the weight must be (O, {n_inputs}), not {weight.shape}")
    panels = -(-n_tokens // TOKENS) * TOKENS * n_inputs
    results = (
        jax.ShapeDtypeStruct((n_tokens, n_outputs), jnp.float32),
        jax.ShapeDtypeStruct((panels,), jnp.float32),
    )
    call = jax.ffi.ffi_call(TARGET, results, vmap_method="sequential")
    kind_number = np.int64(-1 if kind is None else list(KINDS).index(kind))
    return call(x.astype(jnp.float32), weight, kind=kind_number)[0]
