"""MXFP4, the format of GPT-OSS's experts (OCP Microscaling Formats 1.0): 32 numbers of 4 bits (a
sign, 2 of exponent, 1 of mantissa) share one power of two.
"""

import numpy as np
from ml_dtypes import bfloat16

BLOCK_SIZE = 32
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
NUMBERS = np.array([*MAGNITUDES, *(-m for m in MAGNITUDES)], np.float32)
PAIRS = np.stack([np.tile(NUMBERS, 16), np.repeat(NUMBERS, 16)], axis=1)  # that a byte holds
SCALES = np.array([*(2.0**e for e in range(-127, 128)), np.nan], np.float32)


def dequantize(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Numbers "E O I" in bfloat16, which holds each of them exactly.

    Args:
        blocks: "E O I/32 16" uint8, two numbers each, the first in the lower half.
        scales: "E O I/32" uint8, exponents of two plus 127.
    """
    out = np.empty((*blocks.shape, 2), bfloat16)
    for i in range(len(blocks)):  # not all at once: in float32 they take twice the memory
        numbers = np.take(PAIRS, blocks[i], axis=0)
        numbers *= SCALES[scales[i]][..., None, None]
        out[i] = numbers
    return out.reshape(*blocks.shape[:2], -1)
