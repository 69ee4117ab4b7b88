"""The boundary between host and device: weights, cache, compiled steps; the only device_put and
device_get.

One function runs a step: embed, layers (which write the KV cache and attend), logits of the
sampled rows, sampling. It takes the model's leaves and one packed int32 array, and returns one
array. The cache and the table of known tokens are donated and aliased in place. Every shape is
compiled by `compile`; afterwards only compiled executables are called, so that nothing can compile
while serving.

jax keeps what it traced and compiled for as long as the function it was given lives. So each
program is made from a function of its own, not from one of the module: the runner owns it all.
"""

import ctypes
import math
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Int

from fastgen_jax.engine.batch import (
    UNKNOWN,
    Batch,
    HostTables,
    Shape,
    packed_size,
    unpack,
    work_plan,
)
from fastgen_jax.engine.sampling import RowParams, RowTables, Sampled, sample
from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.sharding import cache_sharding, replicated, shard_attention
from fastgen_jax.sampling_params import MAX_LOGPROBS
from pallas_kernels import RaggedMeta, cache_shape, select
from pallas_kernels import cache_dtype as stored_dtype

RESULT_SIZE = 3 + 2 * MAX_LOGPROBS


class DeviceState(NamedTuple):
    """What a step reads and replaces on the device."""

    caches: tuple[Array, ...]  # per layer "B K 2 C H"
    token_ids: Int[Array, "R+1 M"]  # every token known so far; the last line is scratch


class StepResult(NamedTuple):
    """Numpy results of one step; row i belongs to `Batch.sampled[i]`."""

    token_ids: np.ndarray
    logprobs: np.ndarray
    is_finite: np.ndarray
    top_ids: np.ndarray
    top_logprobs: np.ndarray

    @classmethod
    def unpack(cls, packed: np.ndarray) -> "StepResult":
        floats = packed.view(np.float32)
        split = 3 + MAX_LOGPROBS
        return cls(
            packed[:, 0], floats[:, 1], packed[:, 2] != 0, packed[:, 3:split], floats[:, split:]
        )


def pack_result(sampled: Sampled) -> Int[Array, "S {RESULT_SIZE}"]:
    """The inverse of StepResult.unpack, on device."""

    def bits(x):
        return lax.bitcast_convert_type(x, jnp.int32)

    columns = [sampled.token_ids, bits(sampled.logprobs), sampled.is_finite.astype(jnp.int32)]
    tops = [sampled.top_ids, bits(sampled.top_logprobs)]
    return jnp.concatenate([jnp.stack(columns, axis=1), *tops], axis=1)


@dataclass(frozen=True)
class Program:
    """The static part of a step, the same in all shapes."""

    treedef: Any  # of the model, as a pytree
    attention_backend: str
    mesh: Mesh
    sample_tile: int  # rows of logits made at once

    def model(self, leaves: tuple[Array, ...]) -> Any:
        return jax.tree.unflatten(self.treedef, leaves)


