"""Programs that are kept between runs: used, mended, and never in the way of a start."""

import itertools
import logging
import os
import resource
import shutil
import subprocess
import sys
import zlib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from fastgen_jax.engine import compiled
from fastgen_jax.engine.compiled import CHECKSUMS, keep_compiled, mend, opens
from tests import tiny

NAMES = ("compilation_cache_dir", "persistent_cache_min_compile_time_secs",
         "persistent_cache_enable_xla_caches")  # fmt: skip


@pytest.fixture(autouse=True)
def own_cache(monkeypatch) -> Iterator[None]:
    """jax without a cache, as a program starts; afterwards with the suite's again."""
    before = {f"jax_{name}": getattr(jax.config, f"jax_{name}") for name in NAMES}
    monkeypatch.setattr(compiled, "MIN_COMPILE_SECONDS", 0.0)
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def forget() -> None:
    """As a new process knows it: no cache, no programs."""
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()
    jax.clear_caches()


def start(tmp_path: Path, cache: Path) -> tuple[int, int]:
    """Starts an engine; how many programs came from the cache and how many did not."""
    forget()
    events = Counter()

    def listen(event: str, **kwargs: object) -> None:
        events[event.rpartition("/")[2]] += 1

    jax.monitoring.register_event_listener(listen)
    try:
        tiny.make_engine(tmp_path / "model", tiny.one_program, compilation_cache=str(cache)).close()
    finally:
        jax.monitoring.unregister_event_listener(listen)
    assert events["compile_requests_use_cache"] > 0
    return events["cache_hits"], events["compile_requests_use_cache"] - events["cache_hits"]


def entries(cache: Path) -> list[Path]:
    found = sorted(cache.glob("*-cache"))
    assert found
    return found


