"""Command R7B and Command A (Cohere, 2025): Command R in which most layers have a window, and only
those turn.
"""

import dataclasses
from typing import Any

from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.families import cohere
from fastgen_jax.models.hf_config import layer_windows, only

WEIGHTS, IGNORED = cohere.WEIGHTS, cohere.IGNORED


def config(hf: dict[str, Any]) -> ModelConfig:
    """The ModelConfig of a Hugging Face config.json."""
    only(hf, use_qk_norm=False, use_parallel_block=True, use_gated_activation=True)
    base = dataclasses.replace(
        cohere.config(hf),
        family="cohere2",
        windows=layer_windows({"sliding_window": 4096} | hf, every=4),
    )
    unrotated = [i for i in range(base.n_layers) if base.window(i) is None]
    return dataclasses.replace(base, unrotated_layers=tuple(unrotated))
