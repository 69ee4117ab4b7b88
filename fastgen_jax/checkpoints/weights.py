"""Which tensor of a Hugging Face checkpoint fills which part of which of our parameters.

A family's WEIGHTS maps names to (path, part): `{}` in a name is the layer, a second one the expert
or head. A part is a list of views of the parameter; laid one behind the other by rows they are the
tensor. So one table serves loading and, read backwards, exporting. Of several names for one part
the one that is stored counts, and of several parts for one name (`a|b`) the first whose shape fits.
In IGNORED `{}` is any number, `{n_layers}` the config's, and `*` anything.
"""

import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from fastgen_jax.models.config import ModelConfig

PLAIN = "plain"  # the tensor is the parameter
ROW = "row"  # the tensor has the parameter as its one row
# All experts in one tensor, (E, in, out) if a weight; gate and up alternate by outputs.
TOGETHER = ("experts", "experts_gate_up")
# All other parts stand for a weight and its bias.
TRANSPOSED = "T:"  # before a part: the file has (in, out)
TIED_HEAD, EMBEDDING = "lm_head.weight", "embed.weight"  # one, if the config says so
N_COMPARED = 64  # rows of them
FLOATS = ("bfloat16", "float16", "float32", "float64")
MAX_PIECE = 2**24  # elements read at once


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
                is_one = {*part.split("|")} <= {PLAIN, ROW, *TOGETHER}
                sources += [source] if is_one else _weight_and_bias(source)
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


def views(source: Source, parameter: np.ndarray, config: ModelConfig) -> list[np.ndarray]:
    """The views of a parameter that a tensor fills, in the order of its rows.

    See layers.Attention, layers.GatedMLP and moe.MoE for the layouts of their rows, here on one
    device.
    """
    if source.index is not None:
        parameter = parameter[source.index]
    rest, part = parameter.shape[1:], source.part.removeprefix(TRANSPOSED)

    def rows(*layout: int) -> np.ndarray:
        return parameter.reshape(*layout, *rest)

    match part:
        case "plain" | "row" | "linear" | "expert":
            return [parameter]
        case "q" | "k" | "v" | "qkv":
            g = config.group_size
            heads = rows(config.n_kv_heads, g + 2, config.head_dim)
            parts = {"q": heads[:, :g], "k": heads[:, g], "v": heads[:, g + 1]}
            return [parts[name] for name in part]
        case "gate" | "up" | "gate_up":
            pairs = rows(2, -1)
            parts = {"gate": pairs[0], "up": pairs[1]}
            return [parts[name] for name in part.split("_")]
        case "expert_gate" | "expert_up":
            return [rows(2, -1)[0 if part == "expert_gate" else 1]]
        case "experts":
            return [_reversed_per_expert(parameter)]
        case "experts_gate_up":
            return [_reversed_per_expert(parameter.reshape(len(parameter), 2, -1, *rest[1:]))]
    raise AssertionError(part)


def _reversed_per_expert(parameter: np.ndarray) -> np.ndarray:
    """All axes but the first, which is the experts', in reverse."""
    return np.moveaxis(parameter.T, -1, 0)


