"""GPT-2 (Radford et al., 2019): learned positions; weights are stored (in, out)."""

from typing import Any

from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.hf_config import activation, field, only, token_ids

LAYER = "transformer.h.{}"
WEIGHTS = {
    "transformer.wte.weight": ("embed.weight", "plain"),
    "transformer.wpe.weight": ("position_embed.weight", "plain"),
    f"{LAYER}.ln_1": ("layers.{}.attention_norm", "linear"),
    f"{LAYER}.attn.c_attn": ("layers.{}.attention.qkv", "T:qkv"),
    f"{LAYER}.attn.c_proj": ("layers.{}.attention.out", "T:linear"),
    f"{LAYER}.ln_2": ("layers.{}.mlp_norm", "linear"),
    f"{LAYER}.mlp.c_fc": ("layers.{}.mlp.up", "T:linear"),
    f"{LAYER}.mlp.c_proj": ("layers.{}.mlp.down", "T:linear"),
    "transformer.ln_f": ("norm", "linear"),
    "lm_head": ("lm_head", "linear"),
}
IGNORED = (f"{LAYER}.attn.bias", f"{LAYER}.attn.masked_bias")  # causal masks


def config(hf: dict[str, Any]) -> ModelConfig:
    """The ModelConfig of a Hugging Face config.json."""
    only(hf, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)
    hidden_size = field(hf, "n_embd", "hidden_size")
    n_heads = field(hf, "n_head", "num_attention_heads")
    max_position = field(hf, "n_positions", "max_position_embeddings")
    return ModelConfig(
        family="gpt2",
        vocab_size=hf["vocab_size"],
        hidden_size=hidden_size,
        n_layers=field(hf, "n_layer", "num_hidden_layers"),
        n_heads=n_heads,
        n_kv_heads=n_heads,
        head_dim=hidden_size // n_heads,
        ffn_size=hf.get("n_inner") or 4 * hidden_size,
        max_position=max_position,
        norm="layer",
        norm_eps=hf.get("layer_norm_epsilon", 1e-5),
        rope=None,
        n_learned_positions=max_position,
        qkv_bias=True,
        out_bias=True,
        attention_scale=None if hf.get("scale_attn_weights", True) else 1.0,
        activation=activation(hf.get("activation_function", "gelu_new")),
        gated_mlp=False,
        mlp_bias=True,
        tie_embeddings=hf.get("tie_word_embeddings", True),
        eos_token_ids=token_ids(hf.get("eos_token_id", 50256)),
        bos_token_id=hf.get("bos_token_id", 50256),
    )
