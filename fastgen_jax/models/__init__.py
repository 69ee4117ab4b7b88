"""Models for JAX programs: `create` and `load` those that the files beside this one describe.

A wing of its own, above checkpoints: what it needs is imported when it is called, so that to import
any file beside it costs no more than that file.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flax import nnx
    from jax.sharding import Mesh

    from fastgen_jax.models.config import ModelConfig
    from fastgen_jax.models.decoder import Model


def create(
    config: ModelConfig | dict[str, Any] | str | os.PathLike[str],
    rngs: nnx.Rngs,
    dtype: str = "float32",
    mesh: Mesh | None = None,
) -> Model:
    """A model of random weights, the same on one device as on several.

    Args:
        config: a ModelConfig, what a config.json says, or the directory of one.
        rngs: of which one key of `params` is taken.
        dtype: of the weights; auto: float32 on CPU, bfloat16 on GPU and TPU.
        mesh: of one axis, "tensor", over whose devices the weights lie as an engine of that
            tensor_parallel_size has them; None: the first device.

    Raises:
        ConfigError: the config is not one of a model that is supported, or the mesh is another.
    """
    from fastgen_jax.checkpoints.directory import as_config
    from fastgen_jax.checkpoints.loading import random_model
    from fastgen_jax.models.layers import Policy
    from fastgen_jax.models.sharding import check_mesh, make_mesh

    mesh = make_mesh(1) if mesh is None else check_mesh(mesh)
    return random_model(as_config(config), Policy.here(dtype, mesh), mesh, rngs.params())


def load(path: str | os.PathLike[str], dtype: str = "auto", mesh: Mesh | None = None) -> Model:
    """The model of a checkpoint.

    Args:
        path: a Hugging Face or converted directory, or a hub id.
        dtype, mesh: as `create` takes them.

    Raises:
        ConfigError, CheckpointError: what is wrong with it.
    """
    from fastgen_jax.checkpoints.directory import locate, read_config
    from fastgen_jax.checkpoints.loading import load_model
    from fastgen_jax.models.layers import Policy
    from fastgen_jax.models.sharding import check_mesh, make_mesh

    mesh = make_mesh(1) if mesh is None else check_mesh(mesh)
    directory = locate(os.fspath(path))
    return load_model(directory, read_config(directory), Policy.here(dtype, mesh), mesh)
