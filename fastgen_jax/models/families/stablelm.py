"""StableLM 2 and 3B (Bellagente et al., 2024): Llama with layer norms; the first part of a head
turns.
"""

import dataclasses
from typing import Any

from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.families import llama
from fastgen_jax.models.hf_config import hf_rope, without

LAYER = "model.layers.{}"
WEIGHTS = without(llama.WEIGHTS, "norm") | llama.LAYER_NORMS | {
    f"{LAYER}.self_attn.q_layernorm.norms.{{}}.weight": (
        "layers.{}.attention.q_norm.weight", "plain"),
    f"{LAYER}.self_attn.k_layernorm.norms.{{}}.weight": (
        "layers.{}.attention.k_norm.weight", "plain"),
}  # fmt: skip
IGNORED = llama.IGNORED


def config(hf: dict[str, Any]) -> ModelConfig:
    """The ModelConfig of a Hugging Face config.json."""
    is_parallel = hf.get("use_parallel_residual", False)
    return dataclasses.replace(
        llama.config(hf),
        family="stablelm",
        norm="layer",
        norm_eps=hf.get("layer_norm_eps", 1e-5),
        residual="parallel" if is_parallel else "sequential",
        shared_norm=is_parallel,
        rope=hf_rope({"partial_rotary_factor": 0.25} | hf),
        qkv_bias=hf.get("use_qkv_bias", False),
        qk_norm="each_head" if hf.get("qk_layernorm", False) else None,
    )
