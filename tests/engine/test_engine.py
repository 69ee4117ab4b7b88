import dataclasses
import functools
import threading

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pallas_kernels
from fastgen_jax.engine import startup, step
from fastgen_jax.engine.admission import Admission
from fastgen_jax.engine.config import EngineConfig
from fastgen_jax.engine.engine import Engine
from fastgen_jax.engine.types import Request
from fastgen_jax.errors import (
    ConfigError,
    ContextLengthExceeded,
    EngineStopped,
    InvalidRequest,
    QueueFull,
)
from fastgen_jax.sampling_params import SamplingParams
from pallas_kernels.tpu.tiles import Tiles
from tests.tiny import (
    assert_idle,
    make_engine,
    one_program,
    random_requests,
    run,
    tokens,
    write_config,
)


@pytest.fixture(scope="module")
def tight(folder):
    """A pool of 1.2 times the largest request."""
    return make_engine(folder, one_program, num_kv_blocks=15, enable_prefix_caching=False)


def test_greedy_tokens_equal_a_full_recompute_of_each_token(engine, naive):
    requests = random_requests(0, 12)
    for request, outputs in zip(requests, run(engine, requests), strict=True):
        assert tokens(outputs) == naive.greedy(request.prompt_token_ids, 24)
    assert_idle(engine)


@pytest.mark.parametrize(("budget", "block_size"), [(8, 4), (16, 16), (24, 32)])
def test_tokens_do_not_depend_on_chunk_budget_or_block_size(folder, engine, budget, block_size):
    options = {"max_num_batched_tokens": budget, "block_size": block_size, "max_num_seqs": 8}
    other = make_engine(folder, one_program, **options)
    requests = random_requests(budget, 10)
    expected = [tokens(o) for o in run(engine, requests)]
    assert [tokens(o) for o in run(other, requests)] == expected


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), n=st.integers(1, 14))
def test_cancelled_neighbours_do_not_change_tokens(engine, seed, n):
    rng = np.random.default_rng(seed)
    requests = random_requests(seed, n, temperature=1.0, seed=seed)
    alone = [tokens(run(engine, [request])[0]) for request in requests[:3]]
    ids = [engine.submit(request) for request in requests]
    outputs = {i: [] for i in ids}
    while engine.has_work:
        if rng.random() < 0.5:
            engine.cancel(int(rng.choice(ids[3:] or [10**9])))
        for output in engine.step():
            outputs[output.request_id].append(output)
    assert [tokens(outputs[i]) for i in ids[:3]] == alone
    for events in outputs.values():
        assert [e.finish_reason is not None for e in events] == [False] * (len(events) - 1) + [True]
    assert_idle(engine)


SAMPLING = {
    "greedy": {"temperature": 0.0},
    "seeded": {"temperature": 1.0, "seed": 11, "top_p": 0.9},
    "penalised": {"temperature": 0.7, "seed": 5, "presence_penalty": 1.0, "top_k": 20},
}


@pytest.mark.parametrize("name", SAMPLING)
def test_preempted_sequences_make_the_same_tokens_and_logprobs(engine, tight, name):
    requests = random_requests(3, 50, longest=70, logprobs=2, **SAMPLING[name])
    before = tight.stats().n_preemptions
    expected, got = run(engine, requests), run(tight, requests)
    assert tight.stats().n_preemptions > before
    for a, b in zip(expected, got, strict=True):
        assert tokens(a) == tokens(b)
        assert [o.finish_reason for o in a] == [o.finish_reason for o in b]
        for x, y in zip(a, b, strict=True):
            np.testing.assert_allclose(x.logprobs.logprob, y.logprobs.logprob, atol=1e-4)
            assert [i for i, _ in x.logprobs.top] == [i for i, _ in y.logprobs.top]
    assert_idle(tight)


