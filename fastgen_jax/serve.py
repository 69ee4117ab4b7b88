"""The command line: python -m fastgen_jax.serve [PATH].

Binds the port, then loads the model in the engine's thread while the server already answers.
Imports of weight wait until they are needed, so that --help and a wrong flag answer at once.
"""

import argparse
import errno
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from fastgen_jax.built_in import DEMO
from fastgen_jax.cluster.config import ClusterConfig, check_shared
from fastgen_jax.engine.config import EngineConfig
from fastgen_jax.errors import ConfigError, FastGenError
from fastgen_jax.server import logs
from fastgen_jax.server.config import ADMIN_VARIABLE, KEY_VARIABLE, ServerConfig
from fastgen_jax.server.flags import FlagParser, add_flags, build, markdown
from fastgen_jax.server.listen import bind, inherited, unix_socket, url_of
from fastgen_jax.server.loading import check_model, make_service, model_names
from fastgen_jax.server.report import StartupReport

if TYPE_CHECKING:
    from fastgen_jax.server.certificates import Certificates

DEBUG = "run again with FASTGEN_DEBUG=1 to see where it came from"
LESS_MEMORY = (
    "choose a smaller model, --dtype bfloat16, or less of --max-num-batched-tokens, "
    "--max-num-seqs or --memory-fraction"
)
RPC_PACKAGES = ("grpc", "grpc_health", "grpc_reflection", "google.rpc")
CONFIGS = (EngineConfig, ServerConfig, ClusterConfig)
EXAMPLES = """\
examples:
  python -m fastgen_jax.serve                           the built-in demo model
  python -m fastgen_jax.serve ./TinyLlama-1.1B --max-model-len 2K
  python -m fastgen_jax.serve --help=markdown           all flags as a table
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the server until a signal; returns the exit code."""
    logs.open_standard_files()
    try:
        return run(sys.argv[1:] if argv is None else argv)
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        logs.flush()
        if os.environ.get("FASTGEN_DEBUG") == "1":
            raise
        print_error(error)
        return 2 if isinstance(error, ConfigError) else 1


def run(argv: Sequence[str]) -> int:
    """Parses, binds, loads and serves.

    Raises:
        FastGenError: a flag, the address or the model cannot work.
    """
    started = time.monotonic()
    engine_config, server_config, cluster_config = parse(argv)
    check_model(engine_config.model)
    logs.set_up_logging(server_config.log_level, server_config.log_format)
    signal.signal(signal.SIGTERM, exit_at_once)  # until the server's own handlers stand
    if cluster_config.is_asked_for:
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # Ray has no other switch
        from fastgen_jax.cluster.running import run_cluster

        return run_cluster(engine_config, server_config, cluster_config)
    certificates = tls_files(server_config)
    with listen(server_config) as listener, listen_to_rpc(server_config) as rpc_listener:
        return serve(
            listener,
            rpc_listener,
            engine_config=engine_config,
            server_config=server_config,
            certificates=certificates,
            started=started,
        )


def serve(
    listener: socket.socket,
    rpc_listener: socket.socket | None,
    *,
    engine_config: EngineConfig,
    server_config: ServerConfig,
    certificates: "Certificates | None",
    started: float,
) -> int:
    """Loads and serves; returns the exit code.

    Raises:
        FastGenError: the model cannot work, or the engine has given up.
    """
    name = model_names(engine_config.model, server_config)[0]
    url = url_of(listener, server_config.host, "https" if certificates else "http")
    report = StartupReport(url, name, started, server_config.uds)
    report.opened()
    service = make_service(engine_config, server_config, report)
    service.start()
    from fastgen_jax.server.lifecycle import Server  # FastAPI, while the engine's thread loads

    rpc = None
    if rpc_listener is not None:
        from fastgen_jax.server.rpc.server import RpcServer

        rpc = RpcServer(service, server_config, rpc_listener, certificates)
    Server(service, server_config, certificates, rpc).run([listener])
    has_stopped = service.stop()
    if service.load_error is not None:
        raise service.load_error
    if service.failure is not None:
        raise FastGenError(f"{service.failure}; the log has the tracebacks, start the server again")
    if not has_stopped:  # a thread is deep in a compilation, which nothing can interrupt
        exit_at_once()
    return 0


def listen(config: ServerConfig) -> AbstractContextManager[socket.socket]:
    if config.fd is not None:
        return inherited(config.fd)
    return bind(config.host, config.port) if config.uds is None else unix_socket(config.uds)


