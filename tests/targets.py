"""Ahead-of-time compilation for accelerators that this machine lacks, with the real compilers.

TPU programs need the `libtpu` wheel; CUDA programs `jax-cuda12-plugin` and `jax-cuda12-pjrt` of
jax's version and `nvidia-cuda-nvcc-cu12`, and to read their machine code `nvidia-cuda-nvdisasm`. A
missing wheel skips the test, or fails it under FASTGEN_REQUIRE_COMPILERS=1. Imports
jax only when asked for a target: ENVIRONMENT must be set before that.
"""

import importlib.util
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import pytest

from convert import chips

ENVIRONMENT, GPUS, TPUS = chips.ENVIRONMENT, chips.GPUS, chips.TPUS

# Operations of a compiled program's text that devices communicate by.
COLLECTIVE = r" (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("


@dataclass(frozen=True)
class Target:
    """One described accelerator: `compile` runs the real compiler for it and never the program."""

    platform: str  # "tpu" or "cuda"
    sharding: Any  # of arguments without their own: replicated over `mesh`
    mesh: Any

    def compile(self, fn: Callable, *args: Any, **jit_options: Any) -> Any:
        """Compiles jit(fn) for this accelerator.

        Args:
            fn: a function, or something already jitted (then without jit_options).
            args: arrays or anything else with shape and dtype, in pytrees; only their shapes count,
                and the sharding of a ShapeDtypeStruct that has one.
            jit_options: of jax.jit: donate_argnums, static_argnames ...

        Returns:
            jax's Compiled: .memory_analysis(), .cost_analysis(), .as_text().
        """
        import jax

        jitted = jax.jit(fn, **jit_options) if jit_options or not hasattr(fn, "trace") else fn

        def place(x):
            own = x.sharding if isinstance(x, jax.ShapeDtypeStruct) else None
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=own or self.sharding)

        shapes = jax.tree.map(place, args)
        with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh), warnings.catch_warnings():
            # Programs for a described device enter the cache, but only a real one can read them.
            warnings.filterwarnings("ignore", "Error reading persistent compilation cache")
            traced = jitted.trace(*shapes)
            return traced.lower(lowering_platforms=(self.platform,)).compile()


def has_compilers() -> bool:
    """Whether any accelerator's compiler is installed here."""
    return any(importlib.util.find_spec(name) for name in ("libtpu", "jax_cuda12_plugin"))


def tpu_target(name: str = "v5e", n_devices: int = 1) -> Target:
    """A TPU: v4, v5e, v5p, v6e or tpu7x; up to four devices, of v5e and v6e eight."""
    _require("libtpu", "pip install libtpu")
    return _target("tpu", name, n_devices)


def gpu_target(name: str = "h100", n_devices: int = 1) -> Target:
    """A GPU: h100 or a100; several of one host."""
    _require(
        "jax_cuda12_plugin", "pip install jax-cuda12-plugin and jax-cuda12-pjrt of jax's version"
    )
    return _target("cuda", name, n_devices)


def _require(module: str, remedy: str) -> None:
    if not importlib.util.find_spec(module):
        absent(f"no {module} here to compile with; {remedy}")


def absent(reason: str) -> NoReturn:
    """Skips the test, or fails it where all compilers are to be there."""
    if os.environ.get("FASTGEN_REQUIRE_COMPILERS") == "1":
        pytest.fail(reason)
    pytest.skip(reason)


def _target(platform: str, name: str, n_devices: int) -> Target:
    from fastgen_jax.models.sharding import mesh_over, replicated

    mesh = mesh_over(chips.Chips(name, n_devices).devices())
    return Target(platform, replicated(mesh), mesh)
