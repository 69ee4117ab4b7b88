"""A closed engine leaves nothing behind: no weights, no cache, no programs, no threads."""

import subprocess
import sys
import threading
import weakref
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from fastgen_jax.engine.types import Request
from fastgen_jax.errors import EngineStopped
from fastgen_jax.llm import LLM
from fastgen_jax.sampling_params import SamplingParams
from tests import tiny
from tests.engine.simulation import fake_engine
from tests.engine.test_source import engine_on, module

ROOT = Path(__file__).parents[2]
REQUEST = Request([0, 1], SamplingParams(max_tokens=4))


def device_arrays(engine):
    """Weights, cache and programs' tables, without keeping them alive."""
    runner = engine._runner
    arrays = jax.tree.leaves((runner.leaves, runner.state, runner._row_tables))
    return [weakref.ref(array) for array in arrays]


def programs(engine):
    return [weakref.ref(program) for program in engine._runner.programs.made.values()]


def alive(references):
    return [reference for reference in references if reference() is not None]


def test_close_frees_weights_cache_and_programs_at_once(tmp_path, no_collection):
    engine = tiny.make_engine(tmp_path)
    tiny.run(engine, tiny.random_requests(0, 2))
    held = device_arrays(engine) + programs(engine)
    assert len(alive(held)) == len(held) > 10
    engine.close()
    assert alive(held) == []


def test_last_reference_frees_weights_cache_and_programs_at_once(tmp_path, no_collection):
    engine = tiny.make_engine(tmp_path)
    tiny.run(engine, tiny.random_requests(0, 2))
    held = device_arrays(engine) + programs(engine)
    del engine
    assert alive(held) == []


def test_closed_llm_frees_what_its_engine_held(tmp_path, no_collection):
    with LLM.from_engine(tiny.make_engine(tmp_path)) as llm:
        llm.generate([1, 2], SamplingParams(max_tokens=2), use_tqdm=False)
        held = device_arrays(llm.engine) + programs(llm.engine)
    assert alive(held) == []


@pytest.mark.parametrize("level", [None, 1, 2])
def test_engine_on_modules_leaves_nothing_but_the_modules(level, no_collection):
    one, other = module(0), module(1)
    engine = engine_on(one)
    held = device_arrays(engine) + programs(engine)
    engine.update_weights(other)
    if level:
        engine.sleep(level)
    held += device_arrays(engine)
    engine.close()
    modules = {id(leaf) for leaf in jax.tree.leaves((one, other))}
    assert {id(reference()) for reference in alive(held)} <= modules
    del one, other
    assert alive(held) == []


def test_weights_that_were_replaced_are_freed_at_once(no_collection):
    with engine_on(module(0)) as engine:
        old = [weakref.ref(leaf) for leaf in engine._runner.leaves]
        engine.update_weights(module(1))
        assert alive(old) == []


def test_programs_of_the_user_stay_compiled(tmp_path, forbid_compile):
    double = jax.jit(lambda x: jnp.where(x > 1, x * 2, x))
    x = jnp.arange(5)
    double(x), jnp.zeros((3, 5)), jnp.take(x, x)
    tiny.make_engine(tmp_path).close()
    with forbid_compile():
        double(x), jnp.zeros((3, 5)), jnp.take(x, x)


def test_closed_engine_refuses_requests_and_steps():
    with fake_engine() as engine:
        engine.submit(REQUEST)
    engine.close()
    with pytest.raises(EngineStopped, match="the engine is closed"):
        engine.submit(REQUEST)
    assert engine.has_work
    with pytest.raises(EngineStopped, match="the engine is closed"):
        engine.step()


def test_close_waits_for_run_which_ends_every_request():
    engine, outputs = fake_engine(), []
    has_begun = threading.Event()

    def deliver(new):
        outputs.extend(new)
        assert not engine._runner.is_closed
        has_begun.set()

    runner = threading.Thread(target=engine.run, args=(deliver,))
    engine.submit(Request([0, 1], SamplingParams(max_tokens=14, ignore_eos=True)))
    runner.start()
    assert has_begun.wait(10)
    engine.close()
    assert engine._runner.is_closed
    assert [o.finish_reason for o in outputs if o.finish_reason]
    runner.join(10)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's /proc")
# Fewer would not do: from one engine to the next the memory changes by 20 MB either way.
def test_process_does_not_grow_with_the_engines_it_has_closed():
    n_engines = 10
    command = [sys.executable, "-m", "tests.engine.sweep", str(n_engines)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    n_lines = done.stdout.count("\n")
    assert (done.returncode, n_lines) == (0, n_engines), done.stdout + done.stderr
