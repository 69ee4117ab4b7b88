"""Paged attention on NVIDIA GPUs in Triton, launched by jax-triton: the twin of gpu/attention.py
for the day that jax has no Pallas-Triton. Same plan, same write, same order of kernels; see there.

Needs the packages of the extra `jax-triton`, whose versions must suit jax's: `check_installed`.
They are imported when the first kernel is launched.
"""

import dataclasses
import functools
import importlib.metadata
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Num

from pallas_kernels.contract import QUANTIZED, AttentionSpec, RaggedMeta, check_arguments
from pallas_kernels.gpu import plan
from pallas_kernels.gpu.layout import (
    FACTORS,
    LOG2_E,
    MERGE_ROWS,
    Inputs,
    Layout,
    check_plan,
    make_inputs,
    make_layout,
    tiled,
    warps_and_stages,
    write,
)

MIN_KEYS = 16  # of a tile: triton 3.6 has no shorter sums of products
EXTRA = "jax-triton>=0.3.1,<0.5", "triton>=3.6,<3.9", "jax<0.12"  # of pyproject.toml


class Combination(NamedTuple):
    """Versions that work together: from the first one of a pair on, and below its second."""

    jax_triton: tuple[str, str]
    jax: tuple[str, str]
    triton: str  # from this one on

    def __str__(self) -> str:
        (first, end), (old, new) = self.jax_triton, self.jax
        least = f"triton >= {self.triton}"
        return f"jax-triton >= {first}, < {end} with jax >= {old}, < {new} and {least}"

    def holds(self, jax_version: str, jax_triton: str, triton: str) -> bool:
        return (
            _is_between(jax_triton, *self.jax_triton)
            and _is_between(jax_version, *self.jax)
            and _numbers(triton) >= _numbers(self.triton)
        )


WORKING = [
    Combination(("0.3.1", "0.4"), ("0.8.2", "0.12"), "3.6"),
    Combination(("0.4", "0.5"), ("0.11", "0.12"), "3.7"),
]


def version_problem(jax_version: str, jax_triton: str | None, triton: str | None) -> str | None:
    """Why these versions do not work together, None if they do; None is a package not installed."""
    if jax_triton and triton:
        versions = jax_version, jax_triton, triton
        if any(combination.holds(*versions) for combination in WORKING):
            return None
    found = f"jax {jax_version}, jax-triton {jax_triton or 'missing'}, triton {triton or 'missing'}"
    install = " ".join(f"'{requirement}'" for requirement in EXTRA)
    return (
        f"attention backend 'jax_triton' does not work with {found}. It needs "
        f"{'; '.join(map(str, WORKING))}; none works with a newer jax. Use another backend, or "
        f"install the extra jax-triton of fastgen-jax: pip install {install}"
    )


def _is_between(version: str, first: str, end: str) -> bool:
    return _numbers(first) <= _numbers(version) < _numbers(end)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)[:3]))


