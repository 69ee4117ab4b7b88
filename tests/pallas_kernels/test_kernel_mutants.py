"""Kernels with one bug seeded must not match the oracle: what the attention cases can find.

A mutant is a kernel whose source has one fragment replaced; the fragment must occur exactly once,
so a kernel that changes takes its mutants along. On TPU the simulator may tell before the oracle,
and where its copies are eager, results are right and it alone can.
"""

import ast
import functools
import importlib
import inspect
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.errors import JaxRuntimeError
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

import pallas_kernels
from tests.pallas_kernels.attention_cases import (
    HAS_SIMULATOR,
    MODULES,
    Case,
    Complaint,
    Implementation,
    Mismatch,
    check,
    clock_entries_in_turn,
    implementation,
    prepared,
)
from tests.test_structure import imported

SOURCES = Path(pallas_kernels.__file__).parent
TPU_PROGRAMS = "paged_decode", "paged_write", "paged_chunk"
SMALLEST_TILES = {"decode_streams": 1, "decode_blocks": 1, "chunk_blocks": 1}  # to compile
QUANTIZED = ("float32", "int8")
CASES = {
    # Few and sharp: float32 products, many features at once, contexts of several tiles, with ALiBi
    # so that each tile outweighs the one before.
    "mixed": Case(QUANTIZED, (6, 2), 64, window=40, soft_cap=2.0, alibi=True, sinks=True),
    "long": Case(QUANTIZED, (6, 2), 64, alibi=True, sinks=True, kind="multi-token decodes"),
    "tpu": Case(heads=(2, 1), window=200, soft_cap=2.0, alibi=True, sinks=True),
    "tpu heads": Case(heads=(4, 2), alibi=True),
    "tpu scales": Case(QUANTIZED, (2, 1), window=40, sinks=True),
    "decodes": Case(QUANTIZED, (6, 2), 64, alibi=True, sinks=True, kind="decodes"),
    # More tiles of keys than stages, and few heads: each program is simulated, one after the other.
    "hopper": Case(heads=(2, 1), head_size=128, alibi=True, kind="multi-token decodes"),
    "hopper window": Case(heads=(2, 1), head_size=128, window=40, sinks=True, kind="chunks"),
}


@dataclass(frozen=True)
class Mutant:
    """A bug: `old` becomes `new` in the file, and the case tells.

    kind: of bug, for `sample`.
    error, message: what it tells with; by default wrong results or a complaint of any kind.
    n_cores: of TPU's tiles; is_eager: see `attention_cases.implementation`.
    """

    name: str
    file: str  # of pallas_kernels
    kind: str = "none"
    old: str = "def ragged_paged_attention("  # by default no bug at all
    new: str = "def ragged_paged_attention("
    case: str = "mixed"
    error: type[Exception] | tuple[type[Exception], ...] = (Mismatch, Complaint)
    message: str | None = None
    n_cores: int = 1
    is_eager: bool = False

    def __str__(self) -> str:
        return self.name.replace(" ", "_")

    @property
    def implementation(self) -> str:
        names = {"xla": "xla", "gpu": "pallas_gpu", "tpu": "pallas_tpu", "mos": "mosaic_gpu"}
        return names[self.file[:3]]

    def source(self) -> str:
        text = (SOURCES / self.file).read_text()
        assert text.count(self.old) == 1, f"{self.old!r} occurs {text.count(self.old)} times"
        return text.replace(self.old, self.new)


def _readers(module: str, entry: str) -> set[str]:
    """The module, and those of the entry's folder that import from it."""
    folder = entry.removesuffix("attention")
    sources = {n: inspect.getsource(m) for n, m in sys.modules.items() if n.startswith(folder)}
    names = {name: imported(ast.parse(source)) for name, source in sources.items()}
    readers = {module}
    while more := {name for name in names.keys() - readers if names[name] & readers}:
        readers |= more
    return readers


@contextmanager
def _forgotten(names: set[str]) -> Iterator[None]:
    """Inside, these modules are imported anew; then they are restored."""
    before = {name: sys.modules.pop(name) for name in names}
    for name in names:
        delattr(*_place(name))
    try:
        yield
    finally:
        for name, module in before.items():
            sys.modules[name] = module
            setattr(*_place(name), module)


