"""The boundary between host and device: weights, cache, compiled steps; the only device_put and
device_get.

The cache and the table of known tokens are donated and aliased in place. Every shape of step.py's
programs is compiled by `compile`; afterwards only compiled executables are called, so that nothing
can compile while serving.

jax keeps what it traced and compiled for as long as the function it was given lives. So each
program is made from a function of its own, not from one of the module: the runner owns it all.
"""

import ctypes
import math
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array

from fastgen_jax.engine.batch import (
    Batch,
    HostTables,
    MaskedShape,
    Shape,
    pack_masked,
    packed_size,
)
from fastgen_jax.engine.constraint import mask_width
from fastgen_jax.engine.processors import Processor
from fastgen_jax.engine.scoring import Scores
from fastgen_jax.engine.step import (
    DeviceState,
    Launched,
    Program,
    StepResult,
    masked_step,
    step,
)
from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.layout import HeadLayout
from fastgen_jax.models.sharding import cache_sharding, replicated
from pallas_kernels import cache_dtype as stored_dtype
from pallas_kernels import cache_shape


def zeros(shape: tuple[int, ...], dtype: Any, sharding: NamedSharding) -> Callable[[], Array]:
    """A compiled program that makes an array of zeros."""
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding).lower().compile()


def return_freed_memory() -> None:
    """Makes glibc give the system what has been freed: compiling leaves it hundreds of megabytes.

    Elsewhere it does nothing.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def buckets(smallest: int, largest: int) -> list[int]:
    """Padded sizes: powers of two, but for 4, which 8 serves as well; `largest` too."""
    sizes, size = {largest}, smallest
    while size < largest:
        sizes.add(size)
        size *= 4 if size == 2 else 2
    return sorted(sizes)


class Runner:
    """Owner of the device's arrays and of the programs that work on them.

    Args:
        model: an NNX module whose parameters are on the mesh.
        n_rows, max_tokens: size of the table of known tokens.
        n_blocks, block_size, cache_dtype: size of the KV cache.
        hidden_dtype: of the model's final hidden states.
        shapes: what to compile; every batch must have one of them.
        layers: whose hidden states every step leaves, to be fetched where they are wanted.
        sample_tile, row_tile: see Program.
        processors: compiled into each of them.
    """

    def __init__(
        self,
        model: nnx.Module,
        config: ModelConfig,
        *,
        mesh: Mesh,
        attention_backend: str,
        n_rows: int,
        max_tokens: int,
        n_blocks: int,
        block_size: int,
        cache_dtype: str,
        hidden_dtype: str,
        shapes: list[Shape],
        sample_tile: int,
        row_tile: int | None = None,
        layers: tuple[int, ...] = (),
        processors: tuple[Processor, ...] = (),
    ):
        leaves, treedef = jax.tree.flatten(model)
        self.leaves = tuple(leaves)
        self.program = Program(
            treedef, attention_backend, mesh, sample_tile, row_tile, layers, processors
        )
        self.mesh = mesh
        self.shapes = shapes
        self._steps: dict[Shape | MaskedShape, Callable] = {}
        self._hidden_size, self._hidden_dtype = config.hidden_size, hidden_dtype
        self._mask_width = mask_width(config.vocab_size)
        self._state_shape = (n_rows + 1, max_tokens)
        heads = HeadLayout.of(config, mesh.size)
        own = cache_shape(  # of one device
            attention_backend,
            n_blocks=n_blocks,
            n_kv_heads=heads.n_own_kv_slots,
            block_size=block_size,
            head_size=config.head_dim,
        )
        shape = (n_blocks, heads.n_kv_slots, *own[2:])
        dtype = stored_dtype(cache_dtype, jax.default_backend())
        self._n_layers = config.n_layers
        self._empty_cache = zeros(shape, dtype, cache_sharding(mesh))
        self._no_tokens = zeros(self._state_shape, jnp.int32, replicated(mesh))
        self.state = self._fresh_state()
        self._row_tables: tuple[Any, ...] = ()

    def reset(self) -> None:
        """Forgets the cache and all known tokens, as after a step that failed."""
        self.free()  # there is no room for two
        self.state = self._fresh_state()

    def free(self) -> None:
        """Without cache and known tokens no step can run until `reset`."""
        self.state = self.state._replace(caches=())

    def _fresh_state(self) -> DeviceState:
        caches = tuple(self._empty_cache() for _ in range(self._n_layers))
        return DeviceState(caches, self._no_tokens())

    def close(self) -> None:
        """Frees all that it owns; nothing else may be called afterwards."""
        vars(self).clear()
        return_freed_memory()

    def compile(self, tables: HostTables, on_done: Callable[[int, int], None]) -> None:
        """Compiles every shape, the largest first, on as many threads as help."""
        self._upload_tables(tables)
        masked = {MaskedShape(shape.n_hidden, self._mask_width): None for shape in self.shapes}
        with ThreadPoolExecutor(2) as pool:
            jobs = [
                pool.submit(self._compile, shape) for shape in [*reversed(self.shapes), *masked]
            ]
            for n_done, job in enumerate(jobs):
                on_done(n_done, len(jobs))
                job.result()
            on_done(len(jobs), len(jobs))
        return_freed_memory()

    def _compile(self, shape: Shape | MaskedShape) -> None:
        self._steps[shape] = self.lower(shape).compile()

    def temporary_bytes(self, shape: Shape) -> int:
        """Device memory that a step of this shape needs beside its arguments and results."""
        tables = HostTables(self._state_shape[0] - 1, 1, 1, self.program.processors)
        self._upload_tables(tables)
        analysis = self.lower(shape).compile().memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes

    def lower(self, shape: Shape | MaskedShape):
        """The traced step of this shape, ready to compile."""
        packed = self._absent((packed_size(shape),), jnp.int32)
        if isinstance(shape, Shape):
            one_shape = partial(step, program=self.program, shape=shape)
            return jax.jit(one_shape, donate_argnames="state").lower(
                self.leaves, self.state, packed, self._row_tables
            )
        one_shape = partial(masked_step, program=self.program, shape=shape)
        hidden = self._absent((shape.n_hidden, self._hidden_size), self._hidden_dtype)
        return jax.jit(one_shape, donate_argnames="known").lower(
            self.leaves, self.state.token_ids, hidden, packed, self._row_tables
        )

    def _absent(self, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=replicated(self.mesh))

    def dispatch(self, batch: Batch, tables: HostTables) -> Launched:
        """Starts a step and returns at once. `fetch` waits for its result; if the batch is
        constrained, `draw` comes before.
        """
        if tables.is_dirty:
            self._upload_tables(tables)
        packed = jax.device_put(batch.packed, replicated(self.mesh))
        run = self._steps[batch.shape]
        self.state, launched = run(self.leaves, self.state, packed, self._row_tables)
        if not batch.is_constrained:
            launched.result.copy_to_host_async()
        if batch.is_pooled:
            launched.pooled.copy_to_host_async()
        if batch.scored:
            launched.scores.copy_to_host_async()
        if batch.has_states:
            assert launched.states is not None
            launched.states.copy_to_host_async()
        return launched

    def draw(self, batch: Batch, launched: Launched, masks: np.ndarray) -> Launched:
        """Starts to draw the tokens of a constrained batch; masks i32[n_hidden, W]."""
        packed = pack_masked(batch, masks, n_rows=self._state_shape[0] - 1)
        packed = jax.device_put(packed, replicated(self.mesh))
        run = self._steps[MaskedShape(*masks.shape)]
        known, result = run(
            self.leaves, self.state.token_ids, launched.hidden, packed, self._row_tables
        )
        self.state = self.state._replace(token_ids=known)
        result.copy_to_host_async()
        return launched._replace(result=result)

    def fetch(self, launched: Launched) -> StepResult:
        """Waits for a dispatched step."""
        return StepResult.unpack(np.asarray(launched.result))

    def fetch_pooled(self, launched: Launched) -> np.ndarray:
        """f32[S, D] of a dispatched step: a line for each of its sequences."""
        return np.asarray(launched.pooled)

    def fetch_scores(self, launched: Launched) -> Scores:
        """Of a dispatched step: a line for each scored position, and more."""
        return Scores.unpack(np.asarray(launched.scores))

    def fetch_states(self, launched: Launched) -> np.ndarray:
        """[T, L, D] of a dispatched step."""
        return np.asarray(launched.states)

    def _upload_tables(self, tables: HostTables) -> None:
        # Copies: on CPU device_put may alias host memory, and the host goes on writing there.
        arrays = (tables.bias_ids, tables.bias, tables.banned_ids, tables.arguments.lines)
        copies = jax.tree.map(np.copy, arrays)
        self._row_tables = jax.device_put(copies, replicated(self.mesh))
        tables.is_dirty = False


def make_shapes(
    *, smallest: int, max_batched_tokens: int, max_seqs: int, table_width: int, tile: int
) -> list[Shape]:
    """One shape per token bucket; a batch of T tokens has at most T sequences, in whole sample
    tiles.
    """
    shapes = []
    for n_tokens in buckets(smallest, max_batched_tokens):
        n_seqs = min(n_tokens, max_seqs)
        if n_seqs > tile:
            n_seqs = math.ceil(n_seqs / tile) * tile
        shapes.append(Shape(n_tokens, n_seqs, table_width))
    return shapes


def shape_for(n_tokens: int, shapes: Iterable[Shape]) -> Shape:
    """The smallest shape that holds n_tokens."""
    return next(shape for shape in shapes if shape.n_tokens >= n_tokens)
