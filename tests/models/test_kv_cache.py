"""What 8 bits for keys and values do to logits; benchmarks.models.kv_cache measures it widely."""

import dataclasses

import jax.numpy as jnp
import pytest

from benchmarks.models import kv_cache
from fastgen_jax.engine import startup
from pallas_kernels import quantize, reference

# Nats, of the mean divergence: twice what was measured of gpt_oss; see benchmarks/results.
BOUNDS = {"int8": 1.1e-3, "fp8": 2e-2}
NAMES = ["gpt_oss", "deepseek_v3"]


def next_tokens_scales(x, dtype):
    cells, scales = quantize(x, dtype)
    return cells, jnp.roll(scales, 1, axis=0)


@pytest.mark.parametrize("name", NAMES)
def test_logits_stay_within_what_was_measured(name):
    for dtype, effect in kv_cache.golden_of(name).items():
        assert 0 < effect.kl < BOUNDS[dtype]


def test_wrong_scales_break_the_bounds(monkeypatch):
    cpu = dataclasses.replace(startup.BACKENDS["cpu"], attention="reference")
    monkeypatch.setitem(startup.BACKENDS, "cpu", cpu)
    monkeypatch.setattr(reference, "quantize", next_tokens_scales)
    for dtype, effect in kv_cache.golden_of(NAMES[0]).items():
        assert effect.kl > BOUNDS[dtype]
