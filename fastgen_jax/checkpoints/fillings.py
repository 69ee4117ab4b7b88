"""What can fill the parameters of a model that runs: a module, a state or any tree by our paths,
tensors by Hugging Face's names, or a checkpoint's directory.

`fillings` finds all that is wrong and takes no memory; each Filling then makes one parameter.
"""

import dataclasses
import difflib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

import fastgen_jax.models.families as families
from fastgen_jax.checkpoints import converted, held, loading, names, weights
from fastgen_jax.checkpoints.directory import locate, read_config
from fastgen_jax.checkpoints.held import Held, on_host
from fastgen_jax.checkpoints.overrides import Overrides
from fastgen_jax.checkpoints.weights import Source
from fastgen_jax.errors import WeightsError
from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.decoder import Model
from fastgen_jax.models.sharding import gathered, place

Filling = Callable[[jax.Array | np.ndarray], jax.Array]  # what is there -> what shall be
MAX_HINTS = 20  # names for which the nearest ones are looked up
UNTRAINED = ("max_position", "eos_token_ids", "bos_token_id")  # of a config: no weight depends on
GIVEN = Path("the given arrays")


class Target(NamedTuple):
    """The model that runs. params: its parameters by path, with the shapes of one device."""

    config: ModelConfig
    params: dict[str, Any]
    mesh: Mesh
    overrides: Overrides


@dataclass(frozen=True)
class Tensor:
    """An array under the name that Hugging Face gives it, as `weights.plan` wants it."""

    array: Any
    file: Path = GIVEN

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    @property
    def dtype(self) -> np.dtype:
        return self.array.dtype

    def __getitem__(self, rows: slice) -> np.ndarray:
        return on_host(self.array)[rows]


def fillings(source: Any, target: Target) -> dict[str, Filling]:
    """By path, what fills the parameters that the source has; a module and a directory have all.

    Raises:
        WeightsError, CheckpointError: lists everything that does not fit.
        ConfigError: there is no such directory.
    """
    if isinstance(source, str | os.PathLike):
        return _of_directory(locate(os.fspath(source)), target)
    if isinstance(source, Model):
        found = held.of_module(source)
        missing = [f"missing: {path}" for path in target.params if path not in found.arrays]
        return _of_held(found, target, [*_differences(source.config, target.config), *missing])
    arrays = dict(_flat(source))
    if not arrays:
        raise WeightsError(
            "no weights given; want a module of fastgen_jax.models, its state, arrays by path or "
            f"by Hugging Face's names, or a directory, got {type(source).__name__}"
        )
    if _are_ours(arrays, target):
        return _of_held(Held(arrays, 1), target, [])
    return _of_tensors(arrays, target)


