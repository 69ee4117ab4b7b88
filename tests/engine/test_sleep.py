"""An engine that sleeps holds no memory, and forgets nobody who waits."""

import threading
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from fastgen_jax import LLM
from fastgen_jax.engine.config import EngineConfig
from fastgen_jax.engine.types import Request
from fastgen_jax.errors import ConfigError, EngineStopped, WeightsError
from fastgen_jax.sampling_params import SamplingParams
from tests import tiny
from tests.engine.sweep import Footprint
from tests.engine.test_exchange import naive, named_by_hugging_face
from tests.engine.test_source import OPTIONS, engine_on, live_bytes, module

PARAMS = SamplingParams(max_tokens=10, temperature=0.0, ignore_eos=True)
PROMPT = [1, 2, 3, 4, 5, 6, 7, 8, 9]


@pytest.fixture(scope="module")
def shared():
    return module(0)


@pytest.fixture(scope="module")
def running(shared):
    with engine_on(shared) as engine:
        yield engine


@pytest.fixture
def engine(running):
    yield running
    running.wake_up()
    tiny.assert_idle(running)


def cache_bytes(engine):
    return sum(x.nbytes for x in jax.tree.leaves(engine._runner.state.caches))


def greedy(engine, prompt=PROMPT):
    (outputs,) = tiny.run(engine, [Request([*prompt], PARAMS)])
    return tiny.tokens(outputs)


def test_memory_of_the_cache_comes_back_and_nothing_is_compiled(engine, shared, forbid_compile):
    expected = naive(shared).greedy(PROMPT, 10)
    before, size = live_bytes(), cache_bytes(engine)
    with forbid_compile():
        engine.sleep()
        assert before - live_bytes() >= size > 0
        engine.wake_up()
        assert live_bytes() <= before
        assert greedy(engine) == expected


def test_level_2_drops_weights_which_are_read_again_from_their_directory(tmp_path):
    expected = module(1)
    path = tiny.write_config(tmp_path)
    save_file(named_by_hugging_face(expected), tmp_path / "model.safetensors")
    with tiny.one_program(EngineConfig(model=path, **OPTIONS)) as engine:
        weights = sum(leaf.nbytes for leaf in engine._runner.leaves)
        before, size = live_bytes(), cache_bytes(engine)
        engine.sleep(2)
        assert before - live_bytes() >= size + weights
        engine.wake_up()
        assert greedy(engine) == naive(expected).greedy(PROMPT, 10)


def test_level_2_without_a_directory_needs_weights_before_it_wakes_up():
    with engine_on(module(0)) as engine:
        engine.sleep(2)
        with pytest.raises(WeightsError, match="no checkpoint to read them from again"):
            engine.wake_up()
        with pytest.raises(WeightsError, match=r"missing: embed.weight \(the engine has none\)"):
            engine.update_weights({"norm.weight": np.ones(32, np.float32)})
        assert engine.is_sleeping
        engine.update_weights(module(1))
        engine.wake_up()
        assert greedy(engine) == naive(module(1)).greedy(PROMPT, 10)


def test_those_that_run_go_on_and_those_that_come_are_answered(engine, shared):
    found = {engine.submit(Request([*PROMPT], PARAMS)): []}

    def collect(outputs):
        for output in outputs:
            found[output.request_id].append(output.token_id)

    for _ in range(4):
        collect(engine.step())
    engine.sleep()
    (known,) = found.values()
    assert 0 < len(known) < 10
    found[engine.submit(Request([5, 6], PARAMS))] = []
    collect(engine.step())
    n_steps = engine.stats().n_steps
    collect(engine.step())
    assert engine.has_work
    assert engine.stats().n_steps == n_steps
    engine.wake_up()
    while engine.has_work:
        collect(engine.step())
    expected = [naive(shared).greedy(prompt, 10) for prompt in (PROMPT, [5, 6])]
    assert list(found.values()) == expected


