"""Ministral 3 and Devstral 2 (Mistral AI, 2025): Mistral with YaRN, and queries that grow with
their position as in Llama 4.
"""

import dataclasses
from typing import Any

from fastgen_jax.models.config import ModelConfig, QueryScale
from fastgen_jax.models.families import mistral

WEIGHTS, IGNORED = mistral.WEIGHTS, mistral.IGNORED


def config(hf: dict[str, Any]) -> ModelConfig:
    """The ModelConfig of a Hugging Face config.json."""
    return dataclasses.replace(
        mistral.config(hf | {"sliding_window": hf.get("sliding_window")}),
        family="ministral3",
        query_scale=_query_scale(hf),
    )


def _query_scale(hf: dict[str, Any]) -> QueryScale | None:
    rope = hf["rope_parameters"]
    if not rope.get("llama_4_scaling_beta"):
        return None
    return QueryScale(
        weight=rope["llama_4_scaling_beta"],
        length=rope["original_max_position_embeddings"],
        layers=tuple(range(hf["num_hidden_layers"])),
    )
