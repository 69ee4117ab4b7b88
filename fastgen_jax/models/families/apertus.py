"""Apertus (Swiss AI Initiative, 2025): Llama with norms of each head's queries and keys, and an MLP
without gate whose activation is learned.
"""

import dataclasses
from typing import Any

from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.families import llama
from fastgen_jax.models.families.qwen3 import QK_NORMS
from fastgen_jax.models.hf_config import only, without

LAYER = "model.layers.{}"
WEIGHTS = without(llama.WEIGHTS, "layernorm.weight", "gate_proj", "up_proj")
WEIGHTS |= QK_NORMS | {
    f"{LAYER}.attention_layernorm.weight": ("layers.{}.attention_norm.weight", "plain"),
    f"{LAYER}.feedforward_layernorm.weight": ("layers.{}.mlp_norm.weight", "plain"),
    f"{LAYER}.mlp.up_proj": ("layers.{}.mlp.up", "linear"),
    f"{LAYER}.mlp.act_fn.alpha_p": ("layers.{}.mlp.xielu.alpha_p", "plain"),
    f"{LAYER}.mlp.act_fn.alpha_n": ("layers.{}.mlp.xielu.alpha_n", "plain"),
    f"{LAYER}.mlp.act_fn.beta": ("layers.{}.mlp.xielu.beta", "plain"),
}
IGNORED = (*llama.IGNORED, f"{LAYER}.mlp.act_fn.eps")  # a millionth, for the sake of gradients
ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "original_max_position_embeddings": 8192,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}


def config(hf: dict[str, Any]) -> ModelConfig:
    """The ModelConfig of a Hugging Face config.json."""
    only(hf, hidden_act="xielu", post_norm=False, mlp_bias=False)
    hf = {"rope_theta": 12e6, "rms_norm_eps": 1e-5} | hf | {"hidden_act": "silu"}
    if not (hf.get("rope_parameters") or hf.get("rope_scaling")):
        hf |= {"rope_scaling": ROPE}
    return dataclasses.replace(
        llama.config(hf),
        family="apertus",
        qk_norm="head" if hf.get("qk_norm", True) else None,
        activation="xielu",
        gated_mlp=False,
    )
