"""StarCoder2 (Lozhkov et al., 2024): layer norms, a plain MLP, biases and a sliding window."""

from typing import Any

from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.families import llama
from fastgen_jax.models.hf_config import (
    activation,
    hf_rope,
    layer_windows,
    only,
    token_ids,
    without,
)

LAYER = "model.layers.{}"
WEIGHTS = without(llama.WEIGHTS, "norm", "mlp") | llama.LAYER_NORMS | {
    f"{LAYER}.mlp.c_fc": ("layers.{}.mlp.up", "linear"),
    f"{LAYER}.mlp.c_proj": ("layers.{}.mlp.down", "linear"),
}  # fmt: skip
IGNORED = llama.IGNORED


def config(hf: dict[str, Any]) -> ModelConfig:
    """The ModelConfig of a Hugging Face config.json."""
    only(hf, norm_type="layer_norm", mlp_type="default")
    n_heads, has_bias = hf["num_attention_heads"], hf.get("use_bias", True)
    return ModelConfig(
        family="starcoder2",
        vocab_size=hf["vocab_size"],
        hidden_size=hf["hidden_size"],
        n_layers=hf["num_hidden_layers"],
        n_heads=n_heads,
        n_kv_heads=hf.get("num_key_value_heads") or n_heads,
        head_dim=hf.get("head_dim") or hf["hidden_size"] // n_heads,
        ffn_size=hf["intermediate_size"],
        max_position=hf.get("max_position_embeddings", 4096),
        norm="layer",
        norm_eps=hf.get("norm_epsilon", 1e-5),
        rope=hf_rope(hf),
        windows=layer_windows(hf),
        qkv_bias=has_bias,
        out_bias=has_bias,
        activation=activation(hf.get("hidden_act", "gelu_pytorch_tanh")),
        gated_mlp=False,
        mlp_bias=has_bias,
        tie_embeddings=hf.get("tie_word_embeddings", True),
        eos_token_ids=token_ids(hf.get("eos_token_id", 50256)),
        bos_token_id=hf.get("bos_token_id", 50256),
    )
