"""Phi 1, 1.5 and 2 (Gunasekar et al., 2023) under the names of their own code, before transformers
knew them.
"""

import dataclasses
from typing import Any

from fastgen_jax.models.config import ModelConfig, RopeConfig
from fastgen_jax.models.families import phi
from fastgen_jax.models.hf_config import only

LAYER = "transformer.h.{}"
WEIGHTS = {
    "transformer.embd.wte.weight": ("embed.weight", "plain"),
    f"{LAYER}.ln": ("layers.{}.attention_norm", "linear"),
    f"{LAYER}.mixer.Wqkv": ("layers.{}.attention.qkv", "qkv"),
    f"{LAYER}.mixer.out_proj": ("layers.{}.attention.out", "linear"),
    f"{LAYER}.mlp.fc1": ("layers.{}.mlp.up", "linear"),
    f"{LAYER}.mlp.fc2": ("layers.{}.mlp.down", "linear"),
    "lm_head.ln": ("norm", "linear"),
    "lm_head.linear": ("lm_head", "linear"),
}
IGNORED = ()


def config(hf: dict[str, Any]) -> ModelConfig:
    """The ModelConfig of a Hugging Face config.json."""
    only(hf, num_local_experts=None)  # Phixtral's
    as_phi = {
        "hidden_size": hf["n_embd"],
        "num_hidden_layers": hf["n_layer"],
        "num_attention_heads": hf["n_head"],
        "num_key_value_heads": hf.get("n_head_kv"),
        "intermediate_size": hf.get("n_inner") or 4 * hf["n_embd"],
        "max_position_embeddings": hf.get("n_positions", 2048),
        "layer_norm_eps": hf.get("layer_norm_epsilon", 1e-5),
        "hidden_act": hf.get("activation_function", "gelu_new"),
    }
    rope = RopeConfig(size=hf.get("rotary_dim", 32))
    return dataclasses.replace(phi.config(hf | as_phi), family="phi-msft", rope=rope)
