"""Hunyuan-A13B (Tencent, 2025): Hunyuan with experts, one of them shared."""

import dataclasses
from typing import Any

from fastgen_jax.errors import ConfigError
from fastgen_jax.models.config import ModelConfig, MoeConfig
from fastgen_jax.models.families import hunyuan_v1_dense, qwen2_moe
from fastgen_jax.models.hf_config import only, without

MLP = "model.layers.{}.mlp"
ROUTER = f"{MLP}.gate.weight"
WEIGHTS = (
    without(hunyuan_v1_dense.WEIGHTS, ".mlp.")
    | without(qwen2_moe.EXPERTS, ROUTER)
    | {
        f"{MLP}.gate.wg.weight": ("layers.{}.mlp.router", "plain"),
        f"{MLP}.shared_mlp.gate_proj": ("layers.{}.mlp.shared.gate_up", "gate"),
        f"{MLP}.shared_mlp.up_proj": ("layers.{}.mlp.shared.gate_up", "up"),
        f"{MLP}.shared_mlp.down_proj": ("layers.{}.mlp.shared.down", "linear"),
    }
)
IGNORED = hunyuan_v1_dense.IGNORED


def config(hf: dict[str, Any]) -> ModelConfig:
    """The ModelConfig of a Hugging Face config.json."""
    only(hf, use_mixed_mlp_moe=True, moe_layer_num_skipped=0, norm_topk_prob=True, mlp_bias=False)
    size = _of_all_layers(hf, "moe_intermediate_size", hf["intermediate_size"])
    moe = MoeConfig(
        n_experts=_of_all_layers(hf, "num_experts", 1),
        n_chosen=_of_all_layers(hf, "moe_topk", 1),
        ffn_size=size,
        layers=tuple(range(hf["num_hidden_layers"])),
        normalise=True,
        shared_size=size * _of_all_layers(hf, "num_shared_expert", 1),
    )
    return dataclasses.replace(hunyuan_v1_dense.config(hf), family="hunyuan_v1_moe", moe=moe)


def _of_all_layers(hf: dict[str, Any], name: str, default: int) -> int:
    """A number, or one that a list repeats for each layer."""
    value = hf.get(name)
    values = set(value) if isinstance(value, list) else {default if value is None else value}
    if len(values) != 1:
        raise ConfigError(f"hunyuan_v1_moe: layers with different {name} are not supported")
    return values.pop()
