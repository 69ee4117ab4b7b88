"""Qwen1.5-MoE and Qwen2-MoE (Qwen Team, 2024): Qwen2 with experts, one of them shared and gated."""

import dataclasses
from typing import Any

from fastgen_jax.errors import ConfigError
from fastgen_jax.models.config import ModelConfig, MoeConfig
from fastgen_jax.models.families import llama
from fastgen_jax.models.hf_config import layer_windows

EXPERTS = {
    "model.layers.{}.mlp.gate.weight": ("layers.{}.mlp.router", "plain"),
    "model.layers.{}.mlp.experts.{}.gate_proj": ("layers.{}.mlp.gate_up", "expert_gate"),
    "model.layers.{}.mlp.experts.{}.up_proj": ("layers.{}.mlp.gate_up", "expert_up"),
    "model.layers.{}.mlp.experts.{}.down_proj": ("layers.{}.mlp.down", "expert"),
}
SHARED = "model.layers.{}.mlp.shared_expert"
WEIGHTS = llama.WEIGHTS | EXPERTS | {
    f"{SHARED}.gate_proj": ("layers.{}.mlp.shared.gate_up", "gate"),
    f"{SHARED}.up_proj": ("layers.{}.mlp.shared.gate_up", "up"),
    f"{SHARED}.down_proj": ("layers.{}.mlp.shared.down", "linear"),
    f"{SHARED}_gate": ("layers.{}.mlp.shared_gate", "linear"),
}  # fmt: skip
IGNORED = llama.IGNORED


def config(hf: dict[str, Any]) -> ModelConfig:
    """The ModelConfig of a Hugging Face config.json."""
    windows = ()
    if hf.get("use_sliding_window"):
        if not hf.get("layer_types"):
            raise ConfigError("qwen2_moe: use_sliding_window without layer_types is not supported")
        windows = layer_windows(hf)
    moe = mixture(hf, shared_size=hf["shared_expert_intermediate_size"], shared_gate=True)
    bias = hf.get("qkv_bias", True)
    return dataclasses.replace(
        llama.config(hf), family="qwen2_moe", qkv_bias=bias, windows=windows, moe=moe
    )


def mixture(hf: dict[str, Any], **fields: Any) -> MoeConfig:
    """The experts of both Qwen2-MoE and Qwen3-MoE, in every decoder_sparse_step-th layer."""
    step, dense = hf.get("decoder_sparse_step", 1), hf.get("mlp_only_layers") or ()
    layers = range(hf["num_hidden_layers"])
    return MoeConfig(
        n_experts=hf.get("num_experts") or hf["num_local_experts"],
        n_chosen=hf["num_experts_per_tok"],
        ffn_size=hf["moe_intermediate_size"],
        layers=tuple(i for i in layers if (i + 1) % step == 0 and i not in dense),
        normalise=hf.get("norm_topk_prob", False),
        **fields,
    )
