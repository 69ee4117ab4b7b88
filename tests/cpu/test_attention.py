"""What is the CPU's attention's own: kinds of CPU, division of the work, refusals. What it shares
with every backend is tested in tests/pallas_kernels.
"""

import dataclasses
import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels.contract import AttentionSpec
from pallas_kernels.cpu import build
from tests.pallas_kernels.attention_cases import (
    FEW_CASES,
    Case,
    check,
    implementation,
    load,
    make_batch,
    prepared,
)

if not build.library().exists():
    pytest.skip("pallas_kernels.cpu is not built", allow_module_level=True)
PLAIN = Case(n_tokens=80)
# What jax makes of a refusal: the second where the caller's own thread runs the program.
REFUSAL = (jax.errors.JaxRuntimeError, ValueError)


def of_kind(kind: str):
    """The implementation for CPUs of that kind."""
    function = functools.partial(pallas_kernels.select("cpu"), kind=kind)
    return implementation("cpu", function)


@pytest.mark.parametrize("kind", build.KINDS)
@pytest.mark.parametrize("case", [PLAIN, *FEW_CASES], ids=str)
def test_every_kind_of_cpu_matches_the_oracle(kind, case):
    batch, want = prepared(case)
    try:
        got = of_kind(kind)(case, batch)
    except REFUSAL as error:
        pytest.skip(f"{kind}: {error}")
    check(case, batch, got, want)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_long_context_that_threads_share_matches_the_oracle(dtype):
    case = Case(("float32", dtype), n_tokens=60, longest=5000, n_cells=64, heads=(3, 1), sinks=True)
    case = dataclasses.replace(case, window=4000)
    batch = make_batch(case, [(4900, 1), (2000, 40)])
    check(case, batch, load("cpu")(case, batch))


@pytest.mark.parametrize("window", [1, 20, 64, 90])
def test_tile_of_keys_that_some_rows_of_an_item_do_not_see_any_more(window):
    case = Case(("float32", "float32"), n_tokens=200, longest=300, n_cells=32, heads=(1, 1))
    case = dataclasses.replace(case, window=window)
    batch = make_batch(case, [(96, 96), (291, 95)])
    check(case, batch, load("cpu")(case, batch))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_nan_among_values_stays_with_its_sequence(dtype):
    case = Case(("float32", dtype), n_tokens=384, n_rows=12, longest=64, heads=(2, 1))
    batch = make_batch(case, [(64, 32)] * 6 + [(40, 32)] * 6)
    clean = np.asarray(load("cpu")(case, batch).out)[6 * 32 :]
    v = np.array(batch.v)
    v[: 6 * 32] = np.nan  # and so is what a thread still has of them when it comes to the others
    out = np.asarray(load("cpu")(case, batch._replace(v=v)).out)
    assert np.isnan(out[: 6 * 32]).any()
    np.testing.assert_array_equal(out[6 * 32 :], clean)


def test_threads_take_turns_and_change_no_bit():
    batch = make_batch(case := Case(n_tokens=420, longest=1200, n_cells=64), [(900, 1), (700, 300)])
    first = load("cpu")(case, batch).out
    for _ in range(5):
        np.testing.assert_array_equal(load("cpu")(case, batch).out, first)


def weight_of(exponent: np.ndarray) -> np.ndarray:
    """w / (1 + w) with w = 2^-exponent, as the softmax of two keys gives it."""
    n = len(exponent)
    spec = AttentionSpec(scale=float(np.log(2)))
    q = np.zeros((2 * n, 1, 64), np.float32)
    q[1::2, 0, 0] = -exponent
    k, v = np.zeros((2, 2 * n, 1, 64), np.float32)
    k[1::2, 0, 0] = v[1::2] = 1.0
    cells = np.arange(2 * n)
    table = np.arange(n)[:, None]
    arrays = cells % 2, cells, table, np.full(n, 2), 2 * np.arange(n + 1), np.array(n), np.array(0)
    meta = pallas_kernels.RaggedMeta(*(jnp.asarray(x, jnp.int32) for x in arrays))
    cache = jnp.zeros((n, 1, 2, 2, 64))
    attend = jax.jit(pallas_kernels.select("cpu"), static_argnames="spec")
    return np.asarray(attend(q, k, v, cache, meta, spec=spec)[0])[1::2, 0, 0]


