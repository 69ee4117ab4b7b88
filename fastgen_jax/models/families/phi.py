"""Phi 1, 1.5 and 2 (Gunasekar et al., 2023): one norm before parallel attention and MLP, and biases
everywhere.
"""

from typing import Any

from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.hf_config import activation, hf_rope, only, token_ids

LAYER = "model.layers.{}"
WEIGHTS = {
    "model.embed_tokens.weight": ("embed.weight", "plain"),
    f"{LAYER}.input_layernorm": ("layers.{}.attention_norm", "linear"),
    f"{LAYER}.self_attn.q_proj": ("layers.{}.attention.qkv", "q"),
    f"{LAYER}.self_attn.k_proj": ("layers.{}.attention.qkv", "k"),
    f"{LAYER}.self_attn.v_proj": ("layers.{}.attention.qkv", "v"),
    f"{LAYER}.self_attn.dense": ("layers.{}.attention.out", "linear"),
    f"{LAYER}.mlp.fc1": ("layers.{}.mlp.up", "linear"),
    f"{LAYER}.mlp.fc2": ("layers.{}.mlp.down", "linear"),
    "model.final_layernorm": ("norm", "linear"),
    "lm_head": ("lm_head", "linear"),
}
IGNORED = ()


def config(hf: dict[str, Any]) -> ModelConfig:
    """The ModelConfig of a Hugging Face config.json."""
    only(hf, qk_layernorm=False)
    n_heads = hf["num_attention_heads"]
    return ModelConfig(
        family="phi",
        vocab_size=hf["vocab_size"],
        hidden_size=hf["hidden_size"],
        n_layers=hf["num_hidden_layers"],
        n_heads=n_heads,
        n_kv_heads=hf.get("num_key_value_heads") or n_heads,
        head_dim=hf["hidden_size"] // n_heads,
        ffn_size=hf["intermediate_size"],
        max_position=hf.get("max_position_embeddings", 2048),
        residual="parallel",
        shared_norm=True,
        norm="layer",
        norm_eps=hf.get("layer_norm_eps", 1e-5),
        rope=hf_rope({"partial_rotary_factor": 0.5} | hf),
        qkv_bias=True,
        out_bias=True,
        activation=activation(hf.get("hidden_act", "gelu_new")),
        gated_mlp=False,
        mlp_bias=True,
        tie_embeddings=hf.get("tie_word_embeddings", False),
        head_bias=True,
        eos_token_ids=token_ids(hf.get("eos_token_id")),
        bos_token_id=hf.get("bos_token_id"),
    )
