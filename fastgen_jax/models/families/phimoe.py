"""Phi-3.5-MoE (Abdin et al., 2024): Mixtral with layer norms, biases and LongRoPE, whose router is
a SparseMixer.
"""

import dataclasses
from typing import Any

from fastgen_jax.errors import ConfigError
from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.families import llama, mixtral
from fastgen_jax.models.hf_config import layer_windows, only, without

WEIGHTS = without(mixtral.WEIGHTS, "norm") | llama.LAYER_NORMS
IGNORED = llama.IGNORED
DEFAULTS = {"rms_norm_eps": 1e-5, "rope_theta": 1e6, "router_jitter_noise": 0.01}


def config(hf: dict[str, Any]) -> ModelConfig:
    """The ModelConfig of a Hugging Face config.json."""
    hf = DEFAULTS | hf
    only(hf, num_experts_per_tok=2)
    base = llama.config(hf)
    if base.rope is None or base.rope.kind not in ("default", "longrope"):
        raise ConfigError("phimoe with a rope type other than longrope is not supported")
    experts = dataclasses.replace(
        mixtral.mixture(hf), scores="sparsemixer", tolerance=2 * hf["router_jitter_noise"]
    )
    return dataclasses.replace(
        base,
        family="phimoe",
        norm="layer",
        head_bias=hf.get("lm_head_bias", False),
        windows=layer_windows(hf),
        moe=experts,
    )