def _place(name: str) -> tuple[types.ModuleType, str]:
    """The package of a module, and its name there."""
    package, _, leaf = name.rpartition(".")
    return sys.modules[package], leaf


def _compile_alone(program: Callable) -> Callable:
    """The program by itself; JAX compiles once what all mutants share."""
    static = {"spec", "tiles", "interpret"} & inspect.signature(program).parameters.keys()
    return jax.jit(program, static_argnames=sorted(static))


def breed(mutant: Mutant) -> Implementation:
    """The implementation with the mutant's bug."""
    entry = MODULES[mutant.implementation]
    importlib.import_module(entry)
    name = f"pallas_kernels.{mutant.file.removesuffix('.py').replace('/', '.')}"
    with _forgotten(_readers(name, entry)):
        module = types.ModuleType(name)
        sys.modules[name] = module
        setattr(*_place(name), module)
        exec(compile(mutant.source(), str(SOURCES / mutant.file), "exec"), vars(module))
        entered = importlib.import_module(entry)
    is_for_tpu = mutant.implementation == "pallas_tpu"
    for program in TPU_PROGRAMS if is_for_tpu else ():
        setattr(entered, program, _compile_alone(getattr(entered, program)))
    return implementation(
        mutant.implementation,
        entered.ragged_paged_attention,
        is_eager=mutant.is_eager,
        is_joined=not is_for_tpu,
        n_cores=mutant.n_cores,
        **SMALLEST_TILES,
    )


def run(tested: Implementation, name: str) -> None:
    case = tested.fit(CASES[name])
    batch, want = prepared(case)
    check(case, batch, tested(case, batch), want)


