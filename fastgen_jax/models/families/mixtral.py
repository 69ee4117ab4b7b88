"""Mixtral (Jiang et al., 2024): Mistral whose MLPs are mixtures of experts."""

import dataclasses
from typing import Any

from fastgen_jax.models.config import ModelConfig, MoeConfig
from fastgen_jax.models.families import llama, mistral
from fastgen_jax.models.hf_config import without

EXPERTS = "model.layers.{}.block_sparse_moe.experts.{}"
WEIGHTS = without(llama.WEIGHTS, ".mlp.") | {
    "model.layers.{}.block_sparse_moe.gate.weight": ("layers.{}.mlp.router", "plain"),
    f"{EXPERTS}.w1": ("layers.{}.mlp.gate_up", "expert_gate"),
    f"{EXPERTS}.w3": ("layers.{}.mlp.gate_up", "expert_up"),
    f"{EXPERTS}.w2": ("layers.{}.mlp.down", "expert"),
}
IGNORED = llama.IGNORED


def config(hf: dict[str, Any]) -> ModelConfig:
    """The ModelConfig of a Hugging Face config.json."""
    return dataclasses.replace(
        mistral.config({"sliding_window": None} | hf), family="mixtral", moe=mixture(hf)
    )


def mixture(hf: dict[str, Any]) -> MoeConfig:
    """Experts in every layer, as large as a dense MLP, whose scores sum to one."""
    return MoeConfig(
        n_experts=hf["num_local_experts"],
        n_chosen=hf["num_experts_per_tok"],
        ffn_size=hf["intermediate_size"],
        layers=tuple(range(hf["num_hidden_layers"])),
        normalise=True,
    )
