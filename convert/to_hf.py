"""A converted checkpoint as the Hugging Face checkpoint that it was: the same tensors, bit for bit,
in the same files unless another number of files is asked for.
"""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from convert.to_orbax import UNUSED, copy_texts
from fastgen_jax.checkpoints import weights
from fastgen_jax.checkpoints.converted import PAIRS, read_host_arrays, read_manifest
from fastgen_jax.checkpoints.directory import read_config
from fastgen_jax.checkpoints.overrides import Overrides
from fastgen_jax.checkpoints.tensor_files import INDEX, read_header
from fastgen_jax.models.config import ModelConfig


def write(
    source: Path,
    destination: Path,
    *,
    dtype: str | None,
    n_files: int | None,
    overrides: Overrides,
) -> None:
    """Fills an empty directory with the Hugging Face form of a converted model.

    Args:
        dtype: of all weights; None for what each was.
        n_files: how many hold the weights; None for as many as there were.
        overrides: keys of config.json to change.
    """
    table = read_manifest(source)["tensors"]
    config, arrays = read_config(source, overrides), read_host_arrays(source)
    unused = _unused(source)
    files: dict[str, str] = {name: entry["file"] for name, entry in table.items()}
    files |= dict.fromkeys(unused, min(files.values()))
    if n_files is not None:
        files = _spread(files, n_files)
    by_file = defaultdict(list)
    for name, file in files.items():
        by_file[file].append(name)
    total = 0
    for file, names in by_file.items():
        tensors = {
            name: unused[name] if name in unused else _tensor(table[name], arrays, config, dtype)
            for name in names
        }
        total += sum(tensor.nbytes for tensor in tensors.values())
        save_file(tensors, destination / file, metadata={"format": "pt"})
    copy_texts(source, destination, overrides, is_quantised=False)
    if len(by_file) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(files.items()))}
        (destination / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _tensor(
    entry: dict[str, Any], arrays: dict[str, np.ndarray], config: ModelConfig, dtype: str | None
) -> np.ndarray:
    source = weights.Source(*entry["part"])
    stored = arrays[source.path]
    if source.path.endswith(PAIRS):
        stored = stored.reshape(-1, *stored.shape[2:])
    tensor = weights.extract(source, stored, config)
    return np.asarray(tensor, jax.numpy.dtype(dtype or entry["dtype"]), order="C")


def _unused(source: Path) -> dict[str, np.ndarray]:
    """What the model had and needs not."""
    file = source / UNUSED
    if not file.exists():
        return {}
    tensors, _ = read_header(file)
    return {name: tensor[:] for name, tensor in tensors.items()}


def _spread(files: dict[str, str], n_files: int) -> dict[str, str]:
    """The same names over so many files, in the order that they have."""
    if n_files == 1:
        return dict.fromkeys(files, "model.safetensors")
    n_files = min(n_files, len(files))
    return {
        name: f"model-{i * n_files // len(files) + 1:05}-of-{n_files:05}.safetensors"
        for i, name in enumerate(files)
    }
