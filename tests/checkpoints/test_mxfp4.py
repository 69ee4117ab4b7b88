"""MXFP4 against values of transformers' `convert_moe_packed_tensors`, and against the format."""

from pathlib import Path

import numpy as np
import pytest
from ml_dtypes import bfloat16

from fastgen_jax.checkpoints.mxfp4 import dequantize
from fastgen_jax.checkpoints.quantised import unquantised
from fastgen_jax.checkpoints.tensor_files import Stored

BLOCKS = (np.arange(64) * 37 % 256).astype(np.uint8).reshape(1, 2, 2, 16)
SCALES = np.array([127, 131, 0, 126], np.uint8).reshape(1, 2, 2)
# What transformers makes of each of the four blocks, each divided by its scale.
EXPECTED = np.array(
    [
        *(0.0, 0.0, 3.0, 1.0, -1.0, 2.0, -6.0, 4.0, 2.0, -0.5, -0.5, -1.5, -4.0, -3.0, 1.5, 0.0),
        *(-0.0, 1.0, -3.0, 2.0, 1.0, 6.0, 6.0, -0.5, -2.0, -1.5, 0.5, -4.0, 4.0, 0.0, -1.5, 1.0),
        *(0.0, 3.0, 3.0, 6.0, -1.0, -0.5, -6.0, -1.5, 2.0, -4.0, -0.5, 0.0, -4.0, 1.0, 1.5, 3.0),
        *(-0.0, 6.0, -3.0, -0.5, 1.0, -2.0, 6.0, -4.0, -2.0, 0.0, 0.5, 1.5, 4.0, 3.0, -1.5, 6.0),
    ]
).reshape(2, 32)


def test_values_are_those_of_transformers():
    numbers = dequantize(BLOCKS, SCALES)
    assert numbers.dtype == bfloat16
    assert numbers.shape == (1, 2, 64)
    np.testing.assert_array_equal(numbers[0, 0, :32].astype(np.float64), EXPECTED[0])
    np.testing.assert_array_equal(numbers[0, 0, 32:].astype(np.float64), 16 * EXPECTED[1])


@pytest.mark.parametrize("scale", [0, 1, 127, 252])
def test_every_byte_is_two_numbers_times_the_scale_exactly(scale):
    magnitudes = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    numbers = np.array(magnitudes + [-m for m in magnitudes]) * 2.0 ** (scale - 127)
    blocks = np.arange(256, dtype=np.uint8).reshape(2, 4, 2, 16)
    out = dequantize(blocks, np.full((2, 4, 2), scale, np.uint8)).astype(np.float64).reshape(256, 2)
    np.testing.assert_array_equal(out[:, 0], numbers[np.arange(256) % 16])
    np.testing.assert_array_equal(out[:, 1], numbers[np.arange(256) // 16])


def test_the_scale_that_is_no_number_makes_none():
    assert np.isnan(dequantize(BLOCKS, np.full_like(SCALES, 255)).astype(np.float32)).all()


def stored(name: str, shape: tuple[int, ...], dtype: str = "uint8") -> Stored:
    return Stored(Path("model.safetensors"), name, shape, np.dtype(dtype), 0)


MXFP4 = {"quantization_config": {"quant_method": "mxfp4"}}


def test_blocks_and_scales_are_one_tensor_of_experts():
    pair = [stored("w_blocks", (5, 6, 2, 16)), stored("w_scales", (5, 6, 2)), stored("b", (5,))]
    tensors, problems = unquantised(MXFP4, {tensor.name: tensor for tensor in pair})
    assert not problems
    assert {name: tensor.shape for name, tensor in tensors.items()} == {"w": (5, 64, 6), "b": (5,)}


@pytest.mark.parametrize(
    ("blocks", "scales"),
    [
        (stored("w_blocks", (5, 6, 2, 16)), stored("w_scales", (5, 6, 3))),
        (stored("w_blocks", (5, 6, 2, 8)), stored("w_scales", (5, 6, 2))),
        (stored("w_blocks", (6, 2, 16)), stored("w_scales", (6, 2))),
        (stored("w_blocks", (5, 6, 2, 16), "int8"), stored("w_scales", (5, 6, 2))),
        (stored("w_blocks", (5, 6, 2, 16)), stored("w_scales", (5, 6, 2), "float16")),
    ],
)
def test_blocks_that_do_not_fit_their_scales_are_named(blocks, scales):
    _, problems = unquantised(MXFP4, {"w_blocks": blocks, "w_scales": scales})
    (problem,) = problems
    assert "w_blocks in model.safetensors" in problem
    assert "not MXFP4" in problem
