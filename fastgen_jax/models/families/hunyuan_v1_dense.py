"""Hunyuan (Tencent, 2025) without experts: Llama with norms of each head's queries and keys after
they are turned.
"""

import dataclasses
from typing import Any

from fastgen_jax.models.config import ModelConfig, RopeConfig
from fastgen_jax.models.families import llama
from fastgen_jax.models.hf_config import hf_rope, only

ATTENTION = "model.layers.{}.self_attn"
WEIGHTS = llama.WEIGHTS | {
    f"{ATTENTION}.query_layernorm.weight": ("layers.{}.attention.q_norm.weight", "plain"),
    f"{ATTENTION}.key_layernorm.weight": ("layers.{}.attention.k_norm.weight", "plain"),
}
IGNORED = llama.IGNORED


def config(hf: dict[str, Any]) -> ModelConfig:
    """The ModelConfig of a Hugging Face config.json."""
    only(hf, use_cla=False)  # keys and values that layers share
    return dataclasses.replace(
        llama.config({"rms_norm_eps": 1e-5} | hf),
        family="hunyuan_v1_dense",
        rope=ntk_rope(hf),
        qk_norm="head" if hf.get("use_qk_norm", True) else None,
        qk_norm_last=True,
    )


def ntk_rope(hf: dict[str, Any]) -> RopeConfig:
    """What is called dynamic with an `alpha` is a larger base, whatever the length."""
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    if not rope.get("alpha"):
        return hf_rope(hf)
    plain = hf_rope(hf | {"rope_parameters": rope | {"rope_type": "default"}})
    size = hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"]
    return dataclasses.replace(plain, theta=plain.theta * rope["alpha"] ** (size / (size - 2)))
