"""Products with a weight, and what may be one pass with them: a norm before, a gate or a sum after.

On CPU, if its library is there and better than XLA, it is one call that writes nothing of what lies
between; a 16-bit weight is widened on its way and x is not rounded, but for a matrix unit
(pallas_kernels/cpu/product.py). Elsewhere it is single steps, XLA's to fuse; gradients are those of
the steps everywhere. All accumulate in float32.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels import cpu_product, has_cpu_gated_product, has_cpu_product

Scale = tuple[Float[Array, "I"], float]  # weight and eps of an rms_norm


def product(
    x: Float[Array, "T I"],
    weight: Float[Array, "O I"],
    n_shards: int = 1,
    *,
    norm: Scale | None = None,
    added: Float[Array, "T O"] | None = None,
) -> Float[Array, "T O"]:
    """norm(x) W^T in float32; or that in the dtype of what is added, and this added.

    n_shards: of the weight, which XLA divides; the library's product is not XLA's to divide.
    """
    scale, eps = norm or (None, 0.0)
    return _in_one_pass(x, weight, scale, added, eps, False, n_shards)


def gated_product(
    x: Float[Array, "T I"], weight: Float[Array, "2*F I"], *, norm: Scale | None = None
) -> Float[Array, "T F"]:
    """silu(G norm(x)) * (U norm(x)) in x's dtype, of the two halves of a weight on one device."""
    scale, eps = norm or (None, 0.0)
    return _in_one_pass(x, weight, scale, None, eps, True, 1)


def rms_norm(
    x: Float[Array, "... D"],
    weight: Float[Array, "#D"],
    eps: float,
    n_summed: int | None = None,
) -> Float[Array, "... D"]:
    """x / rms(x) * weight, statistics in float32; of x so many elements are not padding."""
    x32 = x.astype(jnp.float32)
    mean = jnp.sum(x32 * x32, axis=-1, keepdims=True) / (n_summed or x.shape[-1])
    return (x32 * lax.rsqrt(mean + eps) * along_last(weight, x)).astype(x.dtype)


def along_last(weight: Array, x: Array) -> Array:
    """The weight with as many axes as x, for its last ones."""
    return weight.reshape((1,) * (x.ndim - weight.ndim) + weight.shape)


def gate(both: Float[Array, "... 2 F"], activate: Callable[[Array], Array]) -> Array:
    """act(gate) * up in float32."""
    both = both.astype(jnp.float32)
    return activate(both[..., 0, :]) * both[..., 1, :]


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _in_one_pass(x, weight, scale, added, eps: float, is_gated: bool, n_shards: int) -> Array:
    steps = partial(_in_steps, eps=eps, is_gated=is_gated, n_shards=n_shards)

    def cpu(x, weight, scale, added):
        if n_shards > 1 or not has_cpu_product(len(x), weight.dtype):
            return steps(x, weight, scale, added)
        if not is_gated:
            y = cpu_product(x, weight, norm=scale, eps=eps, added=added)
            return y if added is None else y.astype(added.dtype)
        if has_cpu_gated_product(len(x), weight.dtype):
            return cpu_product(x, weight, norm=scale, eps=eps, is_gated=True).astype(x.dtype)
        return _gated(cpu_product(x, weight, norm=scale, eps=eps), x.dtype)

    return lax.platform_dependent(x, weight, scale, added, cpu=cpu, default=steps)


def _in_steps(x, weight, scale, added, eps: float, is_gated: bool, n_shards: int) -> Array:
    y = _alone(x if scale is None else rms_norm(x, scale, eps), weight, n_shards)
    if is_gated:
        return _gated(y, x.dtype)
    return y if added is None else added + y.astype(added.dtype)


def _gated(both: Float[Array, "T 2*F"], dtype) -> Float[Array, "T F"]:
    return gate(both.astype(dtype).reshape(len(both), 2, -1), jax.nn.silu).astype(dtype)


def _forward(x, weight, scale, added, eps: float, is_gated: bool, n_shards: int):
    steps = partial(_in_steps, eps=eps, is_gated=is_gated, n_shards=n_shards)
    return jax.vjp(steps, x, weight, scale, added)


_in_one_pass.defvjp(_forward, lambda eps, is_gated, n_shards, pull, d_y: pull(d_y))


def _product(x: Float[Array, "T I"], weight: Float[Array, "O I"], n_shards: int) -> Array:
    """x W^T with the weight's dtype as input and float32 as output; so are its gradients' products.

    On CPU XLA's product packs the right-hand side anew in every call, so with few tokens the weight
    had better be on the left: up to 1.25 times as fast (benchmarks/models/matmul.py).
    """

    def dot(a, b):
        contract = (((1,), (1,)), ((), ()))
        return lax.dot_general(a, b, contract, preferred_element_type=jnp.float32)

    def rounded(x, weight):
        return dot(x.astype(weight.dtype), weight)

    def cpu(x, weight):
        if n_shards == 1 and has_cpu_product(len(x), weight.dtype):
            return cpu_product(x, weight)
        fewest = 1 if weight.dtype == jnp.float32 else 32
        if not fewest <= len(x) < 128:
            return rounded(x, weight)
        return lax.optimization_barrier(dot(weight, x.astype(weight.dtype))).T  # not turned back

    return lax.platform_dependent(x, weight, cpu=cpu, default=rounded)


def _product_forward(x, weight, n_shards: int):
    return _product(x, weight, n_shards), (x, weight)


def _product_backward(_, saved, d_y: Float[Array, "T O"]):
    """By itself jax would multiply a bfloat16 weight in float32."""
    x, weight = saved
    d_y = d_y.astype(weight.dtype)
    d_x = jnp.einsum("to,oi->ti", d_y, weight, preferred_element_type=jnp.float32)
    d_weight = jnp.einsum(
        "to,ti->oi", d_y, x.astype(weight.dtype), preferred_element_type=jnp.float32
    )
    return d_x.astype(x.dtype), d_weight.astype(weight.dtype)


_alone = jax.custom_vjp(_product, nondiff_argnums=(2,))
_alone.defvjp(_product_forward, _product_backward)
