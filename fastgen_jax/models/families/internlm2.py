"""InternLM2 and 2.5 (Cai et al., 2024), whose checkpoints bring their own code: Llama under other
names.
"""

import dataclasses
from typing import Any

from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.families import llama

LAYER = "model.layers.{}"
# Each KV head's queries, key and value follow one another, as ours do.
WEIGHTS = {
    "model.tok_embeddings.weight": ("embed.weight", "plain"),
    f"{LAYER}.attention_norm.weight": ("layers.{}.attention_norm.weight", "plain"),
    f"{LAYER}.attention.wqkv": ("layers.{}.attention.qkv", "linear"),
    f"{LAYER}.attention.wo": ("layers.{}.attention.out", "linear"),
    f"{LAYER}.ffn_norm.weight": ("layers.{}.mlp_norm.weight", "plain"),
    f"{LAYER}.feed_forward.w1": ("layers.{}.mlp.gate_up", "gate"),
    f"{LAYER}.feed_forward.w3": ("layers.{}.mlp.gate_up", "up"),
    f"{LAYER}.feed_forward.w2": ("layers.{}.mlp.down", "linear"),
    "model.norm.weight": ("norm.weight", "plain"),
    "output": ("lm_head", "linear"),
}
IGNORED = ()


def config(hf: dict[str, Any]) -> ModelConfig:
    """The ModelConfig of a Hugging Face config.json."""
    has_bias = hf.get("bias", True)
    return dataclasses.replace(
        llama.config(hf), family="internlm2", qkv_bias=has_bias, out_bias=has_bias
    )
