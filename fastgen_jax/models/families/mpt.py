"""MPT (MosaicML, 2023): ALiBi and no biases, not even of norms.

`alibi_bias_max` counts, as where the models were trained; transformers takes 8 whatever it says.
"""

from typing import Any

from fastgen_jax.errors import ConfigError
from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.hf_config import alibi_slopes, field, only, token_ids

LAYER = "transformer.blocks.{}"
WEIGHTS = {
    "transformer.wte.weight": ("embed.weight", "plain"),
    f"{LAYER}.norm_1.weight": ("layers.{}.attention_norm.weight", "plain"),
    f"{LAYER}.attn.Wqkv": ("layers.{}.attention.qkv", "qkv"),
    f"{LAYER}.attn.out_proj": ("layers.{}.attention.out", "linear"),
    f"{LAYER}.norm_2.weight": ("layers.{}.mlp_norm.weight", "plain"),
    f"{LAYER}.ffn.up_proj": ("layers.{}.mlp.up", "linear"),
    f"{LAYER}.ffn.down_proj": ("layers.{}.mlp.down", "linear"),
    "transformer.norm_f.weight": ("norm.weight", "plain"),
    "lm_head": ("lm_head", "linear"),
}
IGNORED = ()


def config(hf: dict[str, Any]) -> ModelConfig:
    """The ModelConfig of a Hugging Face config.json."""
    attention = hf.get("attn_config") or {}
    only(hf, no_bias=True, logit_scale=None)
    if not hf.get("norm_type", "layernorm").endswith("layernorm"):
        raise ConfigError(
            f"mpt with norm_type={hf['norm_type']!r} is not supported, only layer norm"
        )
    only(
        attention, alibi=True, attn_type="multihead_attention", prefix_lm=False, qk_ln=False,
        attn_uses_sequence_id=False,
    )  # fmt: skip
    hidden_size = field(hf, "d_model", "hidden_size")
    n_heads = field(hf, "n_heads", "num_attention_heads")
    return ModelConfig(
        family="mpt",
        vocab_size=hf["vocab_size"],
        hidden_size=hidden_size,
        n_layers=field(hf, "n_layers", "num_hidden_layers"),
        n_heads=n_heads,
        n_kv_heads=n_heads,
        head_dim=hidden_size // n_heads,
        ffn_size=hf.get("expansion_ratio", 4) * hidden_size,
        max_position=hf.get("max_seq_len", 2048),
        norm="layer",
        norm_eps=hf.get("layer_norm_epsilon", 1e-5),
        norm_bias=False,
        rope=None,
        alibi_slopes=alibi_slopes(n_heads, attention.get("alibi_bias_max", 8)),
        attention_scale=attention.get("softmax_scale"),
        qkv_clip=attention.get("clip_qkv"),
        activation="gelu",
        gated_mlp=False,
        tie_embeddings=hf.get("tie_word_embeddings", True),
        eos_token_ids=token_ids(hf.get("eos_token_id")),
        bos_token_id=hf.get("bos_token_id"),
    )