def test_a_step_is_dispatched_before_the_one_before_is_read(engine, monkeypatch):
    events = []
    dispatch, fetch = engine._runner.dispatch, engine._runner.fetch
    monkeypatch.setattr(
        engine._runner, "dispatch", lambda *a: (events.append("dispatch"), dispatch(*a))[1]
    )
    monkeypatch.setattr(engine._runner, "fetch", lambda *a: (events.append("fetch"), fetch(*a))[1])
    run(engine, random_requests(1, 1, longest=5))
    assert events[:2] == ["dispatch", "dispatch"]
    assert events[2:-2] == ["fetch", "dispatch"] * ((len(events) - 4) // 2)
    assert events[-2:] == ["fetch", "fetch"]


def test_nothing_compiles_after_warm_up(engine, forbid_compile):
    requests = []
    for seed, params in enumerate(
        [
            {"temperature": 0.0},
            {"temperature": 1.0, "top_k": 5, "top_p": 0.5, "min_p": 0.1},
            {"logprobs": 20, "presence_penalty": 1.0, "frequency_penalty": 0.5},
            {"repetition_penalty": 1.3, "logit_bias": {3: 5.0}, "min_tokens": 9, "seed": 1},
            {"n": 3, "temperature": 0.5, "stop_token_ids": (4,)},
        ]
    ):
        requests += random_requests(seed, 3, **params)
    with forbid_compile():
        for n in (1, 2, 5, len(requests)):
            run(engine, requests[:n])


def test_step_aliases_the_cache_and_needs_little_memory_beside_it(folder):
    engine = make_engine(folder, num_kv_blocks=4096)
    runner = engine._runner
    cache_bytes = sum(x.nbytes for x in jax.tree.leaves(runner.state.caches))
    for shape in runner.shapes:
        memory = runner.programs.made[shape].memory_analysis()
        assert memory.alias_size_in_bytes >= cache_bytes
        activations = 4 * shape.n_tokens * (3 * 64 + 8 * 32) + 16 * 4 * 62 * shape.n_seqs
        assert memory.temp_size_in_bytes < 0.05 * cache_bytes + 16 * activations


def test_eos_ends_a_sample_and_its_extra_token_is_discarded(engine, naive):
    request = random_requests(4, 1)[0]
    greedy = naive.greedy(request.prompt_token_ids, 24)
    params = dataclasses.replace(request.params, stop_token_ids=(greedy[5],))
    outputs = run(engine, [Request(request.prompt_token_ids, params)])[0]
    end = greedy.index(greedy[5]) + 1
    assert tokens(outputs) == greedy[:end]
    assert outputs[-1].finish_reason == "stop"
    assert outputs[-1].stop_reason == greedy[5]
    assert_idle(engine)


def test_samples_of_one_request_differ_and_repeat_with_the_seed(engine):
    request = random_requests(5, 1, n=3, temperature=1.0, seed=9)[0]
    first, second = (
        [[o.token_id for o in run_ if o.index == i] for i in range(3)]
        for run_ in run(engine, [request]) + run(engine, [request])
    )
    assert len({tuple(sample) for sample in first}) == 3
    assert first == second


def test_logprobs_are_those_of_the_raw_logits(engine, naive):
    request = random_requests(6, 1, logprobs=5, temperature=1.0, seed=2, top_k=3)[0]
    outputs = run(engine, [request])[0]
    known = request.prompt_token_ids + tokens(outputs)
    raw = np.asarray(jax.nn.log_softmax(naive.logits(known), axis=-1))
    for i, output in enumerate(outputs):
        row = raw[len(request.prompt_token_ids) + i - 1]
        np.testing.assert_allclose(output.logprobs.logprob, row[output.token_id], atol=1e-4)
        assert [t for t, _ in output.logprobs.top] == np.argsort(-row, kind="stable")[:5].tolist()
        for token, logprob in output.logprobs.top:
            assert token != output.token_id or logprob == output.logprobs.logprob


def test_prefix_cache_hits_leave_tokens_unchanged(folder, engine):
    prompt = random_requests(8, 1)[0].prompt_token_ids * 3
    params = SamplingParams(max_tokens=10, temperature=0.0, ignore_eos=True)
    requests = [Request([*prompt[:50], i], params) for i in range(4)]
    cached = make_engine(folder, one_program)
    cold = make_engine(folder, one_program, enable_prefix_caching=False)
    expected = [tokens(o) for o in run(cold, requests)]
    run(cached, requests[:1])
    assert [tokens(o) for o in run(cached, requests)] == expected
    assert cached.stats().n_prefix_hits >= 4 * 48
    assert cold.stats().n_prefix_hits == 0
    assert_idle(cached)


@pytest.mark.parametrize("n_steps", [0, 1, 2, 6])
def test_cancel_frees_everything_within_two_steps(engine, n_steps):
    request = random_requests(9, 1, longest=60, max_tokens=30)[0]
    request_id = engine.submit(Request(request.prompt_token_ids * 2, request.params))
    for _ in range(n_steps):
        engine.step()
    engine.cancel(request_id)
    engine.cancel(request_id)
    outputs = engine.step() + engine.step()
    assert [o.finish_reason for o in outputs if o.finish_reason] == ["abort"]
    assert_idle(engine)


def test_finish_ends_one_sample_quietly(engine):
    request_id = engine.submit(random_requests(10, 1, n=2, temperature=1.0)[0])
    for _ in range(4):
        engine.step()
    engine.finish(request_id, 0)
    outputs = []
    while engine.has_work:
        outputs += engine.step()
    assert {o.index for o in outputs} == {1}
    assert_idle(engine)


def test_request_that_can_never_fit_is_refused_with_the_numbers(engine):
    params = SamplingParams(max_tokens=50)
    with pytest.raises(ContextLengthExceeded, match=r"length is 96 tokens.*110 tokens"):
        engine.submit(Request([1] * 60, params))
    admission = Admission(max_requests=1, max_model_len=96, n_blocks=5, block_size=8, vocab_size=62)
    with pytest.raises(ContextLengthExceeded, match="KV cache of 5 blocks holds 40 tokens"):
        admission.check(Request([1] * 39, params))


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([], {}, "prompt is empty"),
        ([62], {}, "prompt holds 62; token ids are integers from 0 to 61"),
        ([-1], {}, "prompt holds -1"),
        ([2**63], {}, "prompt holds 9223372036854775808"),
        ([1.5], {}, "prompt holds 1.5"),
        ([True], {}, "prompt holds True"),
        ([1], {"stop_token_ids": (62,)}, "stop_token_ids holds 62"),
        ([1], {"logit_bias": {99: 1.0}}, "logit_bias holds 99"),
    ],
)
def test_bad_request_is_refused_and_changes_nothing(engine, prompt, params, message):
    with pytest.raises(InvalidRequest, match=message):
        engine.submit_all([random_requests(0, 1)[0], Request(prompt, SamplingParams(**params))])
    assert not engine.has_work
    assert_idle(engine)


