"""A closed engine leaves nothing behind: no weights, no cache, no programs, no threads."""

import threading

import jax
import jax.numpy as jnp
import pytest

from fastgen_jax.engine.types import Request
from fastgen_jax.errors import EngineStopped
from fastgen_jax.sampling_params import SamplingParams
from tests import tiny
from tests.engine.simulation import fake_engine

REQUEST = Request([0, 1], SamplingParams(max_tokens=4))


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
