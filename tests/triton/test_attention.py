"""The backend jax_triton: versions, its Triton kernels interpreted on numpy against the oracle, and
compiled for absent GPUs.

Without the packages of the extra `jax-triton` only the versions are tested; under
FASTGEN_REQUIRE_COMPILERS=1 that fails.
"""

import dataclasses
import functools
import importlib.metadata
import importlib.util
import os
import subprocess
import tomllib
from pathlib import Path

import numpy as np
import pytest

import pallas_kernels
from fastgen_jax.engine.startup import check_attention
from fastgen_jax.errors import ConfigError
from pallas_kernels.triton import attention
from pallas_kernels.triton.attention import EXTRA, version_problem
from tests import targets
from tests.gpu.serving import Serving, compile_attention
from tests.gpu.test_kernels import LONG, SPLIT, n_merged, plan
from tests.gpu.test_targets import GPUS
from tests.pallas_kernels.attention_cases import (
    FEW_CASES,
    Batch,
    Case,
    Mismatch,
    check,
    make_batch,
    prepared,
)
from tests.pallas_kernels.test_kernel_mutants import CASES as MUTANT_CASES

WORKING = [
    ("0.10.2", "0.3.1", "3.6.0"),
    ("0.8.2", "0.3.1", "3.8.0"),
    ("0.11.2", "0.3.1", "3.9.0"),
    ("0.11.0", "0.4.0", "3.7.0"),
    ("0.11.2", "0.4.1", "3.9.0"),
]
FAILING = [
    ("0.10.2", "0.4.1", "3.9.0"),
    ("0.11.2", "0.4.1", "3.6.0"),
    ("0.11.2", "0.3.1", "3.5.1"),
    ("0.8.1", "0.3.1", "3.6.0"),
    ("0.11.2", "0.3.0", "3.6.0"),
    ("0.11.2", "0.5.0", "3.9.0"),
    ("0.12.0", "0.3.1", "3.6.0"),
    ("0.12.0.1", "0.4.1", "3.9.0"),
    ("0.11.2", None, "3.6.0"),
    ("0.11.2", "0.4.1", None),
]
PLAIN = Case()


@pytest.mark.parametrize("versions", WORKING, ids=str)
def test_versions_that_were_seen_to_work_are_taken(versions):
    assert version_problem(*versions) is None


@pytest.mark.parametrize("versions", FAILING, ids=str)
def test_other_versions_are_refused_with_what_is_here_and_what_to_install(versions):
    problem = version_problem(*versions)
    names = zip(("jax", "jax-triton", "triton"), versions, strict=True)
    found = ", ".join(f"{name} {version or 'missing'}" for name, version in names)
    assert problem is not None
    assert f"does not work with {found}. It needs jax-triton >= 0.3.1, < 0.4 with jax" in problem
    assert "pip install 'jax-triton>=0.3.1,<0.5' 'triton>=3.6,<3.9' 'jax<0.12'" in problem


def test_what_the_message_installs_is_the_extra():
    project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
    assert project["optional-dependencies"]["jax-triton"] == [*EXTRA]


def test_backend_without_its_packages_is_refused_before_anything_is_loaded(monkeypatch):
    def missing(package):
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(ImportError, match=r"jax-triton missing, triton missing.*pip install"):
        pallas_kernels.select("jax_triton")
    with pytest.raises(ConfigError, match=r"jax-triton missing, triton missing.*pip install"):
        check_attention("jax_triton", "gpu")
    with pytest.raises(ConfigError, match="'jax_triton' runs on gpu, and this is cpu"):
        check_attention("jax_triton", "cpu")


def need(package: str, version: str) -> None:
    """Skips the test, or fails it where compilers are required, without that version or newer."""
    if importlib.util.find_spec(package):
        found = importlib.metadata.version(package.replace("_", "-"))
        if numbers(found) >= numbers(version):
            return
    reason = f"no {package} {version} here; install the extra: pip install '.[jax-triton]'"
    if os.environ.get("FASTGEN_REQUIRE_COMPILERS") == "1":
        pytest.fail(reason)
    pytest.skip(reason)


def numbers(version: str) -> list[int]:
    return [int(number) for number in version.split(".")[:2]]


@pytest.fixture(scope="module")
def interpreted():
    """The module tests.triton.interpreted."""
    need("triton", "3.7")  # the interpreter of 3.6 does not know today's numpy
    from tests.triton import interpreted

    return interpreted


@pytest.fixture(scope="module")
def tested(interpreted):
    """The interpreted implementation, with plans for a GPU of few processors."""
    return interpreted.implementation(plan)


