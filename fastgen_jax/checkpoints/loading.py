"""Fills an NNX model from the files of a checkpoint directory, or with random weights.

Weights are read only from safetensors, never from pickles. A family's WEIGHTS says where each
Hugging Face tensor goes. Before anything is read or any device memory taken, every disagreement
between files and model (missing, unused, wrong shape or dtype, damaged) is found, and all are
reported at once. A parameter is filled by byte ranges, moved to its devices and forgotten: the host
never holds the model.
"""

from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

import fastgen_jax.models.families as families
from fastgen_jax.checkpoints import converted, names, weights
from fastgen_jax.checkpoints.converted import Transform
from fastgen_jax.checkpoints.directory import read_hf
from fastgen_jax.checkpoints.overrides import Overrides
from fastgen_jax.checkpoints.quantised import Tensor, unquantised
from fastgen_jax.checkpoints.tensor_files import read_headers, weight_files
from fastgen_jax.checkpoints.weights import Source
from fastgen_jax.errors import CheckpointError
from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.decoder import Model
from fastgen_jax.models.families.wrappers import WRAPPERS
from fastgen_jax.models.layers import Policy
from fastgen_jax.models.sharding import laid_out, place, placed

N_THREADS = 4
MAX_IN_FLIGHT = 2**30  # bytes of parameters that are filled at once, but at least one parameter
MAX_PROBLEMS = 100  # printed

OnProgress = Callable[[int, int], None]  # done, total


def abstract_model(config: ModelConfig, policy: Policy) -> Model:
    """The model with shapes in place of arrays, those of one device."""
    return nnx.eval_shape(lambda: Model(config, policy=policy, rngs=nnx.Rngs(0)))


def flat_params(model: nnx.Module) -> dict[str, Any]:
    """Dotted path -> variable."""
    return {
        ".".join(map(str, path)): variable
        for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param))
    }


def random_model(config: ModelConfig, policy: Policy, mesh: Mesh, seed: int | jax.Array) -> Model:
    """A model of random weights (load_format="dummy"), made on the devices: the same on one as on
    several.

    Args:
        seed: or a key.
    """
    model = abstract_model(config, policy)
    params = flat_params(model)
    shardings = [placed(path, param, config, mesh).sharding for path, param in params.items()]

    def init():
        leaves = jax.tree.leaves(Model(config, policy=policy, rngs=nnx.Rngs(seed)))
        return [
            laid_out(path, leaf, config, mesh.size)
            for path, leaf in zip(params, leaves, strict=True)
        ]

    return filled(model, jax.jit(init, out_shardings=shardings)())


def filled(model: Model, leaves: Iterable[jax.Array]) -> Model:
    """The model with these parameters.

    Not by nnx.split and nnx.merge: these leave cycles that hold the arrays until Python looks for
    cycles.
    """
    return jax.tree.unflatten(jax.tree.structure(model), leaves)


def load_model(
    directory: Path,
    config: ModelConfig,
    policy: Policy,
    mesh: Mesh,
    on_progress: OnProgress = lambda done, total: None,
    transform: Transform | None = None,
    overrides: Overrides = None,
) -> Model:
    """The model of a Hugging Face or converted directory, on the devices of the mesh.

    Args:
        overrides: what was changed of config.json before `config` was made of it.
        transform: applied to each parameter before it is moved, to cast or quantise it.

    Raises:
        CheckpointError: lists every tensor that is missing, unused, of the wrong shape or dtype, or
        damaged.
    """
    model = abstract_model(config, policy)
    params = flat_params(model)
    if converted.is_converted(directory):
        leaves = read_converted(directory, config, mesh, params, on_progress, transform)
    else:
        leaves = read_safetensors(
            directory, config, mesh, params, on_progress, transform, overrides
        )
    return filled(model, leaves)