XLA = functools.partial(Mutant, file="xla.py")
TILE = functools.partial(Mutant, file="gpu/tile.py")
GPU = functools.partial(Mutant, file="gpu/attention.py")
XLA_MUTANTS = [
    XLA("a token sees the next one", kind="mask", old="(distance <= 0)", new="(distance <= 1)"),
    XLA(
        "the window is one too wide",
        kind="mask",
        old="visible &= distance > -spec.window",
        new="visible &= distance >= -spec.window",
    ),
    XLA(
        "a chunk's sum is not rescaled",
        kind="softmax",
        old="acc = a.acc * shrink[..., None]",
        new="acc = a.acc",
        case="long",
    ),
    XLA(
        "a single's sum is not rescaled",
        kind="softmax",
        old="(state.acc * shrink[..., None]).at",
        new="state.acc.at",
        case="decodes",
    ),
    XLA(
        "keys get the values' scales",
        kind="score",
        old="scores * scales.keys[",
        new="scores * scales.values[",
    ),
    XLA(
        "scales of unused cells leak",
        kind="mask",
        old="jnp.where(is_cached[:, None], scales.values, 0.0)",
        new="scales.values",
    ),
    XLA(
        "the soft cap comes after the mask",
        kind="score",
        old="    top = scores.max(-1)\n",
        new="    scores = 2 * jnp.tanh(scores / 2)\n    top = scores.max(-1)\n",
    ),
    XLA(
        "ALiBi has the wrong sign",
        kind="score",
        old="scores + batch.slopes",
        new="scores - batch.slopes",
    ),
    XLA(
        "sinks are not in the sum",
        kind="softmax",
        old="Softmax(acc, top, jnp.ones(shape[:-1]))",
        new="Softmax(acc, top, jnp.zeros(shape[:-1]))",
    ),
    XLA(
        "the last partial tile is missed",
        kind="extent",
        old="last = -(-jnp.minimum(start + n_queries - stop + seq_len, seq_len) // n_keys)",
        new="last = jnp.minimum(start + n_queries - stop + seq_len, seq_len) // n_keys",
    ),
    XLA(
        "tokens are written one cell on",
        kind="write",
        old="slots[:, None] % n_cells",
        new="(slots[:, None] + 1) % n_cells",
    ),
    XLA(
        "a tile is loaded from the tile before",
        kind="place",
        old="return merge(state, Softmax(*(x[0] for x in part))), plan(j + 1)",
        new="return merge(state, Softmax(*(x[0] for x in part))), plan(j)",
        case="long",
    ),
]
GPU_MUTANTS = [
    TILE(
        "a token sees the next one",
        kind="mask",
        old="is_cached[None, :] & (distance <= 0)",
        new="is_cached[None, :] & (distance <= 1)",
    ),
    TILE(
        "the window is one too wide",
        kind="mask",
        old="visible &= distance > -spec.window",
        new="visible &= distance >= -spec.window",
    ),
    TILE(
        "the sum is not rescaled",
        kind="softmax",
        old="tuple(a * shrink[:, None] + _dot(",
        new="tuple(a + _dot(",
        case="long",
    ),
    TILE(
        "values get the keys' scales",
        kind="score",
        old="weights = weights * value_scales[None, :]",
        new="weights = weights * key_scales[None, :]",
    ),
    TILE(
        "ALiBi has the wrong sign",
        kind="score",
        old="scores + queries.slopes",
        new="scores - queries.slopes",
    ),
    TILE(
        "the soft cap is half as strong",
        kind="score",
        old="spec.soft_cap * LOG2_E",
        new="0.5 * spec.soft_cap * LOG2_E",
    ),
    TILE(
        "every part of a split adds the sink",
        kind="softmax",
        old="has_sink = item.split == 0",
        new="has_sink = item.split >= 0",
        case="decodes",
    ),
    TILE(
        "a tile has a token too many",
        kind="mask",
        old="tile_token < n_tokens",
        new="tile_token <= n_tokens",
    ),
    TILE(
        "a tile is loaded from the tile before",
        kind="place",
        old="blocks = _blocks(layout, inputs.tables, item, kv_head, j + 1)",
        new="blocks = _blocks(layout, inputs.tables, item, kv_head, j)",
        case="long",
    ),
    TILE(
        "the last partial tile is missed",
        kind="extent",
        old="last = lax.div(item.kv_start, block_n), pl.cdiv(item.kv_end, block_n)",
        new="last = lax.div(item.kv_start, block_n), lax.div(item.kv_end, block_n)",
        case="decodes",
    ),
    TILE(
        "a tile behind the diagonal is not masked",
        kind="mask",
        old="diagonal = lax.div(jnp.minimum(item.position + 1, item.kv_end), block_n)",
        new="diagonal = pl.cdiv(jnp.minimum(item.position + 1, item.kv_end), block_n)",
    ),
    TILE(
        "a tile at the window's edge is not masked",
        kind="mask",
        old="jnp.maximum(first, pl.cdiv(behind, block_n))",
        new="jnp.maximum(first, lax.div(behind, block_n))",
    ),
    GPU(
        "the last part of a split is missed",
        kind="extent",
        old="(part < n_slots)[:, None]",
        new="(part < n_slots - 1)[:, None]",
        case="decodes",
    ),
    Mutant(
        "tokens are written one cell on",
        kind="write",
        file="gpu/layout.py",
        old="slice(None), slots % n_cells",
        new="slice(None), (slots + 1) % n_cells",
    ),
]
STREAM = functools.partial(Mutant, file="tpu/stream.py", case="tpu")
DECODE = functools.partial(Mutant, file="tpu/decode.py", case="tpu")
CHUNK = functools.partial(Mutant, file="tpu/chunk.py", case="tpu")
WRITE = functools.partial(Mutant, file="tpu/write.py", case="tpu")
RACE = {"error": Complaint, "message": "RACE DETECTED", "is_eager": True}
TPU_MUTANTS = [
    STREAM(
        "a token sees the next one",
        kind="mask",
        old="visible = distance <= 0",
        new="visible = distance <= 1",
    ),
    STREAM(
        "the window is one too wide",
        kind="mask",
        old="visible &= distance > -spec.window",
        new="visible &= distance >= -spec.window",
        case="tpu scales",  # ALiBi would hide what is far
    ),
    STREAM("ALiBi has the wrong sign", kind="score", old="scores + (slope", new="scores - (slope"),
    STREAM(
        "nothing waits for a tile",
        kind="race",
        old="""                    for copy in self._copies(slot, b, 0):
                        copy.wait()
""",
        new="""                    pass
""",
    ),
    CHUNK(
        "a chunk reads the next tile's buffer",
        kind="place",
        old="slot, n_queries = item % stream.n_buffers,",
        new="slot, n_queries = (item + 1) % stream.n_buffers,",
    ),
    CHUNK(
        "a chunk's sum is not rescaled",
        kind="softmax",
        old="refs.acc[k, g] = refs.acc[k, g] * shrink + added",
        new="refs.acc[k, g] = refs.acc[k, g] + added",
    ),
    CHUNK(
        "a chunk's keys get the values' scales",
        kind="score",
        old="keys = keys.astype(jnp.float32) * scales[0][0:1]",
        new="keys = keys.astype(jnp.float32) * scales[0][1:2]",
        case="tpu scales",
    ),
    CHUNK(
        "a chunk's last partial block is missed",
        kind="extent",
        old="blocks = -(-(tile * size + high + shift) // n_cells)",
        new="blocks = jnp.maximum((tile * size + high + shift) // n_cells, 1)",
    ),
    CHUNK(
        "every KV head attends to the first one's cells",
        kind="place",
        old="blocks = [[ring.at[slot, b, k] for",
        new="blocks = [[ring.at[slot, b, 0] for",
        case="tpu heads",
    ),
    CHUNK(
        "a tile of queries is shared by two cores",
        kind="race",
        old="borders = jnp.where(borders > 0, is_before.sum(1, dtype=jnp.int32), 0)",
        new="",
        n_cores=2,
    ),
    CHUNK(
        "results change while they are copied",
        kind="race",
        old="""        pl.when(is_last & (leaving >= 0))(lambda: self._out_copy(0).wait())
        pl.when(is_last)(lambda: self._leave(p))
""",
        new="""        pl.when(is_last)(lambda: self._leave(p))
        pl.when(is_last & (leaving >= 0))(lambda: self._out_copy(0).wait())
""",
        **RACE,
    ),
    DECODE(
        "a single's sum is not rescaled",
        kind="softmax",
        old="acc_ref[...] * _widen(shrink, acc_ref.shape[1]) + added",
        new="acc_ref[...] + added",
        case="tpu heads",  # sinks would be the maximum before and after
    ),
    DECODE(
        "a single's values get the keys' scales",
        kind="score",
        old="part * tile[1][1:2]",
        new="part * tile[1][0:1]",
        case="tpu scales",
    ),
    DECODE(
        "the sink is added in every lane",
        kind="softmax",
        old="jnp.where(lane == 0, 1.0, 0.0)",
        new="jnp.where(lane >= 0, 1.0, 0.0)",
    ),
    DECODE(
        "a single's last partial block is missed",
        kind="extent",
        old="n_blocks = lax.div(self.refs.seq_lens[s] + self.n_cells - 1, self.n_cells)",
        new="n_blocks = jnp.maximum(lax.div(self.refs.seq_lens[s], self.n_cells), 1)",
        error=JaxRuntimeError,  # that block is to be written: its place is behind the buffer
        message="Out-of-bounds read",
    ),
    DECODE(
        "the second core serves the first one's sequences",
        kind="race",
        old="index = pl.program_id(0) * tiles.decode_streams + w",
        new="index = w",
        n_cores=2,
    ),
    DECODE(
        "a single is written one cell on",
        kind="write",
        old="new_cell = lax.rem(refs.seq_lens[s] - 1, self.n_cells)",
        new="new_cell = lax.rem(refs.seq_lens[s], self.n_cells)",
    ),
    DECODE(
        "a block is refilled while it is written back",
        kind="race",
        old="""        pl.when(lane.is_writing > 0)(lambda: self._wait_for_write())
        stream.fetch(lane.ahead, item + stream.n_buffers - 1, self._fetch_row)
""",
        new="""        stream.fetch(lane.ahead, item + stream.n_buffers - 1, self._fetch_row)
        pl.when(lane.is_writing > 0)(lambda: self._wait_for_write())
""",
        **RACE,
    ),
    WRITE(
        "a chunk's first block loses its earlier tokens",
        kind="write",
        old="pl.when(n_old(i) > 0)(lambda: each(old_copies, i, method))",
        new="pl.when(n_old(i) > 1000)(lambda: each(old_copies, i, method))",
    ),
    WRITE(
        "a chunk's first new cell keeps what it held",
        kind="write",
        old="len(placed.shape) - 1) < first",
        new="len(placed.shape) - 1) <= first",
    ),
    WRITE(
        "a chunk is written one cell back",
        kind="write",
        old="return pl.multiple_of(aligned, ROWS), start - aligned",
        new="return pl.multiple_of(aligned, ROWS), start - aligned + 1",
    ),
]
MUTANTS = XLA_MUTANTS + GPU_MUTANTS + TPU_MUTANTS
MOSAIC = functools.partial(Mutant, file="mosaic_gpu/chunk.py", case="hopper")
MOSAIC_MUTANTS = [
    MOSAIC("no bug", old="def chunks(", new="def chunks(", error=()),
    MOSAIC(
        "no bug in windows", old="def chunks(", new="def chunks(", error=(), case="hopper window"
    ),
    MOSAIC("a token sees the next one", old="cell <= query", new="cell <= query + 1"),
    MOSAIC(
        "the window is one too wide",
        old="cell > query - spec.window",
        new="cell >= query - spec.window",
        case="hopper window",
    ),
    MOSAIC(
        "cells that nobody cached are not cleared",
        old="jnp.where(row < end - i, values, jnp.zeros_like(values))",
        new="values",
    ),
    MOSAIC(
        "the sum is not rescaled",
        old="acc = state.acc * _of_columns(shrink, state.acc)",
        new="acc = state.acc",
    ),
    MOSAIC(
        "sinks are not in the sum",
        old="jnp.where(top > LOWEST, zeros + 1.0, zeros)",
        new="zeros",
        case="hopper window",
    ),
    MOSAIC(
        "a tile stores rows of other tokens",
        old="lax.fori_loop(0, own.n_tokens, store, None)",
        new="lax.fori_loop(0, tiles.own_tokens, store, None)",
        case="hopper window",
    ),
    MOSAIC(
        "keys are overwritten while they are read",
        old="""    found = scores(q, k, lambda: _turn(job), interpret=interpret)
    plgpu.barrier_arrive(scratch.k_free.at[slot])
""",
        new="""    plgpu.barrier_arrive(scratch.k_free.at[slot])
    found = scores(q, k, lambda: _turn(job), interpret=interpret)
""",
        error=Complaint,
        message="RACE DETECTED",
    ),
    MOSAIC(
        "the last values are read while they are cleared",
        old="""    _clear(job, end - 1, scratch.v.at[lax.rem(end - 1, n_stages)])
    plgpu.barrier_arrive(scratch.last_clean)
""",
        new="""    plgpu.barrier_arrive(scratch.last_clean)
    _clear(job, end - 1, scratch.v.at[lax.rem(end - 1, n_stages)])
""",
        error=Complaint,
        message="RACE DETECTED",
    ),
    MOSAIC(
        "rows are copied before they are written",
        old="""        _put(scratch.rows.at[own.index], values)
        plgpu.commit_smem()
""",
        new="        _put(scratch.rows.at[own.index], values)\n",
        error=Complaint,
        message="RACE DETECTED",
    ),
]