def attend(tested, case: Case, batch: Batch) -> np.ndarray:
    """The output, after checking it and the cache against the oracle."""
    result = tested(case, batch)
    check(case, batch, result)
    return result.out


@pytest.mark.parametrize("case", FEW_CASES, ids=str)
def test_every_feature_matches_the_oracle(interpreted, case):
    batch, want = prepared(case)
    check(case, batch, interpreted.implementation()(case, batch), want)


@pytest.mark.parametrize(
    "features", [{}, {"soft_cap": 2.0, "alibi": True, "sinks": True, "window": 300}]
)
def test_split_contexts_match(tested, features):
    case = dataclasses.replace(SPLIT, **features)
    batch = make_batch(case, LONG)
    assert n_merged(case, batch) >= 2
    attend(tested, case, batch)


@pytest.mark.parametrize("window", [None, 130])
def test_chunks_of_many_tiles_match(tested, window):
    case = Case(n_tokens=256, longest=1024, n_cells=64, window=window)
    attend(tested, case, make_batch(case, [(3, 1), (1000, 150), (90, 90)]))


@pytest.mark.parametrize("n_cells", [1, 8, 256])
def test_every_block_size_matches(tested, n_cells):
    case = dataclasses.replace(PLAIN, n_cells=n_cells)
    attend(tested, case, make_batch(case, [(300, 1), (31, 1), (290, 5), (133, 11)]))


