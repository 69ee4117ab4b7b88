"""`model(tokens, segment_ids, positions)`, the forward of trainers, against Hugging Face."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastgen_jax.checkpoints.directory import read_config
from fastgen_jax.checkpoints.loading import load_model
from fastgen_jax.engine.startup import fit_rope
from fastgen_jax.models.layers import Policy
from fastgen_jax.models.sharding import make_mesh
from tests.models.test_golden import GOLDEN, OF_TEXT, OPTIONS, TOLERANCE


@functools.cache
def model_of(name: str):
    config = fit_rope(read_config(GOLDEN / name), OPTIONS["max_model_len"])
    return load_model(GOLDEN / name, config, Policy(), make_mesh(1))


def known_of(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of a golden and Hugging Face's logits after each."""
    with np.load(GOLDEN / name / "golden.npz", allow_pickle=False) as golden:
        known = np.concatenate([golden["prompt_ids"], golden["greedy_ids"][:-1]])
        return known.astype(np.int32), golden["logits"]


forward = jax.jit(lambda model, *rows: model(*rows))


@pytest.mark.parametrize("name", OF_TEXT)
def test_packed_and_padded_rows_give_the_logits_of_hugging_face(name):
    """A row with the text twice, the second time without its first tokens' company, and padding."""
    known, expected = known_of(name)
    n = len(known)
    tokens = np.zeros((2, 2 * n), np.int32)
    segments = np.zeros_like(tokens)
    tokens[0], segments[0] = np.tile(known, 2), np.repeat([1, 2], n)
    tokens[1, 5 : n + 5], segments[1, 5 : n + 5] = known, 7
    logits = forward(model_of(name), tokens, segments)
    assert logits.dtype == jnp.float32
    for found in (logits[0, :n], logits[0, n:], logits[1, 5 : n + 5]):
        assert np.abs(found - expected).max() <= TOLERANCE