def test_too_many_requests_are_refused_together(folder):
    engine = make_engine(folder, one_program, max_queued_requests=3)
    requests = random_requests(0, 4)
    with pytest.raises(InvalidRequest, match=r"4 samples .* are asked for at once, the limit is 3"):
        engine.submit_all(requests)
    engine.submit_all(requests[:2])
    with pytest.raises(QueueFull, match="2 samples run or wait, the limit is 3"):
        engine.submit_all(requests[2:])
    engine.submit(requests[2])
    with pytest.raises(QueueFull, match="3 samples run or wait"):
        engine.submit(requests[3])


def test_each_sample_counts_in_the_queue(folder):
    engine = make_engine(folder, one_program, max_queued_requests=5)
    three, two = (random_requests(0, 1, n=n, temperature=1.0)[0] for n in (3, 2))
    with pytest.raises(InvalidRequest, match="6 samples"):
        engine.check(random_requests(0, 1, n=6)[0])
    engine.submit(three)
    with pytest.raises(QueueFull, match="3 samples run or wait, the limit is 5"):
        engine.submit(three)
    engine.submit(two)
    while engine.has_work:
        engine.step()
    assert_idle(engine)


def test_non_finite_logits_fail_their_request_alone(engine, monkeypatch):
    requests = random_requests(12, 4)
    expected = [tokens(o) for o in run(engine, requests)]
    fetch, n_poisoned = engine._runner.fetch, 0

    def poison(result):
        nonlocal n_poisoned
        step = fetch(result)
        if len(step.token_ids) >= 4 and not n_poisoned and victims:
            n_poisoned += 1
            return step._replace(is_finite=np.arange(len(step.token_ids)) != 2)
        return step

    ids = engine.submit_all(requests)
    victims = [ids[2]]
    monkeypatch.setattr(engine._runner, "fetch", poison)
    outputs = {i: [] for i in ids}
    while engine.has_work:
        for output in engine.step():
            outputs[output.request_id].append(output)
    assert n_poisoned == 1
    failed = [i for i in ids if outputs[i][-1].finish_reason == "error"]
    assert len(failed) == 1
    assert "non-finite" in outputs[failed[0]][-1].error
    for request_id, want in zip(ids, expected, strict=True):
        assert request_id in failed or tokens(outputs[request_id]) == want
    assert_idle(engine)


