"""Programs compiled beforehand, for chips that need not be here, into a converted checkpoint."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from convert.chips import Chips
from fastgen_jax.checkpoints.directory import read_config
from fastgen_jax.checkpoints.loading import abstract_model, filled, flat_params
from fastgen_jax.engine import startup, stored
from fastgen_jax.engine.config import EngineConfig
from fastgen_jax.engine.programs import Programs
from fastgen_jax.engine.recipe import Recipe
from fastgen_jax.errors import FastGenError
from fastgen_jax.models.layers import Policy
from fastgen_jax.models.sharding import mesh_over, placed

OnProgress = Callable[[int, int], None]  # done, total


def compile_for(
    chips: Chips, directory: Path, sizes: dict[str, Any], on_progress: OnProgress
) -> Path:
    """Compiles all programs that an engine of these sizes would, and stores them.

    Args:
        sizes: options of EngineConfig; those left out are what a server would choose there.

    Raises:
        FastGenError: an engine would refuse them, or the compiler is not here.
    """
    mesh = mesh_over(chips.devices())
    config = EngineConfig(model=str(directory), tensor_parallel_size=chips.n, **sizes)
    resolved, model_config, shapes = startup.design(config, read_config(directory), mesh)
    model = abstract_model(model_config, Policy.here(resolved.dtype, mesh))
    params = flat_params(model)
    leaves: list[Any] = [placed(path, param, model_config, mesh) for path, param in params.items()]
    model = filled(model, leaves)
    if config.num_kv_blocks is None:
        memory = chips.memory or startup.free_memory(mesh.devices.flat[0])
        weights = sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)
        n_blocks = startup.fit_blocks(resolved, model_config, model, shapes, mesh, memory - weights)
        resolved = dataclasses.replace(resolved, num_kv_blocks=n_blocks)
    recipe = startup.recipe_of(model, model_config, resolved, mesh)
    programs = Programs(partial(program, recipe), shapes, recipe.masked)
    with compiling_anew():
        programs.compile("all", on_progress)
    made_for = stored.purpose(resolved, model_config, mesh.devices.flat)
    return stored.write(directory, mesh.devices.flat, made_for, programs.made)


@contextlib.contextmanager
def compiling_anew() -> Iterator[None]:
    """Without jax's cache: the CPU's executables that come out of it lack their code when they are
    serialised again.
    """
    before = getattr(jax.config, "jax_enable_compilation_cache", True)
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # which has decided by now whether it is used
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


def program(recipe: Recipe, key: Any) -> tuple[bytes, list[list[int]]]:
    """A compiled program as the runtime writes it, and the shapes of its outputs."""
    compiled = recipe.compile(key)
    shardings = jax.tree.leaves(recipe.results(key))
    infos = jax.tree.leaves(compiled.out_info)
    for info, sharding in zip(infos, shardings, strict=True):
        if not info.sharding.is_equivalent_to(sharding, len(info.shape)):
            raise FastGenError(f"{key} returns an array as {info.sharding}, not as {sharding}")
    executable = compiled.runtime_executable()
    if executable is None:
        raise FastGenError(f"{key} has no executable that could be stored")
    return executable.serialize(), [[*info.shape] for info in infos]
