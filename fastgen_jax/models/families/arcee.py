"""AFM (Arcee AI, 2025): Llama with an MLP without gate and squared ReLU."""

import dataclasses
from typing import Any

from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.families import llama
from fastgen_jax.models.hf_config import without

WEIGHTS = without(llama.WEIGHTS, "gate_proj", "up_proj") | {
    "model.layers.{}.mlp.up_proj": ("layers.{}.mlp.up", "linear"),
}
IGNORED = llama.IGNORED


def config(hf: dict[str, Any]) -> ModelConfig:
    """The ModelConfig of a Hugging Face config.json."""
    hf = {"hidden_act": "relu2", "rms_norm_eps": 1e-5} | hf
    return dataclasses.replace(llama.config(hf), family="arcee", gated_mlp=False)
