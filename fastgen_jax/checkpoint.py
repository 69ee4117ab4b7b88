"""What lies on disk: finds a model's files, reads its configs, and fills an NNX model from
safetensors.

The only place that knows on-disk formats. Weights are read only from safetensors, never from
pickles. A family's WEIGHTS says where each Hugging Face tensor goes; before anything is read, every
disagreement between files and model (missing, unused, wrong shape, unreadable) is found and all are
reported at once.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from safetensors import SafetensorError, safe_open

from fastgen_jax import models, weights
from fastgen_jax.config import ModelConfig
from fastgen_jax.errors import CheckpointError, ConfigError
from fastgen_jax.layers import Policy
from fastgen_jax.models.decoder import Model
from fastgen_jax.sharding import parameter_sharding
from fastgen_jax.weights import Source

HUB_FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "tokenizer.model", "*.jinja"]
MAX_JSON_BYTES = 64 * 2**20


class Stored(NamedTuple):
    """A tensor of a safetensors file."""

    file: Path
    name: str
    shape: tuple[int, ...]

    def read(self) -> np.ndarray:
        with safe_open(self.file, framework="numpy") as opened:
            return opened.get_tensor(self.name)


def locate(model: str) -> Path:
    """The directory of a model: a path as it is, a hub id downloaded (with a progress bar) on first
    use.

    Raises:
        CheckpointError: neither a directory nor a repository that can be downloaded.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    looks_like_id = model.count("/") <= 1 and not model.startswith((".", "/", "~"))
    if not looks_like_id:
        raise CheckpointError(f"no directory {model!r}; give a Hugging Face directory or a hub id")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, allow_patterns=HUB_FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        first_line = str(error).strip().split("\n")[0]
        raise CheckpointError(
            f"{model!r} is no directory here and could not be downloaded ({first_line}); check the "
            "name, the network, or give the path of a downloaded directory"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; CheckpointError names what is wrong with it."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise CheckpointError(f"{path.name} is larger than {MAX_JSON_BYTES} bytes")
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(
            f"{path.name} is missing in {str(path.parent)!r}; is this the directory of a "
            "Hugging Face model?"
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path.name} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path.name} must hold a JSON object, got {type(value).__name__}")
    return value


def read_config(directory: Path) -> ModelConfig:
    """The ModelConfig of a checkpoint directory."""
    hf = read_json(directory / "config.json")
    if "model_type" not in hf:
        raise ConfigError("config.json has no model_type")
    try:
        return models.family(hf["model_type"]).config(hf)
    except KeyError as error:
        raise ConfigError(f"config.json lacks {error}") from error
    except TypeError as error:
        raise ConfigError(f"config.json has a value of the wrong type: {error}") from error


def read_generation_config(directory: Path) -> dict[str, Any]:
    """generation_config.json, or {} where there is none."""
    path = directory / "generation_config.json"
    return read_json(path) if path.exists() else {}


def abstract_model(config: ModelConfig, policy: Policy) -> nnx.Module:
    """The model with shapes in place of arrays."""
    return nnx.eval_shape(lambda: Model(config, policy=policy, rngs=nnx.Rngs(0)))


def flat_params(model: nnx.Module) -> dict[str, Any]:
    """Dotted path -> variable."""
    return {
        ".".join(map(str, path)): variable
        for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param))
    }


def random_model(config: ModelConfig, policy: Policy, mesh: Mesh, seed: int) -> nnx.Module:
    """A model of random weights (load_format="dummy"), made on the devices."""
    graphdef, abstract = nnx.split(abstract_model(config, policy))
    shardings = _tree_shardings(abstract, mesh)

    def init():
        return nnx.state(Model(config, policy=policy, rngs=nnx.Rngs(seed)))

    return nnx.merge(graphdef, jax.jit(init, out_shardings=shardings)())


def _tree_shardings(state: nnx.State, mesh: Mesh) -> nnx.State:
    paths = [".".join(map(str, path)) for path, _ in nnx.to_flat_state(state)]
    shardings = [parameter_sharding(path, mesh) for path in paths]
    return jax.tree.unflatten(jax.tree.structure(state), shardings)


def load_model(
    directory: Path,
    config: ModelConfig,
    policy: Policy,
    mesh: Mesh,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> nnx.Module:
    """The model of a Hugging Face directory, on the devices of the mesh.

    Raises:
        CheckpointError: lists every tensor that is missing, unused, of the wrong shape or
        unreadable.
    """
    family = models.family(config.family)
    model = abstract_model(config, policy)
    params = flat_params(model)
    stored = read_headers(weight_files(directory), getattr(family, "PREFIX", ""))
    sources = weights.plan(
        family,
        config,
        policy.n_shards,
        {path: param.shape for path, param in params.items()},
        {name: tensor.shape for name, tensor in stored.items()},
    )
    by_path: dict[str, list[Source]] = {path: [] for path in params}
    for source in sources:
        by_path[source.path].append(source)
    graphdef, state = nnx.split(model)
    leaves = []
    for n_done, (path, param) in enumerate(params.items()):
        on_progress(n_done, len(params))
        array = np.empty(param.shape, param.dtype)
        for source in by_path[path]:
            tensor = stored[source.name].read()
            weights.fill(source, array, tensor, config, policy.n_shards)
        leaves.append(jax.device_put(array, parameter_sharding(path, mesh)))
    on_progress(len(params), len(params))
    return nnx.merge(graphdef, jax.tree.unflatten(jax.tree.structure(state), leaves))


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint: those its index names, or its only one.

    Raises:
        CheckpointError: none, a missing shard, an index that points outside the directory, or
        pickles only.
    """
    index = directory / "model.safetensors.index.json"
    if index.exists():
        names = sorted(set(read_json(index).get("weight_map", {}).values()))
        escaping = [n for n in names if not isinstance(n, str) or Path(n).name != n or "\0" in n]
        if escaping or not names:
            raise CheckpointError(f"{index.name} names no file of this directory: {escaping[:3]}")
        missing = [n for n in names if not (directory / n).is_file()]
        if missing:
            raise CheckpointError(f"shards named in {index.name} are missing: {', '.join(missing)}")
        return [directory / n for n in names]
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        pickles = sorted(p.name for p in directory.glob("*.bin")) + sorted(
            p.name for p in directory.glob("*.pt*")
        )
        why = (
            f"; {pickles[0]} is a pickle, which can run code when read: convert it to safetensors"
            if pickles
            else ""
        )
        raise CheckpointError(f"no .safetensors file in {str(directory)!r}{why}")
    return files


def read_headers(files: list[Path], prefix: str = "") -> dict[str, Stored]:
    """Every tensor by name; CheckpointError lists unreadable files.

    prefix: what all names of a model begin with; if no name of a checkpoint does, as where it was
    saved without its head, it is added.
    """
    stored, problems = {}, []
    for file in files:
        try:
            with safe_open(file, framework="numpy") as opened:
                for name in opened.keys():  # noqa: SIM118 (not a dict)
                    if name in stored:
                        problems.append(f"{name}: in {stored[name].file.name} and in {file.name}")
                    shape = tuple(opened.get_slice(name).get_shape())
                    stored[name] = Stored(file, name, shape)
        except (SafetensorError, OSError) as error:
            problems.append(f"{file.name}: {error}")
    if problems:
        raise CheckpointError("damaged checkpoint:\n  " + "\n  ".join(problems))
    if not any(name.startswith(prefix) for name in stored):
        return {prefix + name: tensor for name, tensor in stored.items()}
    return stored
