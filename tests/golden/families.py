"""Tiny configurations of every model family, as `transformers.AutoConfig.for_model` takes them.

At least one for each variant of a family that its code knows. Weights are large (initializer_range)
so that attention is sharp.
"""

from typing import Any

SHAPE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.25,
    "tie_word_embeddings": False,
}
MOE = {"num_local_experts": 5, "num_experts_per_tok": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": SHAPE | {"model_type": "qwen2"},
    "mixtral": SHAPE | MOE | {"model_type": "mixtral", "sliding_window": None},
    "mistral": SHAPE | {"model_type": "mistral", "sliding_window": 50},
}
