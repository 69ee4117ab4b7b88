"""Compiled programs that lie beside a model's weights: what they are for, and whether to load them.

A program is machine code: who writes one decides what this process does. So a set is loaded if a
key that only this account can read has signed it, or if the user vouches for it. It is used if all
that shaped it is as it was; else the programs are compiled here, and the log says why.
"""

import functools
import hashlib
import hmac
import importlib.metadata
import json
import logging
import os
import platform
import re
import secrets
import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax

import pallas_kernels
from fastgen_jax.engine.config import EngineConfig
from fastgen_jax.errors import CheckpointError
from fastgen_jax.models.config import ModelConfig

log = logging.getLogger("fastgen_jax.engine")

FOLDER = "programs"  # in a model's directory; in it one for each kind and number of chips
MANIFEST, SIGNATURE = "manifest.json", "manifest.hmac"
KEY_FILE = Path("~/.cache/fastgen_jax/programs.key")
MAX_BYTES = 2**31  # of one program
MAX_MANIFEST_BYTES = 2**24
# Fields of a config that shape programs.
SHAPING = ("dtype", "kv_cache_dtype", "attention_backend", "max_model_len", "block_size",
           "num_kv_blocks", "max_num_batched_tokens", "max_num_seqs", "deterministic",
           "return_hidden_states")  # fmt: skip
PACKAGES = {
    "cpu": ("jax", "jaxlib"),
    "gpu": ("jax", "jaxlib", "jax-cuda12-pjrt", "jax-cuda13-pjrt"),
    "tpu": ("jax", "jaxlib", "libtpu"),
}
# What else compilers and tracing go by: variables of the environment, and jax's own options.
FLAGS = {"cpu": ("XLA_FLAGS",), "gpu": ("XLA_FLAGS",), "tpu": ("XLA_FLAGS", "LIBTPU_INIT_ARGS")}
IDLE_FLAGS = re.compile(r"--xla_(dump_|jf_dump_|force_host_platform_device_count)")
OPTIONS = (
    "jax_default_matmul_precision",
    "jax_default_prng_impl",
    "jax_threefry_partitionable",
    "jax_disable_most_optimizations",
)


class Program(NamedTuple):
    """A file, and what it must be like."""

    file: str
    size: int
    sha256: str
    outputs: list[list[int]]  # shapes


@dataclass(frozen=True)
class Stored:
    """A set of programs that may be loaded."""

    directory: Path
    made_for: Mapping[str, Any]
    programs: Mapping[str, Program]  # by the text of their shape

    def read(self, shape: Any) -> tuple[bytes, Program] | None:
        """The program of a shape; None: it is not here, or not as it was written, and the log says
        so.
        """
        program = self.programs.get(repr(shape))
        if program is None:
            return None
        file = self.directory / program.file
        try:
            if file.stat().st_size != program.size or program.size > MAX_BYTES:
                raise OSError("its size is another one")
            content = file.read_bytes()
        except OSError as error:
            log.warning("the stored program %s is not used: %s", file, error)
            return None
        if hashlib.sha256(content).hexdigest() != program.sha256:
            log.warning("the stored program %s is not used: it is not as it was written", file)
            return None
        return content, program


def purpose(config: EngineConfig, model: ModelConfig, devices: Iterable[Any]) -> dict[str, Any]:
    """All that shapes programs, by names that a user knows."""
    devices = list(devices)
    chip = devices[0]
    found: dict[str, Any] = {"chip": chip.device_kind, "chips": len(devices)}
    if chip.platform == "cpu":
        found["chip"] = f"{platform.machine()} {_cpu_features()}"
        found["library of pallas_kernels.cpu"] = pallas_kernels.has_cpu_library()
    for name in PACKAGES[chip.platform]:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    found |= {name: _flags(name) for name in FLAGS[chip.platform]}
    found |= {name: getattr(jax.config, name, None) for name in OPTIONS}
    found["source of fastgen_jax"] = _source()
    # Functions of a program have no name that others could know them by: no set is made for any.
    found["logits_processors"] = sorted(config.logits_processors or {})
    found["config.json"] = hashlib.sha256(repr(model).encode()).hexdigest()[:16]
    return found | {name: _plain(getattr(config, name)) for name in SHAPING}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _flags(variable: str) -> str:
    """Those that change what is compiled, in their order: the last of a name counts."""
    flags = os.environ.get(variable, "").split()
    return " ".join(flag for flag in flags if not IDLE_FLAGS.match(flag))


