"""StarCoder and SantaCoder (Li et al., 2023; Ben Allal et al., 2023): GPT-2 with one KV head, and
weights stored (out, in).
"""

import dataclasses
from typing import Any

from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.families import gpt2

IGNORED = gpt2.IGNORED
# Each KV head's queries, key and value follow one another, as ours do.
WEIGHTS = {
    name: (path, "linear" if part.startswith("T:") else part)
    for name, (path, part) in gpt2.WEIGHTS.items()
}


def config(hf: dict[str, Any]) -> ModelConfig:
    """The ModelConfig of a Hugging Face config.json."""
    base = gpt2.config({"activation_function": "gelu_pytorch_tanh"} | hf)
    n_kv_heads = 1 if hf.get("multi_query", True) else base.n_heads
    return dataclasses.replace(base, family="gpt_bigcode", n_kv_heads=n_kv_heads)
