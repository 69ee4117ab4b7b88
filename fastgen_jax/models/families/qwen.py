"""Qwen (Bai et al., 2023), the first one, whose checkpoints bring their own code: Llama with biases
of queries, keys and values, under other names.

Its tricks for contexts beyond `seq_length` (dynamic NTK, log-n attention) do nothing within it, so
`seq_length` is the longest context that is served.
"""

import dataclasses
from typing import Any

from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.families import llama
from fastgen_jax.models.hf_config import only

LAYER = "transformer.h.{}"
WEIGHTS = {
    "transformer.wte.weight": ("embed.weight", "plain"),
    f"{LAYER}.ln_1.weight": ("layers.{}.attention_norm.weight", "plain"),
    f"{LAYER}.attn.c_attn": ("layers.{}.attention.qkv", "qkv"),
    f"{LAYER}.attn.c_proj": ("layers.{}.attention.out", "linear"),
    f"{LAYER}.ln_2.weight": ("layers.{}.mlp_norm.weight", "plain"),
    f"{LAYER}.mlp.w1": ("layers.{}.mlp.gate_up", "up"),
    f"{LAYER}.mlp.w2": ("layers.{}.mlp.gate_up", "gate"),
    f"{LAYER}.mlp.c_proj": ("layers.{}.mlp.down", "linear"),
    "transformer.ln_f.weight": ("norm.weight", "plain"),
    "lm_head": ("lm_head", "linear"),
}
IGNORED = ()


def config(hf: dict[str, Any]) -> ModelConfig:
    """The ModelConfig of a Hugging Face config.json."""
    only(hf, scale_attn_weights=True)
    as_llama = {
        "head_dim": hf["kv_channels"],
        "intermediate_size": hf["intermediate_size"] // 2,  # of gate and up together
        "max_position_embeddings": hf["seq_length"],
        "rms_norm_eps": hf.get("layer_norm_epsilon", 1e-6),
        "rope_theta": hf.get("rotary_emb_base"),
        "partial_rotary_factor": hf.get("rotary_pct"),
    }
    has_bias = not hf.get("no_bias", True)
    return dataclasses.replace(
        llama.config(hf | as_llama),
        family="qwen",
        qkv_bias=True,
        out_bias=has_bias,
        mlp_bias=has_bias,
    )