def test_weights_are_right_to_a_few_units_in_the_last_place():
    exponent = np.linspace(0, 100, 4001, dtype=np.float32)
    w = np.exp2(-exponent.astype(np.float64))
    error = np.abs(weight_of(exponent) / (w / (1 + w)) - 1)
    assert (error < 3e-7 + 1.5e-7 * exponent).all()  # the score itself is rounded


def test_keys_that_weigh_less_than_the_smallest_number_weigh_nothing():
    assert not weight_of(np.array([130, 1e4, 1e30], np.float32)).any()


OUT_OF_BOUNDS = {
    r"block_tables\[4\]": ("block_tables", (4, 0), 10**6),
    r"slots\[3\]": ("slots", 3, -1),
    r"seq_lens\[2\]": ("seq_lens", 2, 10**6),
    r"cu_q_lens\[5\]": ("cu_q_lens", 6, 10**6),
    "n_seqs": ("n_seqs", (), 9),
}


@pytest.mark.parametrize(("message", "change"), OUT_OF_BOUNDS.items())
def test_batch_that_leads_out_of_bounds_is_an_error(message, change):
    name, place, value = change
    batch = make_batch(PLAIN)
    array = np.array(getattr(batch.meta, name))
    array[place] = value
    meta = batch.meta._replace(**{name: array})
    with pytest.raises(REFUSAL, match=f"batch's {message} is out of bounds"):
        load("cpu")(PLAIN, batch._replace(meta=meta))


def test_gradients_and_batching_are_refused():
    q, k, v, cache, _, meta = (jax.tree.map(jnp.asarray, x) for x in make_batch(PLAIN))
    attend = functools.partial(pallas_kernels.select("cpu"), spec=PLAIN.spec)
    with pytest.raises(ValueError, match="cannot be differentiated"):
        jax.grad(lambda q: attend(q, k, v, cache, meta)[0].sum())(q)
    with pytest.raises(NotImplementedError, match="vmap"):
        jax.vmap(lambda q: attend(q, k, v, cache, meta)[0])(q[None])


def test_cache_of_other_numbers_is_refused():
    q, k, v, cache, _, meta = make_batch(PLAIN)
    attend = functools.partial(pallas_kernels.select("cpu"), spec=PLAIN.spec)
    with pytest.raises(ValueError, match="a cache of int32: the CPU's attention has float32"):
        attend(q, k, v, np.zeros_like(cache, np.int32), meta)


def test_library_of_other_sources_is_never_used(tmp_path, monkeypatch):
    for name in build.SOURCES:
        (tmp_path / name).write_bytes((build.HERE / name).read_bytes())
    before = build.library()
    monkeypatch.setattr(build, "HERE", tmp_path)
    assert build.library().name == before.name
    for name in build.SOURCES:
        source = (tmp_path / name).read_bytes()
        (tmp_path / name).write_text("// another one")
        assert build.library().name != before.name
        assert not build.library().exists()
        (tmp_path / name).write_bytes(source)


def test_building_twice_builds_once():
    command = [sys.executable, "-m", "pallas_kernels.cpu.build", "--compiler", "/does/not/exist"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout == ""


def test_setup_without_a_compiler_says_what_is_lost(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(build, "library", lambda: tmp_path / "attention.so")
    monkeypatch.setattr(sys, "argv", ["build", "--compiler", "/does/not/exist"])
    build.main()
    assert "attention on CPU will be slower" in capsys.readouterr().out
