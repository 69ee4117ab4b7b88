"""Noise is jax.random's own, bit for bit: a seed says the same on every backend and ever after."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastgen_jax.engine.noise import gumbel

SEEDS = jnp.array([0, 1, -1, 2**31 - 1, -(2**31), 123456789], jnp.int32)
POSITIONS = jnp.array([1, 0, 2**31 - 1, 4096, 17, 131072], jnp.int32)


def jax_own(seed: jax.Array, position: jax.Array, n_columns: int) -> jax.Array:
    key = jax.random.fold_in(jax.random.key(seed.view(jnp.uint32)), position)
    return jax.random.gumbel(key, (n_columns,), jnp.float32)


@pytest.mark.parametrize("n_columns", [1, 5, 32000, 151936])
def test_noise_has_the_bits_of_jax_random(n_columns):
    ours = jax.jit(gumbel, static_argnums=2)(SEEDS, POSITIONS, n_columns)
    wanted = [jax_own(*row, n_columns) for row in zip(SEEDS, POSITIONS, strict=True)]
    assert ours.dtype == jnp.float32
    np.testing.assert_array_equal(ours.view(jnp.uint32), jnp.stack(wanted).view(jnp.uint32))


def test_noise_does_not_depend_on_what_kind_of_keys_the_program_prefers():
    before = gumbel(SEEDS, POSITIONS, 64)
    with jax.default_prng_impl("rbg"):
        np.testing.assert_array_equal(gumbel(SEEDS, POSITIONS, 64), before)


def test_noise_is_finite_and_spread_as_gumbels_distribution_is():
    noise = np.asarray(gumbel(SEEDS, POSITIONS, 151936))
    assert np.isfinite(noise).all()
    for quantile in (0.01, 0.25, 0.5, 0.75, 0.99):
        wanted = -np.log(-np.log(quantile))
        assert (noise < wanted).mean() == pytest.approx(quantile, abs=2e-3)