def check_installed() -> None:
    """Raises ImportError unless the installed packages work together, naming what does."""
    versions = []
    for package in ("jax-triton", "triton"):
        try:
            versions.append(importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            versions.append(None)
    problem = version_problem(jax.__version__, *versions)
    if problem:
        raise ImportError(problem)


@dataclass(frozen=True)
class TritonLayout(Layout):
    """Everything about one kernel that Triton compiles in."""

    q_dtype: Any = None
    has_slopes: bool = False
    has_sinks: bool = False

    @property
    def head_width(self) -> int:
        """Columns of a tile of heads: a power of two, as Triton demands."""
        return 1 << (self.head_size - 1).bit_length()

    @property
    def score_scale(self) -> float:
        """Products times this are scores in units of log2, or the exponent of the soft cap."""
        cap = self.spec.soft_cap
        return self.spec.scale * LOG2_E * (1 if cap is None else 2 / cap)

    @property
    def log2_cap(self) -> float | None:
        return None if self.spec.soft_cap is None else self.spec.soft_cap * LOG2_E

    @property
    def narrows_queries(self) -> bool:
        """bfloat16 becomes float16, which quantised cells are."""
        return self.q_dtype != self.dtype and self.dtype == jnp.float16

    @property
    def widens_queries(self) -> bool:
        return self.q_dtype != self.dtype and self.dtype == jnp.float32

    @property
    def is_quantized(self) -> bool:
        return self.cache_dtype in QUANTIZED

    @property
    def is_float8(self) -> bool:
        return self.cache_dtype == jnp.float8_e4m3fn

    @property
    def factor(self) -> float:
        return FACTORS[self.cache_dtype]


def launch(
    kernel: str,
    out: Array,
    *arrays: Array,
    grid: tuple[int, ...],
    layout: TritonLayout,
    fresh: tuple[jax.ShapeDtypeStruct, ...] = (),
    num_warps: int,
    num_stages: int,
    compute_capability: int | None = None,
) -> tuple[Array, ...]:
    """Runs a kernel of kernels.py on `out`, which it changes in place, and `arrays`.

    Args:
        kernel: its name; its parameters are out, arrays, fresh and layout.
        fresh: outputs that start with anything.
        compute_capability: of the GPU, 90 for an H100; None asks the driver.

    Returns:
        out and the fresh outputs.
    """
    jax_triton, kernels = _packages()
    outputs = *fresh, jax.ShapeDtypeStruct(out.shape, out.dtype)
    if _numbers(jax_triton.__version__) < _numbers("0.4"):
        options = {"out_shape": outputs}
    else:  # from here on an aliased output is no parameter of its own
        options = {"out_type": outputs, "aliased": 0}
    with warnings.catch_warnings():
        # jax-triton 0.4 would rather have refs, which 0.3 does not know.
        warnings.filterwarnings("ignore", "input_output_aliases is deprecated", DeprecationWarning)
        *parts, out = jax_triton.triton_call(
            out,
            *arrays,
            kernel=getattr(kernels, kernel),
            name=kernel,
            grid=grid,
            input_output_aliases={0: len(fresh)},
            num_warps=num_warps,
            num_stages=num_stages,
            compute_capability=compute_capability,
            layout=layout,
            **options,
        )
    return out, *parts


@functools.cache
def _packages() -> tuple[Any, Any]:
    """The module jax_triton, and our kernels."""
    check_installed()
    import jax_triton  # pyright: ignore[reportMissingImports]

    from pallas_kernels.triton import kernels

    return jax_triton, kernels


def ragged_paged_attention(
    q: Float[Array, "T N H"],
    k: Float[Array, "T K H"],
    v: Float[Array, "T K H"],
    kv_cache: Num[Array, "B K 2 C H"],
    meta: RaggedMeta,
    *,
    spec: AttentionSpec,
    alibi_slopes: Float[Array, "N"] | None = None,
    sinks: Float[Array, "N"] | None = None,
    kv_scales: Float[Array, "B K 2 C"] | None = None,
    launch: Callable[..., tuple[Array, ...]] = launch,
) -> tuple[Array, ...]:
    """See contract.RaggedPagedAttention.

    launch: runs a kernel; see `launch`.

    Raises:
        ImportError: see check_installed.
        ValueError: also for a meta without a plan, or one for other sizes.
    """
    check_arguments(q, k, v, kv_cache, meta, kv_scales)
    check_plan("jax_triton", q, kv_cache, meta)
    kv_cache, kv_scales = write(k, v, kv_cache, kv_scales, meta)
    layout = TritonLayout(
        **vars(make_layout(q, kv_cache, meta, spec)),
        q_dtype=q.dtype,
        has_slopes=alibi_slopes is not None,
        has_sinks=sinks is not None,
    )
    inputs = make_inputs(q, _as_triton(kv_cache), kv_scales, meta, alibi_slopes, sinks)
    out = jnp.zeros(q.size, q.dtype)
    out = _decode(out, inputs, meta.plan, layout, launch)
    out = _chunks(out, inputs, meta.plan, layout, launch)
    out = out.reshape(q.shape)
    return (out, kv_cache) if kv_scales is None else (out, kv_cache, kv_scales)


def _as_triton(kv_cache: Num[Array, "B K 2 C H"]) -> Num[Array, "B K 2 C H"]:
    """The same bits in a dtype that Triton has on every GPU."""
    if kv_cache.dtype == jnp.uint16:
        return lax.bitcast_convert_type(kv_cache, jnp.bfloat16)
    if kv_cache.dtype in QUANTIZED:
        return lax.bitcast_convert_type(kv_cache, jnp.int8)
    return kv_cache


def _arrays(inputs: Inputs) -> tuple[Array, ...]:
    """Kernels have all of them as parameters; those that are absent are never read."""
    absent = jnp.zeros(1, jnp.float32)
    return tuple(absent if array is None else array for array in inputs)


def _tiled(layout: TritonLayout, block_m: int) -> TritonLayout:
    layout = tiled(layout, block_m)
    return dataclasses.replace(layout, block_n=max(layout.block_n, MIN_KEYS))


def _decode(
    out: Float[Array, "T*N*H"], inputs: Inputs, work: plan.WorkPlan, layout: TritonLayout, launch
) -> Float[Array, "T*N*H"]:
    """`out` with the decode items' tokens."""
    if not len(work.decode):
        return out
    layout = _tiled(layout, plan.decode_rows(layout.group_size))
    n_slots = 2 * len(work.merges) + 1  # an odd capacity's half is rounded down
    n_rows = n_slots * layout.n_kv_heads * layout.block_m
    sizes = n_rows * layout.head_size, n_rows, n_rows
    out, *parts = launch(
        "attention_decode",
        out,
        *_arrays(inputs),
        grid=(layout.n_kv_heads, len(work.decode)),
        layout=layout,
        fresh=tuple(jax.ShapeDtypeStruct((size,), jnp.float32) for size in sizes),
        **warps_and_stages(layout),
    )
    if not len(work.merges):
        return out
    (out,) = launch(
        "attention_merge",
        out,
        work.merges,
        *parts,
        grid=(len(work.merges), layout.n_kv_heads, layout.block_m // MERGE_ROWS),
        layout=layout,
        num_warps=4,
        num_stages=4,
    )
    return out


def _chunks(
    out: Float[Array, "T*N*H"], inputs: Inputs, work: plan.WorkPlan, layout: TritonLayout, launch
) -> Float[Array, "T*N*H"]:
    """`out` with the chunk items' tokens."""
    if not len(work.chunks):
        return out
    layout = _tiled(layout, plan.chunk_rows(layout.group_size, layout.head_size))
    (out,) = launch(
        "attention_chunks",
        out,
        *_arrays(inputs._replace(items=work.chunks)),
        grid=(layout.n_kv_heads, len(work.chunks)),
        layout=layout,
        **warps_and_stages(layout),
    )
    return out
