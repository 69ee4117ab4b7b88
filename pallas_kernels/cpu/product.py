"""x W^T on CPU where the weight has 16 bits, in C++ (product.cc) on XLA's own threads.

XLA's own products of such weights take 1.1 to 14 times the time (benchmarks/models/matmul.py).
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pallas_kernels.cpu.build import KINDS

TARGET = "fastgen_product"
WEIGHTS = ("bfloat16", "float16", "float32")
TOKENS = 32  # of which room for packed inputs is a multiple


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
