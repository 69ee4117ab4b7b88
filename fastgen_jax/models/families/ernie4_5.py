"""ERNIE 4.5 (Baidu, 2025) without experts: Llama with rotary pairs that are neighbours."""

import dataclasses
from typing import Any

from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.families import llama
from fastgen_jax.models.hf_config import hf_rope, only

WEIGHTS, IGNORED = llama.WEIGHTS, llama.IGNORED


def config(hf: dict[str, Any]) -> ModelConfig:
    """The ModelConfig of a Hugging Face config.json."""
    only(hf, compression_ratio=1)  # of positions
    hf = {"head_dim": 128, "tie_word_embeddings": True, "rope_theta": 500000.0} | hf
    has_bias = hf.get("use_bias", False)
    return dataclasses.replace(
        llama.config({"rms_norm_eps": 1e-5} | hf),
        family="ernie4_5",
        rope=hf_rope(hf, interleaved=True),
        qkv_bias=has_bias,
        out_bias=has_bias,
        mlp_bias=has_bias,
    )
