"""deterministic=True: the same bits in whatever company; benchmarks.engine.invariance asks more."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastgen_jax.engine.config import EngineConfig
from fastgen_jax.engine.engine import Engine
from fastgen_jax.engine.types import Output, Request
from fastgen_jax.errors import ConfigError
from fastgen_jax.sampling_params import SamplingParams
from tests.tiny import run, write_config

GOLDEN = Path(__file__).parents[1] / "golden"
N_REQUESTS = 12
LENGTHS = {"dtype": "float32", "max_model_len": 96, "block_size": 8, "deterministic": True}
ROOMY = {"num_kv_blocks": 200, "enable_prefix_caching": False} | LENGTHS
# A fifth of what all requests need at once, and budgets that cut their prompts.
TIGHT = {"num_kv_blocks": 20, "max_num_seqs": 6, "max_num_batched_tokens": 37} | LENGTHS


def requests() -> list[Request]:
    """Some prompts start alike; greedy and drawn, with penalties and filters here and there."""
    rng, found = np.random.default_rng(0), []
    shared = rng.integers(0, 62, 40).tolist()
    for i in range(N_REQUESTS):
        start = shared[: rng.integers(9, 40)] if i % 3 == 0 else []
        params = SamplingParams(
            max_tokens=10,
            temperature=i % 2,
            top_p=0.8 if i % 4 == 3 else 1.0,
            repetition_penalty=1.3 if i % 5 == 0 else 1.0,
            seed=i,
            logprobs=3,
            ignore_eos=True,
        )
        prompt = start + rng.integers(0, 62, rng.integers(1, 40)).tolist()
        found.append(Request(prompt, params))
    return found


REQUESTS = requests()


def bits(outputs: list[Output]) -> list[tuple]:
    """Tokens with their own and the top logprobs, which float tells apart bit by bit."""
    said = [o for o in outputs if o.token_id is not None]
    return [(o.token_id, o.logprobs.logprob, tuple(o.logprobs.top)) for o in said if o.logprobs]


@pytest.fixture(scope="module", params=[("gqa", "float32"), ("qwen2_moe", "bfloat16")], ids=str)
def engines(request):
    name, dtype = request.param
    model = {"model": str(GOLDEN / name), "dtype": dtype}
    return [Engine(EngineConfig(**options | model)) for options in (ROOMY, TIGHT)]


@pytest.fixture(scope="module")
def alone(engines):
    return [bits(run(engines[0], [request])[0]) for request in REQUESTS]


def test_random_company_never_changes_a_bit(engines, alone):
    _, engine = engines

    @settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.permutations(range(N_REQUESTS)), st.lists(st.integers(0, 4), min_size=1))
    def in_company(order, bursts):
        assert bits_of_all(engine, order, bursts) == alone

    in_company()
    assert engine.stats().n_preemptions > 0
    assert all(len(line) == 10 for line in alone)


def bits_of_all(engine: Engine, order: list[int], bursts: list[int]) -> list[list[tuple]]:
    """Submitted in that order, so many between two steps."""
    outputs: dict[int, list[Output]] = {}
    todo, sizes = list(order), itertools.cycle(bursts)
    while todo or engine.has_work:
        n_now = next(sizes) if engine.has_work else 1
        for i in todo[:n_now]:
            outputs[engine.submit(REQUESTS[i])] = []
        del todo[:n_now]
        for output in engine.step():
            outputs[output.request_id].append(output)
    owners = dict(zip(order, outputs.values(), strict=True))
    return [bits(owners[i]) for i in range(N_REQUESTS)]


def test_one_program_serves_every_batch(engines):
    assert [shape.n_tokens % 32 for shape in engines[1]._runner.shapes] == [0]


def test_other_attention_is_refused(tmp_path):
    config = EngineConfig(
        model=write_config(tmp_path),
        load_format="dummy",
        deterministic=True,
        attention_backend="xla",
    )
    with pytest.raises(ConfigError, match=r"needs attention_backend='invariant'.*leave"):
        Engine(config)
