"""Sequences as the engine makes them, for tests of the scheduler and of packing."""

import itertools

import numpy as np

from fastgen_jax.engine.types import Sequence
from fastgen_jax.sampling_params import SamplingParams

_ids = itertools.count()


def make_sequence(n_tokens: int, n_cached: int = 0, *, row: int = -1, **fields) -> Sequence:
    """A live sequence that knows `n_tokens` tokens; all but the prompt's are output unless told."""
    prompt = fields.pop("prompt_ids", np.arange(n_tokens, dtype=np.int32))
    return Sequence(
        id=fields.pop("id", next(_ids)),
        request_id=0,
        index=0,
        prompt_ids=prompt,
        params=fields.pop("params", SamplingParams()),
        seed=fields.pop("seed", 0),
        max_tokens=fields.pop("max_tokens", 10**6),
        ending_ids=fields.pop("ending_ids", frozenset()),
        n_tokens=n_tokens,
        n_cached=n_cached,
        row=row,
        **fields,
    )
