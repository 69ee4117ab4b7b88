"""x W^T on CPU in C++ (product.cc) on XLA's own threads, where XLA's own product takes longer: with
most weights of 16 bits, and in float32 where vectors are long.

    python -m benchmarks.models.matmul
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pallas_kernels.cpu.build import KINDS
from pallas_kernels.cpu.calls import check_installed

TARGET = "fastgen_product"
WEIGHTS = ("bfloat16", "float16", "float32")
TOKENS, INPUTS = 32, 16  # of which room for packed inputs is a multiple
FEW = 8  # rows, up to which memory is what a product waits for
LONG_VECTORS = "avx512", "avx512bf16", "amx"  # kinds of CPU


def is_better(n_tokens: int, dtype: str) -> bool:
    """Whether XLA's own product of such a weight takes longer here. The library must be there."""
    kind = check_installed()
    if (kind, dtype) == ("avx512bf16", "bfloat16"):  # with instructions for it, and no matrix unit
        return n_tokens < FEW
    return dtype in WEIGHTS[:2] or (dtype == "float32" and kind in LONG_VECTORS)


def can_gate(n_tokens: int, dtype: str) -> bool:
    """Whether `gated_product` is there for such a weight, and `is_better` says so."""
    in_tiles = (check_installed(), dtype) == ("amx", "bfloat16")
    return is_better(n_tokens, dtype) and (in_tiles or n_tokens > FEW)


def product(
    x: Float[Array, "T I"],
    weight: Float[Array, "O I"],
    *,
    norm: Float[Array, "I"] | None = None,
    eps: float = 0.0,
    added: Float[Array, "T O"] | None = None,
    is_gated: bool = False,
    kind: str | None = None,
) -> Float[Array, "T O"]:
    """In float32: x is not rounded, the weight is widened on its way. It has no gradient.

    The matrix unit of CPUs of the kind "amx" multiplies bfloat16 only: there x is rounded to it, if
    the weight is of it. The target must be known to XLA: calls.check_installed.

    Args:
        norm: x is x / sqrt(mean(x^2) + eps) * norm.
        added: to y.
        is_gated: y is silu(x G^T) * (x U^T) of the first and the second half of the weight, which
            is "2*O I". What lies between is never written to memory. See `can_gate`.
        kind: of CPU, one of build.KINDS; None: the best that this one is of.
    """
    if str(weight.dtype) not in WEIGHTS:
        raise ValueError(f"a weight of {weight.dtype}: the CPU's product has {', '.join(WEIGHTS)}")
    n_tokens, n_inputs = x.shape
    if weight.shape[1:] != (n_inputs,):
        raise ValueError(f"x is {x.shape}: the weight must be (O, {n_inputs}), not {weight.shape}")
    if is_gated and len(weight) % 2:
        raise ValueError(f"a gated weight has two halves, not {len(weight)} rows")
    n_outputs = len(weight) // (1 + is_gated)
    panels = -(-n_tokens // TOKENS) * TOKENS * (-(-n_inputs // INPUTS) * INPUTS)
    results = (
        jax.ShapeDtypeStruct((n_tokens, n_outputs), jnp.float32),
        jax.ShapeDtypeStruct((panels,), jnp.float32),
    )
    call = jax.ffi.ffi_call(
        TARGET,
        results,
        vmap_method="sequential",
        input_output_aliases=None if added is None else {3: 0},
    )
    nothing = jnp.zeros(0)
    arrays = (nothing if a is None else a.astype(jnp.float32) for a in (norm, added))
    return call(
        x.astype(jnp.float32),
        weight,
        *arrays,
        eps=np.float32(eps),
        is_gated=is_gated,
        kind=np.int64(-1 if kind is None else list(KINDS).index(kind)),
    )[0]