def halve(entry: bytes) -> bytes:
    return entry[: len(entry) // 2]


def flip(entry: bytes) -> bytes:
    middle = len(entry) // 2
    return entry[:middle] + bytes([entry[middle] ^ 16]) + entry[middle + 1 :]


def empty(entry: bytes) -> bytes:
    return b""


def grow_old(cache: Path) -> None:
    """Nobody writes on at what is there."""
    for path in entries(cache):
        os.utime(path, (1e9, 1e9))


@pytest.mark.parametrize("is_listed", [True, False])
def test_damaged_programs_are_compiled_once_and_kept_again(tmp_path, caplog, is_listed):
    cache = tmp_path / "xla"
    _, n_programs = start(tmp_path, cache)
    if is_listed:
        assert start(tmp_path, cache) == (n_programs, 0)
    for path, damage in zip(entries(cache), itertools.cycle([halve, flip, empty])):
        path.write_bytes(damage(path.read_bytes()))
    grow_old(cache)
    with caplog.at_level(logging.WARNING):
        assert start(tmp_path, cache) == (0, n_programs)
    assert f"{n_programs} damaged programs" in caplog.text
    caplog.clear()
    assert start(tmp_path, cache) == (n_programs, 0)
    assert caplog.text == ""


@pytest.mark.parametrize("damage", [halve, flip, empty])
@pytest.mark.parametrize("is_listed", [True, False])
def test_every_damage_is_seen(tmp_path, damage, is_listed):
    path = tmp_path / "jit_step-1-cache"
    entry = zlib.compress(bytes(range(256)) * 50)
    path.write_bytes(entry)
    assert not is_listed or mend(tmp_path) == 0
    path.write_bytes(damage(entry))
    grow_old(tmp_path)
    assert mend(tmp_path) == 1
    assert not path.exists()


class FakeZstandard:
    """A codec that takes whole entries alone."""

    class ZstdError(Exception):
        pass

    def decompress(self, entry: bytes) -> bytes:
        if not entry.endswith(b"end"):
            raise self.ZstdError("cut")
        return entry


@pytest.mark.parametrize(("codec", "n_damaged"), [(FakeZstandard(), 1), (None, 0)])
def test_zstandard_is_judged_by_who_can_read_it(tmp_path, monkeypatch, codec, n_damaged):
    monkeypatch.setitem(sys.modules, "compression.zstd", None)
    monkeypatch.setitem(sys.modules, "zstandard", codec)
    for name, end in {"jit_whole": b"end", "jit_cut": b""}.items():
        (tmp_path / f"{name}-cache").write_bytes(compiled.ZSTD + end)
    grow_old(tmp_path)
    assert mend(tmp_path) == n_damaged
    assert (tmp_path / "jit_whole-cache").exists()


def test_a_copy_of_the_cache_serves_from_another_directory(tmp_path):
    _, n_programs = start(tmp_path, tmp_path / "here")
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    assert start(tmp_path, tmp_path / "there") == (n_programs, 0)


def test_a_file_where_the_directory_should_be_stops_no_start(tmp_path, caplog):
    (tmp_path / "xla").write_text("mine")
    forget()
    tiny.make_engine(tmp_path, tiny.one_program, compilation_cache=str(tmp_path / "xla")).close()
    assert "compiled programs are not kept" in caplog.text
    assert (tmp_path / "xla").read_text() == "mine"


@pytest.fixture
def full_disk() -> Iterator[None]:
    """No file may grow beyond 64 KiB."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_stops_no_start_and_keeps_nothing(tmp_path, caplog, full_disk):
    cache = tmp_path / "xla"
    n_hits, _ = start(tmp_path, cache)
    assert n_hits == 0
    assert "not kept" in caplog.text
    assert list(cache.iterdir()) == []


def test_a_cache_that_cannot_be_written_still_serves(tmp_path, caplog, request):
    cache = tmp_path / "xla"
    _, n_programs = start(tmp_path, cache)
    request.getfixturevalue("full_disk")
    assert start(tmp_path, cache) == (n_programs, 0)
    assert "not kept" in caplog.text


def test_what_another_process_writes_now_is_left_alone(tmp_path):
    (tmp_path / "jit_step-1-cache").write_bytes(b"\x78\x9chalf")
    assert mend(tmp_path) == 0
    grow_old(tmp_path)
    assert mend(tmp_path) == 1


def test_a_senseless_list_of_checksums_loses_nothing(tmp_path):
    cache = tmp_path / "xla"
    _, n_programs = start(tmp_path, cache)
    (cache / CHECKSUMS).write_bytes(b"\xff\x00 what\nno checksum\n\n")
    assert start(tmp_path, cache) == (n_programs, 0)


def test_processes_that_mend_at_once_keep_every_sound_program(tmp_path):
    cache = tmp_path / "xla"
    start(tmp_path, cache)
    entry = entries(cache)[0].read_bytes()
    for i in range(50):
        (cache / f"jit_step-{i}-cache").write_bytes(halve(entry) if i % 2 else entry)
    grow_old(cache)
    n_sound = sum(opens(path.read_bytes()) for path in entries(cache))
    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(mend, [cache] * 4)) >= 25
    assert len(entries(cache)) == n_sound
    assert len(compiled.read_checksums(cache)) == n_sound
    assert {path.name for path in cache.iterdir() if CHECKSUMS in path.name} == {CHECKSUMS}


def test_a_cache_that_the_program_has_set_up_is_left_alone(tmp_path):
    before = jax.config.jax_compilation_cache_dir
    keep_compiled(str(tmp_path / "xla"))
    assert jax.config.jax_compilation_cache_dir == before
    assert not (tmp_path / "xla").exists()


KEY = """
import sys, jax
sys.path.insert(0, sys.argv[1])
jax.monitoring.register_event_listener(lambda event, **_: print(event))
from fastgen_jax.engine import compiled
compiled.MIN_COMPILE_SECONDS = 0.0
from pathlib import Path
from tests import tiny
tiny.make_engine(Path(sys.argv[2]), tiny.one_program, compilation_cache=sys.argv[3]).close()
assert compiled.__file__.startswith(sys.argv[1])
"""


def test_another_checkout_uses_the_same_cache(tmp_path):
    root = Path(__file__).parents[2]
    for folder in ("fastgen_jax", "pallas_kernels", "tests"):
        ignored = shutil.ignore_patterns("golden", "checkpoint", "__pycache__")
        shutil.copytree(root / folder, tmp_path / "other" / folder, ignore=ignored)
    printed = [
        subprocess.run(
            [sys.executable, "-P", "-c", KEY, checkout, tmp_path / "model", tmp_path / "xla"],
            capture_output=True, text=True, check=True, cwd=tmp_path,
        ).stdout
        for checkout in (root, tmp_path / "other")
    ]  # fmt: skip
    assert ["cache_misses" in text for text in printed] == [True, False]
