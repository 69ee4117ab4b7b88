"""Which tensor of a Hugging Face checkpoint fills which part of which of our parameters.

A family's WEIGHTS maps names to (path, part): `{}` in a name is the layer, a second one the expert
or head. A part is a list of views of the parameter; laid one behind the other by rows they are the
tensor. So one table serves loading and, read backwards, exporting.
"""

import re
from typing import Any, NamedTuple

import numpy as np

from fastgen_jax.config import ModelConfig
from fastgen_jax.errors import CheckpointError

PLAIN = "plain"  # the tensor is the parameter; all other parts stand for a weight and its bias
TRANSPOSED = "T:"  # before a part: the file has (in, out)


class Source(NamedTuple):
    """One tensor of a file and the part of a parameter that it fills."""

    name: str
    path: str  # of our parameter, dotted
    part: str
    index: int | None = None  # of the expert or head


def expand(weights: dict[str, tuple[str, str]], config: ModelConfig) -> list[Source]:
    """WEIGHTS with layers and experts (or heads) filled in; an entry that is a whole linear stands
    for its weight and bias.
    """
    n_inner = max(config.moe.n_experts if config.moe else 0, config.n_heads)
    sources = []
    for name, (path, part) in weights.items():
        n_slots = name.count("{}")
        for i in range(config.n_layers if n_slots else 1):
            for j in range(n_inner) if n_slots == 2 else (None,):
                source = Source(name.format(i, j), path.format(i), part, j)
                sources += [source] if part == PLAIN else _weight_and_bias(source)
    return sources


def _weight_and_bias(source: Source) -> list[Source]:
    """An expert's weight and bias are parameters side by side; another product's lie inside it."""
    weight, bias = ("", "_bias") if _is_of_experts(source) else (".weight", ".bias")
    return [
        source._replace(name=f"{source.name}.weight", path=source.path + weight),
        source._replace(name=f"{source.name}.bias", path=source.path + bias),
    ]


def _is_of_experts(source: Source) -> bool:
    return source.part.removeprefix(TRANSPOSED).startswith("expert")


def views(
    source: Source, parameter: np.ndarray, config: ModelConfig, n_shards: int
) -> list[np.ndarray]:
    """The views of a parameter that a tensor fills, in the order of its rows.

    See layers.Attention, layers.GatedMLP and moe.MoE for the layouts of their rows.
    """
    if source.index is not None:
        parameter = parameter[source.index]
    rest, part = parameter.shape[1:], source.part.removeprefix(TRANSPOSED)

    def rows(*layout: int) -> np.ndarray:
        return parameter.reshape(*layout, *rest)

    match part:
        case "plain" | "linear" | "expert":
            return [parameter]
        case "q" | "k" | "v" | "qkv":
            g = config.group_size
            heads = rows(config.n_kv_heads, g + 2, config.head_dim)
            parts = {"q": heads[:, :g], "k": heads[:, g], "v": heads[:, g + 1]}
            return [parts[name] for name in part]
        case "gate" | "up" | "gate_up":
            pairs = rows(n_shards, 2, -1)
            parts = {"gate": pairs[:, 0], "up": pairs[:, 1]}
            return [parts[name] for name in part.split("_")]
        case "expert_gate" | "expert_up":
            return [rows(2, -1)[0 if part == "expert_gate" else 1]]
    raise AssertionError(part)


def tensor_shape(
    source: Source, shape: tuple[int, ...], config: ModelConfig, n_shards: int
) -> tuple[int, ...]:
    """The shape that the tensor must have on disk."""
    if source.part == PLAIN and source.index is None:
        return tuple(shape)
    found = views(source, np.empty(shape, np.bool_), config, n_shards)  # never touched, so free
    rest = shape[2:] if source.index is not None else shape[1:]
    n_rest = int(np.prod(rest, dtype=int))
    whole = (sum(view.size for view in found) // n_rest, *rest)
    return whole[::-1] if source.part.startswith(TRANSPOSED) else whole


def fill(
    source: Source, parameter: np.ndarray, tensor: np.ndarray, config: ModelConfig, n_shards: int
) -> None:
    """Writes the tensor into its part of the parameter."""
    if source.part.startswith(TRANSPOSED):
        tensor = tensor.T
    start = 0
    for view in views(source, parameter, config, n_shards):
        n_rows = view.size // max(int(np.prod(tensor.shape[1:], dtype=int)), 1)
        view[...] = tensor[start : start + n_rows].reshape(view.shape)
        start += n_rows


def extract(
    source: Source, parameter: np.ndarray, config: ModelConfig, n_shards: int
) -> np.ndarray:
    """The tensor that would fill that part: the inverse of `fill`."""
    shape = tensor_shape(source, parameter.shape, config, n_shards)
    is_transposed = source.part.startswith(TRANSPOSED)
    rest = shape[:1] if is_transposed else shape[1:]
    pieces = [view.reshape(-1, *rest) for view in views(source, parameter, config, n_shards)]
    tensor = np.concatenate(pieces) if len(pieces) > 1 else pieces[0]
    return tensor.T if is_transposed else tensor.reshape(shape)


def plan(
    family: Any,
    config: ModelConfig,
    n_shards: int,
    shapes: dict[str, tuple[int, ...]],
    stored: dict[str, tuple[int, ...]],
) -> list[Source]:
    """Which tensor fills which part of which parameter.

    Args:
        shapes: of our parameters by path.
        stored: shapes of the checkpoint's tensors by name.

    Raises:
        CheckpointError: lists all that is missing, unused or of the wrong shape.
    """
    sources = [s for s in expand(family.WEIGHTS, config) if _exists(s, shapes)]
    known = {s.name for s in expand(family.WEIGHTS, config)}
    ignored = [pattern.replace(".", r"\.").replace("{}", r"\d+") for pattern in family.IGNORED]
    is_ignored = re.compile("|".join(ignored) or "(?!)").fullmatch
    needed = {s.name for s in sources}
    problems = [f"missing: {name}" for name in sorted(needed - set(stored))]
    for name in stored:
        if name in needed or is_ignored(name):
            continue
        if name not in known:
            problems.append(f"unused: {name}")
        elif name.endswith("bias"):
            problems.append(f"unused: {name} (the config says there is no such parameter)")
    for source in sources:
        if source.name in stored:
            want = tensor_shape(source, shapes[source.path], config, n_shards)
            if stored[source.name] != want:
                have = stored[source.name]
                problems.append(f"shape: {source.name} is {have}, the config wants {want}")
    if problems:
        raise CheckpointError(
            f"the checkpoint does not fit its config.json ({len(problems)} problems):\n  "
            + "\n  ".join(problems[:50])
        )
    return sources


def _exists(source: Source, shapes: dict[str, tuple[int, ...]]) -> bool:
    """Whether the model has that parameter and it that expert or head."""
    shape = shapes.get(source.path)
    return shape is not None and (source.index is None or source.index < shape[0])