def sample(mutants: list[Mutant]) -> list[Mutant]:
    """All races, and of the others enough for each kind of each implementation and each file."""
    chosen, found = [], set()
    for mutant in mutants:
        new = {(mutant.implementation, mutant.kind), mutant.file} - found
        if mutant.kind == "race" or new:
            chosen.append(mutant)
            found |= new
    return chosen


SAMPLE = sample(MUTANTS)


def parameters(mutants: list[Mutant], sampled: list[Mutant]) -> list:
    """Those not sampled are for the exhaustive run."""
    rest = [pytest.mark.exhaustive]
    return [
        pytest.param(m, marks=[] if m in sampled else rest, id=f"{m.implementation}-{m}")
        for m in mutants
    ]


def test_sample_has_every_race_and_every_kind_of_bug_of_each_implementation():
    races = {m.name for m in MUTANTS if m.kind == "race"}
    assert len(races) == 5 and races <= {m.name for m in SAMPLE}
    kinds = [{(m.implementation, m.kind) for m in mutants} for mutants in (MUTANTS, SAMPLE)]
    assert kinds[0] == kinds[1]


@pytest.mark.parametrize("mutant", parameters(MUTANTS, SAMPLE))
def test_mutant_does_not_match_the_oracle(mutant: Mutant):
    tested = breed(mutant)
    with pytest.raises(mutant.error, match=mutant.message):
        run(tested, mutant.case)