def test_engine_that_a_thread_runs_sleeps_and_wakes_up(shared):
    outputs, is_over = [], threading.Event()

    def deliver(new):
        outputs.extend(new)
        if any(output.finish_reason for output in new):
            is_over.set()

    with engine_on(shared) as engine:
        thread = threading.Thread(target=engine.run, args=(deliver,))
        thread.start()
        engine.sleep()
        assert engine.is_sleeping
        engine.submit(Request([*PROMPT], PARAMS))
        beat = engine.stats().last_step_time
        while engine.stats().last_step_time == beat:  # health sees that it lives
            assert thread.is_alive()
        assert not outputs
        engine.wake_up()
        assert is_over.wait(60)
        assert tiny.tokens(outputs) == naive(shared).greedy(PROMPT, 10)
    thread.join(60)


def test_prompt_of_an_llm_waits_until_another_thread_wakes_it_up(shared):
    params, results = PARAMS.clone(), []
    with LLM.from_module(shared, **OPTIONS, use_tqdm_on_load=False) as llm:
        llm.sleep()

        def generate():
            results.extend(llm.generate([*PROMPT], params, use_tqdm=False))

        thread = threading.Thread(target=generate)
        thread.start()
        while not llm.engine.stats().n_waiting:
            assert thread.is_alive()
        llm.wake_up()
        thread.join(60)
    assert results[0].outputs[0].token_ids == naive(shared).greedy(PROMPT, 10)


def test_closed_while_it_sleeps_ends_every_request(shared):
    outputs = []
    engine = engine_on(shared)
    thread = threading.Thread(target=engine.run, args=(outputs.extend,))
    thread.start()
    engine.sleep()
    engine.submit(Request([*PROMPT], PARAMS))
    engine.close()
    thread.join(60)
    assert [output.finish_reason for output in outputs] == ["abort"]
    for act in (engine.sleep, engine.wake_up):
        with pytest.raises(EngineStopped, match="the engine is closed"):
            act()


def test_sleep_twice_is_the_deeper_one_and_waking_twice_does_no_harm(engine, shared):
    engine.sleep(1)
    engine.sleep(2)
    engine.sleep(1)
    engine.update_weights(shared)
    engine.wake_up()
    engine.wake_up()
    assert greedy(engine) == naive(shared).greedy(PROMPT, 10)


@pytest.mark.parametrize("level", [0, 3, "1", True])
def test_other_levels_are_refused(engine, level):
    with pytest.raises(ConfigError, match="level must be 1 "):
        engine.sleep(level)
    assert not engine.is_sleeping


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_process_gives_back_what_the_cache_took(shared):
    with engine_on(shared, num_kv_blocks=2**16) as engine:
        size = cache_bytes(engine) / 2**20
        assert size == 128  # MiB
        before = Footprint.read().anon_mb
        engine.sleep()
        assert before - Footprint.read().anon_mb > size / 2
        engine.wake_up()
        assert greedy(engine) == naive(shared).greedy(PROMPT, 10)


@pytest.mark.parametrize("n_devices", [2])
def test_weights_on_several_devices_come_back_as_they_were(n_devices):
    held = module(0, n_devices)
    with engine_on(held, tensor_parallel_size=n_devices) as engine:
        before = [(np.array(leaf), leaf.sharding) for leaf in engine._runner.leaves]
        engine.sleep()
        assert all(isinstance(leaf, np.ndarray) for leaf in engine._runner.leaves)
        engine.wake_up()
        for (array, sharding), leaf in zip(before, engine._runner.leaves, strict=True):
            np.testing.assert_array_equal(array, leaf)
            assert leaf.sharding == sharding
        assert greedy(engine) == naive(module(0)).greedy(PROMPT, 10)


def test_weights_can_be_replaced_while_it_sleeps(engine, shared):
    engine.sleep()
    engine.update_weights(module(1))
    engine.update_weights({"norm.weight": module(0).norm.weight[...]})
    assert engine.is_sleeping
    engine.wake_up()
    assert greedy(engine) == naive(module(1)).greedy(PROMPT, 10)
    engine.update_weights(shared)
