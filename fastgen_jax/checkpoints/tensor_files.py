"""Safetensors files: which ones a checkpoint has, what they hold, and reading parts of them.

A header is foreign input. Nothing of it is believed before it has been checked against the size of
the file; tensors are read with pread, so a file that shrinks meanwhile is an error, never a SIGBUS.
"""

import json
import math
import os
from collections.abc import Collection
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeGuard

import ml_dtypes
import numpy as np

from fastgen_jax.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000  # as in the safetensors library
MAX_JSON_BYTES = 64 * 2**20
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = {
    "BOOL": np.dtype(np.bool_),
    **{f"U{bits}": np.dtype(f"uint{bits}") for bits in (8, 16, 32, 64)},
    **{f"I{bits}": np.dtype(f"int{bits}") for bits in (8, 16, 32, 64)},
    **{f"F{bits}": np.dtype(f"float{bits}") for bits in (16, 32, 64)},
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
}
COPIES = "consolidated*.safetensors"  # Mistral's own form of the weights that lie beside them
# What a checkpoint without safetensors may hold instead -> why it is not read.
PICKLE = "is a pickle, which can run code when read: convert it to safetensors"
FOREIGN = "is another framework's: give a checkpoint in safetensors"
OTHERS = {
    **{f"*.{end}": PICKLE for end in ("bin", "pt", "pth", "ckpt", "pkl")},
    "*.gguf": "is a GGUF file: give the Hugging Face checkpoint that it was made from",
    **{f"*.{end}": FOREIGN for end in ("h5", "msgpack", "npz", "onnx", "nemo")},
}


@dataclass(frozen=True)
class Stored:
    """A tensor of a safetensors file; `tensor[a:b]` reads those rows, `tensor[:]` all."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    offset: int  # of its first byte in the file

    def __getitem__(self, rows: slice) -> np.ndarray:
        """Raises CheckpointError where the file ends early or cannot be read."""
        start, stop, _ = rows.indices(self.shape[0] if self.shape else 1)
        rest = self.shape[1:]
        row_bytes = math.prod(rest) * self.dtype.itemsize
        shape = (max(stop - start, 0), *rest) if self.shape else ()
        array = np.empty(shape, self.dtype)
        self._read(self.offset + start * row_bytes, array.reshape(-1).view(np.uint8).data)
        return array

    def _read(self, position: int, buffer: memoryview) -> None:
        try:
            with self.file.open("rb", buffering=0) as opened:
                while buffer:
                    n_read = os.preadv(opened.fileno(), [buffer], position)
                    if not n_read:
                        raise CheckpointError(
                            f"{self.file.name} was cut off while it was read, at tensor {self.name}"
                        )
                    buffer, position = buffer[n_read:], position + n_read
        except OSError as error:
            raise CheckpointError(f"{self.file.name}: {self.name}: {error}") from error


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
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path.name} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path.name} must hold a JSON object, got {type(value).__name__}")
    return value


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint: its only one, those that its index names, or all but
    copies.

    Only names are checked, not where links lead: the hub's cache consists of links.

    Raises:
        CheckpointError: none, a missing shard, an index that names files elsewhere, or pickles.
    """
    names = [path.name for path in directory.iterdir() if path.is_file()]
    if INDEX in names and SINGLE not in names:
        return _indexed_files(directory)
    return [directory / name for name in weight_names(names, str(directory))]


def weight_names(names: Collection[str], where: str) -> list[str]:
    """Which of a checkpoint's files hold the weights, as far as names tell.

    Args:
        where: the checkpoint, for messages.

    Raises:
        CheckpointError: none; says what is there instead.
    """
    if SINGLE in names:
        return [SINGLE]
    visible = sorted(name for name in names if not name.startswith("."))
    found = [name for name in visible if name.endswith(".safetensors")]
    if found:
        return [name for name in found if not fnmatchcase(name, COPIES)] or found
    for pattern, why in OTHERS.items():
        for name in visible:
            if fnmatchcase(name, pattern):
                raise CheckpointError(f"no .safetensors file in {where!r}; {name} {why}")
    raise CheckpointError(f"no .safetensors file in {where!r}")