@pytest.mark.newer_jax
@pytest.mark.skipif(not HAS_SIMULATOR, reason="jax 0.10 has no simulator of Mosaic GPU kernels")
@pytest.mark.parametrize("mutant", MOSAIC_MUTANTS, ids=str)
def test_mutant_of_the_mosaic_kernel_is_found(mutant: Mutant):
    tested = breed(mutant)
    if not mutant.error:
        run(tested, mutant.case)
        return
    with pytest.raises(mutant.error, match=mutant.message):
        run(tested, mutant.case)


def without_bugs(mutants: list[Mutant]) -> list[Mutant]:
    """One for each way that the mutants are run."""
    ways = {}
    for mutant in mutants:
        file = (
            MODULES[mutant.implementation].removeprefix("pallas_kernels.").replace(".", "/") + ".py"
        )
        way = {"case": mutant.case, "n_cores": mutant.n_cores, "is_eager": mutant.is_eager}
        name = mutant.case + " two cores" * (mutant.n_cores == 2) + " eager" * mutant.is_eager
        ways[file, *way.values()] = Mutant(name, file, **way)
    return list(ways.values())


@pytest.mark.parametrize("mutant", parameters(without_bugs(MUTANTS), without_bugs(SAMPLE)))
def test_kernel_without_a_bug_matches_the_oracle(mutant: Mutant):
    run(breed(mutant), mutant.case)


