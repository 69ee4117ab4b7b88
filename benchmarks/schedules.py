"""How near to a chip's rates the compilers' schedules let the attention kernels come.

By benchmarks.gpu.schedule and benchmarks.tpu.schedule, whose tools must be here.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

from benchmarks.gpu import schedule as gpu
from benchmarks.tpu import schedule as tpu
from benchmarks.tpu.subjects import SUBJECTS, our_arguments
from convert.chips import Chips


class Kernel(NamedTuple):
    """One kernel's inner loop.

    Attributes:
        share: what bytes and matrix units need at least, of what the schedule takes.
        bound_by: what that is, and how many times the next one.
    """

    share: float
    bound_by: str


class Kernels(NamedTuple):
    """Those of attention, for bfloat16, and whose schedule it is."""

    decode: Kernel
    chunk: Kernel
    source: str


@functools.cache
def attention(chip: str, head_size: int, group: int, n_kv_heads: int, n_tokens: int) -> Kernels:
    """Of one chip of several; the sizes are what that chip has.

    Args:
        group: query heads per KV head.
        n_tokens: of the step.

    Raises:
        CompileError, FileNotFoundError: a compiler or a tool is not here, or refuses.
    """
    if chip in gpu.CHIPS:
        return _of_gpu(gpu.Case(chip, head_size, "bfloat16", group))
    case = tpu.Case(chip, head_size, n_kv_heads, group, "bfloat16", tiles={})
    return _of_tpu(case._replace(tiles=_tiles(case, n_tokens)))


def _of_gpu(case: gpu.Case) -> Kernels:
    found = gpu.measure(case)
    return Kernels(
        *(of_floors(found[f"attention_{name}"]) for name in ("decode", "chunks")),
        source="ptxas, SASS",
    )


def of_floors(figures: gpu.Figures) -> Kernel:
    """Issue slots are the schedule's; bytes and matrix unit are the chip's."""
    floors = figures.floors
    least = max(floors["bytes"], floors["unit"])
    return Kernel(least / max(least, floors["issue"]), figures.binds)


def _of_tpu(case: tpu.Case) -> Kernels:
    kernels = []
    for name in ("ours_decode", "ours_chunk"):
        found = tpu.figures(tpu.measure(name, case)[0], SUBJECTS[name].work(case), case)
        kernels.append(Kernel(found.roof, found.bound))
    return Kernels(*kernels, source="libtpu, bundles")


def _tiles(case: tpu.Case, n_tokens: int) -> dict[str, Any]:
    """What the kernels choose there."""
    import jax

    from fastgen_jax.models.sharding import mesh_over
    from pallas_kernels.tpu.tiles import tiles_for

    arguments, mesh = our_arguments(case), mesh_over(Chips(case.chip, 1).devices())
    n_heads = arguments.q.shape[1]
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        tiles = tiles_for(n_tokens, n_heads, arguments.cache[0], interpret=False)
    return dataclasses.asdict(tiles)