def step(
    leaves: tuple[Array, ...],
    state: DeviceState,
    packed: Int[Array, "..."],
    row_tables: tuple[Array, Array, Array],
    *,
    program: Program,
    shape: Shape,
) -> tuple[DeviceState, Int[Array, "S {RESULT_SIZE}"]]:
    """One ragged batch through the model, and one sampled token for each row that asks for it."""
    part = unpack(packed, shape)
    n_seqs, n_single, n_samples = part["counts"]
    rows, positions = part["token_rows"], part["positions"]
    with jax.named_scope("token_ids"):
        is_unknown = part["token_ids"] == UNKNOWN
        token_ids = jnp.where(is_unknown, state.token_ids[rows, positions], part["token_ids"])
        known = state.token_ids.at[rows, positions].set(token_ids)
    meta = RaggedMeta(
        positions=positions,
        slots=part["slots"],
        block_tables=part["block_tables"],
        seq_lens=part["seq_lens"],
        cu_q_lens=part["cu_q_lens"],
        n_seqs=n_seqs,
        n_single=n_single,
        plan=work_plan(part, shape),
    )
    attention = shard_attention(select(program.attention_backend), program.mesh)
    attention = jax.jit(partial(attention), static_argnames="spec")  # layers share one trace

    def attend(q, k, v, cache, **options):
        with jax.named_scope("attention"):
            return attention(q, k, v, cache, meta, **options)

    model = program.model(leaves)
    hidden, caches = model(token_ids, positions, state.caches, attend)
    sample_rows, n_tokens = part["sample_rows"], positions[part["sample_tokens"]] + 1
    params = RowParams.unpack(part["sample_params"])
    tables = RowTables(known, *row_tables)
    sampled_hidden = hidden[part["sample_tokens"]]
    tile = min(program.sample_tile, shape.n_seqs)

    def sample_rows_from(i, result):
        start = i * tile

        def cut(x):
            return lax.dynamic_slice_in_dim(x, start, tile)

        logits = model.unembed(cut(sampled_hidden))
        row_params = jax.tree.map(cut, params)
        sampled = sample(logits, row_params, tables, cut(sample_rows), cut(n_tokens))
        return lax.dynamic_update_slice_in_dim(result, pack_result(sampled), start, 0)

    with jax.named_scope("sample"):
        result = jnp.zeros((shape.n_seqs, RESULT_SIZE), jnp.int32)
        n_tiles = (n_samples + tile - 1) // tile
        result = lax.fori_loop(0, n_tiles, sample_rows_from, result)
    known = known.at[sample_rows, n_tokens].set(result[:, 0], mode="drop")
    return DeviceState(caches, known), result


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
        shapes: what to compile; every batch must have one of them.
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
        shapes: list[Shape],
        sample_tile: int,
    ):
        leaves, treedef = jax.tree.flatten(model)
        self.leaves = tuple(leaves)
        self.program = Program(treedef, attention_backend, mesh, sample_tile)
        self.mesh = mesh
        self.shapes = shapes
        self._steps: dict[Shape, Callable] = {}
        self._state_shape = (n_rows + 1, max_tokens)
        own = cache_shape(  # of one device
            attention_backend,
            n_blocks=n_blocks,
            n_kv_heads=config.n_kv_heads // mesh.size,
            block_size=block_size,
            head_size=config.head_dim,
        )
        shape = (n_blocks, config.n_kv_heads, *own[2:])
        dtype = stored_dtype(cache_dtype, jax.default_backend())
        self._n_layers = config.n_layers
        self._empty_cache = zeros(shape, dtype, cache_sharding(mesh))
        self._no_tokens = zeros(self._state_shape, jnp.int32, replicated(mesh))
        self.state = self._fresh_state()
        self._row_tables: tuple[Array, ...] = ()

    def reset(self) -> None:
        """Forgets the cache and all known tokens, as after a step that failed."""
        del self.state  # there is no room for two
        self.state = self._fresh_state()

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
        with ThreadPoolExecutor(2) as pool:
            jobs = [pool.submit(self._compile, shape) for shape in reversed(self.shapes)]
            for n_done, job in enumerate(jobs):
                on_done(n_done, len(jobs))
                job.result()
            on_done(len(jobs), len(jobs))
        return_freed_memory()

    def _compile(self, shape: Shape) -> None:
        self._steps[shape] = self.lower(shape).compile()

    def temporary_bytes(self, shape: Shape) -> int:
        """Device memory that a step of this shape needs beside its arguments and results."""
        tables = HostTables(self._state_shape[0] - 1, 1, 1)
        self._upload_tables(tables)
        analysis = self.lower(shape).compile().memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes

    def lower(self, shape: Shape):
        """The traced step of this shape, ready to compile."""
        packed = jax.ShapeDtypeStruct(
            (packed_size(shape),), jnp.int32, sharding=replicated(self.mesh)
        )
        one_shape = partial(step, program=self.program, shape=shape)
        return jax.jit(one_shape, donate_argnames="state").lower(
            self.leaves, self.state, packed, self._row_tables
        )

    def dispatch(self, batch: Batch, tables: HostTables) -> Array:
        """Starts a step and returns at once; `fetch` waits for its result."""
        if tables.is_dirty:
            self._upload_tables(tables)
        packed = jax.device_put(batch.packed, replicated(self.mesh))
        run = self._steps[batch.shape]
        self.state, result = run(self.leaves, self.state, packed, self._row_tables)
        result.copy_to_host_async()
        return result

    def fetch(self, result: Array) -> StepResult:
        """Waits for a dispatched step."""
        return StepResult.unpack(np.asarray(result))

    def _upload_tables(self, tables: HostTables) -> None:
        # Copies: on CPU device_put may alias host memory, and the host goes on writing there.
        arrays = (tables.bias_ids.copy(), tables.bias.copy(), tables.banned_ids.copy())
        self._row_tables = tuple(jax.device_put(a, replicated(self.mesh)) for a in arrays)
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
