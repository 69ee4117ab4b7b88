"""Granite 4 (Granite Team, IBM, 2025) without Mamba layers and experts: Granite whose gate and up
are one tensor.
"""

import dataclasses
from typing import Any

from fastgen_jax.errors import ConfigError
from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.families import granite, llama
from fastgen_jax.models.families.refused import RECURRENT
from fastgen_jax.models.hf_config import only, without

MLP = "model.layers.{}.shared_mlp"
WEIGHTS = without(llama.WEIGHTS, ".mlp.") | {
    f"{MLP}.input_linear": ("layers.{}.mlp.gate_up", "gate_up"),
    f"{MLP}.output_linear": ("layers.{}.mlp.down", "linear"),
}
IGNORED = llama.IGNORED
ATTENTION = {"attention", "full_attention"}


def config(hf: dict[str, Any]) -> ModelConfig:
    """The ModelConfig of a Hugging Face config.json."""
    others = {*(hf.get("layer_types") or ["mamba"])} - ATTENTION
    if others:
        raise ConfigError(f"granitemoehybrid: layers of {sorted(others)}: {RECURRENT}")
    only({"num_local_experts": 8} | hf, num_local_experts=0)
    base = granite.config(hf | {"intermediate_size": hf["shared_intermediate_size"]})
    turns = hf.get("position_embedding_type") == "rope"
    return dataclasses.replace(base, family="granitemoehybrid", rope=base.rope if turns else None)
