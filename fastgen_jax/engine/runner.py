"""The boundary between host and device: weights, cache, compiled steps; the only device_put and
device_get.

The cache and the table of known tokens are donated and aliased in place. Only compiled executables
are called, so that nothing can compile while serving.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fastgen_jax.engine.batch import Batch, HostTables, MaskedShape, Shape, pack_masked
from fastgen_jax.engine.programs import Programs, return_freed_memory
from fastgen_jax.engine.recipe import Recipe
from fastgen_jax.engine.scoring import Scores
from fastgen_jax.engine.step import DeviceState, Launched, StepResult
from fastgen_jax.models.sharding import replicated

FINE_MULTIPLE = 16  # tokens


def zeros(like: Any) -> Callable[[], Any]:
    """A compiled program that makes arrays of zeros where a tree has jax.ShapeDtypeStruct."""
    places = jax.tree.map(lambda array: array.sharding, like)

    def make():
        return jax.tree.map(lambda array: jnp.zeros(array.shape, array.dtype), like)

    return jax.jit(make, out_shardings=places).lower().compile()


def buckets(smallest: int, largest: int, n_fine: int = 0) -> list[int]:
    """Padded sizes: powers of two, but for 4, which 8 serves as well, and `largest`. Where it is
    halved n_fine times, four sizes a time instead, in multiples of 16.
    """
    sizes = {largest}
    while n_fine and largest >= 8 * FINE_MULTIPLE:
        sizes |= {math.ceil(largest * i / 8 / FINE_MULTIPLE) * FINE_MULTIPLE for i in (5, 6, 7, 8)}
        largest, n_fine = largest // 2, n_fine - 1
    size, least = smallest, min(sizes)
    while size < least:
        sizes.add(size)
        size *= 4 if size == 2 else 2
    return sorted(sizes)


class Runner:
    """Owner of the device's arrays and of the programs that work on them.

    Args:
        model: an NNX module whose parameters are on the mesh.
        recipe: of its programs.
        shapes: those that batches may have, in the order of their size.
        make: yields the program of a shape, or that draws its constrained rows (default: compiles).
    """

    def __init__(
        self,
        model: nnx.Module,
        recipe: Recipe,
        shapes: list[Shape],
        make: Callable[[Shape | MaskedShape], Any] | None = None,
    ):
        self.leaves = tuple(jax.tree.leaves(model))
        self.program, self.mesh = recipe.program, recipe.program.mesh
        self.recipe = recipe
        self.programs = Programs(make or recipe.compile, shapes, recipe.masked)
        self._empty_cache = zeros(recipe.state.caches[0])
        self._no_tokens = zeros(recipe.state.token_ids)
        self.state = self._fresh_state()
        self._row_tables: tuple[Any, ...] = ()

    @property
    def shapes(self) -> list[Shape]:
        """Those that the next batch may have, in the order of their size."""
        return self.programs.ready

    def reset(self) -> None:
        """Forgets the cache and all known tokens, as after a step that failed."""
        self.free()  # there is no room for two
        self.state = self._fresh_state()

    def free(self) -> None:
        """Without cache and known tokens no step can run until `reset`."""
        self.state = self.state._replace(caches=())

    def _fresh_state(self) -> DeviceState:
        caches = tuple(self._empty_cache() for _ in self.recipe.state.caches)
        return DeviceState(caches, self._no_tokens())

    def close(self) -> None:
        """Frees all that it owns; nothing else may be called afterwards."""
        self.programs.close()
        vars(self).clear()
        return_freed_memory()

    def dispatch(self, batch: Batch, tables: HostTables) -> Launched:
        """Starts a step and returns at once. `fetch` waits for its result; if the batch is
        constrained, `draw` comes before.
        """
        if tables.is_dirty:
            self._upload_tables(tables)
        packed = jax.device_put(batch.packed, replicated(self.mesh))
        run = self.programs.made[batch.shape]
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
        packed = pack_masked(batch, masks, n_rows=self.recipe.n_rows)
        packed = jax.device_put(packed, replicated(self.mesh))
        run = self.programs.made[MaskedShape(*masks.shape)]
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
        copies = jax.tree.map(np.copy, tables.of_device)
        self._row_tables = jax.device_put(copies, replicated(self.mesh))
        tables.is_dirty = False


def make_shapes(
    *,
    smallest: int,
    max_batched_tokens: int,
    max_seqs: int,
    table_width: int,
    tile: int,
    n_fine: int = 0,
) -> list[Shape]:
    """One shape per token bucket; a batch of T tokens has at most T sequences, in whole sample
    tiles.

    Args:
        n_fine: as of buckets.
    """
    shapes = []
    for n_tokens in buckets(smallest, max_batched_tokens, n_fine):
        n_seqs = min(n_tokens, max_seqs)
        if n_seqs > tile:
            n_seqs = math.ceil(n_seqs / tile) * tile
        shapes.append(Shape(n_tokens, n_seqs, table_width))
    return shapes


def shape_for(n_tokens: int, shapes: Iterable[Shape]) -> Shape:
    """The smallest shape that holds n_tokens."""
    return next(shape for shape in shapes if shape.n_tokens >= n_tokens)
