"""Pallas calls by name, not by position: operands, results and scratch are dicts."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.tpu.stream import N_TABLES
from pallas_kernels.tpu.tiles import Tiles


def launch(
    body: Callable[[SimpleNamespace], None],
    *,
    name: str,
    scalars: dict[str, Any],
    hbm: dict[str, Any],
    vmem: dict[str, Any],
    cache: tuple[Any, ...],
    out: dict[str, jax.ShapeDtypeStruct],
    scratch: dict[str, Any],
    tiles: Tiles,
    interpret: Any,
) -> tuple[dict[str, Any], tuple[Any, ...]]:
    """Runs body on every core; its argument has an attribute for each name, and `cache`.

    Args:
        scalars: int32 arrays for SMEM; hbm, vmem: (trees of) arrays left there, brought there.
        cache: arrays in HBM, donated and changed in place.
        out: results, left in HBM.
        scratch: (trees of) memory references and semaphores.

    Returns:
        The results by name, and the cache.
    """
    inputs, input_tree = jax.tree.flatten((scalars, {"cache": cache}, hbm, vmem))
    outputs, output_tree = jax.tree.flatten(({"cache": cache}, out))
    room, room_tree = jax.tree.flatten(scratch)
    n_scalars, n_vmem = len(scalars), len(jax.tree.leaves(vmem))
    n_hbm = len(inputs) - n_scalars - n_vmem

    def kernel(*refs):
        given, made = refs[: len(inputs)], refs[len(inputs) : len(inputs) + len(outputs)]
        names = {}
        for group in (
            *jax.tree.unflatten(input_tree, given),
            *jax.tree.unflatten(output_tree, made),  # after the inputs: `cache` is the result
            jax.tree.unflatten(room_tree, refs[len(inputs) + len(outputs) :]),
        ):
            names |= group
        body(SimpleNamespace(**names))

    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    results = pl.pallas_call(
        kernel,
        name=name,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=n_scalars,
            grid=(tiles.n_cores,),
            in_specs=[anywhere] * n_hbm + [pl.BlockSpec(memory_space=pltpu.VMEM)] * n_vmem,
            out_specs=[anywhere] * len(outputs),
            scratch_shapes=room,
        ),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in outputs],
        input_output_aliases={n_scalars + i: i for i in range(len(cache))},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",), vmem_limit_bytes=tiles.vmem_bytes
        ),
        interpret=interpret,
    )(*inputs)
    changed, named = jax.tree.unflatten(output_tree, results)
    return named, changed["cache"]


def stream_room(cache: tuple[Any, ...], table_width: int, n_streams: int, n_blocks: int, n_buffers):
    """Scratch of stream.Stream, for `n_streams` of them."""
    return {
        "table_ring": pltpu.SMEM((n_streams, N_TABLES, table_width), jnp.int32),
        "table_sems": pltpu.SemaphoreType.DMA((n_streams, N_TABLES)),
        "rings": tuple(
            pltpu.VMEM((n_streams, n_buffers, n_blocks, *x.shape[1:]), x.dtype) for x in cache
        ),
        "sems": pltpu.SemaphoreType.DMA((n_streams, n_buffers)),
    }
