"""pack() against a plain loop, and what the host tables say of each row."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgen_jax.engine.batch import (
    FLOAT_PARAMS,
    INT_PARAMS,
    UNKNOWN,
    HostTables,
    Shape,
    pack,
    packed_size,
    unpack,
)
from fastgen_jax.engine.pooling import Pooled
from fastgen_jax.engine.scoring import Scoring
from fastgen_jax.engine.types import Chunk
from fastgen_jax.sampling_params import POOLINGS, SamplingParams
from tests.engine.sequences import make_sequence

N_ROWS, MAX_TOKENS, BLOCK_SIZE = 6, 24, 4
WIDTH = MAX_TOKENS // BLOCK_SIZE
SHAPE = Shape(n_tokens=40, n_seqs=8, n_blocks=WIDTH)


def enter(tables, n_tokens, n_cached=0, **fields):
    """A sequence with a row, and the blocks of what it has cached."""
    n_output = fields.pop("n_output", 0)
    s = make_sequence(n_tokens, prompt_ids=np.arange(n_tokens - n_output) * 7 % 50, **fields)
    s.output_ids = list(range(100, 100 + n_output))
    tables.enter(s)
    s.n_cached = n_cached
    return s


def extend(tables, s, n_new, blocks):
    """Takes the blocks of the next n_new tokens from `blocks`; returns the chunk."""
    n_blocks = -(-(s.n_cached + n_new) // BLOCK_SIZE) - len(s.block_ids)
    tables.extend(s, [next(blocks) for _ in range(n_blocks)])
    return Chunk(s, n_new, n_blocks)


@st.composite
def plans(draw):
    """Tables, and chunks of random sequences of which those of one token come first."""
    tables = HostTables(N_ROWS, MAX_TOKENS, WIDTH)
    blocks = iter(draw(st.permutations(range(1, N_ROWS * WIDTH + 1))))
    chunks = []
    for _ in range(draw(st.integers(1, N_ROWS))):
        n_tokens = draw(st.integers(1, MAX_TOKENS))
        n_cached = draw(st.integers(max(0, n_tokens - 6), n_tokens - 1))
        n_output = draw(st.integers(0, n_tokens - 1))
        temperature = draw(st.sampled_from([0.0, 0.5]))
        params = SamplingParams(temperature=temperature, seed=3, top_k=n_cached)
        s = enter(tables, n_tokens, n_cached, n_output=n_output, params=params, seed=n_tokens)
        pooling = draw(st.sampled_from([None, *POOLINGS]))
        s.pooled = Pooled(pooling) if pooling else None
        n_top, first = draw(st.integers(-1, 3)), draw(st.integers(1, s.n_prompt))
        s.scoring = Scoring(first, s.n_prompt, n_top) if n_top >= 0 else None
        chunks.append(extend(tables, s, draw(st.integers(1, n_tokens - n_cached)), blocks))
    return tables, sorted(chunks, key=lambda chunk: chunk.n_new > 1)


def plain_pack(chunks, tables):
    """The parts of a batch, token by token."""
    part = {name: np.zeros(shape, np.int32) for name, shape in SHAPE.fields.items()}
    part["token_rows"][:] = part["sample_rows"][:] = tables.n_rows
    t = m = n_scored = n_tops = 0
    for i, (s, n_new, _) in enumerate(chunks):
        known = [*s.prompt_ids, *s.output_ids]
        for position in range(s.n_cached, s.n_cached + n_new):
            part["token_ids"][t] = known[position]
            part["positions"][t] = position
            part["token_rows"][t] = s.row
            block = s.block_ids[position // BLOCK_SIZE]
            part["slots"][t] = block * BLOCK_SIZE + position % BLOCK_SIZE
            if s.scoring is not None and s.scoring.next <= position + 1 < s.n_prompt:
                part["scored_tokens"][n_scored] = t
                part["scored_ids"][n_scored] = known[position + 1]
                n_scored, n_tops = n_scored + 1, max(n_tops, s.scoring.n_top)
            t += 1
        part["block_tables"][i, : len(s.block_ids)] = s.block_ids
        part["seq_lens"][i] = s.n_cached + n_new
        part["cu_q_lens"][i + 1 :] = part["pooled_from"][i:] = t
        if s.pooled is not None:
            part["pooled_from"][i] -= n_new if s.pooled.needs_all else 1
        if s.n_cached + n_new == s.n_tokens:
            part["sample_tokens"][m] = t - 1
            part["sample_rows"][m] = s.row
            part["sample_params"][m] = tables.params[s.row]
            m += 1
    n_single = sum(chunk.n_new == 1 for chunk in chunks)
    part["counts"][:] = len(chunks), n_single, m, n_scored, n_tops
    return part


@settings(max_examples=200)
@given(plans())
def test_pack_equals_a_plain_loop(plan):
    tables, chunks = plan
    batch = pack(chunks, tables, SHAPE, BLOCK_SIZE)
    part, expected = unpack(batch.packed, SHAPE), plain_pack(chunks, tables)
    m = expected["counts"][2]
    for name in SHAPE.fields:
        n = m if name == "sample_params" else None
        np.testing.assert_array_equal(part[name][:n], expected[name][:n], err_msg=name)
    assert sum(len(positions) for _, positions in batch.scored) == expected["counts"][3]
    assert batch.sampled == [s for s, n_new, _ in chunks if s.n_cached + n_new == s.n_tokens]


def test_padding_points_into_scratch():
    tables = HostTables(N_ROWS, MAX_TOKENS, WIDTH)
    chunk = extend(tables, enter(tables, 5), 5, iter([3, 9]))
    part = unpack(pack([chunk], tables, SHAPE, BLOCK_SIZE).packed, SHAPE)
    assert not part["slots"][5:].any()
    assert not part["block_tables"][1:].any()
    assert (part["token_rows"][5:] == N_ROWS).all()
    assert (part["sample_rows"][1:] == N_ROWS).all()
    assert (part["cu_q_lens"][1:] == 5).all()


def test_padding_rows_ask_for_no_work():
    tables = HostTables(N_ROWS, MAX_TOKENS, WIDTH)
    params = SamplingParams(temperature=0.7)
    chunk = extend(tables, enter(tables, 4, params=params), 4, iter([1]))
    part = unpack(pack([chunk], tables, SHAPE, BLOCK_SIZE).packed, SHAPE)
    asked = {name: set(column) for name, column in columns(part["sample_params"][1:]).items()}
    assert asked["repetition_penalty"] == {1.0}
    assert asked["top_p"] == {1.0}
    assert asked["temperature"] == asked["min_p"] == asked["presence_penalty"] == {0.0}
    assert asked["frequency_penalty"] == {0.0}
    assert asked["top_k"] == asked["n_logprobs"] == asked["has_bias"] == {0}


def columns(lines):
    """Sampling parameters by name, floats as floats."""
    n = len(FLOAT_PARAMS)
    floats = np.ascontiguousarray(lines[:, :n]).view(np.float32)
    return dict(zip(FLOAT_PARAMS + INT_PARAMS, [*floats.T, *lines[:, n:].T], strict=True))


def test_parameters_reach_their_columns():
    tables = HostTables(N_ROWS, MAX_TOKENS, WIDTH)
    params = SamplingParams(
        temperature=0.5, top_p=0.25, min_p=0.125, repetition_penalty=1.5, presence_penalty=-1.0,
        frequency_penalty=2.0, top_k=-1, logprobs=5, min_tokens=3, logit_bias={4: -2.5},
    )  # fmt: skip
    s = enter(tables, 7, n_output=2, params=params, seed=2**32 - 1)
    line = {name: column[0] for name, column in columns(tables.params[s.row][None]).items()}
    for name in FLOAT_PARAMS:
        assert line[name] == getattr(params, name)
    assert (line["top_k"], line["seed"], line["n_logprobs"]) == (0, -1, 5)
    assert (line["n_prompt"], line["min_total"], line["has_bias"]) == (5, 8, 1)
    assert tables.bias_ids[s.row, :2].tolist() == [4, UNKNOWN]
    assert tables.bias[s.row, 0] == -2.5


def test_tables_are_dirty_only_when_a_row_brings_bias_or_bans():
    tables = HostTables(N_ROWS, MAX_TOKENS, WIDTH)
    tables.is_dirty = False
    enter(tables, 3, params=SamplingParams(temperature=0.3, top_p=0.5))
    assert not tables.is_dirty
    enter(tables, 3, params=SamplingParams(min_tokens=2), ending_ids=frozenset([9, 8]))
    assert tables.is_dirty
    assert set(tables.banned_ids[1].tolist()) == {9, 8, UNKNOWN}


def test_row_that_is_used_again_keeps_nothing_of_the_sequence_before():
    tables = HostTables(1, MAX_TOKENS, WIDTH)
    bias = SamplingParams(logit_bias={1: 1.0, 2: 2.0}, min_tokens=5)
    first = enter(tables, 20, params=bias, ending_ids=frozenset([4, 5, 6]))
    tables.extend(first, [1, 2, 3, 4, 5])
    tables.leave(first)
    assert first.row == -1
    params = SamplingParams(logit_bias={3: 1.0}, min_tokens=1)
    enter(tables, 2, params=params, ending_ids=frozenset([7]))
    assert (tables.token_ids[0, 2:] == UNKNOWN).all()
    assert not tables.block_tables.any()
    assert set(tables.bias_ids[0].tolist()) == {3, UNKNOWN}
    assert set(tables.banned_ids[0].tolist()) == {7, UNKNOWN}


def test_rows_are_handed_out_once_each():
    tables = HostTables(3, MAX_TOKENS, WIDTH)
    assert {enter(tables, 2).row for _ in range(3)} == {0, 1, 2}
    with pytest.raises(IndexError):
        enter(tables, 2)


def test_unpack_covers_the_packed_array_without_gaps():
    packed = np.arange(packed_size(SHAPE), dtype=np.int32)
    parts = unpack(packed, SHAPE)
    assert np.concatenate([p.ravel() for p in parts.values()]).tolist() == packed.tolist()
    assert {name: p.shape for name, p in parts.items()} == SHAPE.fields
    parts["counts"][:] = -5
    assert packed[-3:].tolist() == [-5, -5, -5]
