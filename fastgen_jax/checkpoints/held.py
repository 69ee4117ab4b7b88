"""Parameters that a program holds, as an engine or another mesh wants them.

An array whose dtype and layout are those wanted is shared, not copied; any other is moved by
itself, so that there is never a second copy of more than one parameter on top of what was there.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from fastgen_jax.checkpoints.loading import abstract_model, filled, flat_params
from fastgen_jax.errors import WeightsError
from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.decoder import Model
from fastgen_jax.models.layers import Policy
from fastgen_jax.models.sharding import gathered, lies_alike, place, placed, shape_on

DTYPES = ("float32", "bfloat16", "float16")
OnProgress = Callable[[int, int], None]  # done, total


class Held(NamedTuple):
    """Arrays by the paths of our parameters, laid out for so many devices (see models.layout)."""

    arrays: dict[str, Any]  # of jax or numpy
    n_shards: int


def of_module(module: Model) -> Held:
    """The parameters of a module, wherever they are.

    Not by nnx.state: it leaves cycles that hold the arrays until Python looks for cycles.
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(module)
    paths = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in leaves]
    arrays = {p.removesuffix(".value"): leaf for p, (_, leaf) in zip(paths, leaves, strict=True)}
    return Held(arrays, module.embed.policy.n_shards)


def model_of(
    held: Held, config: ModelConfig, policy: Policy, mesh: Mesh, on_progress: OnProgress
) -> Model:
    """A model with these parameters.

    Raises:
        WeightsError: lists all that is missing, too much, of another shape or dtype, or deleted.
    """
    model = abstract_model(config, policy)
    params = flat_params(model)
    problems = [f"missing: {path}" for path in sorted(params.keys() - held.arrays.keys())]
    check([*problems, *misfits(held, params, config)])

    def leaves() -> Iterator[jax.Array]:
        for n_done, (path, param) in enumerate(params.items()):
            on_progress(n_done, len(params))
            yield moved(path, held, param, config, mesh)
        on_progress(len(params), len(params))

    return filled(model, leaves())


def check(problems: list[str]) -> None:
    """Raises WeightsError if there are any."""
    if problems:
        raise WeightsError(
            f"the weights do not fit the model ({len(problems)} problems); nothing was changed:\n  "
            + "\n  ".join(problems)
        )


def misfits(held: Held, params: dict[str, Any], config: ModelConfig) -> Iterator[str]:
    """What is wrong with those that are there.

    Args:
        params: by path, anything of the shape that one device has.
    """
    for path, array in held.arrays.items():
        if path not in params:
            yield f"unused: {path}"
        elif not isinstance(array, jax.Array | np.ndarray):
            yield f"no array: {path} is of the type {type(array).__name__}"
        elif isinstance(array, jax.Array) and array.is_deleted():
            yield f"deleted: {path} was given away (donated) to a program that has run"
        else:
            want = shape_on(path, params[path].shape, config, held.n_shards)
            if array.shape != want:
                yield f"shape: {path} is {array.shape}, the model wants {want}"
            if array.dtype.name not in DTYPES:
                yield f"dtype: {path} is {array.dtype}; want one of {', '.join(DTYPES)}"


def moved(path: str, held: Held, param: Any, config: ModelConfig, mesh: Mesh) -> jax.Array:
    """A parameter on the devices of the mesh; the array itself where it is there already.

    Args:
        param: anything of its dtype, and of the shape that one device has.
    """
    array, want = held.arrays[path], placed(path, param, config, mesh)
    if lies_alike(path, param.shape, config, held.n_shards, mesh.size):
        array = jax.device_put(_cast(array, want.dtype), want.sharding)
        return array.block_until_ready()
    one = gathered(path, on_host(array), param.shape, config, held.n_shards)
    return place(path, one.astype(want.dtype), config, mesh)


def _cast(array: jax.Array | np.ndarray, dtype: Any) -> jax.Array | np.ndarray:
    """Where it lies; on CPU numpy does it, which compiles nothing. A copy of a numpy array, in any
    case: it is the caller's, who may go on writing there.
    """
    if isinstance(array, np.ndarray):
        return array.astype(dtype)
    if array.dtype == dtype:
        return array
    return (on_host(array) if jax.default_backend() == "cpu" else array).astype(dtype)


def on_host(array: jax.Array | np.ndarray) -> np.ndarray:
    """Of a jax array through another one on the same buffers, for jax keeps what it has copied to
    the host as long as the array lives.
    """
    if isinstance(array, np.ndarray):
        return array
    shards = [shard.data for shard in array.addressable_shards]
    return np.asarray(jax.make_array_from_single_device_arrays(array.shape, array.sharding, shards))
