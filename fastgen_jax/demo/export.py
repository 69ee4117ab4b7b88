"""Writes a trained Llama as a Hugging Face directory: the inverse of `fastgen_jax.checkpoint`."""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer

from fastgen_jax.checkpoints import weights
from fastgen_jax.checkpoints.loading import flat_params
from fastgen_jax.demo import vocabulary
from fastgen_jax.models.decoder import Model
from fastgen_jax.models.families import llama

MAX_BYTES = 8_000_000


def hf_tensors(model: Model) -> dict[str, np.ndarray]:
    """The model's weights in bfloat16 under Hugging Face's names."""
    params = {path: np.asarray(param[...]) for path, param in flat_params(model).items()}
    sources = [s for s in weights.expand(llama.WEIGHTS, model.config) if s.path in params]
    return {
        s.name: np.ascontiguousarray(
            weights.extract(s, params[s.path], model.config).astype(ml_dtypes.bfloat16)
        )
        for s in sources
    }


def export(directory: Path, model: Model, hf_config: dict[str, Any], tokenizer: Tokenizer) -> None:
    """Writes config, weights, tokenizer and generation defaults (greedy)."""
    directory.mkdir(parents=True, exist_ok=True)
    file = directory / "model.safetensors"
    save_file(hf_tensors(model), file, metadata={"format": "pt"})
    assert file.stat().st_size <= MAX_BYTES, file.stat().st_size
    vocabulary.save(tokenizer, directory)
    ends = {name: hf_config[name] for name in ("bos_token_id", "eos_token_id")}
    generation = {**ends, "do_sample": False, "pad_token_id": vocabulary.EOS_ID}
    _write(directory / "config.json", hf_config)
    _write(directory / "generation_config.json", generation)


def _write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
