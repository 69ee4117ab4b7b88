"""Model families: FAMILIES maps a Hugging Face model_type to the module that knows it.

A family module offers `config(hf) -> ModelConfig`, `WEIGHTS` and `IGNORED` (`{}` is a number, `*`
anything); the module that they describe is decoder.Model.
"""

import difflib
import importlib
from types import ModuleType
from typing import Any

from fastgen_jax.errors import ConfigError
from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.families.refused import REFUSED
from fastgen_jax.models.families.wrappers import WRAPPERS, text_config
from fastgen_jax.models.hf_config import only

FAMILIES = {  # model_type -> module
    "apertus": "apertus",
    "arcee": "arcee",
    "baichuan": "baichuan",
    "bloom": "bloom",
    "cohere": "cohere",
    "cohere2": "cohere2",
    "deepseek_v2": "deepseek_v2",
    "deepseek_v3": "deepseek_v3",
    "dots1": "dots1",
    "ernie4_5": "ernie4_5",
    "ernie4_5_moe": "ernie4_5_moe",
    "exaone4": "exaone4",
    "exaone_moe": "exaone_moe",
    "falcon": "falcon",
    "flex_olmo": "flex_olmo",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "glm": "glm",
    "glm4": "glm4",
    "glm4_moe": "glm4_moe",
    "glm4_moe_lite": "glm4_moe_lite",
    "glm4v_moe_text": "glm4_moe",
    "glm4v_text": "glm4",
    "gpt2": "gpt2",
    "gpt_bigcode": "gpt_bigcode",
    "gpt_neox": "gpt_neox",
    "gpt_oss": "gpt_oss",
    "gptj": "gptj",
    "granite": "granite",
    "granitemoe": "granitemoe",
    "granitemoehybrid": "granitemoehybrid",
    "granitemoeshared": "granitemoe",
    "helium": "helium",
    "hunyuan_v1_dense": "hunyuan_v1_dense",
    "hunyuan_v1_moe": "hunyuan_v1_moe",
    "internlm2": "internlm2",
    "kimi_k2": "kimi_k2",
    "llama": "llama",
    "llama4_text": "llama4",
    "minimax_m2": "minimax_m2",
    "ministral": "ministral",
    "ministral3": "ministral3",
    "mistral": "mistral",
    "mixtral": "mixtral",
    "mpt": "mpt",
    "nemotron": "nemotron",
    "olmo2": "olmo2",
    "olmo3": "olmo3",
    "olmoe": "olmoe",
    "opt": "opt",
    "phi": "phi",
    "phi-msft": "phi_msft",
    "phi3": "phi3",
    "phimoe": "phimoe",
    "qwen": "qwen",
    "qwen2": "qwen2",
    "qwen2_5_vl_text": "qwen2",
    "qwen2_moe": "qwen2_moe",
    "qwen2_vl_text": "qwen2",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3_moe",
    "qwen3_vl_moe_text": "qwen3_vl_moe",
    "qwen3_vl_text": "qwen3",
    "seed_oss": "seed_oss",
    "smollm3": "smollm3",
    "solar_open": "solar_open",
    "stablelm": "stablelm",
    "starcoder2": "starcoder2",
}


def family(model_type: str) -> ModuleType:
    """The module of a Hugging Face model_type.

    Raises:
        ConfigError: says why a type is not served, or which known ones are nearest.
    """
    if model_type in FAMILIES:
        return importlib.import_module(f"{__name__}.{FAMILIES[model_type]}")
    refusal = f"model type {model_type!r} is not supported"
    if model_type in REFUSED:
        raise ConfigError(f"{refusal}: {REFUSED[model_type]}")
    known = sorted({*FAMILIES, *WRAPPERS})
    if nearest := difflib.get_close_matches(model_type, known):
        refusal += f"; did you mean {' or '.join(map(repr, nearest))}?"
    raise ConfigError(f"{refusal}; known: {', '.join(known)}")


def model_config(hf: dict[str, Any]) -> ModelConfig:
    """The ModelConfig of a Hugging Face config.json; of a model that also sees, its text's."""
    text = text_config(hf)
    only(text, is_causal=True)
    return family(text["model_type"]).config(text)
