"""The room every test runs in: eight fake CPU devices, no network, strict dtypes and ranks."""

import contextlib
import importlib.metadata
import ipaddress
import os
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

from tests import targets  # before jax: libtpu reads its environment when jax first loads it

# The suite compiles hundreds of tiny programs and runs each for milliseconds. Without code
# optimisation they compile four times as fast; what they compute is the same program.
# Cut into parts, as for a machine that waits for one large program, they took a sixth longer.
XLA_FLAGS = [
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0",
    "--xla_cpu_parallel_codegen_split_count=1",
]
if importlib.metadata.version("jaxlib").startswith("0.10.") and not targets.has_compilers():
    # Later versions, and the accelerators' compilers, do not know this flag, and abort.
    XLA_FLAGS.append("--xla_cpu_use_fusion_emitters=false")
os.environ |= targets.ENVIRONMENT | {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": " ".join([os.environ.get("XLA_FLAGS", ""), *XLA_FLAGS]),
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
# Engines of the same shape compile once, in this run and in the next ones.
jax.config.update("jax_compilation_cache_dir", str(Path(__file__).parents[1] / ".pytest_cache/xla"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)

# Recorded around every fetch of an executable, from the compiler or from the persistent cache.
COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--one-in",
        type=int,
        default=1,
        metavar="N",
        help="run one test of N, always the same ones, and all that the oldest jax cannot run",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    n = config.getoption("one_in")

    def is_left_out(item: pytest.Item) -> bool:
        return bool(zlib.crc32(item.nodeid.encode()) % n) and "newer_jax" not in item.keywords

    left_out = [item for item in items if is_left_out(item)]
    items[:] = [item for item in items if not is_left_out(item)]
    config.hook.pytest_deselected(items=left_out)


class NetworkBlocked(RuntimeError):
    """A test reached for a machine other than this one."""


class UnexpectedCompile(AssertionError):
    """XLA compiled a program where everything should have been compiled before."""


def _is_local(host: object) -> bool:
    if isinstance(host, bytes):
        host = host.decode()
    if not host or host == "localhost":
        return True
    try:
        address = ipaddress.ip_address(str(host))
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified


def _refuse_network(event: str, args: tuple) -> None:
    if event == "socket.connect":
        host = (
            args[1][0] if isinstance(args[1], tuple) else None
        )  # a Unix socket's address is a path
    elif event in ("socket.getaddrinfo", "socket.gethostbyname"):
        host = args[0]
    else:
        return
    if not _is_local(host):
        raise NetworkBlocked(f"{event} to {host}: tests use no network")


sys.addaudithook(_refuse_network)


@contextlib.contextmanager
def no_compile() -> Iterator[None]:
    """Makes any XLA compilation inside raise UnexpectedCompile, at once and again at the end."""
    compiled: list[str] = []

    def listen(event: str, duration: float, **kwargs: object) -> None:
        if event == COMPILE_EVENT:
            compiled.append(str(kwargs.get("fun_name", "?")))
            raise UnexpectedCompile(f"XLA compiled {compiled[-1]} in {duration:.3f} s")

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    if compiled:
        raise UnexpectedCompile(f"XLA compiled {', '.join(compiled)}")


@pytest.fixture
def forbid_compile():
    """`with forbid_compile(): ...` fails if anything inside compiles."""
    return no_compile


@pytest.fixture(autouse=True)
def forget_programs():
    """Unloads programs now and then: each takes some of the 65530 memory maps that Linux allows a
    process, and XLA crashes where none is left.
    """
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 20_000:
        jax.clear_caches()