def read_converted(
    directory: Path,
    config: ModelConfig,
    mesh: Mesh,
    params: dict[str, Any],
    on_progress: OnProgress,
    transform: Transform | None,
) -> list[jax.Array]:
    """The parameters, in order, on the devices of the mesh, from what `python -m convert` made."""
    on_progress(0, len(params))
    leaves = converted.restore(directory, params, config, mesh, transform)
    on_progress(len(params), len(params))
    return leaves


def read_safetensors(
    directory: Path,
    config: ModelConfig,
    mesh: Mesh,
    params: dict[str, Any],
    on_progress: OnProgress,
    transform: Transform | None,
    overrides: Overrides,
) -> list[jax.Array]:
    """The parameters, in order, on the devices of the mesh, from a Hugging Face directory."""
    parts = find_parts(directory, config, params, overrides)

    def load(path: str) -> jax.Array:
        array = fill(params[path], parts[path], config)
        if transform is not None:
            array = transform(path, array)
        return place(path, array, config, mesh)

    sizes = [(path, param.size * param.dtype.itemsize) for path, param in params.items()]
    return in_parallel(load, sizes, on_progress)


Parts = dict[str, list[tuple[Source, Tensor]]]  # by path: what fills the parameter


def find_parts(
    directory: Path, config: ModelConfig, params: dict[str, Any], overrides: Overrides = None
) -> Parts:
    """Which tensors of a Hugging Face directory fill which parameters.

    Args:
        overrides: what was changed of config.json before `config` was made of it.

    Raises:
        CheckpointError: lists all problems.
    """
    family = families.family(config.family)
    stored, problems = read_headers(weight_files(directory))
    if (name := names.adapter(stored)) is not None:
        raise CheckpointError(
            f"{name} in {stored[name].file.name} belongs to an adapter (LoRA) that is not merged; "
            "merge it into its base model (merge_and_unload of peft) and give what that saves"
        )
    hf = read_hf(directory, overrides)
    tensors, found = unquantised(hf, stored)
    problems += found
    known = [*family.WEIGHTS, *family.IGNORED]
    others = WRAPPERS.get(hf["model_type"], ())
    ours, found = names.canonical(tensors, known, others)
    problems += found
    tensors = {name: tensors[theirs] for name, theirs in ours.items()}
    shapes = {path: param.shape for path, param in params.items()}
    sources, found = weights.plan(family, config, shapes, tensors)
    problems += found
    if problems:
        shown = problems[:MAX_PROBLEMS]
        if len(problems) > len(shown):
            shown.append(f"and {len(problems) - len(shown)} more")
        raise CheckpointError(
            f"the checkpoint is damaged or does not fit its config.json ({len(problems)} problems):"
            "\n  " + "\n  ".join(shown)
        )
    parts: Parts = {path: [] for path in params}
    for source in sources:
        parts[source.path].append((source, tensors[source.name]))
    unfilled = [path for path, found in parts.items() if not found]
    assert not unfilled, unfilled
    return parts


def fill(param: Any, parts: list[tuple[Source, Tensor]], config: ModelConfig) -> np.ndarray:
    """A parameter with the shape and dtype of `param`, from its parts."""
    array = np.empty(param.shape, param.dtype)
    for source, tensor in parts:
        weights.fill(source, array, tensor, config)
    return array


def in_parallel(
    load: Callable[[str], Any], sizes: Iterable[tuple[str, int]], on_progress: OnProgress
) -> list[Any]:
    """`load` of every path, in order, on several threads that together hold MAX_IN_FLIGHT bytes."""
    waiting = deque(sizes)
    total, n_bytes, running, results = len(waiting), 0, deque(), []
    on_progress(0, total)
    with ThreadPoolExecutor(N_THREADS, thread_name_prefix="load") as pool:
        while waiting or running:
            if waiting and (not running or n_bytes + waiting[0][1] <= MAX_IN_FLIGHT):
                path, size = waiting.popleft()
                n_bytes += size
                running.append((pool.submit(load, path), size))
                continue
            future, size = running.popleft()
            results.append(future.result())
            n_bytes -= size
            on_progress(len(results), total)
    return results