def _cpu_features() -> str:
    """Programs for a CPU use all that it can: others must be alike."""
    with suppress(OSError):
        found = re.search(r"^(?:flags|Features)\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.M)
        if found:
            return hashlib.sha256(" ".join(sorted(found[1].split())).encode()).hexdigest()[:16]
    return platform.processor()


@functools.cache
def _source() -> str:
    """What the code is that programs are traced from."""
    digest = hashlib.sha256()
    ours, kernels = Path(__file__).parents[1], Path(pallas_kernels.__path__[0])
    for folder in (ours / "engine", ours / "models", kernels):
        for file in sorted(f for f in folder.rglob("*") if f.suffix in (".py", ".cc", ".h")):
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def folder_of(directory: Path, devices: Iterable[Any]) -> Path:
    """Where the programs for such devices lie."""
    devices = list(devices)
    kind = re.sub(r"[^A-Za-z0-9]+", "-", f"{devices[0].platform} {devices[0].device_kind}")
    return directory / FOLDER / f"{kind}-{len(devices)}"


def find(directory: Path | None, devices: Iterable[Any], *, is_trusted: bool) -> Stored | None:
    """The programs for these devices, if this account has made them or the user trusts them."""
    devices = list(devices)
    if directory is None or not (directory / FOLDER).is_dir():
        return None
    folder = folder_of(directory, devices)
    try:
        if not folder.is_dir():
            there = ", ".join(sorted(path.name for path in folder.parent.iterdir()))
            raise CheckpointError(f"there are none for {folder.name}, but for {there}")
        if (folder / MANIFEST).stat().st_size > MAX_MANIFEST_BYTES:
            raise CheckpointError(f"{MANIFEST} is larger than {MAX_MANIFEST_BYTES} bytes")
        text = (folder / MANIFEST).read_bytes()
        if not is_trusted and not _is_ours(text, folder):
            raise CheckpointError(
                "this account has not made them, and they are machine code; give --trust-programs "
                "if you know who has"
            )
        manifest = json.loads(text)
        programs = {shape: Program(*fields) for shape, fields in manifest["programs"].items()}
        return Stored(folder, dict(manifest["made_for"]), programs)
    except (
        OSError,
        CheckpointError,
        LookupError,
        TypeError,
        ValueError,
        AttributeError,
        RecursionError,
    ) as error:
        log.warning("stored programs are not used: %s", error)
        return None


def differences(stored: Stored, wanted: Mapping[str, Any]) -> list[str]:
    """How what they were made for is not what is wanted."""
    made_for = stored.made_for
    names = [name for name in {**wanted, **made_for} if made_for.get(name) != wanted.get(name)]
    return [f"{name} was {made_for.get(name)} and is {wanted.get(name)}" for name in names]


def write(
    directory: Path,
    devices: Iterable[Any],
    made_for: Mapping[str, Any],
    programs: Mapping[Any, tuple[bytes, list[list[int]]]],
) -> Path:
    """Stores programs, by their shape: contents, and shapes of their outputs. Those of such devices
    that were there are replaced.
    """
    folder = folder_of(directory, devices)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    table = {}
    for i, (shape, (content, outputs)) in enumerate(programs.items()):
        (partial / f"{i}.bin").write_bytes(content)
        digest = hashlib.sha256(content).hexdigest()
        table[repr(shape)] = Program(f"{i}.bin", len(content), digest, outputs)
    text = json.dumps({"made_for": made_for, "programs": table}).encode()
    (partial / MANIFEST).write_bytes(text)
    (partial / SIGNATURE).write_text(_sign(text, _make_key()))
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    return folder


def _is_ours(text: bytes, folder: Path) -> bool:
    """Whether a key of this account has signed it. Who can read the key, can sign."""
    with suppress(FileNotFoundError):
        key, signature = KEY_FILE.expanduser().read_bytes(), (folder / SIGNATURE).read_bytes()
        return hmac.compare_digest(_sign(text, key).encode(), signature)
    return False


def _sign(text: bytes, key: bytes) -> str:
    return hmac.new(key, text, "sha256").hexdigest()


def _make_key() -> bytes:
    """This account's key, made where there is none: 32 random bytes that nobody else may read."""
    file = KEY_FILE.expanduser()
    file.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError):
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as opened:
            opened.write(secrets.token_bytes(32))
    return file.read_bytes()


def load(content: bytes, devices: Iterable[Any]) -> Any:
    """An executable on these devices, of bytes that must be trusted."""
    from jaxlib import xla_client

    devices = tuple(devices)
    return devices[0].client.deserialize_executable(content, xla_client.DeviceList(devices))


class Loaded:
    """A deserialised executable, which is called as jax's own are.

    Args:
        treedef, outputs: of what it returns; the shape and sharding of each leaf.
    """

    def __init__(self, executable: Any, treedef: Any, outputs: list[tuple[Any, Any]]):
        self._executable, self._treedef, self._outputs = executable, treedef, outputs

    def __call__(self, *args: Any) -> Any:
        results = self._executable.execute_sharded(jax.tree.leaves(args))
        arrays = [
            jax.make_array_from_single_device_arrays(shape, sharding, shards)
            for (shape, sharding), shards in zip(
                self._outputs, results.disassemble_into_single_device_arrays(), strict=True
            )
        ]
        return jax.tree.unflatten(self._treedef, arrays)
