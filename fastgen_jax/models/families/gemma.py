"""Gemma (Gemma Team, 2024): Llama with norms around one, scaled embeddings and another GELU."""

import dataclasses
from typing import Any

from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.families import llama
from fastgen_jax.models.hf_config import only

WEIGHTS, IGNORED = llama.WEIGHTS, llama.IGNORED


def config(hf: dict[str, Any]) -> ModelConfig:
    """The ModelConfig of a Hugging Face config.json."""
    only(hf, use_bidirectional_attention=False)
    activation = hf.get("hidden_activation") or hf.get("hidden_act", "gelu")
    if not hf.get("hidden_activation") and activation == "gelu":
        activation = "gelu_pytorch_tanh"  # what the first configs meant
    hf = {"head_dim": 256, "tie_word_embeddings": True} | hf | {"hidden_act": activation}
    return dataclasses.replace(
        llama.config(hf), family="gemma", norm_offset=1.0, embedding_scale=hf["hidden_size"] ** 0.5
    )
