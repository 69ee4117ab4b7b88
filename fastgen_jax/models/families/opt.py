"""OPT (Zhang et al., 2022): learned positions and ReLU; the 350M model normalises sums."""

from typing import Any

from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.hf_config import activation, only, token_ids

LAYER = "model.decoder.layers.{}"
WEIGHTS = {
    "model.decoder.embed_tokens.weight": ("embed.weight", "plain"),
    "model.decoder.embed_positions.weight": ("position_embed.weight", "plain"),
    "model.decoder.project_in": ("project_in", "linear"),
    "model.decoder.project_out": ("project_out", "linear"),
    f"{LAYER}.self_attn_layer_norm": ("layers.{}.attention_norm", "linear"),
    f"{LAYER}.self_attn.q_proj": ("layers.{}.attention.qkv", "q"),
    f"{LAYER}.self_attn.k_proj": ("layers.{}.attention.qkv", "k"),
    f"{LAYER}.self_attn.v_proj": ("layers.{}.attention.qkv", "v"),
    f"{LAYER}.self_attn.out_proj": ("layers.{}.attention.out", "linear"),
    f"{LAYER}.final_layer_norm": ("layers.{}.mlp_norm", "linear"),
    f"{LAYER}.fc1": ("layers.{}.mlp.up", "linear"),
    f"{LAYER}.fc2": ("layers.{}.mlp.down", "linear"),
    "model.decoder.final_layer_norm": ("norm", "linear"),
    "lm_head": ("lm_head", "linear"),
}
IGNORED = ("model.decoder.version",)
POSITION_OFFSET = 2  # the first two rows of the table are no positions


def config(hf: dict[str, Any]) -> ModelConfig:
    """The ModelConfig of a Hugging Face config.json."""
    only(hf, layer_norm_elementwise_affine=True)
    n_heads, max_position = hf["num_attention_heads"], hf.get("max_position_embeddings", 2048)
    has_bias = hf.get("enable_bias", True)
    is_before = hf.get("do_layer_norm_before", True)
    return ModelConfig(
        family="opt",
        vocab_size=hf["vocab_size"],
        hidden_size=hf["hidden_size"],
        n_layers=hf["num_hidden_layers"],
        n_heads=n_heads,
        n_kv_heads=n_heads,
        head_dim=hf["hidden_size"] // n_heads,
        ffn_size=hf["ffn_dim"],
        max_position=max_position,
        residual="sequential" if is_before else "post",
        norm="layer",
        final_norm=is_before and not hf.get("_remove_final_layer_norm", False),
        embedding_size=hf.get("word_embed_proj_dim"),
        rope=None,
        n_learned_positions=max_position + POSITION_OFFSET,
        position_offset=POSITION_OFFSET,
        qkv_bias=has_bias,
        out_bias=has_bias,
        activation=activation(hf.get("activation_function", "relu")),
        gated_mlp=False,
        mlp_bias=has_bias,
        tie_embeddings=hf.get("tie_word_embeddings", True),
        eos_token_ids=token_ids(hf.get("eos_token_id", 2)),
        bos_token_id=hf.get("bos_token_id", 2),
    )
