"""Directories that `python -m convert` makes: an Orbax checkpoint of our parameters beside config,
tokenizer and a manifest.

Parameters are stored as one device holds them, gate and up as two rows of one array, so that every
mesh that divides it can read its own part. The manifest is written last and names every file.
"""

import hashlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fastgen_jax.checkpoints.tensor_files import read_json
from fastgen_jax.errors import CheckpointError
from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.sharding import lines_of, place, placed

MANIFEST = "fastgen.json"
WEIGHTS = "weights"
FORMAT = 1
MAX_IN_FLIGHT = 2**29  # bytes read at once, but at least one parameter
PAIRS = (".gate_up.weight", ".gate_up.bias")  # see layers.GatedMLP


Transform = Callable[[str, np.ndarray], np.ndarray]  # of a parameter's path and value, on the host


def is_converted(directory: Path) -> bool:
    return (directory / MANIFEST).is_file()


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest; CheckpointError where it is damaged or of another version."""
    manifest = read_json(directory / MANIFEST)
    if manifest.get("format") != FORMAT:
        raise CheckpointError(
            f"{MANIFEST} has format {manifest.get('format')!r} and this program reads {FORMAT}; "
            "convert the model again"
        )
    for key in ("files", "params", "tensors"):
        if not isinstance(manifest.get(key), dict):
            raise CheckpointError(f"{MANIFEST} is damaged: it has no {key!r}; convert again")
    return manifest


def stored_shape(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of a parameter on disk."""
    return (2, shape[0] // 2, *shape[1:]) if path.endswith(PAIRS) else tuple(shape)


def sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def damages(directory: Path, files: dict[str, Any], *, checksums: bool) -> Iterator[str]:
    """What differs between a directory and the files of its manifest."""
    for name, (size, digest) in files.items():
        file = directory / name
        if not file.is_file():
            yield f"missing: {name}"
        elif file.stat().st_size != size:
            yield f"size: {name} has {file.stat().st_size} bytes, should have {size}"
        elif checksums and sha256(file) != digest:
            yield f"checksum: {name} is not as it was written"


def misfits(stored: dict[str, Any], params: dict[str, Any]) -> Iterator[str]:
    """Where the parameters of a manifest are not those of the model."""
    for path in sorted(params.keys() - stored.keys()):
        yield f"missing: {path}"
    for path in sorted(stored.keys() - params.keys()):
        yield f"unused: {path}"
    for path in params.keys() & stored.keys():
        want, have = stored_shape(path, params[path].shape), tuple(stored[path]["shape"])
        if want != have:
            yield f"shape: {path} is {have}, the config wants {want}"


def check(directory: Path, params: dict[str, Any]) -> None:
    """Raises CheckpointError, which lists all that is damaged or does not fit the model."""
    manifest = read_manifest(directory)
    problems = [*damages(directory, manifest["files"], checksums=False)]
    problems += misfits(manifest["params"], params)
    if problems:
        raise CheckpointError(
            f"the converted checkpoint is damaged or does not fit its config.json "
            f"({len(problems)} problems); convert the model again:\n  " + "\n  ".join(problems)
        )


def restore(
    directory: Path,
    params: dict[str, Any],
    config: ModelConfig,
    mesh: Mesh,
    transform: Transform | None = None,
) -> list[jax.Array]:
    """The parameters, in the order of `params`, with their dtypes, on the devices of the mesh.

    Each device reads its own part. What is to be transformed, or does not divide as it is stored,
    goes through the host, one parameter after the other.

    Raises:
        CheckpointError: lists all that is damaged or does not fit the model.
    """
    check(directory, params)
    found = {path: _parts(path, param, config, mesh) for path, param in params.items()}
    parts = {} if transform else {path: part for path, part in found.items() if part is not None}
    arrays = _read(directory / WEIGHTS, parts) if parts else {}
    # A function of this call: jax keeps its programs, one per shape, as long as it lives.
    join = jax.jit(lambda pair: pair.reshape(-1, *pair.shape[2:]))

    def leaf(path: str) -> jax.Array:
        if path not in parts:
            array = read_whole(directory, path, params[path])
            return place(path, transform(path, array) if transform else array, config, mesh)
        return _joined(arrays.pop(path), join) if path.endswith(PAIRS) else arrays.pop(path)

    return [leaf(path) for path in params]


def _parts(
    path: str, param: jax.ShapeDtypeStruct, config: ModelConfig, mesh: Mesh
) -> jax.ShapeDtypeStruct | None:
    """The stored parameter split so that each device has its own part; None: it does not divide."""
    want = placed(path, param, config, mesh)
    if path.endswith(PAIRS) and want.shape == param.shape:
        assert isinstance(want.sharding, NamedSharding)
        sharding = NamedSharding(mesh, PartitionSpec(None, *want.sharding.spec))
        shape = stored_shape(path, param.shape)
        return jax.ShapeDtypeStruct(shape, param.dtype, sharding=sharding)
    return want if lines_of(path, param.shape, config, mesh.size) is None else None


def read_whole(directory: Path, path: str, param: jax.ShapeDtypeStruct) -> np.ndarray:
    """A parameter as one device has it, on the host."""
    wanted = {path: np.empty(stored_shape(path, param.shape), param.dtype)}
    return _read(directory / WEIGHTS, wanted)[path].reshape(param.shape)


def read_host_arrays(directory: Path) -> dict[str, np.ndarray]:
    """The parameters as stored, on the host."""
    stored = read_manifest(directory)["params"]
    wanted = {
        path: np.empty(entry["shape"], jax.numpy.dtype(entry["dtype"]))
        for path, entry in stored.items()
    }
    return {path: np.asarray(array) for path, array in _read(directory / WEIGHTS, wanted).items()}


def _read(path: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    from orbax.checkpoint import v1 as ocp

    # A parameter is held as stored and as wanted, and Orbax refuses one as large as the limit.
    largest = max(math.prod(array.shape) for array in wanted.values()) * 8 + 1
    context = ocp.Context()
    context.memory.read_concurrent_bytes = max(largest, MAX_IN_FLIGHT)
    context.pytree.loading.partial_load = True  # what is wanted, not all that is there
    try:
        with context:
            return ocp.load(str(path.resolve()), wanted)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path.name} cannot be read: {error}; convert the model again"
        ) from error


def _joined(pair: jax.Array, join: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """(2, F, ...) split by F as (2 F, ...) in which each device has its gates, then its ups."""
    shape = (2 * pair.shape[1], *pair.shape[2:])
    assert isinstance(pair.sharding, NamedSharding)
    sharding = NamedSharding(pair.sharding.mesh, PartitionSpec(*pair.sharding.spec[1:]))
    shards = [join(s.data) for s in pair.addressable_shards]
    return jax.make_array_from_single_device_arrays(shape, sharding, shards)
