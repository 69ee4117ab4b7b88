"""Falcon (Almazrouei et al., 2023): 7B with one KV head, 40B, 180B and 11B with several, and the RW
models with ALiBi.

ALiBi is scaled as the scores are. transformers rounds it to bfloat16; here it is float32.
"""

from typing import Any

from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.hf_config import activation, alibi_slopes, field, hf_rope, token_ids

LAYER = "transformer.h.{}"
WEIGHTS = {
    "transformer.word_embeddings.weight": ("embed.weight", "plain"),
    f"{LAYER}.input_layernorm": ("layers.{}.attention_norm", "linear"),
    f"{LAYER}.ln_attn": ("layers.{}.attention_norm", "linear"),
    f"{LAYER}.self_attention.query_key_value": ("layers.{}.attention.qkv", "linear"),
    f"{LAYER}.self_attention.dense": ("layers.{}.attention.out", "linear"),
    f"{LAYER}.post_attention_layernorm": ("layers.{}.mlp_norm", "linear"),
    f"{LAYER}.ln_mlp": ("layers.{}.mlp_norm", "linear"),
    f"{LAYER}.mlp.dense_h_to_4h": ("layers.{}.mlp.up", "linear"),
    f"{LAYER}.mlp.dense_4h_to_h": ("layers.{}.mlp.down", "linear"),
    "transformer.ln_f": ("norm", "linear"),
    "lm_head": ("lm_head", "linear"),
}
IGNORED = ()


def config(hf: dict[str, Any]) -> ModelConfig:
    """The ModelConfig of a Hugging Face config.json."""
    hidden_size = field(hf, "hidden_size", "n_embed")
    n_heads = field(hf, "num_attention_heads", "n_head")
    head_dim = hidden_size // n_heads
    is_new = hf.get("new_decoder_architecture", False)  # of 40B, 180B and 11B: always parallel
    is_parallel = is_new or hf.get("parallel_attn", True)
    has_two_norms = is_new and hf.get("num_ln_in_parallel_attn") != 1
    has_alibi, has_bias = hf.get("alibi", False), hf.get("bias", False)
    slopes = tuple(slope * head_dim**-0.5 for slope in alibi_slopes(n_heads)) if has_alibi else ()
    return ModelConfig(
        family="falcon",
        vocab_size=hf["vocab_size"],
        hidden_size=hidden_size,
        n_layers=field(hf, "num_hidden_layers", "n_layer"),
        n_heads=n_heads,
        n_kv_heads=_n_kv_heads(hf, n_heads),
        head_dim=head_dim,
        ffn_size=hf.get("ffn_hidden_size") or 4 * hidden_size,
        max_position=hf.get("max_position_embeddings", 2048),
        residual="parallel" if is_parallel else "sequential",
        shared_norm=is_parallel and not has_two_norms,
        norm="layer",
        norm_eps=hf.get("layer_norm_epsilon", 1e-5),
        rope=None if has_alibi else hf_rope(hf),
        alibi_slopes=slopes,
        qkv_bias=has_bias,
        out_bias=has_bias,
        activation=activation(hf.get("activation", "gelu")),
        gated_mlp=False,
        mlp_bias=has_bias,
        tie_embeddings=hf.get("tie_word_embeddings", True),
        eos_token_ids=token_ids(hf.get("eos_token_id", 11)),
        bos_token_id=hf.get("bos_token_id", 11),
    )


def _n_kv_heads(hf: dict[str, Any], n_heads: int) -> int:
    if hf.get("new_decoder_architecture", False):
        return hf.get("num_kv_heads") or hf.get("n_head_kv") or n_heads
    return 1 if hf.get("multi_query", True) else n_heads
