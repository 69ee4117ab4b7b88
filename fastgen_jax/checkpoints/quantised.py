"""Quantised checkpoints: those that are a number times a scale are read as what they stand for, the
others are refused by name.

A tensor is anything with `file`, `shape`, `dtype` and `tensor[a:b]`, which reads rows: one of a
file, or one computed from several of them.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from ml_dtypes import bfloat16

from fastgen_jax.checkpoints.mxfp4 import BLOCK_SIZE, dequantize
from fastgen_jax.checkpoints.quantisation import SCALED, method_of, settings
from fastgen_jax.checkpoints.tensor_files import Stored
from fastgen_jax.errors import CheckpointError

BYTE = np.dtype(np.uint8)
SCALES = ("_scale_inv", "_scale")  # both multiply; the first name is DeepSeek's
ZERO_POINT = "_zero_point"
# Scales of activations and of the KV cache, neither of which they fit here.
UNUSED = ("input_scale", "input_scale_ub", "input_zero_point", "activation_scale")
UNUSED += ("output_scale", "output_zero_point", "k_scale", "v_scale", "kv_scale")


@dataclass(frozen=True)
class Scaled:
    """(weight - zero_point) * scale, with one scale per tensor, row, or block of rows and columns.

    block: rows and columns that share a scale.
    """

    weight: Stored
    scale: Stored
    zero_point: Stored | None
    block: tuple[int, int]
    dtype: ClassVar[np.dtype] = np.dtype(np.float32)

    @property
    def file(self) -> Path:
        return self.weight.file

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    def __getitem__(self, rows: slice) -> np.ndarray:
        values = self.weight[rows].astype(np.float32)
        if self.zero_point is not None:
            values -= self._of_rows(self.zero_point, rows)
        values *= self._of_rows(self.scale, rows)
        return values

    def _of_rows(self, scale: Stored, rows: slice) -> np.ndarray:
        start, stop, _ = rows.indices(self.shape[0])
        table = scale[:].astype(np.float32).reshape(_two_axes(scale.shape))
        per_row = table[np.arange(start, stop) // self.block[0]]
        return np.repeat(per_row, self.block[1], axis=1)[:, : self.shape[1]]


@dataclass(frozen=True)
class Packed:
    """The weights of all experts, (experts, in, out), from blocks and scales in MXFP4."""

    blocks: Stored  # (experts, out, in / BLOCK_SIZE, BLOCK_SIZE / 2)
    scales: Stored
    dtype: ClassVar[np.dtype] = np.dtype(bfloat16)

    @property
    def file(self) -> Path:
        return self.blocks.file

    @property
    def shape(self) -> tuple[int, ...]:
        n_experts, n_out, n_blocks, _ = self.blocks.shape
        return n_experts, n_blocks * BLOCK_SIZE, n_out

    def __getitem__(self, rows: slice) -> np.ndarray:
        return dequantize(self.blocks[rows], self.scales[rows]).swapaxes(1, 2)


Tensor = Stored | Scaled | Packed


def unquantised(
    hf: dict[str, Any], stored: dict[str, Stored]
) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of a checkpoint, quantised ones replaced by what they stand for, and what is
    wrong with these.

    Args:
        hf: config.json.

    Raises:
        CheckpointError: a quantisation that is not supported.
    """
    given = settings(hf)
    method = method_of(given, stored)
    if method is None:
        return {**stored}, []
    if method == "mxfp4":
        return _unpacked(stored)
    if method not in SCALED:
        raise CheckpointError(
            f"the checkpoint is quantised with {method}, which is not supported; use the model's "
            f"unquantised checkpoint, or one in fp8 or int8 ({', '.join(SCALED)})"
        )
    unused = tuple(f".{end}" for end in UNUSED)
    tensors: dict[str, Tensor] = {n: t for n, t in stored.items() if not n.endswith(unused)}
    problems = []
    for name in [name for name in stored if name.endswith(".weight")]:
        ends = [end for end in SCALES if name + end in stored]
        if not ends:
            continue
        for end in (*SCALES, ZERO_POINT):
            tensors.pop(name + end, None)
        weight, scale = stored[name], stored[name + ends[0]]
        zero_point = stored.get(name + ZERO_POINT)
        try:
            block = _block(weight, scale, given)
            if zero_point is not None and zero_point.shape != scale.shape:
                raise ValueError(f"scales {scale.shape}, but zero points {zero_point.shape}")
        except ValueError as error:
            problems.append(f"quantised: {name} in {weight.file.name}: {error}")
            continue
        tensors[name] = Scaled(weight, scale, zero_point, block)
    return tensors, problems


def _unpacked(stored: dict[str, Stored]) -> tuple[dict[str, Tensor], list[str]]:
    """Each pair NAME_blocks and NAME_scales as one tensor NAME."""
    tensors: dict[str, Tensor] = {**stored}
    problems = []
    for name, blocks in stored.items():
        scales = stored.get(name.removesuffix("_blocks") + "_scales")
        if not name.endswith("_blocks") or scales is None:
            continue
        del tensors[name], tensors[scales.name]
        wanted = (*scales.shape, BLOCK_SIZE // 2)
        if blocks.shape != wanted or len(wanted) != 4 or {blocks.dtype, scales.dtype} != {BYTE}:
            problems.append(
                f"quantised: {name} in {blocks.file.name} is {blocks.dtype} {blocks.shape} with "
                f"scales {scales.dtype} {scales.shape}, which is not MXFP4"
            )
            continue
        tensors[name.removesuffix("_blocks")] = Packed(blocks, scales)
    return tensors, problems


def _two_axes(shape: tuple[int, ...]) -> tuple[int, int]:
    """The shape of a scale by rows and columns."""
    if len(shape) > 2:
        raise ValueError(f"its scale has the shape {shape}")
    rows, columns = (*shape, 1, 1)[:2]
    return rows, columns


def _block(weight: Stored, scale: Stored, quantisation: dict[str, Any]) -> tuple[int, int]:
    """Rows and columns that share a scale; ValueError where the scales do not cover the weight."""
    if weight.dtype.itemsize != 1 or len(weight.shape) != 2:
        raise ValueError(f"a weight with scales must be an 8-bit matrix, not {weight.dtype}")
    given = _given_block(quantisation)
    block = []
    for n_scales, size, wanted in zip(_two_axes(scale.shape), weight.shape, given, strict=True):
        if n_scales not in (1, size) and wanted is None and size % n_scales == 0:
            wanted = size // n_scales
        length = {1: size, size: 1}.get(n_scales, wanted or 1)
        if -(-size // length) != n_scales:
            raise ValueError(f"scales {scale.shape} do not cover a weight {weight.shape}")
        block.append(length)
    return block[0], block[1]


def _given_block(quantisation: dict[str, Any]) -> tuple[int | None, int | None]:
    """The block size that the config names, of which the last blocks may be a part."""
    groups = quantisation.get("config_groups")
    named = [quantisation.get("weight_block_size")]
    if isinstance(groups, dict):
        named += [(group.get("weights") or {}).get("block_structure") for group in groups.values()]
    for block in named:
        if isinstance(block, list) and len(block) == 2 and all(type(n) is int for n in block):
            return block[0], block[1]
    return None, None
