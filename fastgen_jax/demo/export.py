"""Writes a trained Llama as a Hugging Face directory: the inverse of `fastgen_jax.checkpoint`."""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer

from fastgen_jax.checkpoint import flat_params
from fastgen_jax.demo import vocabulary
from fastgen_jax.models import llama

MAX_BYTES = 8_000_000


def hf_tensors(model: llama.Model) -> dict[str, np.ndarray]:
    """The model's weights in bfloat16 under Hugging Face's names, products (out, in)."""
    params = flat_params(model)
    tensors = {}
    for name, (path, part) in llama.WEIGHTS.items():
        for i in range(model.config.n_layers if "{}" in name else 1):
            suffix = "" if part == "plain" else ".weight"
            if path.format(i) + suffix in params:
                array = np.asarray(params[path.format(i) + suffix][...])
                tensor = array if part == "plain" else _part(array, part, model.config)
                tensors[name.format(i) + suffix] = np.ascontiguousarray(
                    tensor.astype(ml_dtypes.bfloat16)
                )
    return tensors


def _part(array: np.ndarray, part: str, config) -> np.ndarray:
    """The rows of a joint product that make up one of Hugging Face's (see layers.py)."""
    n_in, group = array.shape[1], config.group_size
    if part == "linear":
        return array
    if part in ("gate", "up"):
        return array.reshape(2, -1, n_in)[("gate", "up").index(part)]
    heads = array.reshape(config.n_kv_heads, group + 2, config.head_dim, n_in)
    which = {"q": slice(0, group), "k": group, "v": group + 1}[part]
    return heads[:, which].reshape(-1, n_in)


def export(
    directory: Path, model: llama.Model, hf_config: dict[str, Any], tokenizer: Tokenizer
) -> None:
    """Writes config, weights, tokenizer and generation defaults (greedy)."""
    directory.mkdir(parents=True, exist_ok=True)
    weights = directory / "model.safetensors"
    save_file(hf_tensors(model), weights, metadata={"format": "pt"})
    assert weights.stat().st_size <= MAX_BYTES, weights.stat().st_size
    vocabulary.save(tokenizer, directory)
    ends = {name: hf_config[name] for name in ("bos_token_id", "eos_token_id")}
    generation = {**ends, "do_sample": False, "pad_token_id": vocabulary.EOS_ID}
    _write(directory / "config.json", hf_config)
    _write(directory / "generation_config.json", generation)


def _write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