def test_failed_step_changes_no_token(folder, monkeypatch, caplog):
    engine = make_engine(folder, one_program, max_num_seqs=4)
    requests = random_requests(13, 9)
    expected = [tokens(o) for o in run(engine, requests)]
    fetch, failures = engine._runner.fetch, [6]

    def fail_once(result):
        failures[0] -= 1
        if failures[0] == 0:
            raise RuntimeError("RESOURCE_EXHAUSTED")
        return fetch(result)

    monkeypatch.setattr(engine._runner, "fetch", fail_once)
    got = run(engine, requests)
    assert failures[0] < 0
    assert [tokens(outputs) for outputs in got] == expected
    assert engine.stats().n_failed_steps == 1
    assert "RESOURCE_EXHAUSTED" in caplog.text
    assert_idle(engine)


def test_failed_step_that_takes_the_cache_with_it_changes_no_token(folder, monkeypatch):
    engine = make_engine(folder, one_program, max_num_seqs=4)
    requests = random_requests(17, 6, temperature=1.0, seed=3)
    expected = [tokens(o) for o in run(engine, requests)]
    dispatch, failures = engine._runner.dispatch, [9, 5]

    def fail(*args):
        failures[-1] -= 1
        if failures[-1] == 0:
            failures.pop()
            for array in jax.tree.leaves(engine._runner.state):  # as XLA does with what was donated
                array.delete()
            raise RuntimeError("RESOURCE_EXHAUSTED")
        return dispatch(*args)

    failures.insert(0, 10**9)
    monkeypatch.setattr(engine._runner, "dispatch", fail)
    assert [tokens(o) for o in run(engine, requests)] == expected
    assert engine.stats().n_failed_steps == 2
    assert_idle(engine)


def test_run_delivers_until_stopped_and_aborts_the_rest(engine, folder):
    engine = make_engine(folder, one_program)
    delivered, first = [], threading.Event()

    def deliver(outputs):
        delivered.extend(outputs)
        first.set()

    thread = threading.Thread(target=engine.run, args=(deliver,))
    thread.start()
    engine.submit(random_requests(0, 1, max_tokens=30)[0])
    assert first.wait(30)
    engine.stop("draining")
    thread.join(30)
    assert not thread.is_alive()
    assert delivered[-1].finish_reason in ("abort", "length")
    with pytest.raises(EngineStopped, match="draining"):
        engine.submit(random_requests(0, 1)[0])
    assert_idle(engine)