@pytest.mark.parametrize("mode", ["eager", "on_wait"])
@pytest.mark.parametrize(("n_between", "is_seen"), [(125, True), (126, False)])
def test_race_is_seen_until_another_copy_takes_its_entry(capsys, mode, n_between, is_seen):
    n_entries = 126

    def body(x_ref, out_ref, leaving, arriving, sems):
        out_copy = pltpu.make_async_copy(leaving, out_ref, sems.at[0])
        in_copy = pltpu.make_async_copy(x_ref, arriving, sems.at[1])
        leaving[...] = jnp.zeros(leaving.shape, leaving.dtype)
        out_copy.start()

        def copy(*_):
            in_copy.start()
            in_copy.wait()

        lax.fori_loop(0, n_between, copy, None)
        leaving[...] = jnp.ones(leaving.shape, leaving.dtype)  # the race
        out_copy.wait()

    x = jnp.zeros((8, 128))
    simulator = pltpu.InterpretParams(
        detect_races=True, dma_execution_mode=mode, vector_clock_size=1 + n_entries
    )
    with clock_entries_in_turn() as taken:
        pl.pallas_call(
            body,
            in_specs=[pl.BlockSpec(memory_space=pl.ANY)],
            out_specs=pl.BlockSpec(memory_space=pl.ANY),
            out_shape=x,
            scratch_shapes=[pltpu.VMEM(x.shape, x.dtype)] * 2 + [pltpu.SemaphoreType.DMA((2,))],
            interpret=simulator,
        )(x).block_until_ready()
    assert taken == [1 + i % n_entries for i in range(1 + n_between)]
    assert ("RACE DETECTED" in capsys.readouterr().out) == is_seen
