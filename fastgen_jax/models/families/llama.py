"""Llama 1, 2 and 3 (Touvron et al., 2023; Dubey et al., 2024) and models of the same shape."""

from typing import Any

from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.hf_config import activation, hf_rope, token_ids

# HF tensor name -> (path of our parameter, which part of it); {} is the layer.
WEIGHTS = {
    "model.embed_tokens.weight": ("embed.weight", "plain"),
    "model.layers.{}.input_layernorm.weight": ("layers.{}.attention_norm.weight", "plain"),
    "model.layers.{}.self_attn.q_proj": ("layers.{}.attention.qkv", "q"),
    "model.layers.{}.self_attn.k_proj": ("layers.{}.attention.qkv", "k"),
    "model.layers.{}.self_attn.v_proj": ("layers.{}.attention.qkv", "v"),
    "model.layers.{}.self_attn.o_proj": ("layers.{}.attention.out", "linear"),
    "model.layers.{}.post_attention_layernorm.weight": ("layers.{}.mlp_norm.weight", "plain"),
    "model.layers.{}.mlp.gate_proj": ("layers.{}.mlp.gate_up", "gate"),
    "model.layers.{}.mlp.up_proj": ("layers.{}.mlp.gate_up", "up"),
    "model.layers.{}.mlp.down_proj": ("layers.{}.mlp.down", "linear"),
    "model.norm.weight": ("norm.weight", "plain"),
    "lm_head": ("lm_head", "linear"),
}
# Where the norms of a family of these names are layer norms, which have biases.
LAYER_NORMS = {
    "model.layers.{}.input_layernorm": ("layers.{}.attention_norm", "linear"),
    "model.layers.{}.post_attention_layernorm": ("layers.{}.mlp_norm", "linear"),
    "model.norm": ("norm", "linear"),
}
IGNORED = ()  # tensors that checkpoints carry and nothing needs


def config(hf: dict[str, Any]) -> ModelConfig:
    """The ModelConfig of a Hugging Face config.json."""
    n_heads = hf["num_attention_heads"]
    return ModelConfig(
        family="llama",
        vocab_size=hf["vocab_size"],
        hidden_size=hf["hidden_size"],
        n_layers=hf["num_hidden_layers"],
        n_heads=n_heads,
        n_kv_heads=hf.get("num_key_value_heads") or n_heads,
        head_dim=hf.get("head_dim") or hf["hidden_size"] // n_heads,
        ffn_size=hf["intermediate_size"],
        max_position=hf.get("max_position_embeddings", 2048),
        norm_eps=hf.get("rms_norm_eps", 1e-6),
        rope=hf_rope(hf),
        tie_embeddings=hf.get("tie_word_embeddings", False),
        qkv_bias=hf.get("attention_bias", False),
        out_bias=hf.get("attention_bias", False),
        mlp_bias=hf.get("mlp_bias", False),
        activation=activation(hf.get("hidden_act", "silu")),
        eos_token_ids=token_ids(hf.get("eos_token_id")),
        bos_token_id=hf.get("bos_token_id"),
    )
