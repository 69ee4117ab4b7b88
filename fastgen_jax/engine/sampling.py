"""sample(): logits to tokens, batched, on device, inside the step; every parameter is an array, one
value per row.

Order: the caller's processors; penalties, bias and bans; the mask, if there is one; temperature;
top_k; top_p and min_p of what top_k left; the draw.
Work that no row asks for is skipped at run time (lax.cond), so mixing parameters costs no
recompilation. Nothing here sorts the vocabulary: thresholds are found by bisection over the bits of
float32, which is exact.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from fastgen_jax.engine.batch import FLOAT_PARAMS, INT_PARAMS
from fastgen_jax.engine.noise import gumbel
from fastgen_jax.engine.processors import Known, Processor, process
from fastgen_jax.engine.scoring import NO_TOKEN
from fastgen_jax.sampling_params import MAX_LOGPROBS

TINY = 1e-30


class RowParams(NamedTuple):
    """Sampling parameters of the sampled rows, each "S"; fields are FLOAT_PARAMS then INT_PARAMS of
    batch.py.
    """

    temperature: Float[Array, "S"]
    top_p: Float[Array, "S"]
    min_p: Float[Array, "S"]
    repetition_penalty: Float[Array, "S"]
    presence_penalty: Float[Array, "S"]
    frequency_penalty: Float[Array, "S"]
    top_k: Int[Array, "S"]
    seed: Int[Array, "S"]
    n_logprobs: Int[Array, "S"]
    n_prompt: Int[Array, "S"]
    min_total: Int[Array, "S"]  # prompt and output length below which nothing may end the sample
    has_bias: Int[Array, "S"]
    processors: Int[Array, "S"]  # bits of those that it asks for

    @classmethod
    def unpack(cls, packed: Int[Array, "S F"]) -> "RowParams":
        n_floats = len(FLOAT_PARAMS)
        floats = lax.bitcast_convert_type(packed[:, :n_floats], jnp.float32)
        names = dict(zip(FLOAT_PARAMS, floats.T, strict=True))
        names |= dict(zip(INT_PARAMS, packed[:, n_floats:].T, strict=True))
        return cls(**names)


class RowTables(NamedTuple):
    """What rows have said so far, their biased and banned token ids (-1: none), and the arguments
    of their logits processors; indexed by row.

    token_ids has one line more than there are rows: scratch, for padding.
    """

    token_ids: Int[Array, "R+1 M"]
    bias_ids: Int[Array, "R A"]
    bias: Float[Array, "R A"]
    banned_ids: Int[Array, "R Z"]
    arguments: Any = ()  # by processor and name, "R ..." each


class Scored(NamedTuple):
    """What raw logits say of one token each."""

    logprobs: Float[Array, "S"]
    top_ids: Int[Array, "S {MAX_LOGPROBS}"]  # NO_TOKEN beyond the vocabulary
    top_logprobs: Float[Array, "S {MAX_LOGPROBS}"]
    is_finite: Bool[Array, "S"]  # the logits


class Sampled(NamedTuple):
    token_ids: Int[Array, "S"]
    logprobs: Float[Array, "S"]  # these as of Scored
    top_ids: Int[Array, "S {MAX_LOGPROBS}"]
    top_logprobs: Float[Array, "S {MAX_LOGPROBS}"]
    is_finite: Bool[Array, "S"]
    is_possible: Bool[Array, "S"]  # some token was allowed


def sample(
    logits: Float[Array, "S V"],
    params: RowParams,
    tables: RowTables,
    rows: Int[Array, "S"],
    n_tokens: Int[Array, "S"],
    masks: Int[Array, "S W"] | None = None,
    processors: tuple[Processor, ...] = (),
) -> Sampled:
    """Draws the token after the first `n_tokens` of each row, of those that its mask allows.

    The draw depends on (logits, parameters, seed, position) of the row alone, never on the others.
    """
    wants_change = (
        (params.repetition_penalty != 1.0)
        | (params.presence_penalty != 0.0)
        | (params.frequency_penalty != 0.0)
        | (params.has_bias != 0)
        | (n_tokens < params.min_total)
    )
    processed = logits
    if processors:
        known = known_of(params, tables, rows, n_tokens)
        asked = params.processors
        processed = process(processors, logits, asked, known, tables.arguments, rows)
    is_random = params.temperature > 0.0

    def allowed(adjusted):
        """What the mask leaves of it, whether that is anything, and its best token."""
        is_possible = jnp.ones(len(logits), bool)
        if processors:
            is_possible = jnp.isfinite(jnp.max(adjusted, axis=-1))
        if masks is not None:
            masked = jnp.where(is_allowed(masks, logits.shape[1]), adjusted, -jnp.inf)
            adjusted = lax.optimization_barrier(masked)  # else all that read it unpack the bits
            is_possible &= jnp.max(adjusted, axis=-1) > -jnp.inf
        return adjusted, is_possible, first_best(adjusted)

    as_it_is = allowed(processed)

    def choose():
        changed, is_possible, greedy = lax.cond(
            jnp.any(wants_change),
            lambda: allowed(adjust(processed, params, tables, rows, n_tokens)),
            lambda: as_it_is,
        )
        drawn = lax.cond(
            jnp.any(is_random), lambda: draw(changed, params, n_tokens), lambda: greedy
        )
        return is_possible, jnp.where(is_random, drawn, greedy)

    # Conditions copy what they leave: where nobody asks for any of this, no logits.
    is_possible, token_ids = lax.cond(
        jnp.any(wants_change | is_random), choose, lambda: as_it_is[1:]
    )
    return Sampled(token_ids, *score(logits, token_ids, params.n_logprobs), is_possible)


def known_of(
    params: RowParams, tables: RowTables, rows: Int[Array, "S"], n_tokens: Int[Array, "S"]
) -> Known:
    """What each row's processors may know."""
    said = tables.token_ids[rows]  # S M
    is_said = jnp.arange(said.shape[1])[None] < n_tokens[:, None]
    return Known(jnp.where(is_said, said, -1), params.n_prompt, n_tokens)


