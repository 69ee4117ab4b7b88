"""Programs beside the weights: used where all fits, refused where anything does not."""

import dataclasses
import logging
import os
import shutil
from unittest import mock

import jax
import pytest

from convert import programs
from convert.chips import Chips
from fastgen_jax.engine import startup, stored
from fastgen_jax.engine.config import EngineConfig
from fastgen_jax.errors import ConfigError
from tests.tiny import OPTIONS, Naive, one_program, random_requests, run, tokens, write_config

SIZES = {n: OPTIONS[n] for n in ("max_model_len", "num_kv_blocks", "max_num_batched_tokens",
                                 "max_num_seqs")}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def account(tmp_path_factory):
    """One that has no key yet, and compiles one shape."""
    one_shape = dataclasses.replace(startup.BACKENDS["cpu"], smallest_batch=2**31)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stored, "KEY_FILE", tmp_path_factory.mktemp("account") / "programs.key")
        patch.setitem(startup.BACKENDS, "cpu", one_shape)
        yield patch


@pytest.fixture(scope="module")
def made(tmp_path_factory, account):
    directory = tmp_path_factory.mktemp("model")
    write_config(directory)
    programs.compile_for(Chips("cpu", 1), directory, SIZES, lambda done, total: None)
    return directory


@pytest.fixture
def copy(made, tmp_path):
    return shutil.copytree(made, tmp_path / "copy")


def folder(directory):
    return stored.folder_of(directory, jax.devices()[:1])


def find(directory, *, is_trusted=False):
    return stored.find(directory, jax.devices()[:1], is_trusted=is_trusted)


def start(directory, **options):
    sizes = SIZES | {"load_format": "dummy"} | options
    return one_program(EngineConfig(model=str(directory), **sizes))


def kinds(engine) -> set[type]:
    return {type(program) for program in engine._programs.made.values()}


def test_stored_programs_serve_as_compiled_ones_do(made):
    with start(made, num_kv_blocks=None) as engine:
        assert kinds(engine) == {stored.Loaded}
        assert engine.config.num_kv_blocks == SIZES["num_kv_blocks"]
        requests = random_requests(1, 4)
        expected = [Naive(engine).greedy(r.prompt_token_ids, 24) for r in requests[:1]]
        assert [tokens(o) for o in run(engine, requests)][:1] == expected
        cache = engine._runner.state.caches[0].cells
        run(engine, requests[:1])
        assert cache.is_deleted(), "the cache is not donated"


def test_tampered_program_is_refused_and_compiled(copy, caplog):
    for file in folder(copy).glob("*.bin"):
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    with start(copy) as engine:
        assert kinds(engine) == {jax.stages.Compiled}
    assert "0.bin is not used: it is not as it was written" in caplog.text


def test_tampered_manifest_is_not_ours(copy, caplog):
    manifest = folder(copy) / stored.MANIFEST
    manifest.write_bytes(manifest.read_bytes().replace(b'"jax": "', b'"jax": "9'))
    assert find(copy) is None
    assert "this account has not made them, and they are machine code" in caplog.text


@pytest.mark.parametrize("damage", [b"", b"[]", b"{}", b"[" * 10**5, b'{"programs": 1}'])
def test_manifest_that_makes_no_sense_stops_no_start(copy, caplog, damage):
    (folder(copy) / stored.MANIFEST).write_bytes(damage)
    assert find(copy, is_trusted=True) is None
    assert "stored programs are not used" in caplog.text


def test_programs_of_another_account_are_loaded_only_if_the_user_says_so(
    made, monkeypatch, tmp_path
):
    monkeypatch.setattr(stored, "KEY_FILE", tmp_path / "programs.key")
    assert find(made) is None
    assert find(made, is_trusted=True) is not None


def test_key_is_for_this_account_alone(made):
    assert stored.KEY_FILE.stat().st_mode & 0o777 == 0o600
    assert len(stored.KEY_FILE.read_bytes()) == 32


def test_another_version_is_told(made, monkeypatch, caplog):
    monkeypatch.setattr(stored, "_source", lambda: "another")
    with start(made) as engine:
        assert kinds(engine) == {jax.stages.Compiled}
    assert "stored programs are not used: source of fastgen_jax was" in caplog.text
    assert "and is another" in caplog.text