def _flat(tree: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Leaves by dotted path."""
    if isinstance(tree, nnx.State):
        tree = nnx.to_pure_dict(tree)
    if isinstance(tree, nnx.Variable):
        tree = tree.get_raw_value()
    if isinstance(tree, list | tuple):
        tree = dict(enumerate(tree))
    if isinstance(tree, Mapping):
        for name, inner in tree.items():
            yield from _flat(inner, (*path, str(name)))
    elif path:
        yield ".".join(path), tree


def _are_ours(arrays: dict[str, Any], target: Target) -> bool:
    """Whether the names are our paths: all of them, or more than are Hugging Face's."""
    ours = arrays.keys() & target.params.keys()
    if len(ours) == len(arrays):
        return True
    theirs, _ = names.canonical(arrays, _known(target.config))
    return len(ours) > len(theirs.keys() & {s.name for s in _expanded(target.config)})


def _known(config: ModelConfig) -> list[str]:
    family = families.family(config.family)
    return [*family.WEIGHTS, *family.IGNORED]


def _expanded(config: ModelConfig) -> list[Source]:
    return weights.expand(families.family(config.family).WEIGHTS, config)


def _differences(given: ModelConfig, config: ModelConfig) -> list[str]:
    """Where a config is of another model than the one that runs."""
    if given.rope and config.rope:
        rope = dataclasses.replace(given.rope, is_long=config.rope.is_long)  # chosen at the start
        given = dataclasses.replace(given, rope=rope)
    pairs = {
        field.name: (getattr(given, field.name), getattr(config, field.name))
        for field in dataclasses.fields(config)
        if field.name not in UNTRAINED
    }
    return [
        f"config: {name} is {one!r}, the model's is {own!r}"
        for name, (one, own) in pairs.items()
        if one != own
    ]


def _of_held(found: Held, target: Target, problems: list[str]) -> dict[str, Filling]:
    misfits = held.misfits(found, target.params, target.config)
    held.check(_with_hints([*problems, *misfits], target.params))

    def filling(path: str, _: Any) -> jax.Array:
        return held.moved(path, found, target.params[path], target.config, target.mesh)

    return {path: partial(filling, path) for path in found.arrays}


def _with_hints(problems: list[str], known: Iterable[str]) -> list[str]:
    """With the nearest known name behind each unknown one."""
    known, unused = list(known), [p for p in problems if p.startswith("unused: ")]
    hints = {}
    for problem in unused[:MAX_HINTS]:
        name = problem.split()[1]
        near = difflib.get_close_matches(name, known, n=1)
        hints[problem] = f"{problem}; did you mean {near[0]}?" if near else problem
    return [hints.get(problem, problem) for problem in problems]


def _of_tensors(arrays: dict[str, Any], target: Target) -> dict[str, Filling]:
    config, params = target.config, target.params
    family = families.family(config.family)
    unfit = [
        f"no array: {name} is of the type {type(array).__name__}"
        for name, array in arrays.items()
        if not isinstance(array, jax.Array | np.ndarray)
    ]
    unfit += [
        f"deleted: {name} was given away (donated) to a program that has run"
        for name, array in arrays.items()
        if isinstance(array, jax.Array) and array.is_deleted()
    ]
    held.check(unfit)
    ours, problems = names.canonical(arrays, _known(config))
    tensors = {name: Tensor(arrays[theirs]) for name, theirs in ours.items()}
    shapes = {path: param.shape for path, param in params.items()}
    sources, found = weights.plan(family, config, shapes, tensors)
    problems += [problem for problem in found if not problem.startswith("missing: ")]
    paths = {source.name: source.path for source in _expanded(config)}
    if paths.keys() & tensors.keys() and weights.EMBEDDING not in {paths.get(n) for n in tensors}:
        problems += [
            f"unused: {name} (the model's head is its embedding: give that)"
            for name in tensors
            if paths.get(name) == weights.TIED_HEAD and weights.TIED_HEAD not in params
        ]
    known = [source.name for source in _expanded(config) if source.path in params]
    held.check(_with_hints(problems, known))
    by_path: dict[str, list[tuple[Source, Any]]] = {}
    for source in sources:
        by_path.setdefault(source.path, []).append((source, tensors.get(source.name)))
    return {
        path: partial(_filled, path, parts, target)
        for path, parts in by_path.items()
        if any(tensor is not None for _, tensor in parts)
    }


def _filled(
    path: str, parts: list[tuple[Source, Any]], target: Target, old: jax.Array | np.ndarray
) -> jax.Array:
    """A parameter, of tensors that are all of it or some of what is fused in it."""
    config, param, mesh = target.config, target.params[path], target.mesh
    given = [(source, tensor) for source, tensor in parts if tensor is not None]
    source, tensor = given[0]
    if source.index is None and source.part in (weights.PLAIN, "linear"):
        return held.moved(path, Held({path: tensor.array}, 1), param, config, mesh)
    if len(given) == len(parts):
        whole = np.empty(param.shape, param.dtype)
    else:
        whole = gathered(path, on_host(old), param.shape, config, mesh.size).copy()
    for source, tensor in given:
        weights.fill(source, whole, Tensor(on_host(tensor.array)), config)
    return place(path, whole, config, mesh)


def _of_directory(directory: Path, target: Target) -> dict[str, Filling]:
    config, params, mesh = target.config, target.params, target.mesh
    held.check(_differences(read_config(directory, target.overrides), config))
    if converted.is_converted(directory):
        converted.check(directory, params)
        read = partial(converted.read_whole, directory)
    else:
        parts = loading.find_parts(directory, config, params, target.overrides)

        def read(path: str, param: Any) -> np.ndarray:
            return loading.fill(param, parts[path], config)

    def filling(path: str, _: Any) -> jax.Array:
        return place(path, read(path, params[path]), config, mesh)

    return {path: partial(filling, path) for path in params}