def score(
    logits: Float[Array, "S V"], token_ids: Int[Array, "S"], n_top: Int[Array, "..."]
) -> Scored:
    """n_top: how many of the likeliest tokens are asked for, of each row or of all."""
    best = row_max(logits)
    normaliser = best + jnp.log(jnp.sum(jnp.exp(logits - best), axis=-1, keepdims=True))
    chosen = jnp.take_along_axis(logits, token_ids[:, None], axis=1) - normaliser
    top_logits, top_ids = lax.cond(
        jnp.any(n_top > 0), lambda: _top(logits), lambda: _no_top(logits)
    )
    is_finite = jnp.isfinite(normaliser[:, 0])
    return Scored(chosen[:, 0], top_ids, top_logits - normaliser, is_finite)


def is_allowed(masks: Int[Array, "S W"], vocab_size: int) -> Bool[Array, "S V"]:
    """The masks' bits: token t is bit t % 32 of element t // 32."""
    places = jnp.arange(32, dtype=jnp.int32)
    bits = (masks[:, :, None] >> places[None, None]) & 1
    return bits.reshape(len(masks), -1)[:, :vocab_size] != 0


def row_max(logits: Float[Array, "S V"]) -> Float[Array, "S 1"]:
    """Part of what `first_best` does; of the same logits, XLA makes it once."""

    def of_runs(logits):
        return jnp.max(jnp.max(runs_of(logits), axis=2), axis=1, keepdims=True)

    def plain(logits):
        return jnp.max(logits, axis=1, keepdims=True)

    return lax.platform_dependent(logits, cpu=of_runs, default=plain)


def first_best(logits: Float[Array, "S V"]) -> Int[Array, "S"]:
    """argmax of each row, as reductions of one value. A row with NaN gives some id of the
    vocabulary.

    XLA:CPU runs its own argmax on one core, and would read the logits twice here and write them
    once: instead it finds the best run, and the place in it, 3 to 15 times as fast.
    """
    best = row_max(logits)

    def of_runs(logits, best):
        runs = runs_of(logits)
        run = _first_equal(jnp.max(runs, axis=2), best)
        place = _first_equal(jnp.take_along_axis(runs, run[:, None, None], axis=1)[:, 0], best)
        return jnp.minimum(run * runs.shape[2] + place, logits.shape[1] - 1)

    return lax.platform_dependent(logits, best, cpu=of_runs, default=_first_equal)