def tensor_shape(source: Source, shape: tuple[int, ...], config: ModelConfig) -> tuple[int, ...]:
    """The shape that the tensor must have on disk."""
    if source.part == PLAIN and source.index is None:
        return tuple(shape)
    if source.part == ROW:
        return (1, *shape)
    found = views(source, np.empty(shape, np.bool_), config)  # never touched, so free
    if source.part in TOGETHER:
        n_kept = len(shape) - 1
        return (*found[0].shape[:n_kept], math.prod(found[0].shape[n_kept:]))
    rest = shape[2:] if source.index is not None else shape[1:]
    n_rest = int(np.prod(rest, dtype=int))
    whole = (sum(view.size for view in found) // n_rest, *rest)
    return whole[::-1] if source.part.startswith(TRANSPOSED) else whole


def fill(source: Source, parameter: np.ndarray, tensor: Any, config: ModelConfig) -> None:
    """Writes the tensor into its part of the parameter.

    Args:
        tensor: has a shape, and tensor[a:b] reads these rows; few are read at a time.
    """
    if source.part.startswith(TRANSPOSED):
        tensor = tensor[:].T
    n_rest = max(math.prod(tensor.shape[1:]), 1)
    start = 0
    for view in views(source, parameter, config):
        for piece in _pieces(view, n_rest):
            n_rows = piece.size // n_rest
            piece[...] = tensor[start : start + n_rows].reshape(piece.shape)
            start += n_rows


def _pieces(view: np.ndarray, n_rest: int) -> Iterator[np.ndarray]:
    """Views of the view, in order, of whole rows of the tensor (n_rest elements each); none is much
    larger than MAX_PIECE elements or a row.
    """
    if view.size <= max(MAX_PIECE, n_rest) or view.size // len(view) % n_rest:
        yield view
    elif len(view) == 1:
        yield from _pieces(view[0], n_rest)
    else:
        n_rows = max(MAX_PIECE * len(view) // view.size, 1)
        for i in range(0, len(view), n_rows):
            yield view[i : i + n_rows]


def extract(source: Source, parameter: np.ndarray, config: ModelConfig) -> np.ndarray:
    """The tensor that would fill that part: the inverse of `fill`."""
    shape = tensor_shape(source, parameter.shape, config)
    is_transposed = source.part.startswith(TRANSPOSED)
    rest = shape[:-1] if is_transposed else shape[1:]
    pieces = [view.reshape(-1, *rest) for view in views(source, parameter, config)]
    tensor = np.concatenate(pieces) if len(pieces) > 1 else pieces[0]
    return tensor.T if is_transposed else tensor.reshape(shape)


def plan(
    family: Any,
    config: ModelConfig,
    shapes: dict[str, tuple[int, ...]],
    stored: dict[str, Any],
) -> tuple[list[Source], list[str]]:
    """Which tensor fills which part of which parameter, and all that is missing, unused, of the
    wrong shape or dtype.

    Args:
        shapes: of our parameters by path.
        stored: the checkpoint's tensors by name, each with shape, dtype and file.
    """
    expanded = expand(family.WEIGHTS, config)
    named = _named([s for s in expanded if _exists(s, shapes)], stored)
    sources = [_fitting(s, stored, shapes[s.path], config) for s in named]
    known = {s.name: s.path for s in expanded}
    wild = {".": r"\.", "{}": r"\d+", "{n_layers}": str(config.n_layers), "*": ".*"}
    ignored = [
        re.sub(r"\{\w*\}|[.*]", lambda match: wild[match[0]], pattern) for pattern in family.IGNORED
    ]
    is_ignored = re.compile("|".join(ignored) or "(?!)").fullmatch
    needed = {s.name for s in sources}
    problems = [f"missing: {name}" for name in sorted(needed - set(stored))]
    for name, tensor in stored.items():
        if name in needed or is_ignored(name):
            continue
        if name not in known:
            problems.append(f"unused: {name} in {tensor.file.name}")
        elif known[name] != TIED_HEAD:
            why = "the config says there is no such parameter"
            problems.append(f"unused: {name} in {tensor.file.name} ({why})")
    for source in sources:
        if source.name in stored:
            want = tensor_shape(source, shapes[source.path], config)
            problems += _misfits(source.name, stored[source.name], want)
    if not problems and TIED_HEAD not in shapes:
        heads = [stored[name] for name in stored if known.get(name) == TIED_HEAD]
        (embedding,) = [stored[s.name] for s in sources if s.path == EMBEDDING]
        problems += [_of_own(head) for head in heads if not _are_alike(head, embedding)]
    return sources, problems


def _are_alike(head: Any, embedding: Any) -> bool:
    """Whether a head is what the config says it is, by some of its rows; or that, quantised."""
    if head.shape != embedding.shape:
        return False
    middle = embedding.shape[0] // 2
    one, other = (
        tensor[middle : middle + N_COMPARED].astype(np.float32) for tensor in (head, embedding)
    )
    return np.abs(one - other).max() <= 0.1 * np.abs(other).max()


def _of_own(head: Any) -> str:
    return (
        f"unused: the head in {head.file.name} is not the embedding, as config.json says it is; if "
        "it is the right one, change that: --hf-overrides '{\"tie_word_embeddings\": false}'"
    )


def _misfits(name: str, tensor: Any, want: tuple[int, ...]) -> Iterator[str]:
    where = f"{name} in {tensor.file.name}"
    if tensor.shape != want:
        yield f"shape: {where} is {tensor.shape}, the config wants {want}"
    if tensor.dtype.name not in FLOATS:
        yield f"dtype: {where} is {tensor.dtype}, and no quantisation says so; want a float"


def _named(sources: list[Source], stored: dict[str, Any]) -> list[Source]:
    """For each part of a parameter the first of its names that is stored, or its first name."""
    by_part: dict[tuple, Source] = {}
    for source in sources:
        known = by_part.setdefault(source[1:], source)
        if known.name not in stored and source.name in stored:
            by_part[source[1:]] = source
    return list(by_part.values())


def _fitting(
    source: Source,
    stored: dict[str, Any],
    shape: tuple[int, ...],
    config: ModelConfig,
) -> Source:
    """With the first of its parts that has the stored shape, or its first part."""
    choices = [source._replace(part=part) for part in source.part.split("|")]
    if len(choices) == 1 or source.name not in stored:
        return choices[0]
    found = stored[source.name].shape
    fitting = [c for c in choices if tensor_shape(c, shape, config) == found]
    return (fitting or choices)[0]


def _exists(source: Source, shapes: dict[str, tuple[int, ...]]) -> bool:
    """Whether the model has that parameter and it that expert or head."""
    shape = shapes.get(source.path)
    return shape is not None and (source.index is None or source.index < shape[0])
