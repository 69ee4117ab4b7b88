"""Helium 1 (Kyutai, 2025): Llama with rotary pairs that are neighbours."""

import dataclasses
from typing import Any

from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.families import llama
from fastgen_jax.models.hf_config import hf_rope

WEIGHTS, IGNORED = llama.WEIGHTS, llama.IGNORED


def config(hf: dict[str, Any]) -> ModelConfig:
    """The ModelConfig of a Hugging Face config.json."""
    hf = {"head_dim": 128, "rms_norm_eps": 1e-8, "rope_theta": 100000.0} | hf
    return dataclasses.replace(
        llama.config(hf),
        family="helium",
        rope=hf_rope(hf, interleaved=True),
        out_bias=False,
    )
