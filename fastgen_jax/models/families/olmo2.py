"""OLMo 2 (OLMo Team, 2024): Llama with norms after attention and MLP, and of all heads' queries and
keys together.
"""

import dataclasses
from typing import Any

from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.families import llama
from fastgen_jax.models.families.qwen3 import QK_NORMS

NORM = "model.layers.{}"
OUT_NORMS = {
    f"{NORM}.post_attention_layernorm.weight": ("layers.{}.attention_out_norm.weight", "plain"),
    f"{NORM}.post_feedforward_layernorm.weight": ("layers.{}.mlp_out_norm.weight", "plain"),
}
WEIGHTS = llama.WEIGHTS | QK_NORMS | OUT_NORMS
del WEIGHTS[f"{NORM}.input_layernorm.weight"]
IGNORED = llama.IGNORED


def config(hf: dict[str, Any]) -> ModelConfig:
    """The ModelConfig of a Hugging Face config.json."""
    hf = {"rms_norm_eps": 1e-5} | hf
    return dataclasses.replace(
        llama.config(hf), family="olmo2", norm_places=("after",), qk_norm="all"
    )