def test_tensor_parallel_engine_makes_the_same_tokens():
    options = EngineConfig(
        model="tests/golden/gqa", max_model_len=96, num_kv_blocks=64, max_num_batched_tokens=16
    )
    requests = random_requests(14, 6)
    single = one_program(options)
    sharded = one_program(dataclasses.replace(options, tensor_parallel_size=2))
    expected = [tokens(o) for o in run(single, requests)]
    assert [tokens(o) for o in run(sharded, requests)] == expected
    cache = sharded._runner.state.caches[0].cells
    assert cache.sharding.shard_shape(cache.shape)[1] == cache.shape[1] // 2


@pytest.mark.parametrize("backend", ["pallas_gpu", "pallas_tpu"])
def test_engine_with_interpreted_kernels_on_two_devices_makes_the_same_tokens(
    tmp_path, monkeypatch, backend
):
    options = EngineConfig(
        model=write_config(tmp_path, hidden_size=64, num_hidden_layers=1),  # heads of 16
        load_format="dummy",
        block_size=128,
        num_kv_blocks=16,
        max_num_batched_tokens=8,
        max_num_seqs=2,
        tensor_parallel_size=2,
    )
    requests = random_requests(16, 3, longest=150, max_tokens=6)
    expected = [tokens(o) for o in run(one_program(options), requests)]
    monkeypatch.setitem(
        startup.BACKENDS, "cpu", dataclasses.replace(startup.BACKENDS["cpu"], attention=backend)
    )
    monkeypatch.setattr(step, "select", interpreted)
    assert [tokens(o) for o in run(one_program(options), requests)] == expected


def interpreted(name, _device):
    small = {"tiles": Tiles(decode_blocks=1, chunk_blocks=1)} if name == "pallas_tpu" else {}
    return functools.partial(pallas_kernels.select(name), interpret=True, **small)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention_backend": "cuda"}, "must be one of auto, .*pallas_gpu.*, got 'cuda'"),
        ({"attention_backend": "pallas_tpu"}, "'pallas_tpu' runs on tpu, and this is cpu; leave"),
        ({"num_kv_blocks": 2**28}, "at most 2147483647 fit: use 8388607 blocks"),
    ],
)
def test_attention_that_cannot_work_is_refused(folder, options, message):
    with pytest.raises(ConfigError, match=message):
        make_engine(folder, **options)


@pytest.mark.parametrize(
    ("backend", "dtype", "message"),
    [
        ("pallas_gpu", "float32", "head size 8 with 2 query heads per KV head: pallas_gpu has"),
        ("pallas_tpu", "float16", "TPUs have no float16; use bfloat16"),
    ],
)
def test_heads_that_a_kernel_does_not_take_are_refused(
    folder, monkeypatch, backend, dtype, message
):
    default = dataclasses.replace(startup.BACKENDS["cpu"], attention=backend)
    monkeypatch.setitem(startup.BACKENDS, "cpu", default)
    with pytest.raises(ConfigError, match=message):
        make_engine(folder, dtype=dtype, block_size=128)


def test_pool_is_sized_from_memory_and_capped_by_use(folder):
    engine = make_engine(folder, one_program, num_kv_blocks=None)
    assert engine.config.num_kv_blocks == 8 * 12 + 1
    assert engine.max_total_tokens == 96


def test_two_sequences_share_a_pool_that_holds_one(folder):
    engine = make_engine(folder, one_program, num_kv_blocks=13, enable_prefix_caching=False)
    requests = random_requests(15, 4, longest=71)
    assert all(o[-1].finish_reason == "length" for o in run(engine, requests))
    assert_idle(engine)


def test_engine_without_a_model_says_what_to_do():
    with pytest.raises(ValueError, match="no model given; name a directory or a hub id"):
        Engine(EngineConfig())


def test_model_length_beyond_the_positions_is_refused(folder):
    with pytest.raises(ValueError, match="max_model_len=300 exceeds the 256 positions"):
        Engine(EngineConfig(model=write_config(folder), load_format="dummy", max_model_len=300))
