"""Rotary position embedding (Su et al., 2021) and every way of stretching it to longer contexts.

Frequencies are computed on the host in float32, as transformers computes them; only the dynamic
kind depends on the positions of a batch.
"""

import math
from functools import lru_cache

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from fastgen_jax.models.config import RopeConfig


class Rotation:
    """Of one batch of tokens: turns the first `size` elements of each head, and leaves the rest.

    Pairs are halves (i, i + size/2) as in Llama, or neighbours (2i, 2i + 1) as in GPT-J.
    """

    def __init__(self, positions: Int[Array, "T"], head_dim: int, rope: RopeConfig):
        self.size = rope.size or head_dim
        self.is_interleaved = rope.interleaved
        frequencies, scale = token_frequencies(positions, self.size, rope)
        angles = positions.astype(jnp.float32)[:, None] * frequencies  # T R/2
        cos, sin = jnp.cos(angles) * scale, jnp.sin(angles) * scale
        # T 1 2 R/2. Stacked both: XLA:CPU fuses a cosine alone into every layer, for every head.
        self.cos = jnp.stack([cos, cos], axis=1)[:, None]
        self.sin = jnp.stack([-sin, sin], axis=1)[:, None]

    def __call__(self, x: Float[Array, "T N H"]) -> Float[Array, "T N H"]:
        if self.size < x.shape[2]:
            turned, kept = x[:, :, : self.size], x[:, :, self.size :]
            return jnp.concatenate([self._turn(turned), kept], axis=2)
        return self._turn(x)

    def _turn(self, x: Float[Array, "T N R"]) -> Float[Array, "T N R"]:
        shape = (*x.shape[:2], -1, 2) if self.is_interleaved else (*x.shape[:2], 2, self.size // 2)
        pairs = x.astype(jnp.float32).reshape(shape)
        if self.is_interleaved:
            pairs = pairs.swapaxes(2, 3)
        turned = pairs * self.cos + pairs[:, :, ::-1] * self.sin  # a c - b s, b c + a s
        if self.is_interleaved:
            turned = turned.swapaxes(2, 3)
        return turned.reshape(x.shape).astype(x.dtype)


def token_frequencies(
    positions: Int[Array, "T"], size: int, rope: RopeConfig
) -> tuple[Float[Array, "#T R/2"], float]:
    """Angular frequencies per token (one row for all tokens unless the kind is dynamic) and a
    factor on cos and sin.

    Dynamic NTK: a token at position p uses the base that fits a context of p + 1, as transformers
    does when it decodes token by token. So the result does not depend on how a prompt is cut into
    chunks.
    """
    if rope.kind != "dynamic":
        frequencies, scale = rope_frequencies(size, rope)
        return jnp.asarray(frequencies)[None], scale
    assert rope.original_max_position is not None
    original = float(rope.original_max_position)
    length = jnp.maximum(positions.astype(jnp.float32) + 1.0, original)[:, None]
    base = rope.theta * (rope.factor * length / original - (rope.factor - 1.0)) ** (
        size / (size - 2)
    )
    exponents = jnp.asarray(np.arange(0, size, 2, dtype=np.float32) / size)[None]
    return 1.0 / base**exponents, 1.0


@lru_cache
def rope_frequencies(size: int, rope: RopeConfig) -> tuple[np.ndarray, float]:
    """Angular frequencies "R/2" in float32 and the factor on cos and sin, on the host."""
    exponents = np.arange(0, size, 2, dtype=np.float32) / np.float32(size)
    plain = (1.0 / np.float32(rope.theta) ** exponents).astype(np.float32)
    match rope.kind:
        case "default":
            return plain, 1.0
        case "linear":
            return plain / np.float32(rope.factor), 1.0
        case "llama3":
            return _llama3(plain, rope), 1.0
        case "yarn":
            return _yarn(plain, size, rope), _yarn_scale(rope)
        case "longrope":
            factors = rope.long_factor if rope.is_long else rope.short_factor
            return plain / np.array(factors, np.float32), _longrope_scale(rope)
    raise AssertionError(rope.kind)


def _llama3(plain: np.ndarray, rope: RopeConfig) -> np.ndarray:
    """Llama 3.1: long wavelengths divided by the factor, short ones kept, a ramp between."""
    assert rope.original_max_position is not None
    turns = rope.original_max_position * plain / (2 * math.pi)  # within the original context
    ramp = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    keep = np.clip(ramp, 0.0, 1.0)
    return (plain * keep + plain / rope.factor * (1 - keep)).astype(np.float32)


def _yarn(plain: np.ndarray, size: int, rope: RopeConfig) -> np.ndarray:
    """YaRN (Peng et al., 2023), equation 23: interpolate dimensions that turn seldom, keep those
    that turn often.
    """
    assert rope.original_max_position is not None
    length = rope.original_max_position

    def dimension(turns: float) -> float:
        wavelength = length / (turns * 2 * math.pi)
        return size * math.log(wavelength) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    ramp = (np.arange(size // 2, dtype=np.float32) - low) / max(high - low, 0.001)
    keep = 1 - np.clip(ramp, 0.0, 1.0)
    return (plain / rope.factor * (1 - keep) + plain * keep).astype(np.float32)


def _yarn_scale(rope: RopeConfig) -> float:
    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0

    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return mscale(rope.mscale) / mscale(rope.mscale_all_dim)
    return mscale(1.0)


def _longrope_scale(rope: RopeConfig) -> float:
    """LongRoPE (Ding et al., 2024), as Phi-3 uses it, or as Phi-3.5-MoE says."""
    mscale = rope.long_mscale if rope.is_long else rope.short_mscale
    given = mscale if rope.attention_factor is None else rope.attention_factor
    if given is not None:
        return given
    assert rope.original_max_position is not None
    if rope.factor <= 1:
        return 1.0
    return math.sqrt(1 + math.log(rope.factor) / math.log(rope.original_max_position))
