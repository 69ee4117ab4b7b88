"""The CPU's own matrix product, against NumPy in float64."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from fastgen_jax.models import product as steps
from pallas_kernels.cpu import build
from pallas_kernels.cpu import product as product_file
from pallas_kernels.cpu.calls import check_installed
from pallas_kernels.cpu.product import WEIGHTS, product

if not pallas_kernels.has_cpu_library():
    pytest.skip("pallas_kernels.cpu is not built", allow_module_level=True)
# (tokens, inputs, outputs): few tokens, one panel, ragged ends of every kind, several parts.
SHAPES = [
    (1, 7, 5), (3, 64, 48), (7, 300, 50), (8, 33, 49), (9, 300, 50), (16, 256, 96), (17, 768, 100),
    (33, 513, 97), (40, 31, 12), (128, 257, 49), (130, 64, 24), (300, 520, 147),
]  # fmt: skip
MATRIX_UNIT = "amx", "bfloat16"  # what it multiplies, and rounds x to
REFUSAL = (jax.errors.JaxRuntimeError, ValueError)


def drawn(*shape: int, dtype: str = "float32", seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def exact(x, weight) -> np.ndarray:
    return np.asarray(x, np.float64) @ np.asarray(weight, np.float64).T


def normalised(x, norm, eps) -> np.ndarray:
    x = np.asarray(x, np.float64)
    return x / np.sqrt(np.mean(x**2, axis=1, keepdims=True) + eps) * np.asarray(norm, np.float64)


def bound_of(x, weight, unit: float = 0.0) -> np.ndarray:
    """Of what rounding does to sums in float32 in any order, n u |x| |w| (Higham, 2002, 3.5), of
    which far less is usual; and of x, if that is known to `unit`.
    """
    return (weight.shape[1] ** 0.5 * 2**-23 + unit) * exact(abs(x), abs(weight))


compiled = functools.partial(jax.jit, static_argnames=("eps", "is_gated", "kind"))(product)
gated = functools.partial(compiled, is_gated=True)


def run_or_skip(kind: str, function, *arrays, **options) -> np.ndarray:
    try:
        return np.asarray(function(*arrays, kind=kind, **options))
    except REFUSAL as error:
        pytest.skip(f"{kind}: {error}")


@pytest.mark.parametrize("kind", build.KINDS)
@pytest.mark.parametrize("dtype", WEIGHTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_kind_of_cpu_multiplies_as_numpy_does(kind, dtype, shape):
    n_tokens, n_inputs, n_outputs = shape
    x, weight = drawn(n_tokens, n_inputs), drawn(n_outputs, n_inputs, dtype=dtype, seed=1)
    if (kind, dtype) == MATRIX_UNIT:
        x = x.astype("bfloat16")  # which such a CPU does by itself, see below
    got = run_or_skip(kind, compiled, x, weight)
    assert np.all(abs(got - exact(x, weight)) <= bound_of(x, weight))


def unit_of_normalised(kind: str, dtype: str) -> float:
    """A mean and what is made of it are some roundings away; a matrix unit has one of its own."""
    return 2**-22 + 2**-9 * ((kind, dtype) == MATRIX_UNIT)


@pytest.mark.parametrize("kind", build.KINDS)
@pytest.mark.parametrize("dtype", WEIGHTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_kind_of_cpu_normalises_and_adds_as_numpy_does(kind, dtype, shape):
    n_tokens, n_inputs, n_outputs = shape
    x, weight = 1e-3 * drawn(n_tokens, n_inputs), drawn(n_outputs, n_inputs, dtype=dtype, seed=1)
    norm, added = 1 + drawn(n_inputs, seed=2) / 4, drawn(n_tokens, n_outputs, seed=3)
    got = run_or_skip(kind, compiled, x, weight, norm=norm, eps=1e-6, added=added)
    normed = normalised(x, norm, 1e-6)
    want = np.asarray(added, np.float64) + exact(normed, weight)
    bound = bound_of(normed, weight, unit_of_normalised(kind, dtype)) + 2**-23 * abs(want)
    assert np.all(abs(got - want) <= bound)


GATED = [
    (*of, shape, has_norm)
    for of in itertools.product(build.KINDS, WEIGHTS)
    for shape in SHAPES
    if shape[0] > product_file.FEW or of == MATRIX_UNIT
    for has_norm in (False, True)
]


@pytest.mark.parametrize(("kind", "dtype", "shape", "has_norm"), GATED, ids=str)
def test_every_kind_of_cpu_gates_as_numpy_does(kind, dtype, shape, has_norm):
    n_tokens, n_inputs, n_outputs = shape
    x, weight = drawn(n_tokens, n_inputs), drawn(2 * n_outputs, n_inputs, dtype=dtype, seed=1)
    if (kind, dtype) == MATRIX_UNIT:
        x = x.astype("bfloat16")
    norm, unit, factor = None, 0.0, np.asarray(x, np.float64)
    if has_norm:
        norm, unit = 1 + drawn(n_inputs, seed=2) / 4, unit_of_normalised(kind, dtype)
        factor = normalised(x, norm, 1e-6)
    got = run_or_skip(kind, gated, x, weight, norm=norm, eps=1e-6)
    gate, up = np.split(exact(factor, weight), 2, axis=1)
    d_gate, d_up = np.split(bound_of(factor, weight, unit), 2, axis=1)
    want = gate / (1 + np.exp(-gate)) * up
    # silu's slope is below 1.1; its exponential is right to 3e-7 and to a rounding of its argument.
    bound = 1.1 * d_gate * (abs(up) + d_up) + abs(gate) * d_up
    bound += (6e-7 + 1.2e-7 * abs(gate)) * abs(want) + 1e-30
    assert np.all(abs(got - want) <= bound)


def test_gates_that_are_far_from_zero():
    gates = np.array([-np.inf, -1e30, -200, -80, 0, 200, 1e19, np.nan], np.float32)
    x = jnp.tile(jnp.asarray(gates, "bfloat16").astype("float32")[:, None], (2, 1))
    got = np.asarray(gated(x, jnp.ones((2, 1), "bfloat16")))[:8, 0]
    true = np.asarray(x[:8, 0], np.float64)
    want = [np.nan, 0, 0, true[3] ** 2 * np.exp(true[3]), 0, true[5] ** 2, true[6] ** 2, np.nan]
    np.testing.assert_allclose(got, want, rtol=2e-5)


@pytest.mark.parametrize("kind", build.KINDS)
@pytest.mark.parametrize("n_tokens", [4, 16])
def test_x_is_rounded_to_the_weights_dtype_by_a_matrix_unit_only(kind, n_tokens):
    x = jnp.full((n_tokens, 1), 1 + 2**-7 + 2**-8 + 2**-20)
    got = run_or_skip(kind, compiled, x, jnp.ones((3, 1), "bfloat16"))
    np.testing.assert_array_equal(got, 1 + 2**-6 if kind == "amx" else x[0, 0])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_number_of_16_bits_is_widened_exactly(dtype):
    bits = np.arange(2**16, dtype=np.uint16).reshape(-1, 1)
    weight = jax.lax.bitcast_convert_type(jnp.asarray(bits), dtype)
    want = np.asarray(weight.astype(jnp.float32)).T
    for n_tokens in (1, 12):
        got = np.asarray(compiled(jnp.ones((n_tokens, 1)), weight))
        # XLA's threads may flush what is subnormal in float32: it is then zero in both.
        np.testing.assert_allclose(got, np.repeat(want, n_tokens, 0), rtol=0, atol=2**-126)


@pytest.mark.parametrize("n_tokens", [4, 40])
def test_nan_stays_in_its_row_and_its_column(n_tokens):
    x = drawn(n_tokens, 40).at[2, 3].set(jnp.nan)
    weight = drawn(30, 40, dtype="bfloat16").at[5, 7].set(jnp.nan)
    is_nan = np.isnan(np.asarray(compiled(x, weight)))
    assert is_nan[2].all() and is_nan[:, 5].all()
    assert is_nan.sum() == 30 + n_tokens - 1


def test_a_token_has_the_same_bits_whoever_is_with_it_and_however_often():
    x, weight = drawn(300, 520), drawn(200, 520, dtype="bfloat16")
    whole = np.asarray(compiled(x, weight))
    for first, n in ((0, 300), (5, 9), (100, 17), (150, 150), (290, 10)):
        np.testing.assert_array_equal(compiled(x[first : first + n], weight), whole[first:][:n])
    few = np.asarray(compiled(x[:7], weight))
    for first in range(7):
        np.testing.assert_array_equal(compiled(x[first : first + 1], weight)[0], few[first])


def test_it_works_under_vmap():
    x, weight = drawn(3, 12, 40, dtype="bfloat16"), drawn(30, 40, dtype="bfloat16")
    got = jax.jit(jax.vmap(product, in_axes=(0, None)))(x, weight)
    np.testing.assert_allclose(got, exact(x, weight), atol=1e-4)


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="weight of int8"):
        product(drawn(2, 4), jnp.ones((3, 4), "int8"))
    with pytest.raises(ValueError, match=r"\(O, 4\), not \(3, 5\)"):
        product(drawn(2, 4), drawn(3, 5, dtype="bfloat16"))
    with pytest.raises(ValueError, match="two halves, not 3 rows"):
        gated(drawn(20, 4), drawn(3, 4, dtype="bfloat16"))
    with pytest.raises(REFUSAL, match="of few tokens none is gated"):
        jax.block_until_ready(gated(drawn(8, 4), drawn(6, 4)))


@pytest.mark.parametrize(
    ("y", "n_packed", "n_norm", "n_added"),
    [
        ((3, 6), 32 * 8, 0, 0), ((4, 5), 32 * 8, 0, 0), ((4, 6), 32 * 8 - 1, 8, 0),
        ((4, 6), 32 * 8, 7, 0), ((4, 6), 32 * 8, 0, 23),
    ],
    ids=str,
)  # fmt: skip
def test_native_code_writes_nothing_where_shapes_do_not_fit_together(y, n_packed, n_norm, n_added):
    x, weight, norm, added = (
        drawn(4, 8),
        drawn(6, 8, dtype="float32"),
        drawn(n_norm),
        drawn(n_added),
    )
    results = jax.ShapeDtypeStruct(y, jnp.float32), jax.ShapeDtypeStruct((n_packed,), jnp.float32)
    call = jax.ffi.ffi_call(product_file.TARGET, results)
    with pytest.raises(REFUSAL, match="shapes do not fit together"):
        jax.block_until_ready(
            call(x, weight, norm, added, eps=np.float32(0), is_gated=False, kind=np.int64(-1))
        )


def test_layers_use_it_where_the_weight_has_16_bits_and_is_whole(monkeypatch):
    monkeypatch.setattr(product_file, "check_installed", lambda: "avx2")

    def text(dtype, n_shards):
        arguments = drawn(16, 64), drawn(32, 64, dtype=dtype)
        run = jax.jit(lambda x, weight: steps.product(x, weight, n_shards))
        return run.lower(*arguments).as_text()

    for dtype, n_shards, is_ours in (
        ("bfloat16", 1, True), ("float16", 1, True), ("float32", 1, False), ("bfloat16", 2, False)
    ):  # fmt: skip
        assert ("fastgen_product" in text(dtype, n_shards)) == is_ours


def test_what_xla_multiplies_faster_is_left_to_it(monkeypatch):
    def better(kind):
        monkeypatch.setattr(product_file, "check_installed", lambda: kind)
        sizes = (1, 7, 8, 32, 33, 512)
        return ["".join("-+"[product_file.is_better(n, d)] for n in sizes) for d in WEIGHTS]

    assert WEIGHTS == ("bfloat16", "float16", "float32")
    always, never = "+" * 6, "-" * 6
    assert better("any") == better("avx2") == [always, always, never]
    assert better("avx512") == better("amx") == [always] * 3
    assert better("avx512bf16") == ["++----", always, always]


@pytest.mark.parametrize(("n_tokens", "kind"), [(3, "avx2"), (20, "avx2"), (20, "amx")])
@pytest.mark.parametrize("has_norm", [False, True])
@pytest.mark.parametrize("is_gated", [False, True])
def test_one_pass_has_the_numbers_and_gradients_of_its_steps(
    monkeypatch, n_tokens, kind, has_norm, is_gated
):
    """With few tokens CPUs without a matrix unit leave the gate to XLA."""
    x, weight = drawn(n_tokens, 64), drawn(48, 64, dtype="bfloat16")
    norm = 1 + drawn(64, seed=2) / 4 if has_norm else None
    added = None if is_gated else drawn(n_tokens, 48, seed=3)
    options = {"eps": 1e-5, "is_gated": is_gated, "n_shards": 1}
    # A matrix unit rounds what both normalised, each by itself.
    tolerance = 0.03 if check_installed() == "amx" and has_norm else 1e-4
    monkeypatch.setattr(product_file, "check_installed", lambda: kind)

    def whole(x, weight, norm, added):
        scale = None if norm is None else (norm, 1e-5)
        if is_gated:
            return steps.gated_product(x, weight, norm=scale)
        return steps.product(x, weight, norm=scale, added=added)

    in_steps = functools.partial(steps._in_steps, **options)
    arrays = x, weight, norm, added
    text = jax.jit(whole).lower(*arrays).as_text()
    assert text.count("@fastgen_product") == 1
    assert ("is_gated = true" in text) == (is_gated and (kind == "amx" or n_tokens > 8))
    np.testing.assert_allclose(
        jax.jit(whole)(*arrays), in_steps(*arrays), rtol=tolerance, atol=tolerance
    )
    of = tuple(i for i, array in enumerate(arrays) if array is not None)
    ours, twins = (
        jax.jit(jax.grad(lambda *a, f=f: jnp.sum(f(*a) ** 2), of))(*arrays)
        for f in (whole, in_steps)
    )
    for a, b in zip(ours, twins, strict=True):
        np.testing.assert_allclose(
            np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=tolerance, atol=tolerance
        )


def test_what_is_added_to_keeps_its_value_where_it_is_needed_again():
    x, weight, added = drawn(20, 64), drawn(48, 64, dtype="bfloat16"), drawn(20, 48, seed=3)
    run = jax.jit(lambda x, weight, added: (steps.product(x, weight, added=added), added - 1))
    total, kept = run(x, weight, added)
    np.testing.assert_allclose(total, added + compiled(x, weight), rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(kept, added - 1)
    np.testing.assert_array_equal(added, drawn(20, 48, seed=3))


def test_gradients_are_those_of_xlas_product():
    x, weight = drawn(20, 64), drawn(32, 64, dtype="bfloat16")

    def loss(n_shards):
        return jax.jit(jax.grad(lambda *a: jnp.sum(steps.product(*a, n_shards) ** 2), (0, 1)))

    for ours, xlas in zip(loss(1)(x, weight), loss(2)(x, weight), strict=True):
        # XLA's product rounds x to 8 bits first, and d_y with it.
        np.testing.assert_allclose(
            np.asarray(ours, np.float32), np.asarray(xlas, np.float32), rtol=0.1, atol=0.5
        )
