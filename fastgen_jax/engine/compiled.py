"""Compiled programs between runs: jax's persistent compilation cache, turned on and kept sound.

jax never writes over an entry: one that a crash or a full disk has damaged would be
read in vain, and compiled again, at every start. So damaged ones are removed before jax looks: a
list of checksums tells those that have changed, and what no list knows yet must decompress. Nothing
that is wrong with the directory stops a start.
"""

import contextlib
import importlib
import logging
import math
import os
import tempfile
import time
import zlib
from pathlib import Path

import jax

log = logging.getLogger("fastgen_jax.engine")

CHECKSUMS = "checksums"  # file beside the entries; lines of crc32 in hex and an entry's name
MIN_COMPILE_SECONDS = 0.1  # of what is worth a file
PROGRAM_SIZE = 2**20  # bytes that must fit on the disk for entries to be written at all
SETTLED = 5.0  # seconds after which nobody writes on at an entry
ZSTD = b"\x28\xb5\x2f\xfd"


def keep_compiled(directory: str | None) -> None:
    """Makes jax keep compiled programs there, unless the program has set a cache up itself."""
    if not directory or getattr(jax.config, "jax_compilation_cache_dir", None) is not None:
        return
    path = Path(directory).expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        log.warning("compiled programs are not kept: %s", error)
        return
    min_seconds = MIN_COMPILE_SECONDS
    try:
        _try_to_write(path)
        mend(path)
    except OSError as error:
        log.warning("compiled programs are read from %s but not kept: %s", path, error)
        min_seconds = math.inf
    # XLA's own caches would lie inside, and their path become part of each entry's key: a cache
    # that is copied or moved would serve nothing.
    jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
    jax.config.update("jax_persistent_cache_min_compile_time_secs", min_seconds)
    jax.config.update("jax_compilation_cache_dir", str(path))


def _try_to_write(directory: Path) -> None:
    """Raises OSError if the directory takes no program: read-only, or full."""
    with tempfile.TemporaryFile(dir=directory) as file:
        file.write(bytes(PROGRAM_SIZE))


def mend(directory: Path) -> int:
    """Removes damaged entries and returns how many. What another process writes now is left alone.

    Raises:
        OSError: the directory cannot be changed.
    """
    known = read_checksums(directory)
    sound: dict[str, int] = {}
    n_damaged = 0
    for path in sorted(directory.glob("*-cache")):
        with contextlib.suppress(FileNotFoundError):  # another process was faster
            entry, age = path.read_bytes(), abs(time.time() - path.stat().st_mtime)
            checksum, is_known = zlib.crc32(entry), path.name in known
            if known[path.name] == checksum if is_known else opens(entry):
                sound[path.name] = checksum
            elif is_known or age > SETTLED:
                path.unlink()
                n_damaged += 1
    if sound != known:
        write_checksums(directory, sound)
    if n_damaged:
        log.warning("%d damaged programs in %s are compiled again", n_damaged, directory)
    return n_damaged


def opens(entry: bytes) -> bool:
    """Whether an entry decompresses, and so is whole."""
    if entry.startswith(ZSTD):
        return _opens_as_zstd(entry)
    try:
        return bool(zlib.decompress(entry))
    except zlib.error:
        return False


def _opens_as_zstd(entry: bytes) -> bool:
    """jax prefers this compression where Python or an installed package has it. Where none has, the
    entry is another installation's, and not ours to judge.
    """
    for name in ("compression.zstd", "zstandard"):
        with contextlib.suppress(ImportError):
            codec = importlib.import_module(name)
            try:
                return bool(codec.decompress(entry))
            except codec.ZstdError:
                return False
    return True


def read_checksums(directory: Path) -> dict[str, int]:
    """Checksums by entry; lines that make no sense are skipped, as their entries are looked at."""
    known: dict[str, int] = {}
    with contextlib.suppress(FileNotFoundError):
        for line in (directory / CHECKSUMS).read_text(errors="replace").splitlines():
            checksum, _, name = line.partition(" ")
            with contextlib.suppress(ValueError):
                known[name] = int(checksum, 16)
    return known


def write_checksums(directory: Path, checksums: dict[str, int]) -> None:
    """Replaces the list whole: of several processes the last one wins, and what its list lacks is
    looked at again.
    """
    text = "".join(f"{checksum:08x} {name}\n" for name, checksum in checksums.items())
    descriptor, temporary = tempfile.mkstemp(dir=directory, prefix=CHECKSUMS)
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(text)
        Path(temporary).replace(directory / CHECKSUMS)
    except OSError:
        Path(temporary).unlink()
        raise
