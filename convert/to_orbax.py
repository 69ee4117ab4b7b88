"""A Hugging Face checkpoint as an Orbax checkpoint that restores onto any mesh.

The result holds weights, config and tokenizer files as they were, what no parameter needs (for the
way back), and a manifest: provenance, where each tensor went, checksums.
"""

import datetime
import importlib.metadata
import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp
from safetensors.numpy import save_file

from fastgen_jax.checkpoints import loading
from fastgen_jax.checkpoints.converted import FORMAT, MANIFEST, WEIGHTS, sha256, stored_shape
from fastgen_jax.checkpoints.directory import read_config, read_hf
from fastgen_jax.checkpoints.hub import TEMPLATES
from fastgen_jax.checkpoints.loading import Parts
from fastgen_jax.checkpoints.overrides import Overrides
from fastgen_jax.checkpoints.quantisation import BESIDE, without_settings
from fastgen_jax.checkpoints.quantised import Tensor
from fastgen_jax.checkpoints.tensor_files import (
    INDEX,
    Stored,
    read_headers,
    weight_files,
)
from fastgen_jax.errors import CheckpointError
from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.layers import Policy

UNUSED = "unused.safetensors"
CHUNK_BYTES = 32 * 2**20  # read at once, by one thread
FILE_BYTES = 2**30
# Weights in any form, and code, which is never run.
NO_TEXTS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx"}
NO_TEXTS |= {".npz", ".pkl", ".py"}
PACKAGES = ("fastgen-jax", "jax", "orbax-checkpoint")


def write(
    source: Path,
    destination: Path,
    *,
    name: str,
    dtype: str | None,
    n_files: int | None,
    overrides: Overrides,
    on_progress: loading.OnProgress,
) -> None:
    """Fills an empty directory with the converted model. Holds all weights in host memory once.

    Args:
        name: of the source, for the manifest.
        dtype: of all weights; None keeps each one's.
        n_files: about how many hold the weights; None for files of FILE_BYTES.
        overrides: keys of config.json to change.
    """
    config = read_config(source, overrides)
    params = loading.flat_params(loading.abstract_model(config, Policy()))
    parts = loading.find_parts(source, config, params, overrides)
    arrays = fill_all(params, parts, config, dtype, on_progress)
    _save(arrays, destination / WEIGHTS, n_files)
    if not _is_quantised(parts):
        _save_unused(source, {*_tensors(parts)}, destination)
    copy_texts(source, destination, overrides, is_quantised=_is_quantised(parts))
    manifest = {
        "format": FORMAT,
        "source": _provenance(source, name),
        "params": {
            path: {"shape": array.shape, "dtype": array.dtype.name}
            for path, array in arrays.items()
        },
        "tensors": _tensors(parts),
        "files": file_table(destination),
    }
    (destination / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")


def fill_all(
    params: dict[str, Any],
    parts: Parts,
    config: ModelConfig,
    dtype: str | None,
    on_progress: loading.OnProgress,
) -> dict[str, np.ndarray]:
    """Every parameter as it will lie on disk."""

    def fill(path: str) -> np.ndarray:
        kind = jax.numpy.dtype(dtype) if dtype else common_dtype(t for _, t in parts[path])
        wanted = jax.ShapeDtypeStruct(params[path].shape, kind)
        array = loading.fill(wanted, parts[path], config)
        return array.reshape(stored_shape(path, array.shape))

    filled = loading.in_parallel(fill, [(path, 0) for path in params], on_progress)
    return dict(zip(params, filled, strict=True))


def common_dtype(tensors: Iterable[Tensor]) -> np.dtype:
    """A dtype that holds each tensor's numbers exactly; dequantised ones become bfloat16."""
    dtypes = {t.dtype if isinstance(t, Stored) else _bfloat16() for t in tensors}
    if np.dtype(np.float64) in dtypes:
        raise CheckpointError("the checkpoint has float64 tensors; give --dtype float32")
    return dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float32)


def _bfloat16() -> np.dtype:
    return np.dtype(jax.numpy.bfloat16)


def _save(arrays: dict[str, np.ndarray], path: Path, n_files: int | None) -> None:
    total = sum(array.nbytes for array in arrays.values())
    file_bytes = max(total // n_files, 2**20) if n_files else FILE_BYTES
    context = ocp.Context()
    saving = context.array.saving
    saving.storage_options.chunk_byte_size = min(CHUNK_BYTES, file_bytes)
    saving.ocdbt_target_data_file_size = file_bytes
    saving.use_compression = False  # weights are as good as random: it would cost time for nothing
    context.memory.deepcopy_host_arrays = False  # nobody writes into them meanwhile
    with context:
        ocp.save(str(path), arrays)


def _save_unused(source: Path, used: set[str], destination: Path) -> None:
    stored, _ = read_headers(weight_files(source))
    unused = {name: tensor[:] for name, tensor in stored.items() if name not in used}
    if unused:
        save_file(unused, destination / UNUSED, metadata={"format": "pt"})


def copy_texts(
    source: Path, destination: Path, overrides: Overrides, *, is_quantised: bool
) -> None:
    """Config, tokenizer, templates: every file that holds neither weights nor code."""
    for file in sorted(source.iterdir()):
        is_left = file.suffix in NO_TEXTS or file.name.startswith(".")
        if file.is_file() and not is_left and file.name not in (INDEX, MANIFEST):
            shutil.copyfile(file, destination / file.name)
    for template in sorted((source / TEMPLATES).glob("*.jinja")):
        (destination / TEMPLATES).mkdir(exist_ok=True)
        shutil.copyfile(template, destination / TEMPLATES / template.name)
    if is_quantised or overrides:
        hf = read_hf(source, overrides)
        if is_quantised:  # no longer
            hf = without_settings(hf)
            (destination / BESIDE).unlink(missing_ok=True)
        (destination / "config.json").write_text(json.dumps(hf, indent=2) + "\n")


def _is_quantised(parts: Parts) -> bool:
    return any(not isinstance(t, Stored) for found in parts.values() for _, t in found)


def _tensors(parts: Parts) -> dict[str, Any]:
    """By name in the source: its file and dtype, and the part of a parameter that it is."""
    table = {}
    for found in parts.values():
        for source, tensor in found:
            is_stored = isinstance(tensor, Stored)
            kind = tensor.dtype if is_stored else _bfloat16()
            entry = {"file": tensor.file.name, "dtype": kind.name, "part": source}
            table[tensor.name if is_stored else source.name] = entry
    return table


def file_table(directory: Path) -> dict[str, tuple[int, str]]:
    """Size and checksum of every file below a directory."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(f.relative_to(directory)): (f.stat().st_size, sha256(f)) for f in files}


def _provenance(source: Path, name: str) -> dict[str, Any]:
    resolved = source.resolve()
    return {
        "name": name,
        # The hub's cache has a folder for each commit.
        "revision": resolved.name if resolved.parent.name == "snapshots" else None,
        "files": {file.name: file.stat().st_size for file in weight_files(source)},
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": {package: importlib.metadata.version(package) for package in PACKAGES},
    }