def listen_to_rpc(config: ServerConfig) -> AbstractContextManager[socket.socket | None]:
    """Keeps the port of gRPC until its server can take it.

    Raises:
        ConfigError: the port is taken, or gRPC's packages are not here.
    """
    if not config.grpc_port:
        return nullcontext()
    missing = [name for name in RPC_PACKAGES if find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"--grpc-port needs {', '.join(missing)}; pip install 'fastgen-jax[grpc]'"
        )
    return bind(config.host, config.grpc_port, "--grpc-port")


def parse(argv: Sequence[str]) -> tuple[EngineConfig, ServerConfig, ClusterConfig]:
    """The configs that the command line asks for.

    Raises:
        ConfigError: an unknown flag or a value that cannot work.
    """
    namespace = make_parser().parse(argv)
    model = getattr(namespace, "path", None)
    if model is not None and getattr(namespace, "model", model) != model:
        raise ConfigError("the model is named twice; give it as PATH or with --model")
    namespace.model = model or getattr(namespace, "model", None) or str(DEMO)
    if not hasattr(namespace, "otlp_traces_endpoint"):
        namespace.otlp_traces_endpoint = environments_endpoint()
    if key := os.environ.pop(KEY_VARIABLE, None):
        namespace.api_key = [*getattr(namespace, "api_key", ()), key]
    if key := os.environ.pop(ADMIN_VARIABLE, None):
        if hasattr(namespace, "admin_key"):
            raise ConfigError(f"--admin-key and {ADMIN_VARIABLE} are two keys; give one")
        namespace.admin_key = key
    engine, server, cluster = (build(config, namespace) for config in CONFIGS)
    if cluster.is_asked_for:
        check_shared(server)
    return engine, server, cluster


def environments_endpoint() -> str | None:
    """Where OpenTelemetry's own variables send traces."""
    base = os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT")
    whole = os.environ.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
    return whole or (base.rstrip("/") + "/v1/traces" if base else None)


def make_parser() -> FlagParser:
    parser = FlagParser(
        prog="python -m fastgen_jax.serve",
        usage="%(prog)s [PATH] [flags]",
        description="Serve a Llama-family model over OpenAI's HTTP API.",
        epilog=EXAMPLES,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(
            prog, max_help_position=30, width=100
        ),
        allow_abbrev=False,
        add_help=False,
    )
    parser.add_argument(
        "path", nargs="?", metavar="PATH",
        help="directory of a Hugging Face checkpoint, or a hub id (default: a built-in demo)",
    )  # fmt: skip
    parser.add_argument(
        "-h", "--help", nargs="?", const="all", metavar="markdown", action=_Help,
        help="show this; --help=markdown prints all flags as a Markdown table",
    )  # fmt: skip
    add_flags(parser, CONFIGS)
    return parser


class _Help(argparse.Action):
    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None):
        print(
            markdown(CONFIGS, positional="model") if values == "markdown" else parser.format_help()
        )
        parser.exit()


def tls_files(config: ServerConfig) -> "Certificates | None":
    if config.tls_cert is None or config.tls_key is None:
        return None
    from fastgen_jax.server.certificates import Certificates

    return Certificates(config.tls_cert, config.tls_key)


def exit_at_once(*_: Any):
    """Ends the process without waiting for its threads."""
    logs.flush()
    os._exit(0)


def print_error(error: BaseException):
    """One sentence of cause, one of remedy, after everything else."""
    cause, remedy = explain(error)
    if sys.stdout is not None:  # None: it was closed by who started us
        sys.stdout.flush()
    if logs.fatal(cause, remedy):
        return
    print(f"error: {cause}\n  fix: {remedy}", file=sys.stderr)


def explain(error: BaseException) -> tuple[str, str]:
    """The cause of an error that ends the start, and its remedy."""
    if isinstance(error, FastGenError):
        cause, _, remedy = str(error).partition("; ")
        is_ours = isinstance(error, ConfigError)
        return cause, remedy or ("--help lists every flag and its values" if is_ours else DEBUG)
    if is_out_of_memory(error):
        return "there is not enough memory to load and compile the model", LESS_MEMORY
    cause = f"{type(error).__name__}: {error}"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return cause, "make room on that disk"
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        return cause, "allow more open files (ulimit -n)"
    if isinstance(error, OSError) and error.filename is not None:
        return cause, f"check that {error.filename} exists and that this user may use it"
    return cause, DEBUG


def is_out_of_memory(error: BaseException) -> bool:
    """XLA raises a RuntimeError for every device, and names the reason in its text."""
    text = str(error)
    is_of_xla = isinstance(error, RuntimeError) and (
        "RESOURCE_EXHAUSTED" in text or "out of memory" in text.lower()
    )
    is_of_system = isinstance(error, OSError) and error.errno == errno.ENOMEM
    return isinstance(error, MemoryError) or is_of_xla or is_of_system


if __name__ == "__main__":
    sys.exit(main())
