"""Seed-OSS (ByteDance Seed, 2025): Llama with biases of queries, keys and values."""

import dataclasses
from typing import Any

from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.families import llama

WEIGHTS, IGNORED = llama.WEIGHTS, llama.IGNORED


def config(hf: dict[str, Any]) -> ModelConfig:
    """The ModelConfig of a Hugging Face config.json."""
    hf = {"head_dim": 128, "attention_bias": True} | hf
    return dataclasses.replace(
        llama.config(hf), family="seed_oss", out_bias=hf.get("attention_out_bias", False)
    )
