"""Where an engine's model comes from: a directory, or a module that the program holds.

What differs between them is here; `startup.start` knows neither.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flax import nnx
from jax.sharding import Mesh

from fastgen_jax.checkpoints import held, loading
from fastgen_jax.checkpoints.directory import locate, read_config, read_generation_config
from fastgen_jax.engine.config import EngineConfig
from fastgen_jax.errors import ConfigError
from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.decoder import Model
from fastgen_jax.models.layers import Policy

OnProgress = Callable[[int, int], None]  # done, total
Load = Callable[[ModelConfig, Policy, Mesh, OnProgress], Model]


@dataclass(frozen=True)
class Source:
    """A model that is not there yet.

    Args:
        dtype: of its weights, if the user leaves that open; None: the backend's.
        load: makes it, on the devices of a mesh.
        is_lasting: whether `load` makes the same model again, later.
    """

    model_config: ModelConfig
    generation_config: dict[str, Any]
    dtype: str | None
    load: Load
    is_lasting: bool
    directory: Path | None = None  # where its files are


def source_of(config: EngineConfig, module: nnx.Module | None = None) -> Source:
    """The module if there is one, else what the config names.

    Raises:
        ConfigError, CheckpointError: it is no model that can be served.
    """
    if module is not None:
        return _held(config, module)
    if not config.model:
        raise ConfigError("no model given; name a directory or a hub id")
    has_weights = config.load_format != "dummy"
    directory = locate(config.model, revision=config.revision, with_weights=has_weights)
    overrides = config.hf_overrides

    def load(model: ModelConfig, policy: Policy, mesh: Mesh, on_progress: OnProgress) -> Model:
        if not has_weights:
            return loading.random_model(model, policy, mesh, config.seed)
        return loading.load_model(directory, model, policy, mesh, on_progress, overrides=overrides)

    return Source(
        model_config=read_config(directory, overrides),
        generation_config=read_generation_config(directory, overrides),
        dtype=None,
        load=load,
        is_lasting=True,
        directory=directory,
    )


def _held(config: EngineConfig, module: nnx.Module) -> Source:
    """The parameters that a program holds, shared where dtype and layout are the engine's."""
    for name in ("model", "revision", "hf_overrides"):
        if getattr(config, name):
            raise ConfigError(f"{name} does not go with a module, which has its own; leave it out")
    if config.load_format != "auto":
        raise ConfigError("load_format does not go with a module, whose weights are there")
    if not isinstance(module, Model):
        raise ConfigError(
            f"a module of fastgen_jax.models is wanted, got {type(module).__name__}; make one with "
            "fastgen_jax.models.create or load"
        )
    found = held.of_module(module)

    def load(model: ModelConfig, policy: Policy, mesh: Mesh, on_progress: OnProgress) -> Model:
        return held.model_of(found, model, policy, mesh, on_progress)

    return Source(
        model_config=module.config,
        generation_config={},
        dtype=str(module.embed.weight.dtype),
        load=load,
        is_lasting=False,
    )
