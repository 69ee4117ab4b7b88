"""GPT-OSS (OpenAI, 2025): attention sinks, windows in every other layer, experts with biases and a
clamped gate.
"""

import dataclasses
from typing import Any

from fastgen_jax.errors import ConfigError
from fastgen_jax.models.config import ModelConfig, MoeConfig
from fastgen_jax.models.families import llama
from fastgen_jax.models.hf_config import layer_windows, without
from fastgen_jax.models.moe import GLU_SLOPE

MLP = "model.layers.{}.mlp"
WEIGHTS = without(llama.WEIGHTS, ".mlp.") | {
    "model.layers.{}.self_attn.sinks": ("layers.{}.attention.sinks", "plain"),
    f"{MLP}.router.weight": ("layers.{}.mlp.router", "plain"),
    f"{MLP}.router.bias": ("layers.{}.mlp.router_bias", "plain"),
    f"{MLP}.experts.gate_up_proj": ("layers.{}.mlp.gate_up", "experts_gate_up"),
    f"{MLP}.experts.gate_up_proj_bias": ("layers.{}.mlp.gate_up_bias", "experts_gate_up"),
    f"{MLP}.experts.down_proj": ("layers.{}.mlp.down", "experts"),
    f"{MLP}.experts.down_proj_bias": ("layers.{}.mlp.down_bias", "plain"),
}
IGNORED = llama.IGNORED
DEFAULTS = {
    "attention_bias": True,
    "head_dim": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 150000.0,
    "sliding_window": 128,
    "swiglu_alpha": GLU_SLOPE,
    "swiglu_limit": 7.0,
}


def config(hf: dict[str, Any]) -> ModelConfig:
    """The ModelConfig of a Hugging Face config.json."""
    hf = DEFAULTS | hf
    if not (hf.get("rope_parameters") or hf.get("rope_scaling")):
        raise ConfigError("gpt_oss: config.json needs rope_scaling or rope_parameters")
    if hf["swiglu_alpha"] != GLU_SLOPE:
        raise ConfigError(f"gpt_oss: swiglu_alpha={hf['swiglu_alpha']!r} is not supported")
    moe = MoeConfig(
        n_experts=hf["num_local_experts"],
        n_chosen=hf["num_experts_per_tok"],
        ffn_size=hf["intermediate_size"],
        layers=tuple(range(hf["num_hidden_layers"])),
        scores="chosen",
        router_bias=True,
        expert_bias=True,
        clamp=float(hf["swiglu_limit"]),
    )
    windows = layer_windows(hf, every=2)
    return dataclasses.replace(
        llama.config(hf), family="gpt_oss", sinks=True, windows=windows, moe=moe
    )