def _first_equal(x: Float[Array, "S V"], value: Float[Array, "S 1"]) -> Int[Array, "S"]:
    """The last place, if none is equal."""
    places = lax.broadcasted_iota(jnp.int32, x.shape, 1)
    return jnp.min(jnp.where(x == value, places, x.shape[1] - 1), axis=1)


def runs_of(logits: Float[Array, "S V"], width: int = 64) -> Float[Array, "S R {width}"]:
    """Neighbours, and -inf behind the last one."""
    short = -logits.shape[1] % width
    padded = jnp.pad(logits, ((0, 0), (0, short)), constant_values=-jnp.inf)
    return padded.reshape(len(logits), -1, width)


def _top(logits):
    k = min(MAX_LOGPROBS, logits.shape[1])
    values, ids = likeliest(logits, k)
    pad = ((0, 0), (0, MAX_LOGPROBS - k))
    values = jnp.pad(values, pad, constant_values=-jnp.inf)
    return values, jnp.pad(ids, pad, constant_values=NO_TOKEN)


def likeliest(logits: Float[Array, "S V"], k: int) -> tuple[Float[Array, "S k"], Int[Array, "S k"]]:
    """lax.top_k, which would sort the vocabulary on a GPU: here of the k runs of neighbours that
    have the largest logits. An element of another run has k before it, one in each of these.
    """
    n_rows, width = len(logits), 32
    runs = runs_of(logits, width)
    if runs.shape[1] <= k:
        values, ids = lax.top_k(logits, k)
        return values, ids.astype(jnp.int32)
    _, best = lax.top_k(jnp.max(runs, axis=2), k)
    best = jnp.sort(best.astype(jnp.int32), axis=1)  # equal logits stay in the order of their ids
    chosen = jnp.take_along_axis(runs, best[:, :, None], axis=1).reshape(n_rows, -1)
    values, places = lax.top_k(chosen, k)
    ids = jnp.take_along_axis(best, places // width, axis=1) * width + places % width
    return values, ids.astype(jnp.int32)


def _no_top(logits):
    shape = (len(logits), MAX_LOGPROBS)
    return jnp.zeros(shape, jnp.float32), jnp.zeros(shape, jnp.int32)


def adjust(
    logits: Float[Array, "S V"],
    params: RowParams,
    tables: RowTables,
    rows: Int[Array, "S"],
    n_tokens: Int[Array, "S"],
) -> Float[Array, "S V"]:
    """adjust_row of each: on a TPU one after the other, as it would sort the tokens of all for the
    scatters, and take longer to compile these sorts than the rest of a step.
    """

    def adjust_one(row):
        return adjust_row(tables, *row)

    return lax.platform_dependent(
        (logits, params, rows, n_tokens),
        tpu=partial(lax.map, adjust_one),
        default=jax.vmap(adjust_one),
    )


def adjust_row(
    tables: RowTables,
    logits: Float[Array, "V"],
    params: RowParams,
    row: Int[Array, ""],
    n_tokens: Int[Array, ""],
) -> Float[Array, "V"]:
    """Penalties as OpenAI (presence, frequency: of output) and CTRL (repetition: of prompt and
    output) define them.

    Then logit_bias is added, and tokens that would end the sample too early are banned.
    """
    vocab_size = len(logits)
    said = tables.token_ids[row]  # M
    columns = jnp.arange(len(said))
    is_known = columns < n_tokens
    is_output = is_known & (columns >= params.n_prompt)

    def count(mask):
        ids = jnp.where(mask, said, vocab_size)
        return jnp.zeros(vocab_size, jnp.int32).at[ids].add(1, mode="drop")

    n_output = count(is_output)
    penalty = jnp.where(count(is_known) > 0, params.repetition_penalty, 1.0)
    logits = jnp.where(logits > 0, logits / penalty, logits * penalty)
    logits -= params.frequency_penalty * n_output.astype(jnp.float32)
    logits -= params.presence_penalty * (n_output > 0).astype(jnp.float32)

    bias_ids = jnp.take(tables.bias_ids, row, axis=0, mode="clip")
    has_bias = (params.has_bias != 0) & (bias_ids >= 0)
    bias_ids = jnp.where(has_bias, bias_ids, vocab_size)
    bias = jnp.take(tables.bias, row, axis=0, mode="clip")
    logits = logits.at[bias_ids].add(bias, mode="drop")

    banned_ids = jnp.take(tables.banned_ids, row, axis=0, mode="clip")
    is_banned = (n_tokens < params.min_total) & (banned_ids >= 0)
    banned_ids = jnp.where(is_banned, banned_ids, vocab_size)
    return logits.at[banned_ids].set(-jnp.inf, mode="drop")


def draw(
    logits: Float[Array, "S V"], params: RowParams, n_tokens: Int[Array, "S"]
) -> Int[Array, "S"]:
    """One draw per row, its key fold_in(key(seed), position): never the row, step or batch."""
    temperature = jnp.where(params.temperature > 0.0, params.temperature, 1.0)
    best = jnp.max(logits, axis=-1, keepdims=True)  # scaled to 0: no overflow near temperature 0
    scaled = (logits - best) / temperature[:, None]
    wants_filter = (params.top_k > 0) | (params.top_p < 1.0) | (params.min_p > 0.0)
    scaled = lax.cond(jnp.any(wants_filter), lambda: keep_likely(scaled, params), lambda: scaled)

    return first_best(scaled + gumbel(params.seed, n_tokens, logits.shape[1]))


def keep_likely(logits: Float[Array, "S V"], params: RowParams) -> Float[Array, "S V"]:
    """-inf for the tokens that top_k, top_p or min_p exclude; tokens equal to the last one kept
    stay.
    """
    order = _sortable(logits)
    vocab_size = logits.shape[1]
    k = jnp.where(params.top_k > 0, jnp.minimum(params.top_k, vocab_size), vocab_size)
    kth = _largest(params.top_k > 0, lambda t: jnp.sum(order >= t, axis=-1) >= k)
    logits = jnp.where(order >= kth[:, None], logits, -jnp.inf)

    probabilities = jax.nn.softmax(logits, axis=-1)
    top_p = jnp.maximum(params.top_p, TINY)  # what float32 rounds to 0 still keeps the best
    nucleus = _largest(
        params.top_p < 1.0,
        lambda t: jnp.sum(jnp.where(order >= t, probabilities, 0.0), axis=-1) >= top_p,
    )
    peak = jnp.max(probabilities, axis=-1, keepdims=True)
    is_kept = (probabilities >= params.min_p[:, None] * peak) & (
        (order >= nucleus[:, None]) | (params.top_p >= 1.0)[:, None]
    )
    return jnp.where(is_kept, logits, -jnp.inf)


def _sortable(x: Float[Array, "S V"]) -> Int[Array, "S V"]:
    """int32 keys in the order of float32 values, one key for both zeros."""
    bits = lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x), jnp.int32)
    return jnp.where(bits >= 0, bits, bits ^ jnp.int32(0x7FFFFFFF))


def _largest(is_asked: Bool[Array, "S"], holds) -> Int[Array, "S"]:
    """The largest int32 t per row for which `holds(t "S 1")`; holds is monotone and true at the
    smallest int32, which it is where nobody asks.
    """

    def halve(_, bounds):
        low, high = bounds  # holds(low), not holds(high + 1)
        middle = (low >> 1) + (high >> 1) + ((low | high) & 1)  # rounded up, without overflow
        is_true = holds(middle[:, None])
        return jnp.where(is_true, middle, low), jnp.where(is_true, high, middle - 1)

    low = jnp.full(len(is_asked), jnp.iinfo(jnp.int32).min, jnp.int32)
    high = jnp.full(len(is_asked), jnp.iinfo(jnp.int32).max, jnp.int32)
    return lax.cond(
        jnp.any(is_asked), lambda: lax.fori_loop(0, 32, halve, (low, high))[0], lambda: low
    )
