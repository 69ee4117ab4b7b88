"""The programs of a step, which the runner compiles: traced functions, arrays in and arrays out.

`step` runs one ragged batch: embed, layers (which write the KV cache and attend), logits of the
sampled rows, sampling. Where masks come first it samples nothing, and `masked_step` draws from the
hidden states that it leaves. They take the model's leaves and one packed int32 array.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from fastgen_jax.engine.batch import UNKNOWN, MaskedShape, Shape, unpack, work_plan
from fastgen_jax.engine.processors import Processor
from fastgen_jax.engine.sampling import RowParams, RowTables, Sampled, Scored, sample, score
from fastgen_jax.engine.scoring import SCORE_SIZE
from fastgen_jax.models.kv_cache import KVCache, attend
from fastgen_jax.models.row_tiles import by_tiles
from fastgen_jax.models.sharding import replicated, shard_attention
from fastgen_jax.sampling_params import MAX_LOGPROBS
from pallas_kernels import RaggedMeta, select

RESULT_SIZE = 3 + 2 * MAX_LOGPROBS
IS_FINITE, IS_POSSIBLE = 1, 2  # flags of a result
SCORE_TILE = 256  # most rows of logits at once: no more than a step draws from

# Of a platform or a kind of chip. XLA:GPU launches these kinds of work from CUDA graphs: what it
# does by default and loops, for each turn of which the host would otherwise wait. Some products of
# experts want 35 MiB of a TPU's fast memory at once (64 MiB, or more) and by default get 32.
_EXPERTS = {"xla_tpu_scoped_vmem_limit_kib": "40960"}
COMPILER_OPTIONS = {
    "gpu": {
        "xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,"
        "DYNAMIC_SLICE_FUSION,CONDITIONAL,WHILE"
    },
    "TPU v6 lite": _EXPERTS,
    "TPU7x": _EXPERTS,
}


def compiler_options(device: Any) -> dict[str, str]:
    """For programs of such a device, which need not be here."""
    kinds = device.platform, device.device_kind
    return {name: value for kind in kinds for name, value in COMPILER_OPTIONS.get(kind, {}).items()}


class DeviceState(NamedTuple):
    """What a step reads and replaces on the device."""

    caches: tuple[KVCache, ...]  # of each layer
    token_ids: Int[Array, "R+1 M"]  # every token known so far; the last line is scratch


class Launched(NamedTuple):
    """What a dispatched step leaves on the device; row i belongs to `Batch.sampled[i]`, of `pooled`
    to `Batch.sequences[i]`, of `scores` to the i-th position of `Batch.scored`.
    """

    hidden: Float[Array, "n_hidden D"]
    pooled: Float[Array, "S D"]  # float32 sums; zeros where nothing is pooled
    scores: Int[Array, "T {SCORE_SIZE}"]
    states: Float[Array, "T L D"] | None  # of Program.layers
    result: Int[Array, "S {RESULT_SIZE}"]


class StepResult(NamedTuple):
    """Numpy results of one step; row i belongs to `Batch.sampled[i]`."""

    token_ids: np.ndarray
    logprobs: np.ndarray
    is_finite: np.ndarray
    is_possible: np.ndarray
    top_ids: np.ndarray
    top_logprobs: np.ndarray

    @classmethod
    def unpack(cls, packed: np.ndarray) -> "StepResult":
        floats = packed.view(np.float32)
        flags, split = packed[:, 2], 3 + MAX_LOGPROBS
        is_finite, is_possible = flags & IS_FINITE != 0, flags & IS_POSSIBLE != 0
        tops = packed[:, 3:split], floats[:, split:]
        return cls(packed[:, 0], floats[:, 1], is_finite, is_possible, *tops)


def pack_result(sampled: Sampled) -> Int[Array, "S {RESULT_SIZE}"]:
    """The inverse of StepResult.unpack, on device."""
    flags = jnp.where(sampled.is_finite, IS_FINITE, 0)
    flags |= jnp.where(sampled.is_possible, IS_POSSIBLE, 0)
    columns = [sampled.token_ids, bits(sampled.logprobs), flags]
    tops = [sampled.top_ids, bits(sampled.top_logprobs)]
    return jnp.concatenate([jnp.stack(columns, axis=1), *tops], axis=1)


def pack_scores(scored: Scored) -> Int[Array, "T {SCORE_SIZE}"]:
    """The inverse of Scores.unpack, on device."""
    logprobs = jnp.where(scored.is_finite, scored.logprobs, jnp.nan)
    columns = [bits(logprobs)[:, None], scored.top_ids, bits(scored.top_logprobs)]
    return jnp.concatenate(columns, axis=1)


def bits(x: Float[Array, "..."]) -> Int[Array, "..."]:
    return lax.bitcast_convert_type(x, jnp.int32)


@dataclass(frozen=True)
class Program:
    """The static part of a step, the same in all shapes."""

    treedef: Any  # of the model, as a pytree
    attention_backend: str
    mesh: Mesh
    sample_tile: int  # rows of logits made at once
    row_tile: int | None = None  # tokens that the model sees at once; None: all of a step
    layers: tuple[int, ...] = ()  # whose hidden states every step leaves
    processors: tuple[Processor, ...] = ()

    def model(self, leaves: tuple[Array, ...]) -> Any:
        return jax.tree.unflatten(self.treedef, leaves)


def step(
    leaves: tuple[Array, ...],
    state: DeviceState,
    packed: Int[Array, "..."],
    row_tables: tuple[Array, Array, Array, Any],
    *,
    program: Program,
    shape: Shape,
) -> tuple[DeviceState, Launched]:
    """One ragged batch through the model, and one sampled token for each row that asks for it."""
    part = unpack(packed, shape)
    n_seqs, n_single, n_samples, n_scored, n_tops = part["counts"]
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
    attention = select(program.attention_backend, program.mesh.devices.flat[0])
    attention = shard_attention(attention, program.mesh)
    attention = jax.jit(partial(attention), static_argnames="spec")  # layers share one trace
    model = program.model(leaves)
    if program.row_tile is None:
        attending = partial(attend, attention, meta)
        hidden, caches = model.hidden_states(
            token_ids, positions, state.caches, attending, program.layers
        )
    else:
        tiled = partial(by_tiles, n_rows=program.row_tile, layers=program.layers)
        hidden, caches = tiled(model, attention, token_ids, state.caches, meta)
    states = None
    if program.layers:
        states, hidden = hidden[:, :-1], hidden[:, -1]
        states = lax.with_sharding_constraint(states, replicated(program.mesh))
    pooled = pool(hidden, part["cu_q_lens"], part["pooled_from"])
    pooled = lax.with_sharding_constraint(pooled, replicated(program.mesh))
    questions = Questions(part["scored_tokens"], part["scored_ids"], n_scored, n_tops)
    scores = score_rows(model.unembed, hidden, questions, program)
    sample_tokens = jnp.pad(part["sample_tokens"], (0, shape.n_hidden - shape.n_seqs))
    hidden = hidden[sample_tokens]
    hidden = lax.with_sharding_constraint(hidden, replicated(program.mesh))
    drawn = Drawn(
        RowParams.unpack(part["sample_params"]),
        part["sample_rows"],
        positions[part["sample_tokens"]] + 1,
    )
    tables = RowTables(known, *row_tables)
    hiddens = hidden[: shape.n_seqs]
    known, result = draw_rows(model.unembed, hiddens, drawn, tables, n_samples, program)
    return DeviceState(caches, known), Launched(hidden, pooled, scores, states, result)


def masked_step(
    leaves: tuple[Array, ...],
    known: Int[Array, "R+1 M"],
    hidden: Float[Array, "S D"],
    packed: Int[Array, "..."],
    row_tables: tuple[Array, Array, Array, Any],
    *,
    program: Program,
    shape: MaskedShape,
) -> tuple[Int[Array, "R+1 M"], Int[Array, "S {RESULT_SIZE}"]]:
    """What `step` would have sampled from these hidden states, had the masks been there."""
    part = unpack(packed, shape)
    params = RowParams.unpack(part["params"])
    drawn = Drawn(params, part["rows"], part["n_tokens"], part["masks"])
    tables, unembed = RowTables(known, *row_tables), program.model(leaves).unembed
    return draw_rows(unembed, hidden, drawn, tables, part["n_samples"][0], program)


def pool(
    hidden: Float[Array, "T D"], cu_q_lens: Int[Array, "S+1"], pooled_from: Int[Array, "S"]
) -> Float[Array, "S D"]:
    """Of each chunk the sum of the hidden states from a token on, in float32."""
    n_tokens, n_seqs, ends = len(hidden), len(pooled_from), cu_q_lens[1:]

    def add():
        tokens = jnp.arange(n_tokens, dtype=jnp.int32)
        owners = jnp.searchsorted(ends, tokens, side="right", method="compare_all")
        is_pooled = tokens >= jnp.take(pooled_from, owners, mode="fill", fill_value=n_tokens)
        owners = jnp.where(is_pooled, owners.astype(jnp.int32), n_seqs)  # those are dropped
        return jax.ops.segment_sum(hidden.astype(jnp.float32), owners, n_seqs)

    with jax.named_scope("pool"):
        nothing = jnp.zeros((n_seqs, hidden.shape[1]), jnp.float32)
        return lax.cond(jnp.any(pooled_from < ends), add, lambda: nothing)


def fill_first(
    rows: Int[Array, "S C"], n: Int[Array, ""], tile: int, make: Callable[..., Int[Array, "R C"]]
) -> Int[Array, "S C"]:
    """`rows` with the first n of them made, a tile at a time: `make(start)`. Without a loop, which
    costs a GPU more than a condition, where one tile holds them all.
    """
    if tile == len(rows):
        return lax.cond(n > 0, lambda: make(0), lambda: rows)

    def fill(i, rows):
        return lax.dynamic_update_slice_in_dim(rows, make(i * tile), i * tile, 0)

    return lax.fori_loop(0, (n + tile - 1) // tile, fill, rows)


class Questions(NamedTuple):
    """How likely was what followed these tokens?"""

    tokens: Int[Array, "T"]
    followers: Int[Array, "T"]
    n: Int[Array, ""]
    n_tops: Int[Array, ""]


def score_rows(
    unembed: Callable[[Array], Array],
    hidden: Float[Array, "T D"],
    asked: Questions,
    program: Program,
) -> Int[Array, "T {SCORE_SIZE}"]:
    """Answers the first questions, a tile of logits at a time: none, where nobody asks."""
    tile = min(program.sample_tile, SCORE_TILE, len(hidden))

    def score_tile(start):
        tokens = lax.dynamic_slice_in_dim(asked.tokens, start, tile)
        followers = lax.dynamic_slice_in_dim(asked.followers, start, tile)
        rows = lax.with_sharding_constraint(hidden[tokens], replicated(program.mesh))
        return pack_scores(score(unembed(rows), followers, asked.n_tops))

    with jax.named_scope("score"):
        result = jnp.zeros((len(hidden), SCORE_SIZE), jnp.int32)
        result = fill_first(result, asked.n, tile, score_tile)
    return lax.with_sharding_constraint(result, replicated(program.mesh))


class Drawn(NamedTuple):
    """The rows whose tokens are drawn."""

    params: RowParams
    rows: Int[Array, "S"]
    n_tokens: Int[Array, "S"]
    masks: Int[Array, "S W"] | None = None


def draw_rows(
    unembed: Callable[[Array], Array],
    hidden: Float[Array, "S D"],
    drawn: Drawn,
    tables: RowTables,
    n_samples: Int[Array, ""],
    program: Program,
) -> tuple[Int[Array, "R+1 M"], Int[Array, "S {RESULT_SIZE}"]]:
    """Samples the first rows, a tile of logits at a time, and notes their tokens as known."""
    tile = min(program.sample_tile, len(hidden))

    def draw_tile(start):
        def cut(x):
            return lax.dynamic_slice_in_dim(x, start, tile)

        rows = jax.tree.map(cut, drawn)
        places = rows.rows, rows.n_tokens, rows.masks
        sampled = sample(unembed(cut(hidden)), rows.params, tables, *places, program.processors)
        return pack_result(sampled)

    with jax.named_scope("sample"):
        result = jnp.zeros((len(hidden), RESULT_SIZE), jnp.int32)
        result = fill_first(result, n_samples, tile, draw_tile)
    known = tables.token_ids.at[drawn.rows, drawn.n_tokens].set(result[:, 0], mode="drop")
    return known, result
