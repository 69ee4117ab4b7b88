"""GPT-J (Wang and Komatsuzaki, 2021): one norm before parallel attention and MLP; neighbouring
elements of a head's first part turn.
"""

from typing import Any

from fastgen_jax.models.config import ModelConfig, RopeConfig
from fastgen_jax.models.hf_config import activation, field, token_ids

LAYER = "transformer.h.{}"
WEIGHTS = {
    "transformer.wte.weight": ("embed.weight", "plain"),
    f"{LAYER}.ln_1": ("layers.{}.attention_norm", "linear"),
    f"{LAYER}.attn.q_proj": ("layers.{}.attention.qkv", "q"),
    f"{LAYER}.attn.k_proj": ("layers.{}.attention.qkv", "k"),
    f"{LAYER}.attn.v_proj": ("layers.{}.attention.qkv", "v"),
    f"{LAYER}.attn.out_proj": ("layers.{}.attention.out", "linear"),
    f"{LAYER}.mlp.fc_in": ("layers.{}.mlp.up", "linear"),
    f"{LAYER}.mlp.fc_out": ("layers.{}.mlp.down", "linear"),
    "transformer.ln_f": ("norm", "linear"),
    "lm_head": ("lm_head", "linear"),
}
IGNORED = tuple(  # masks, and sines and cosines
    f"{LAYER}.attn.{name}" for name in ("bias", "masked_bias", "embed_positions")
)


def config(hf: dict[str, Any]) -> ModelConfig:
    """The ModelConfig of a Hugging Face config.json."""
    hidden_size = field(hf, "n_embd", "hidden_size")
    n_heads = field(hf, "n_head", "num_attention_heads")
    return ModelConfig(
        family="gptj",
        vocab_size=hf["vocab_size"],
        hidden_size=hidden_size,
        n_layers=field(hf, "n_layer", "num_hidden_layers"),
        n_heads=n_heads,
        n_kv_heads=n_heads,
        head_dim=hidden_size // n_heads,
        ffn_size=hf.get("n_inner") or 4 * hidden_size,
        max_position=field(hf, "n_positions", "max_position_embeddings"),
        residual="parallel",
        shared_norm=True,
        norm="layer",
        norm_eps=hf.get("layer_norm_epsilon", 1e-5),
        rope=RopeConfig(size=field(hf, "rotary_dim"), interleaved=True),
        activation=activation(hf.get("activation_function", "gelu_new")),
        gated_mlp=False,
        mlp_bias=True,
        tie_embeddings=hf.get("tie_word_embeddings", False),
        head_bias=True,
        eos_token_ids=token_ids(hf.get("eos_token_id", 50256)),
        bos_token_id=hf.get("bos_token_id", 50256),
    )
