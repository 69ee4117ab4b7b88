"""Nemotron 4 and Minitron (NVIDIA, 2024): Llama with layer norms around one and an MLP without gate
and squared ReLU; the first half of a head turns.
"""

import dataclasses
from typing import Any

from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.families import arcee
from fastgen_jax.models.hf_config import hf_rope

LAYER = "model.layers.{}"
WEIGHTS = {name: entry for name, entry in arcee.WEIGHTS.items() if "norm" not in name} | {
    f"{LAYER}.input_layernorm": ("layers.{}.attention_norm", "linear"),
    f"{LAYER}.post_attention_layernorm": ("layers.{}.mlp_norm", "linear"),
    "model.norm": ("norm", "linear"),
}
IGNORED = arcee.IGNORED


def config(hf: dict[str, Any]) -> ModelConfig:
    """The ModelConfig of a Hugging Face config.json."""
    return dataclasses.replace(
        arcee.config(hf),
        family="nemotron",
        norm="layer",
        norm_eps=hf.get("norm_eps", 1e-5),
        norm_offset=1.0,
        rope=hf_rope({"partial_rotary_factor": 0.5} | hf),
    )
