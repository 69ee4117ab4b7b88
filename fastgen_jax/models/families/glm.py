"""GLM-4 (GLM Team, 2024): Llama whose gate and up are one tensor, with biases of queries, keys and
values; neighbouring elements of a head's first half turn.
"""

import dataclasses
from typing import Any

from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.families import llama
from fastgen_jax.models.hf_config import hf_rope, without

WEIGHTS = without(llama.WEIGHTS, "gate_proj", "up_proj") | {
    "model.layers.{}.mlp.gate_up_proj": ("layers.{}.mlp.gate_up", "gate_up"),
}
IGNORED = llama.IGNORED


def config(hf: dict[str, Any]) -> ModelConfig:
    """The ModelConfig of a Hugging Face config.json."""
    hf = {"head_dim": 128, "attention_bias": True, "partial_rotary_factor": 0.5} | hf
    return dataclasses.replace(
        llama.config(hf),
        family="glm",
        rope=hf_rope(hf, interleaved=True),
        out_bias=False,
    )
