"""What an engine's programs are made of: shapes, dtypes and places of all that they take.

It holds no array: programs can be made while arrays change, sleep or are nowhere, and for chips
that are not here.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from fastgen_jax.engine.batch import HostTables, MaskedShape, Shape, packed_size
from fastgen_jax.engine.constraint import mask_width
from fastgen_jax.engine.processors import Processor
from fastgen_jax.engine.step import (
    DeviceState,
    Launched,
    Program,
    compiler_options,
    masked_step,
    step,
)
from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.kv_cache import CacheLayout
from fastgen_jax.models.sharding import replicated


@dataclass(frozen=True, eq=False)
class Recipe:
    """Every array here is a jax.ShapeDtypeStruct."""

    program: Program
    leaves: tuple[Any, ...]
    state: DeviceState
    row_tables: tuple[Any, ...]
    hidden: Any  # "D": of one token
    mask_width: int

    @property
    def n_rows(self) -> int:
        """Rows of the host tables; the device has one more, which is scratch."""
        return self.state.token_ids.shape[0] - 1

    def masked(self, shape: Shape) -> MaskedShape:
        """The program that draws constrained batches of a shape."""
        return MaskedShape(shape.n_hidden, self.mask_width)

    def compile(self, shape: Shape | MaskedShape) -> jax.stages.Compiled:
        """For the devices of the mesh, which need not be here."""
        device: Any = self.program.mesh.devices.flat[0]
        options: Any = compiler_options(device)
        return self.lower(shape).compile(options)

    def lower(self, shape: Shape | MaskedShape) -> jax.stages.Lowered:
        """The traced step of this shape, ready to compile."""
        mesh = self.program.mesh
        device: Any = mesh.devices.flat[0]
        if device in jax.devices():
            return self.trace(shape).lower()
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # Pallas asks it for the chip
            platform: Any = {"gpu": "cuda"}.get(device.platform, device.platform)
            return self.trace(shape).lower(lowering_platforms=(platform,))

    def trace(self, shape: Shape | MaskedShape) -> jax.stages.Traced:
        """The step of this shape, for whatever platform. Executables take all arguments, also
        those that they do not need.

        jax keeps what it traced and compiled for as long as the function it was given lives. So
        each program is made from a function of its own, not from one of the module.
        """
        mesh = self.program.mesh
        packed = absent((packed_size(shape),), jnp.int32, mesh)
        if isinstance(shape, Shape):
            one_shape = partial(step, program=self.program, shape=shape)
            return jax.jit(one_shape, donate_argnames="state", keep_unused=True).trace(
                self.leaves, self.state, packed, self.row_tables
            )
        one_shape = partial(masked_step, program=self.program, shape=shape)
        hidden = absent((shape.n_hidden, *self.hidden.shape), self.hidden.dtype, mesh)
        return jax.jit(one_shape, donate_argnames="known", keep_unused=True).trace(
            self.leaves, self.state.token_ids, hidden, packed, self.row_tables
        )

    def results(self, shape: Shape | MaskedShape) -> Any:
        """Where on the mesh lies what a step returns: a tree of shardings."""
        mesh = self.program.mesh
        everywhere: Any = replicated(mesh)
        if isinstance(shape, MaskedShape):
            return everywhere, everywhere
        caches: Any = jax.tree.map(lambda array: array.sharding, self.state.caches)
        states = everywhere if self.program.layers else None
        launched = Launched(everywhere, everywhere, everywhere, states, everywhere)
        return DeviceState(caches, everywhere), launched


def absent(shape: tuple[int, ...], dtype: Any, mesh: Mesh) -> jax.ShapeDtypeStruct:
    """An array that every device has whole."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=replicated(mesh))


def make_recipe(
    model: nnx.Module,
    config: ModelConfig,
    *,
    mesh: Mesh,
    cache: CacheLayout,
    n_rows: int,
    max_tokens: int,
    n_blocks: int,
    hidden_dtype: str,
    sample_tile: int,
    row_tile: int | None,
    layers: tuple[int, ...],
    processors: tuple[Processor, ...],
) -> Recipe:
    """Of a model whose parameters are on the mesh, or say that they would be.

    Args:
        n_rows, max_tokens: size of the table of known tokens.
        cache, n_blocks: the KV cache and its size.
        hidden_dtype: of the model's final hidden states.
        layers: whose hidden states every step leaves, to be fetched where they are wanted.
        sample_tile, row_tile: see Program.
        processors: compiled into each program.
    """
    leaves, treedef = jax.tree.flatten(model)
    known: Any = absent((n_rows + 1, max_tokens), jnp.int32, mesh)
    tables = HostTables(n_rows, 1, 1, processors).of_device
    return Recipe(
        Program(treedef, cache.backend, mesh, sample_tile, row_tile, layers, processors),
        tuple(jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for x in leaves),
        DeviceState((cache.absent(n_blocks, mesh),) * config.n_layers, known),
        jax.tree.map(lambda x: absent(x.shape, x.dtype, mesh), tables),
        absent((config.hidden_size,), hidden_dtype, mesh),
        mask_width(config.vocab_size),
    )
