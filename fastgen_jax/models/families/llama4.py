"""Llama 4 (Meta, 2025), the text part: experts weigh what they read, one more reads everything, and
some layers do not turn.

Layers that turn attend within chunks of positions. Nothing here computes that, so contexts end
where the first chunk does: up to there it is what full attention is.
"""

import dataclasses
from typing import Any

from fastgen_jax.models.config import ModelConfig, MoeConfig, QueryScale
from fastgen_jax.models.families import llama
from fastgen_jax.models.hf_config import hf_rope, without

MLP = "model.layers.{}.feed_forward"
WEIGHTS = without(llama.WEIGHTS, ".mlp.") | {
    f"{MLP}.gate_proj": ("layers.{}.mlp.gate_up", "gate"),
    f"{MLP}.up_proj": ("layers.{}.mlp.gate_up", "up"),
    f"{MLP}.down_proj": ("layers.{}.mlp.down", "linear"),
    f"{MLP}.router.weight": ("layers.{}.mlp.router", "plain"),
    f"{MLP}.experts.gate_up_proj": ("layers.{}.mlp.gate_up", "experts"),
    f"{MLP}.experts.down_proj": ("layers.{}.mlp.down", "experts"),
    f"{MLP}.shared_expert.gate_proj": ("layers.{}.mlp.shared.gate_up", "gate"),
    f"{MLP}.shared_expert.up_proj": ("layers.{}.mlp.shared.gate_up", "up"),
    f"{MLP}.shared_expert.down_proj": ("layers.{}.mlp.shared.down", "linear"),
}
IGNORED = llama.IGNORED
DEFAULTS = {
    "attention_chunk_size": 8192,
    "attn_scale": 0.1,
    "attn_temperature_tuning": True,
    "floor_scale": 8192,
    "head_dim": 128,
    "interleave_moe_layer_step": 1,
    "intermediate_size": 8192,
    "intermediate_size_mlp": 16384,
    "max_position_embeddings": 131072,
    "no_rope_layer_interval": 4,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5e5,
}


def config(hf: dict[str, Any]) -> ModelConfig:
    """The ModelConfig of a Hugging Face config.json."""
    hf = DEFAULTS | hf
    layers, interval = range(hf["num_hidden_layers"]), hf["no_rope_layer_interval"]
    # 1 for a layer that does rotate, whatever the field's name suggests.
    rotates = hf.get("no_rope_layers") or [(i + 1) % interval for i in layers]
    unrotated = tuple(i for i in layers if not rotates[i])
    return dataclasses.replace(
        llama.config(hf | {"intermediate_size": hf["intermediate_size_mlp"]}),
        family="llama4_text",
        max_position=_max_position(hf),
        rope=hf_rope(hf, interleaved=True),
        unrotated_layers=unrotated,
        qk_norm="unit" if hf.get("use_qk_norm", True) else None,
        query_scale=_query_scale(hf, unrotated),
        moe=_mixture(hf),
    )


def _max_position(hf: dict[str, Any]) -> int:
    """Within which all layers see everything."""
    longest, chunk = hf["max_position_embeddings"], hf["attention_chunk_size"]
    kinds = hf.get("layer_types")
    is_chunked = "chunked_attention" in kinds if kinds else True
    return min(longest, chunk) if chunk and is_chunked else longest


def _query_scale(hf: dict[str, Any], layers: tuple[int, ...]) -> QueryScale | None:
    if not (hf["attn_temperature_tuning"] and layers):
        return None
    length = int(hf["floor_scale"])
    return QueryScale(weight=hf["attn_scale"], length=length, layers=layers, first=1)


def _mixture(hf: dict[str, Any]) -> MoeConfig:
    step, layers = hf["interleave_moe_layer_step"], hf.get("moe_layers")
    if layers is None:
        layers = range(step - 1, hf["num_hidden_layers"], step)
    return MoeConfig(
        n_experts=hf["num_local_experts"],
        n_chosen=hf["num_experts_per_tok"],
        ffn_size=hf["intermediate_size"],
        layers=tuple(layers),
        scores="each_chosen",
        weighs_input=True,
        shared_size=hf["intermediate_size"],
    )
