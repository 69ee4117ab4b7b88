"""Models that also see or hear: their config.json holds a language model's, and their other tensors
are left out. Only text is served.

Where positions have three axes (M-RoPE), those of text are equal, which is plain RoPE.
"""

from typing import Any

from fastgen_jax.errors import ConfigError

IMAGES = ("vision_tower", "multi_modal_projector")
SOUNDS = ("audio_tower", "multi_modal_projector")
WRAPPERS = {  # model_type -> first words of the names of what is not the language model
    "aya_vision": IMAGES,
    "exaone4_5": ("visual", "mtp"),
    "gemma3": IMAGES,
    "glm46v": ("visual",),
    "glm4v": ("visual",),
    "glm4v_moe": ("visual",),
    "idefics3": ("vision_model", "connector"),
    "internvl": IMAGES,
    "llama4": ("vision_model", "multi_modal_projector"),
    "llava": IMAGES,
    "llava_next": (*IMAGES, "image_newline"),
    "llava_onevision": (*IMAGES, "image_newline"),
    "mistral3": IMAGES,
    "qwen2_5_vl": ("visual",),
    "qwen2_audio": SOUNDS,
    "qwen2_vl": ("visual",),
    "qwen3_vl": ("visual",),
    "qwen3_vl_moe": ("visual",),
    "smolvlm": ("vision_model", "connector"),
    "voxtral": SOUNDS,
}
FLAT = ("qwen2_5_vl", "qwen2_vl")  # whose first checkpoints have the text's fields at the top
TEXTS = {"exaone4_5_text": "exaone4"}  # that are a family of another name
OUTER = ("bos_token_id", "eos_token_id")  # count where both say them
# What a text_config leaves out: transformers once wrote only what differs from its class.
LLAMA = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
DEFAULTS = {
    "cohere2": {
        "vocab_size": 256000,
        "hidden_size": 8192,
        "intermediate_size": 22528,
        "num_hidden_layers": 40,
        "num_attention_heads": 64,
        "bos_token_id": 5,
        "eos_token_id": 255001,
    },
    "glm4v_text": {"head_dim": None, "partial_rotary_factor": None},  # not GLM-4's
    "llama": LLAMA,
    "mistral": LLAMA
    | {"intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 131072},
    "qwen2": {
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 22016,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 32768,
    },
}


def text_config(hf: dict[str, Any]) -> dict[str, Any]:
    """The config of the language model that a config.json holds, or is."""
    outer = hf["model_type"]
    if outer not in WRAPPERS:
        return hf
    text = hf if outer in FLAT and "text_config" not in hf else hf["text_config"]
    if not isinstance(text, dict):
        raise ConfigError(f"text_config in config.json must be an object, got {text!r}")
    named: str = text.get("model_type") or outer
    inner = f"{outer}_text" if named == outer else TEXTS.get(named, named)
    text = DEFAULTS.get(inner, {}) | text | {name: hf[name] for name in OUTER if hf.get(name)}
    # The head is the embedding only where nobody denies it: one that is its own must be stored.
    ties = {config.get("tie_word_embeddings") for config in (hf, text)} - {None}
    text.pop("tie_word_embeddings", None)
    return text | {"model_type": inner} | ({"tie_word_embeddings": all(ties)} if ties else {})
