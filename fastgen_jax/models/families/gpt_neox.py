"""GPT-NeoX (Black et al., 2022) and Pythia: attention and MLP in parallel, each with its norm; the
first part of a head turns.
"""

from typing import Any

from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.hf_config import activation, hf_rope, token_ids

LAYER = "gpt_neox.layers.{}"
WEIGHTS = {
    "gpt_neox.embed_in.weight": ("embed.weight", "plain"),
    f"{LAYER}.input_layernorm": ("layers.{}.attention_norm", "linear"),
    f"{LAYER}.attention.query_key_value": ("layers.{}.attention.qkv", "linear"),
    f"{LAYER}.attention.dense": ("layers.{}.attention.out", "linear"),
    f"{LAYER}.post_attention_layernorm": ("layers.{}.mlp_norm", "linear"),
    f"{LAYER}.mlp.dense_h_to_4h": ("layers.{}.mlp.up", "linear"),
    f"{LAYER}.mlp.dense_4h_to_h": ("layers.{}.mlp.down", "linear"),
    "gpt_neox.final_layer_norm": ("norm", "linear"),
    "embed_out": ("lm_head", "linear"),
    "lm_head": ("lm_head", "linear"),  # since transformers 5
}
IGNORED = (f"{LAYER}.attention.bias", f"{LAYER}.attention.masked_bias")  # causal masks


def config(hf: dict[str, Any]) -> ModelConfig:
    """The ModelConfig of a Hugging Face config.json."""
    n_heads = hf["num_attention_heads"]
    rotary = {
        "partial_rotary_factor": hf.get("rotary_pct", 0.25),
        "rope_theta": hf.get("rotary_emb_base", 10000.0),
    }
    return ModelConfig(
        family="gpt_neox",
        vocab_size=hf["vocab_size"],
        hidden_size=hf["hidden_size"],
        n_layers=hf["num_hidden_layers"],
        n_heads=n_heads,
        n_kv_heads=n_heads,
        head_dim=hf["hidden_size"] // n_heads,
        ffn_size=hf["intermediate_size"],
        max_position=hf.get("max_position_embeddings", 2048),
        residual="parallel" if hf.get("use_parallel_residual", True) else "sequential",
        norm="layer",
        norm_eps=hf.get("layer_norm_eps", 1e-5),
        rope=hf_rope(rotary | hf),
        qkv_bias=hf.get("attention_bias", True),
        out_bias=hf.get("attention_bias", True),
        activation=activation(hf.get("hidden_act", "gelu")),
        gated_mlp=False,
        mlp_bias=True,
        tie_embeddings=hf.get("tie_word_embeddings", False),
        eos_token_ids=token_ids(hf.get("eos_token_id", 2)),
        bos_token_id=hf.get("bos_token_id", 0),
    )
