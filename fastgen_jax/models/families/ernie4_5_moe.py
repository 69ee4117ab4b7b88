"""ERNIE 4.5 (Baidu, 2025) with experts: DeepSeek-V3's, but scored by a softmax in one group."""

import dataclasses
from typing import Any

from fastgen_jax.models.config import ModelConfig, MoeConfig
from fastgen_jax.models.families import deepseek_v2, ernie4_5, llama
from fastgen_jax.models.hf_config import only

STATICS = "model.layers.{}.mlp.moe_statics"
WEIGHTS = llama.WEIGHTS | deepseek_v2.EXPERTS | {
    f"{STATICS}.e_score_correction_bias": ("layers.{}.mlp.score_bias", "row"),
}  # fmt: skip
# The layer that predicts a second token; nothing here uses it.
IGNORED = tuple(
    f"model.mtp_{part}.*" for part in ("block", "emb_norm", "hidden_norm", "linear_proj")
)
DEFAULTS = {
    "head_dim": None,
    "moe_layer_end_index": None,
    "moe_layer_interval": 1,
    "moe_layer_start_index": 1,
    "moe_num_shared_experts": 2,
}


def config(hf: dict[str, Any]) -> ModelConfig:
    """The ModelConfig of a Hugging Face config.json."""
    only(hf, use_bias=False, moe_gate_act="softmax", moe_use_aux_free=True)
    hf = DEFAULTS | hf
    return dataclasses.replace(ernie4_5.config(hf), family="ernie4_5_moe", moe=_mixture(hf))


def _mixture(hf: dict[str, Any]) -> MoeConfig:
    last, interval = hf["moe_layer_end_index"], hf["moe_layer_interval"]
    last = hf["num_hidden_layers"] - 1 if last in (None, -1) else last
    layers = range(hf["moe_layer_start_index"], last + 1)
    return MoeConfig(
        n_experts=hf["moe_num_experts"],
        n_chosen=hf["moe_k"],
        ffn_size=hf["moe_intermediate_size"],
        layers=tuple(i for i in layers if (i + 1) % interval == 0),
        normalise=True,
        shared_size=(hf["moe_num_shared_experts"] or 0) * hf["moe_intermediate_size"],
        score_bias=True,
    )
