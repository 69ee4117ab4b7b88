"""The trainer's forward beside a deterministic engine: the same bits."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastgen_jax import models
from fastgen_jax.engine.config import EngineConfig
from fastgen_jax.engine.types import Request
from fastgen_jax.models.row_tiles import logprobs_by_tiles
from fastgen_jax.sampling_params import SamplingParams
from tests.tiny import one_program, run

GOLDEN = Path(__file__).parents[1] / "golden"
LENGTHS = {"max_model_len": 160, "block_size": 8, "num_kv_blocks": 60}
BUDGET = 37  # cuts the prompts


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["gqa"])
def test_logprobs_of_the_trainer_are_the_engines_to_the_bit(name, dtype):
    config = EngineConfig(
        model=str(GOLDEN / name),
        dtype=dtype,
        deterministic=True,
        max_num_batched_tokens=BUDGET,
        **LENGTHS,
    )
    rng, engine = np.random.default_rng(0), one_program(config)
    prompts = [rng.integers(0, 60, n).tolist() for n in (100, 80, 90)]
    params = SamplingParams(max_tokens=40, temperature=1.0, seed=0, logprobs=0, ignore_eos=True)
    model = models.load(GOLDEN / name, dtype=dtype)
    sampled = run(engine, [Request(prompt, params) for prompt in prompts])
    for prompt, outputs in zip(prompts, sampled, strict=True):
        tokens = [*prompt, *(o.token_id for o in outputs)]
        tokens = jnp.array([tokens + [0] * (140 - len(tokens))], jnp.int32)
        got = np.asarray(jax.jit(logprobs_by_tiles)(model, tokens))[0][len(prompt) - 1 :][
            : len(outputs)
        ]
        assert got.tolist() == [o.logprobs.logprob for o in outputs if o.logprobs]


def test_gradients_are_those_of_the_dense_forward():
    model = models.load(GOLDEN / "gqa", dtype="float32")
    tokens = jnp.arange(2 * 45, dtype=jnp.int32).reshape(2, 45) % 60

    def plain(model, tokens):
        logprobs = jax.nn.log_softmax(model(tokens)[:, :-1], axis=2)
        return jnp.take_along_axis(logprobs, tokens[:, 1:, None], axis=2)[:, :, 0]

    def loss(model, forward):
        return jnp.square(forward(model, tokens)).mean()

    grad = jax.jit(jax.grad(loss), static_argnums=1)
    ours, dense = (grad(model, forward) for forward in (logprobs_by_tiles, plain))
    for a, b in zip(*map(jax.tree.leaves, (ours, dense)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
