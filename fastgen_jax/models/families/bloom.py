"""BLOOM (BigScience Workshop, 2022): ALiBi, and a norm of the embeddings."""

from typing import Any

from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.hf_config import alibi_slopes, field, only, token_ids

LAYER = "transformer.h.{}"
WEIGHTS = {
    "transformer.word_embeddings.weight": ("embed.weight", "plain"),
    "transformer.word_embeddings_layernorm": ("embed_norm", "linear"),
    f"{LAYER}.input_layernorm": ("layers.{}.attention_norm", "linear"),
    f"{LAYER}.self_attention.query_key_value": ("layers.{}.attention.qkv", "linear"),
    f"{LAYER}.self_attention.dense": ("layers.{}.attention.out", "linear"),
    f"{LAYER}.post_attention_layernorm": ("layers.{}.mlp_norm", "linear"),
    f"{LAYER}.mlp.dense_h_to_4h": ("layers.{}.mlp.up", "linear"),
    f"{LAYER}.mlp.dense_4h_to_h": ("layers.{}.mlp.down", "linear"),
    "transformer.ln_f": ("norm", "linear"),
    "lm_head": ("lm_head", "linear"),
}
IGNORED = ()


def config(hf: dict[str, Any]) -> ModelConfig:
    """The ModelConfig of a Hugging Face config.json."""
    only(hf, apply_residual_connection_post_layernorm=False)
    hidden_size = field(hf, "hidden_size", "n_embed")
    n_heads = field(hf, "n_head", "num_attention_heads")
    return ModelConfig(
        family="bloom",
        vocab_size=hf["vocab_size"],
        hidden_size=hidden_size,
        n_layers=field(hf, "n_layer", "num_hidden_layers"),
        n_heads=n_heads,
        n_kv_heads=n_heads,
        head_dim=hidden_size // n_heads,
        ffn_size=hf.get("n_inner") or 4 * hidden_size,
        max_position=hf.get("seq_length", 2048),  # of training; ALiBi itself has no limit
        norm="layer",
        norm_eps=hf.get("layer_norm_epsilon", 1e-5),
        embedding_norm=True,
        rope=None,
        alibi_slopes=alibi_slopes(n_heads),
        qkv_bias=True,
        out_bias=True,
        activation="gelu_tanh",
        gated_mlp=False,
        mlp_bias=True,
        tie_embeddings=hf.get("tie_word_embeddings", True),
        eos_token_ids=token_ids(hf.get("eos_token_id", 2)),
        bos_token_id=hf.get("bos_token_id", 1),
    )
