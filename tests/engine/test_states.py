"""Hidden states of chosen layers are those of the dense model, and of Hugging Face's."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastgen_jax import LLM
from fastgen_jax.engine.config import EngineConfig
from fastgen_jax.engine.types import Request
from fastgen_jax.errors import ConfigError, InvalidRequest
from fastgen_jax.sampling_params import SamplingParams
from tests.tiny import assert_idle, dense_attend, make_engine, one_program, random_requests, run

LAYERS = (0, 1, -1)
GOLDEN = np.load("tests/golden/hidden_states.npz")


@pytest.fixture(scope="module")
def llm(folder):
    return LLM.from_engine(make_engine(folder, one_program, return_hidden_states=LAYERS))


@pytest.fixture(scope="module")
def dense(llm):
    """The same for each token of a prompt, densely, alone: f32[L, T, D]."""
    runner, n_layers = llm.engine._runner, llm.engine.model_config.n_layers
    positions, caches = jnp.arange(96, dtype=jnp.int32), (None,) * n_layers

    @jax.jit
    def hidden(leaves, ids):
        model = runner.program.model(leaves)
        return model.hidden_states(ids, positions, caches, dense_attend, (0, 1, 2))[0]

    def states(prompt: list[int]) -> np.ndarray:
        ids = np.zeros(96, np.int32)
        ids[: len(prompt)] = prompt
        return np.asarray(hidden(runner.leaves, ids))[: len(prompt), :-1].swapaxes(0, 1)

    return states


def prompts(draw: int, count: int) -> list[list[int]]:
    return [request.prompt_token_ids for request in random_requests(draw, count)]


def test_states_are_those_of_the_dense_model_in_the_order_of_the_positions(llm, dense):
    given = prompts(0, 5)
    some = [[-1, 0, len(prompt) // 2, 0] for prompt in given]
    for prompt, all_, chosen, own in zip(
        given,
        llm.hidden_states(given, use_tqdm=False),
        llm.hidden_states(given, some, use_tqdm=False),
        some,
        strict=True,
    ):
        assert all_.shape == (3, len(prompt), 32) and all_.dtype == np.float32
        np.testing.assert_allclose(all_, dense(prompt), atol=1e-4)
        np.testing.assert_allclose(chosen, all_[:, own], atol=1e-4)
    assert_idle(llm.engine)


def test_the_first_state_is_the_embedding_and_the_last_is_what_is_pooled(llm):
    (prompt,) = prompts(1, 1)
    (states,) = llm.hidden_states([prompt], [-1], use_tqdm=False)
    weight = llm.engine._runner.program.model(llm.engine._runner.leaves).embed.weight[...]
    np.testing.assert_allclose(states[0, 0], weight[prompt[-1]], atol=1e-6)
    (pooled,) = llm.embed([prompt], normalize=False, use_tqdm=False)
    np.testing.assert_allclose(states[2, 0], pooled.outputs.embedding, atol=1e-4)


def test_states_of_prompts_that_gave_way_are_the_same(folder, dense):
    small = {"num_kv_blocks": 13, "max_num_batched_tokens": 16}
    engine = make_engine(folder, one_program, **small, return_hidden_states=LAYERS)
    for request in random_requests(3, 4):
        engine.submit(request)
    given = prompts(2, 6)
    found = LLM.from_engine(engine).hidden_states(given, use_tqdm=False)
    assert engine.stats().n_preemptions > 0
    for prompt, states in zip(given, found, strict=True):
        np.testing.assert_allclose(states, dense(prompt), atol=1e-4)


def test_cached_prefix_is_used_up_to_the_first_position(llm):
    prompt = [i * 7 % 62 for i in range(60)]
    (states,) = llm.hidden_states([prompt], use_tqdm=False)
    for first, n_reused in [(0, 0), (7, 0), (8, 8), (41, 40), (59, 56)]:
        n_before = llm.engine.stats().n_prefix_hits
        (tail,) = llm.hidden_states([prompt], range(59, first - 1, -1), use_tqdm=False)
        np.testing.assert_allclose(tail[:, ::-1], states[:, first:], atol=1e-4)
        assert llm.engine.stats().n_prefix_hits - n_before == n_reused


def test_tokens_are_the_same_where_states_could_be_asked_for(llm, folder):
    requests = random_requests(4, 4)
    plain = run(make_engine(folder, one_program), requests)
    others = run(llm.engine, requests)
    assert [[o.token_id for o in outs] for outs in plain] == [
        [o.token_id for o in outs] for outs in others
    ]


def test_an_engine_without_layers_leaves_no_states(folder):
    engine = make_engine(folder, one_program)
    (shape,) = engine._runner.shapes
    assert engine._runner.recipe.lower(shape).out_info[1].states is None
    with pytest.raises(InvalidRequest, match="give it return_hidden_states, such as"):
        LLM.from_engine(engine).hidden_states([[1, 2]], use_tqdm=False)


def test_two_devices_leave_the_same_states():
    options = EngineConfig(
        model="tests/golden/gqa", max_model_len=96, num_kv_blocks=64, return_hidden_states=(1, -1)
    )
    sharded = dataclasses.replace(options, tensor_parallel_size=2)
    found = [
        LLM.from_engine(one_program(each)).hidden_states(prompts(5, 3), use_tqdm=False)
        for each in (options, sharded)
    ]
    for one, two in zip(*found, strict=True):
        np.testing.assert_allclose(one, two, atol=1e-4)


@pytest.mark.parametrize("positions", [[], [[]], [3], [-4], [[0], [1]], "ab", [0.5], 7])
def test_positions_that_are_not_there_are_refused(llm, positions):
    with pytest.raises(InvalidRequest, match="position"):
        llm.hidden_states([[1, 2, 3]], positions, use_tqdm=False)


@pytest.mark.parametrize("layers", [(3,), (-4,), ("1",), 2, (True,)])
def test_layers_that_are_not_there_are_refused(folder, layers):
    with pytest.raises(ConfigError, match="return_hidden_states"):
        make_engine(folder, one_program, return_hidden_states=layers)


def test_request_for_both_states_and_samples_is_refused(llm):
    request = Request([1, 2], SamplingParams(max_tokens=3), states_at=(0,))
    with pytest.raises(InvalidRequest, match=r"gets no samples.*Request\.to_read"):
        llm.engine.submit(request)


@pytest.mark.parametrize("name", GOLDEN)
def test_states_are_those_of_hugging_face(name):
    golden = GOLDEN[name]
    options = EngineConfig(
        model=f"tests/golden/{name}", num_kv_blocks=8, max_model_len=32,
        return_hidden_states=tuple(range(len(golden))),
    )  # fmt: skip
    with LLM.from_engine(one_program(options)) as llm:
        prompt = [3 + 5 * i for i in range(golden.shape[1])]
        (states,) = llm.hidden_states(prompt, use_tqdm=False)
    np.testing.assert_allclose(states, golden, atol=1e-5 * np.abs(golden).max())