@pytest.mark.parametrize("dtypes", [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_queries_and_cache_of_different_dtypes_match(tested, dtypes):
    case = dataclasses.replace(PLAIN, dtypes=dtypes)
    attend(tested, case, make_batch(case))


@pytest.mark.parametrize("head_size", [16, 48, 112])
def test_other_head_sizes_match(tested, head_size):
    case = dataclasses.replace(PLAIN, head_size=head_size)
    attend(tested, case, make_batch(case))


@pytest.mark.parametrize("size", [1e-30, 1e6])
def test_bfloat16_queries_beyond_float16_match_with_a_quantised_cache(tested, size):
    case = dataclasses.replace(PLAIN, dtypes=("bfloat16", "int8"), soft_cap=2.0)
    batch = make_batch(case)
    q = (batch.q.astype(np.float32) * size).astype(batch.q.dtype)
    attend(tested, case, batch._replace(q=q))


@pytest.mark.parametrize(
    ("n_tokens", "n_rows", "contexts"),
    [(2, 8, [(40, 1), (7, 1)]), (1, 8, [(5, 1)]), (48, 1, [(48, 48)]), (16, 4, [])],
)
def test_small_shapes_and_empty_batches_work(tested, n_tokens, n_rows, contexts):
    case = dataclasses.replace(PLAIN, n_tokens=n_tokens, n_rows=n_rows)
    attend(tested, case, make_batch(case, contexts))


def test_what_unused_cells_hold_changes_nothing(tested):
    nan, zero = (
        attend(tested, PLAIN, make_batch(PLAIN, unused=unused)) for unused in (np.nan, 0.0)
    )
    np.testing.assert_array_equal(nan, zero)


def test_poisoned_sequence_leaves_the_others_alone(tested):
    batch = make_batch(PLAIN, unused=0.0)
    healthy = tested(PLAIN, batch).out
    batch.q[[1, 4 + 7]] = np.nan
    out = tested(PLAIN, batch).out
    assert np.isnan(out[1]).any()
    others = [t for t in range(35) if t not in (1, 4 + 7)]
    np.testing.assert_array_equal(out[others], healthy[others])


def test_meta_without_a_plan_and_head_sizes_that_do_not_fit_are_refused(interpreted):
    without_plan = dataclasses.replace(interpreted.implementation(), plan=None)
    with pytest.raises(ValueError, match=r"jax_triton needs meta\.plan"):
        without_plan(PLAIN, make_batch(PLAIN))
    case = dataclasses.replace(PLAIN, head_size=72)
    with pytest.raises(ValueError, match="jax_triton has head sizes that 16 divides"):
        without_plan(case, make_batch(case))


MUTANTS = {  # what the bug is -> fragment, what it becomes, case of test_kernel_mutants
    "a token sees the next one": ("(distance <= 0)", "(distance <= 1)", "mixed"),
    "the window is one too wide": (
        "visible & (distance > -layout.spec.window)",
        "visible & (distance >= -layout.spec.window)",
        "mixed",
    ),
    "the sum is not rescaled": ("acc * shrink[:, None] + added\n", "acc + added\n", "long"),
    "values get the keys' scales": ("        row += layout.n_cells\n", "", "mixed"),
    "ALiBi has the wrong sign": ("scores + slope[:, None]", "scores - slope[:, None]", "mixed"),
    "every part of a split adds the sink": (
        "has_sink = tl.load(item + SPLIT) == 0",
        "has_sink = tl.load(item + SPLIT) >= 0",
        "decodes",
    ),
    "the last part of a split is missed": (
        "range(first_slot, first_slot + n_slots)",
        "range(first_slot, first_slot + n_slots - 1)",
        "decodes",
    ),
    "a tile is loaded from the tile before": (
        "blocks = _blocks(layout, table, j + 1)",
        "blocks = _blocks(layout, table, j)",
        "long",
    ),
    "a tile behind the diagonal is not masked": (
        "diagonal = (position + 1) // layout.block_n",
        "diagonal = tl.cdiv(position + 1, layout.block_n)",
        "mixed",
    ),
}


@pytest.mark.parametrize("bug", MUTANTS)
def test_kernel_with_a_bug_does_not_match_the_oracle(interpreted, tmp_path, bug):
    old, new, name = MUTANTS[bug]
    source = interpreted.SOURCE.read_text()
    assert source.count(old) == 1
    mutant = tmp_path / "mutant.py"
    mutant.write_text(source.replace(old, new))
    batch, want = prepared(MUTANT_CASES[name])
    implementation = interpreted.implementation(kernels=interpreted.interpreted_kernels(mutant))
    with pytest.raises(Mismatch):
        check(MUTANT_CASES[name], batch, implementation(MUTANT_CASES[name], batch), want)


@pytest.mark.parametrize("name", ["mixed", "long", "decodes"])
def test_kernel_without_a_bug_matches_the_oracle(interpreted, name):
    batch, want = prepared(MUTANT_CASES[name])
    check(MUTANT_CASES[name], batch, interpreted.implementation()(MUTANT_CASES[name], batch), want)


CAPABILITIES = {"h100": 90, "a100": 80}
SHAPES = [
    Serving(),
    Serving(n_tokens=2048, n_seqs=512, cache_dtype="float8_e4m3fn"),
    Serving(cache_dtype="int8", window=4096, sinks=True, soft_cap=30.0),
    Serving(heads=(32, 32), head_size=80, n_cells=16, alibi=True),
    Serving(heads=(71, 1), head_size=64, n_blocks=8192, dtype="float16", cache_dtype="float16"),
    Serving(heads=(16, 8), head_size=256, dtype="float32", cache_dtype="float32"),
]


@pytest.fixture
def kernels(monkeypatch):
    """What Triton makes of the kernels during a test: name, PTX, shared memory."""
    need("triton", "3.6")
    need("jax_triton", "0.3")
    from jax_triton import triton_lib

    made, compile_kernel = [], triton_lib.compile_ttir_inplace

    def record(*args):
        made.append(compile_kernel(*args))
        return made[-1]

    monkeypatch.setattr(triton_lib, "compile_ttir_inplace", record)
    return made


def assemble(ptx: str, capability: int, folder) -> None:
    """With Triton's own assembler, as new as its PTX."""
    from triton.backends.nvidia.compiler import get_ptxas

    (folder / "kernel.ptx").write_text(ptx)
    arch = ptx.split(".target ")[1].split()[0].rstrip(",")
    command = [get_ptxas(capability).path, f"-arch={arch}", "kernel.ptx", "-o", "kernel.cubin"]
    subprocess.run(command, cwd=folder, check=True)


def on(gpu: str):
    """The backend's attention, compiled for that GPU without asking a driver for it."""
    launch = functools.partial(attention.launch, compute_capability=CAPABILITIES[gpu])
    return functools.partial(attention.ragged_paged_attention, launch=launch)


@pytest.mark.compile
@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("serving", SHAPES, ids=str)
def test_kernels_compile_in_place_and_fit_into_shared_memory(gpu, serving, kernels, tmp_path):
    compiled, cache_bytes = compile_attention(targets.gpu_target(gpu), serving, on(gpu))
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= cache_bytes
    assert memory.temp_size_in_bytes < 64 * 2**20
    assert [k.name for k in kernels] == ["attention_decode", "attention_merge", "attention_chunks"]
    for kernel in kernels:
        assert kernel.shared_mem_bytes <= targets.GPUS[gpu]["shared_per_block"]
        assemble(kernel.binary, CAPABILITIES[gpu], tmp_path)


@pytest.mark.compile
def test_kernels_compile_for_heads_split_over_gpus(kernels):
    target = targets.gpu_target("h100", 2)
    compiled, cache_bytes = compile_attention(target, Serving(n_tokens=64, n_seqs=64), on("h100"))
    assert compiled.memory_analysis().alias_size_in_bytes >= cache_bytes // 2
    assert [k.name for k in kernels] == ["attention_decode", "attention_merge", "attention_chunks"]
