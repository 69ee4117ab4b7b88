"""DeepSeek-V2 (DeepSeek-AI, 2024): latent attention; experts, some shared, after a few dense
layers.
"""

import dataclasses
import math
from typing import Any

from fastgen_jax.errors import ConfigError
from fastgen_jax.models.config import LatentConfig, ModelConfig, MoeConfig, RopeConfig
from fastgen_jax.models.families import llama, qwen2_moe
from fastgen_jax.models.hf_config import without

ATTENTION = "model.layers.{}.self_attn"
SHARED = "model.layers.{}.mlp.shared_experts"
EXPERTS = qwen2_moe.EXPERTS | {
    f"{SHARED}.gate_proj": ("layers.{}.mlp.shared.gate_up", "gate"),
    f"{SHARED}.up_proj": ("layers.{}.mlp.shared.gate_up", "up"),
    f"{SHARED}.down_proj": ("layers.{}.mlp.shared.down", "linear"),
}
WEIGHTS = (
    without(llama.WEIGHTS, ".self_attn.")
    | EXPERTS
    | {
        f"{ATTENTION}.q_proj": ("layers.{}.attention.q", "linear"),
        f"{ATTENTION}.q_a_proj": ("layers.{}.attention.q_down", "linear"),
        f"{ATTENTION}.q_a_layernorm.weight": ("layers.{}.attention.q_norm.weight", "plain"),
        f"{ATTENTION}.q_b_proj": ("layers.{}.attention.q_up", "linear"),
        f"{ATTENTION}.kv_a_proj_with_mqa": ("layers.{}.attention.kv_down", "linear"),
        f"{ATTENTION}.kv_a_layernorm.weight": ("layers.{}.attention.kv_norm.weight", "plain"),
        f"{ATTENTION}.kv_b_proj": ("layers.{}.attention.kv_up", "linear"),
        f"{ATTENTION}.o_proj": ("layers.{}.attention.out", "linear"),
    }
)
IGNORED = llama.IGNORED


def config(hf: dict[str, Any]) -> ModelConfig:
    """The ModelConfig of a Hugging Face config.json."""
    hf = {"topk_method": "greedy", "scoring_func": "softmax", "norm_topk_prob": False} | hf
    if hf["topk_method"] not in ("greedy", "group_limited_greedy"):
        raise ConfigError(f"deepseek_v2: topk_method={hf['topk_method']!r} is not supported")
    require(hf, scoring_func="softmax", norm_topk_prob=False)
    groups = {}
    if hf["topk_method"] == "group_limited_greedy":
        groups = {"n_groups": hf["n_group"], "n_chosen_groups": hf["topk_group"]}
    return latent_model(hf, family="deepseek_v2", moe=mixture(hf, **groups))


def require(hf: dict[str, Any], **values: Any) -> None:
    """Raises ConfigError where config.json says something else, which nothing here computes."""
    for name, value in values.items():
        if hf.get(name, value) != value:
            raise ConfigError(
                f"{hf['model_type']}: {name}={hf[name]!r} is not supported, only {value!r}"
            )


def mixture(hf: dict[str, Any], **fields: Any) -> MoeConfig:
    """The experts of all layers but the first dense ones, or of those that are called sparse."""
    require(hf, moe_layer_freq=1)
    layers = range(hf["num_hidden_layers"])
    kinds = hf.get("mlp_layer_types") or ["dense"] * hf["first_k_dense_replace"]
    dense = {i for i, kind in enumerate(kinds) if kind == "dense"}
    return MoeConfig(
        n_experts=hf["n_routed_experts"],
        n_chosen=hf["num_experts_per_tok"],
        ffn_size=hf["moe_intermediate_size"],
        layers=tuple(i for i in layers if i not in dense),
        scale=hf["routed_scaling_factor"],
        shared_size=(hf.get("n_shared_experts") or 0) * hf["moe_intermediate_size"],
        **fields,
    )


def latent_model(hf: dict[str, Any], *, family: str, moe: MoeConfig) -> ModelConfig:
    """A decoder with latent attention: one head size of queries and keys, no groups of heads."""
    n_heads = hf["num_attention_heads"]
    require(hf, num_key_value_heads=n_heads)
    latent = LatentConfig(
        kv_rank=hf["kv_lora_rank"],
        q_rank=hf.get("q_lora_rank"),
        nope_size=hf["qk_nope_head_dim"],
        rope_size=hf["qk_rope_head_dim"],
        value_size=hf["v_head_dim"],
    )
    plain = llama.config(hf | {"head_dim": latent.head_size, "num_key_value_heads": n_heads})
    assert plain.rope is not None
    rope = dataclasses.replace(
        plain.rope, size=latent.rope_size, interleaved=hf.get("rope_interleave", True)
    )
    scale = latent.head_size**-0.5 * attention_factor(rope)
    return dataclasses.replace(
        plain, family=family, latent=latent, rope=rope, attention_scale=scale, moe=moe
    )


def attention_factor(rope: RopeConfig) -> float:
    """YaRN's, of attention's scale rather than of queries and keys."""
    if rope.kind == "default" or not rope.mscale_all_dim or rope.factor <= 1:
        return 1.0
    return (0.1 * rope.mscale_all_dim * math.log(rope.factor) + 1.0) ** 2
