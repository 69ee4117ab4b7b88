"""Programs that come while others serve: who may use which, failures, and ends midway."""

import threading

import numpy as np
import pytest

from fastgen_jax.engine import programs
from fastgen_jax.engine.batch import MaskedShape, Shape
from fastgen_jax.engine.programs import Programs
from fastgen_jax.engine.recipe import Recipe
from fastgen_jax.errors import ConfigError
from tests.tiny import assert_idle, make_engine, random_requests, run, tokens

SIZES = (2, 8, 16, 32)
SHAPES = [Shape(n, n, 4) for n in SIZES]


class Compiler:
    """Makes a program once it `may`; fails for keys of `broken`."""

    def __init__(self, *broken):
        self.broken, self.made = broken, []
        self.may = threading.Event()
        self.has_begun = threading.Event()
        self.may.set()

    def __call__(self, key):
        self.has_begun.set()
        assert self.may.wait(20)
        if key in self.broken:
            raise RuntimeError("the compiler failed")
        self.made.append(key)
        return key


def masked(shape):
    return MaskedShape(shape.n_hidden, 1)


def first_of(compiler) -> Programs:
    """The largest is there."""
    found = Programs(compiler, SHAPES, masked)
    found.compile("first", lambda done, total: None)
    compiler.has_begun.clear()
    return found


def wait_for(found: Programs) -> None:
    assert found._thread is not None
    found._thread.join(300)  # compilers on a busy machine
    assert not found.is_compiling


def test_largest_program_is_enough_to_begin():
    compiler, told = Compiler(), []
    found = Programs(compiler, SHAPES, masked)
    found.compile("first", lambda *counts: told.append(counts))
    assert found.ready == SHAPES[-1:]
    assert told == [(0, 2), (1, 2), (2, 2)]
    assert (found.n_made, found.n_wanted) == (2, len(SHAPES) + 2)


def test_others_join_from_the_smallest_on_with_what_draws_their_constrained_rows():
    compiler = Compiler()
    found = first_of(compiler)
    while found.compile_next():
        assert all(s in found.made and masked(s) in found.made for s in found.ready)
    assert found.ready == SHAPES
    small = MaskedShape(16, 1)
    assert compiler.made[2:] == [small, *SHAPES[:-1]]


def test_thread_compiles_the_rest(caplog):
    found = first_of(Compiler())
    with caplog.at_level("INFO", "fastgen_jax.engine"):
        found.go_on()
        wait_for(found)
    assert found.ready == SHAPES
    assert found.n_made == found.n_wanted
    assert "compile  6 of 6 programs" in caplog.text


def test_program_that_cannot_be_compiled_is_told_and_its_batches_take_a_larger_one(caplog):
    found = first_of(Compiler(SHAPES[1]))
    found.go_on()
    wait_for(found)
    assert found.ready == [SHAPES[0], *SHAPES[2:]]
    assert found.n_failed == 1
    assert "the program of 8 tokens could not be compiled (RuntimeError)" in caplog.text


def test_largest_program_that_cannot_be_compiled_ends_the_start():
    with pytest.raises(RuntimeError, match="the compiler failed"):
        first_of(Compiler(SHAPES[-1]))


def test_close_waits_for_the_program_that_is_being_compiled_and_begins_no_other():
    compiler = Compiler()
    found = first_of(compiler)
    compiler.may.clear()
    found.go_on()
    assert compiler.has_begun.wait(20)
    closing = threading.Thread(target=found.close)
    closing.start()
    compiler.may.set()
    closing.join(20)
    assert not found.is_compiling
    assert found.made == {}
    assert SHAPES[1] not in compiler.made


def test_programs_that_nobody_holds_are_compiled_no_further():
    compiler = Compiler()
    found = first_of(compiler)
    compiler.may.clear()
    found.go_on()
    thread = found._thread
    assert compiler.has_begun.wait(20)
    del found
    compiler.may.set()
    thread.join(20)
    assert not thread.is_alive()
    assert SHAPES[-2] not in compiler.made


def test_thread_that_compiles_yields_to_others(monkeypatch):
    asked = []
    monkeypatch.setattr(programs.sys, "platform", "linux")
    monkeypatch.setattr(programs.os, "setpriority", lambda *a: asked.append(a), raising=False)
    programs.yield_to_others()
    assert asked == [(programs.os.PRIO_PROCESS, threading.get_native_id(), programs.PATIENT)]


# The engine on them.


@pytest.fixture
def gate(monkeypatch):
    """Holds compilations of all but the largest shape until it is set."""
    may = threading.Event()
    lower = Recipe.lower

    def wait_and_lower(recipe, key):
        n_tokens = key.n_tokens if isinstance(key, Shape) else 32
        assert n_tokens == 32 or may.wait(300)
        return lower(recipe, key)

    monkeypatch.setattr(Recipe, "lower", wait_and_lower)
    yield may
    may.set()


def test_tokens_are_the_same_before_and_after_smaller_programs_are_there(tmp_path, naive, gate):
    requests = random_requests(3, 4)
    with make_engine(tmp_path, compile="first") as engine:
        assert [s.n_tokens for s in engine._runner.shapes] == [32]
        early = [tokens(o) for o in run(engine, requests)]
        gate.set()
        wait_for(engine._programs)
        assert [s.n_tokens for s in engine._runner.shapes] == list(SIZES)
        assert early == [tokens(o) for o in run(engine, requests)]
        assert early[0] == naive.greedy(requests[0].prompt_token_ids, 24)
        assert_idle(engine)


@pytest.mark.parametrize("level", [1, 2])
def test_programs_are_made_while_the_engine_sleeps(tmp_path, gate, level):
    requests = random_requests(3, 4)
    with make_engine(tmp_path, compile="first") as engine:
        early = [tokens(o) for o in run(engine, requests)]
        engine.sleep(level)
        gate.set()
        wait_for(engine._programs)
        engine.wake_up()
        assert engine.stats().n_programs_failed == 0
        assert early == [tokens(o) for o in run(engine, requests)]


def test_programs_are_made_while_weights_change(tmp_path, gate):
    with make_engine(tmp_path, compile="first") as engine:
        names = engine._exchange._params
        gate.set()
        engine.update_weights({name: np.zeros(p.shape, p.dtype) for name, p in names.items()})
        wait_for(engine._programs)
        stats = engine.stats()
        assert (stats.n_programs, stats.n_programs_failed) == (stats.n_programs_wanted, 0)


def test_engine_in_a_program_has_all_of_them_at_once(engine):
    stats = engine.stats()
    assert stats.n_programs == stats.n_programs_wanted
    assert not engine.is_compiling


def test_deterministic_engine_has_one_shape_whichever_come_first(tmp_path):
    found = []
    for which in ("first", "all"):
        options = {"compile": which, "deterministic": True}
        with make_engine(tmp_path, **options) as engine:
            outputs = run(engine, random_requests(5, 3, logprobs=2))
            found.append([(o.token_id, o.logprobs) for each in outputs for o in each])
    assert found[0] == found[1]


def test_unknown_extent_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="compile must be one of all, first, got 'most'"):
        make_engine(tmp_path, compile="most")
