"""Baichuan 1 and 2 (Yang et al., 2023), whose checkpoints bring their own code: Llama with queries,
keys and values in one tensor. 13B has ALiBi. In Baichuan 2 rows of the head have length one.
"""

import dataclasses
from typing import Any

from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.families import llama
from fastgen_jax.models.hf_config import alibi_slopes, only, without

WEIGHTS = without(llama.WEIGHTS, "q_proj", "k_proj", "v_proj") | {
    "model.layers.{}.self_attn.W_pack": ("layers.{}.attention.qkv", "qkv"),
}
IGNORED = llama.IGNORED
FIRST_VOCAB_SIZE = 64000  # of Baichuan 1


def config(hf: dict[str, Any]) -> ModelConfig:
    """The ModelConfig of a Hugging Face config.json."""
    only(hf, tie_word_embeddings=False)
    base = dataclasses.replace(
        llama.config(hf), family="baichuan", unit_head=hf["vocab_size"] != FIRST_VOCAB_SIZE
    )
    if "max_position_embeddings" in hf:  # 7B
        return base
    return dataclasses.replace(
        base,
        max_position=hf.get("model_max_length", 4096),
        rope=None,
        alibi_slopes=alibi_slopes(base.n_heads),
    )