def _indexed_files(directory: Path) -> list[Path]:
    weight_map = read_json(directory / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{INDEX} has no weight_map that names files")
    problems = []
    for name in sorted({str(name) for name in weight_map.values()}):
        if Path(name).name != name or "\0" in name or not name.endswith(".safetensors"):
            problems.append(f"{name!r} is no .safetensors file of this directory")
        elif not (directory / name).is_file():
            problems.append(f"{name} is missing")
    if problems:
        raise CheckpointError(f"{INDEX}: " + "; ".join(problems))
    return [directory / name for name in sorted(set(weight_map.values()))]


def read_headers(files: list[Path]) -> tuple[dict[str, Stored], list[str]]:
    """Every tensor by name, and what is wrong with the files."""
    stored: dict[str, Stored] = {}
    problems = []
    for file in files:
        try:
            tensors, found = read_header(file)
        except (OSError, ValueError, RecursionError) as error:
            problems.append(f"damaged: {file.name}: {error}")
            continue
        problems += [f"damaged: {file.name}: {text}" for text in found]
        for name in stored.keys() & tensors.keys():
            problems.append(f"twice: {name} is in {stored[name].file.name} and in {file.name}")
        stored |= tensors
    return stored, problems


def read_header(file: Path) -> tuple[dict[str, Stored], list[str]]:
    """The tensors of a file, and what is wrong with single ones.

    The format: 8 bytes that are the length of a JSON object, that object, then the tensors, one
    behind the other without gaps.

    Raises:
        ValueError: no tensor can be found.
    """
    size = file.stat().st_size
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if size < 8:
            raise ValueError(f"it has {size} bytes, too few for a safetensors file")
        if length > min(size - 8, MAX_HEADER_BYTES):
            raise ValueError(
                f"its header claims {length} bytes of a file of {size} (at most {MAX_HEADER_BYTES})"
            )
        header = json.loads(opened.read(length).decode(), object_pairs_hook=_without_duplicates)
    if not isinstance(header, dict):
        raise ValueError("its header is no JSON object")
    header.pop("__metadata__", None)
    tensors, problems = {}, []
    for name, entry in header.items():
        try:
            tensors[name] = _stored(file, name, entry, 8 + length)
        except ValueError as error:
            problems.append(f"{name}: {error}")
    if not problems:
        problems = _layout_problems(list(tensors.values()), 8 + length, size)
    return tensors, problems


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries: dict[str, Any] = {}
    for name, value in pairs:
        if name in entries:
            raise ValueError(f"its header has {name!r} twice")
        entries[name] = value
    return entries


def _stored(file: Path, name: str, entry: Any, start: int) -> Stored:
    if not isinstance(entry, dict):
        raise ValueError("its entry is no JSON object")
    dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}")
    if not _are_counts(shape) or not _are_counts(offsets) or len(offsets) != 2:
        raise ValueError(f"impossible shape {shape!r} or data_offsets {offsets!r}")
    n_bytes = math.prod(shape) * DTYPES[dtype].itemsize
    if offsets[1] - offsets[0] != n_bytes:
        raise ValueError(f"{dtype} {shape} takes {n_bytes} bytes, data_offsets are {offsets}")
    return Stored(file, name, tuple(shape), DTYPES[dtype], start + offsets[0])


def _are_counts(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)


def _layout_problems(tensors: list[Stored], start: int, size: int) -> list[str]:
    """Overlaps and gaps, which no writer makes, and tensors that the file is too short for."""
    problems = []
    end, before = start, "the header"
    for tensor in sorted(tensors, key=lambda t: (t.offset, math.prod(t.shape))):
        if tensor.offset != end:
            kind = "overlaps" if tensor.offset < end else "leaves a gap after"
            problems.append(f"{tensor.name}: {kind} {before}")
        end = tensor.offset + math.prod(tensor.shape) * tensor.dtype.itemsize
        before = tensor.name
        if end > size:
            problems.append(f"{before}: ends at byte {end}, but the file has only {size} bytes")
            return problems
    if end < size:
        problems.append(f"{size - end} bytes follow the last tensor, {before}")
    return problems
