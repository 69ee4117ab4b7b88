"""DeepSeek-V3 and R1 (DeepSeek-AI, 2024): V2 whose experts are scored by sigmoids and chosen with a
bias that balances their load.
"""

from typing import Any

from fastgen_jax.models.config import ModelConfig, MoeConfig
from fastgen_jax.models.families import deepseek_v2

ROUTER = "model.layers.{}.mlp.gate"
EXPERTS = deepseek_v2.EXPERTS | {
    f"{ROUTER}.e_score_correction_bias": ("layers.{}.mlp.score_bias", "plain"),
}
WEIGHTS = deepseek_v2.WEIGHTS | EXPERTS
# The layer behind the last one predicts a second token; nothing here uses it.
IGNORED = (*deepseek_v2.IGNORED, "model.layers.{n_layers}.*")


def config(hf: dict[str, Any]) -> ModelConfig:
    """The ModelConfig of a Hugging Face config.json."""
    return deepseek_v2.latent_model(hf, family="deepseek_v3", moe=mixture(hf))


def mixture(hf: dict[str, Any]) -> MoeConfig:
    """Experts scored by sigmoids in the best groups, in all layers but the first dense ones."""
    deepseek_v2.require(hf, topk_method="noaux_tc", scoring_func="sigmoid")
    return deepseek_v2.mixture(
        hf,
        scores="sigmoid",
        score_bias=True,
        normalise=hf.get("norm_topk_prob", True),
        n_groups=hf["n_group"],
        n_chosen_groups=hf["topk_group"],
    )