def test_other_sizes_are_told(made, caplog):
    (programs,) = [find(made)]
    assert programs is not None
    wanted = dict(programs.made_for) | {"max_num_seqs": 5, "jax": "0.9"}
    assert not startup.is_for(programs, wanted)
    assert "max_num_seqs was 8 and is 5" in caplog.text
    assert "jax was" in caplog.text


def test_other_flags_of_the_compiler_are_told(made, monkeypatch, caplog):
    before = os.environ["XLA_FLAGS"]
    monkeypatch.setenv("XLA_FLAGS", f"{before} --xla_cpu_enable_fast_math=true")
    with start(made) as engine:
        assert kinds(engine) == {jax.stages.Compiled}
    assert "stored programs are not used: XLA_FLAGS was" in caplog.text
    assert "--xla_cpu_enable_fast_math=true" in caplog.text


def test_another_precision_of_products_is_told(made, caplog):
    with jax.default_matmul_precision("float32"), start(made) as engine:
        assert kinds(engine) == {jax.stages.Compiled}
    assert "jax_default_matmul_precision was None and is float32" in caplog.text


def test_flags_that_change_no_program_are_passed_over(made, monkeypatch):
    before = os.environ["XLA_FLAGS"]
    more = "--xla_dump_to=here --xla_force_host_platform_device_count=2"
    monkeypatch.setenv("XLA_FLAGS", f"{before} {more}")
    with start(made) as engine:
        assert kinds(engine) == {stored.Loaded}


def test_a_tpus_programs_know_libtpus_flags(monkeypatch):
    monkeypatch.setenv(
        "LIBTPU_INIT_ARGS", "--xla_jf_dump_to=here --xla_tpu_scoped_vmem_limit_kib=1"
    )
    assert "LIBTPU_INIT_ARGS" in stored.FLAGS["tpu"]
    assert stored._flags("LIBTPU_INIT_ARGS") == "--xla_tpu_scoped_vmem_limit_kib=1"


def test_another_kv_cache_is_told_and_has_its_own_size(made, caplog):
    with start(made, num_kv_blocks=None, kv_cache_dtype="int8") as engine:
        assert kinds(engine) == {jax.stages.Compiled}
        assert engine.config.num_kv_blocks != SIZES["num_kv_blocks"]
    assert "kv_cache_dtype was auto and is int8" in caplog.text


def test_programs_without_a_callers_logits_processor_are_not_used_with_it(made, caplog):
    with start(made, logits_processors={"keep": lambda logits, known: logits}) as engine:
        assert kinds(engine) == {jax.stages.Compiled}
    assert "logits_processors was [] and is ['keep']" in caplog.text


def test_other_chips_are_told(copy, caplog):
    folder(copy).rename(folder(copy).with_name("tpu-TPU-v6-lite-8"))
    assert find(copy) is None
    assert "there are none for cpu-cpu-1, but for tpu-TPU-v6-lite-8" in caplog.text


def test_program_that_the_runtime_refuses_is_compiled(made, caplog):
    broken = mock.patch.object(startup, "load", side_effect=RuntimeError("not mine"))
    with broken, start(made) as engine:
        assert kinds(engine) == {jax.stages.Compiled}
    assert "a stored program cannot be loaded, and is compiled: not mine" in caplog.text


def test_directory_without_programs_says_nothing(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "fastgen_jax.engine"):
        assert find(tmp_path) is None
    assert caplog.text == ""


@pytest.mark.parametrize("name", ["", "gpu", "h100-9", "h100-0", "tpu-v9", "v6e", "cpu/.."])
def test_unknown_chips_are_refused(name):
    with pytest.raises(
        ConfigError, match=r"unknown chip .* known are cpu, h100, h200, a100, tpu-v4"
    ):
        Chips.of(name)


def test_chips_are_called_by_their_names():
    assert Chips.of("tpu-v6e-8") == ("v6e", 8)
    assert Chips.of("tpu-7x") == ("tpu7x", 1)
    assert (Chips.of("h100"), Chips.of("cpu")) == (("h100", 1), ("cpu", 1))
