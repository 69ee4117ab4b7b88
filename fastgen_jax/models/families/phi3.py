"""Phi-3, Phi-3.5 and Phi-4 (Abdin et al., 2024): Llama with fused products, a sliding window, and
LongRoPE (Ding et al., 2024) for long contexts.
"""

import dataclasses
from typing import Any

from fastgen_jax.errors import ConfigError
from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.families import llama
from fastgen_jax.models.hf_config import layer_windows, only, without

WEIGHTS = without(llama.WEIGHTS, "q_proj", "k_proj", "v_proj", "gate_proj", "up_proj") | {
    "model.layers.{}.self_attn.qkv_proj": ("layers.{}.attention.qkv", "qkv"),
    "model.layers.{}.mlp.gate_up_proj": ("layers.{}.mlp.gate_up", "gate_up"),
}
IGNORED = llama.IGNORED


def config(hf: dict[str, Any]) -> ModelConfig:
    """The ModelConfig of a Hugging Face config.json."""
    only(hf, attention_bias=False, mlp_bias=False, lm_head_bias=False)
    base = llama.config(hf)
    if base.rope is None or base.rope.kind not in ("default", "longrope"):
        raise ConfigError("phi3 with a rope type other than longrope is not supported")
    return dataclasses.replace(base, family="phi3", windows=layer_windows(hf))
