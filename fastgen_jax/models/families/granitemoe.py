"""Granite 3 MoE (Granite Team, IBM, 2024): Granite with experts, each layer's in one tensor, and
perhaps an MLP beside them that every token takes.
"""

import dataclasses
from typing import Any

from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.families import granite, llama, mixtral
from fastgen_jax.models.hf_config import without

MOE, SHARED = "model.layers.{}.block_sparse_moe", "model.layers.{}.shared_mlp"
WEIGHTS = without(llama.WEIGHTS, ".mlp.") | {
    f"{MOE}.router.layer.weight": ("layers.{}.mlp.router", "plain"),
    f"{MOE}.input_linear.weight": ("layers.{}.mlp.gate_up", "plain"),
    f"{MOE}.output_linear.weight": ("layers.{}.mlp.down", "plain"),
    f"{SHARED}.input_linear": ("layers.{}.mlp.shared.gate_up", "gate_up"),
    f"{SHARED}.output_linear": ("layers.{}.mlp.shared.down", "linear"),
}
IGNORED = llama.IGNORED


def config(hf: dict[str, Any]) -> ModelConfig:
    """The ModelConfig of a Hugging Face config.json."""
    shared_size = hf.get("shared_intermediate_size", 0)
    experts = dataclasses.replace(mixtral.mixture(hf), scores="chosen", shared_size=shared_size)
    return dataclasses.replace(granite.config(hf), family=hf["model_type"], moe=experts)
