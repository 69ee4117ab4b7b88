"""The compilers for absent accelerators, and the room of the tests itself."""

import contextlib
import socket

import jax
import jax.numpy as jnp
import pytest

from tests import targets
from tests.conftest import NetworkBlocked, UnexpectedCompile

TARGETS = [
    pytest.param(targets.tpu_target, "v5e", id="v5e"),
    pytest.param(targets.tpu_target, "v6e", id="v6e"),
    pytest.param(targets.gpu_target, "h100", id="h100"),
    pytest.param(targets.gpu_target, "a100", id="a100"),
]


@pytest.mark.compile
@pytest.mark.parametrize(("make", "name"), TARGETS)
def test_donated_cache_is_updated_in_place_on_an_absent_accelerator(make, name):
    cache = jax.ShapeDtypeStruct((64, 256, 256), jnp.bfloat16)
    block = jax.ShapeDtypeStruct((256, 256), jnp.bfloat16)
    compiled = make(name).compile(
        lambda cache, x: cache.at[3].set(x @ x), cache, block, donate_argnums=0
    )
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes == 64 * 256 * 256 * 2
    assert memory.temp_size_in_bytes < memory.alias_size_in_bytes / 4


def test_eight_cpu_devices_are_visible():
    assert [d.platform for d in jax.devices()] == ["cpu"] * 8


def test_compile_inside_forbid_compile_raises(forbid_compile):
    with pytest.raises(UnexpectedCompile), forbid_compile():
        jax.jit(lambda x: x * 3)(jnp.ones(5))


def test_swallowed_compile_still_raises_at_the_end(forbid_compile):
    def swallow():
        with contextlib.suppress(AssertionError):
            jax.jit(lambda x: x * 5)(jnp.ones(5))

    with pytest.raises(UnexpectedCompile), forbid_compile():
        swallow()


def test_compiled_program_runs_inside_forbid_compile(forbid_compile):
    double, x = jax.jit(lambda x: x * 2), jnp.ones(7)
    double(x)
    with forbid_compile():
        double(x)


@pytest.mark.parametrize("host", ["192.0.2.1", "example.com"])
def test_network_is_blocked(host):
    with pytest.raises(NetworkBlocked):
        socket.create_connection((host, 80), timeout=1)


def test_mixed_dtypes_are_refused():
    with pytest.raises(ValueError, match="implicit dtype promotion"):
        jnp.ones(2, jnp.float32) + jnp.ones(2, jnp.int32)
