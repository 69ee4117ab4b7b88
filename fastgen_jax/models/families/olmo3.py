"""OLMo 3 (OLMo Team, 2025): OLMo 2 in which three of four layers have a window; only the rotary
embedding of the others is stretched.
"""

import dataclasses
from typing import Any

from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.families import olmo2
from fastgen_jax.models.hf_config import hf_rope, layer_windows, rope_by_window

THETA = 500000.0
WEIGHTS, IGNORED = olmo2.WEIGHTS, olmo2.IGNORED


def config(hf: dict[str, Any]) -> ModelConfig:
    """The ModelConfig of a Hugging Face config.json."""
    theta = hf.get("rope_theta", THETA)
    whole, local = rope_by_window(hf, theta, theta)
    return dataclasses.replace(
        olmo2.config(hf | {"rope_parameters": whole}),
        family="olmo3",
        local_rope=hf_rope(hf | {"rope_parameters": local}),
        windows=layer_windows({"sliding_window": 4096} | hf, every=4),
    )
