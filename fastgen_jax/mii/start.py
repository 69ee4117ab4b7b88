"""serve: starts the command line in a process that outlives its caller, and waits for it.

The caller binds the socket, so that the port is known, and nobody else's, before the process runs.
"""

import contextlib
import dataclasses
import math
import os
import secrets
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastgen_jax.built_in import DEMO_NAME
from fastgen_jax.cluster.config import ClusterConfig
from fastgen_jax.engine.config import EngineConfig
from fastgen_jax.errors import FastGenError
from fastgen_jax.mii.deployments import SUFFIX, Deployment, Directory, last_lines, private
from fastgen_jax.mii.options import SERVING, loading_options
from fastgen_jax.mii.process import Process
from fastgen_jax.mii.remote import Client, terminate
from fastgen_jax.progress import PhaseBars
from fastgen_jax.server.config import KEY_VARIABLE, ServerConfig
from fastgen_jax.server.flags import FlagParser, add_flags, arguments, build
from fastgen_jax.server.listen import bind, url_of

CONFIGS = (EngineConfig, ServerConfig, ClusterConfig)
OURS = ("model", "fd", "uds", "api_key")  # fields that are not the caller's
POLL = 0.1  # seconds


def serve(
    model_name_or_path: str = "",
    *,
    deployment_name: str | None = None,
    api_key: str | None = None,
    start_timeout: float | None = None,
    **options: Any,
) -> Client:
    """Serves a model, the built-in demo if none is named, until `terminate_server`.

    Args:
        deployment_name: for `client`; default: the model's, followed by -mii-deployment.
        api_key: that clients must send; default: a new one, which `client` finds. "" for none.
        start_timeout: seconds after which a server that is not ready is ended; default: no limit.
        options: fields of EngineConfig, ServerConfig and ClusterConfig, or MII's names of them, as
            tensor_parallel, replica_num, host, port (default: a free one) and log_level.

    Raises:
        ConfigError: an unknown option, with the nearest known one, or a value that cannot work.
        FastGenError: the name is taken, or the server ended while it started, with its last lines.
    """
    known = [f.name for config in CONFIGS for f in dataclasses.fields(config)]
    options = {"port": 0} | loading_options(options, SERVING, [n for n in known if n not in OURS])
    if model_name_or_path:
        options["model"] = os.fspath(model_name_or_path)
    launch = Launch(
        name=deployment_name or (options.get("model") or DEMO_NAME) + SUFFIX,
        arguments=arguments(options),
        api_key=secrets.token_urlsafe(32) if api_key is None else api_key,
    )
    directory = Directory.of_user()
    deployment = launch.start(directory)
    client = Client(deployment.wire(), deployment)
    try:
        _wait_until_ready(client, deployment, directory.log(launch.name), start_timeout)
    except BaseException:
        terminate(deployment)
        raise
    return client


@dataclass(frozen=True, kw_only=True)
class Launch:
    """What a server is started with."""

    name: str
    arguments: list[str]
    api_key: str

    def start(self, directory: Directory) -> Deployment:
        """Starts the server, unless one of that name runs, and tells the directory."""
        engine, server, cluster = self._configs()
        log = directory.log(self.name)
        with directory.locked(), contextlib.ExitStack() as undo:
            taken = directory.find(self.name)
            if taken is not None:
                raise FastGenError(
                    f"{self.name!r} is deployed already, at {taken.url}; mii.client({self.name!r}) "
                    "is a client of it, or choose another deployment_name"
                )
            listener = undo.enter_context(bind(server.host, server.port))
            fd = None if cluster.is_asked_for else listener.fileno()
            port = listener.getsockname()[1]
            process = self._spawn(port, fd, log)
            undo.callback(process.stop, 0.0)
            deployment = Deployment(
                name=self.name,
                url=url_of(listener, server.host, "https" if server.tls_cert else "http"),
                api_key=self.api_key or None,
                tls_cert=server.tls_cert and os.path.abspath(server.tls_cert),
                process=process,
                max_prompts=min(server.max_prompts, engine.max_queued_requests),
                max_body_bytes=server.max_body_bytes,
                drain_timeout=server.drain_timeout,
            )
            directory.add(deployment)
            undo.pop_all()
            listener.close()
        return deployment

    def _configs(self) -> tuple[EngineConfig, ServerConfig, ClusterConfig]:
        """What the server will read. Raises ConfigError as it would, before it is started."""
        parser = FlagParser(add_help=False, allow_abbrev=False)
        add_flags(parser, CONFIGS)
        namespace = parser.parse(self.arguments)
        if self.api_key:
            namespace.api_key = [self.api_key]
        engine, server = build(EngineConfig, namespace), build(ServerConfig, namespace)
        return engine, server, build(ClusterConfig, namespace)

    def _spawn(self, port: int, fd: int | None, log: Path) -> Process:
        """The command line in a session of its own: neither a hangup nor Ctrl-C reaches it. It
        imports from where we do, and from nowhere else: its working directory may be anybody's.

        Args:
            fd: the socket that it listens on; None: Ray binds the port, and takes no socket.
        """
        where = f"--port={port}" if fd is None else f"--fd={fd}"
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        environment = os.environ | {"PYTHONPATH": path, "PYTHONSAFEPATH": "1"}
        environment |= {KEY_VARIABLE: self.api_key}
        with open(log, "wb", opener=private) as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "fastgen_jax.serve", *self.arguments, where],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=[] if fd is None else [fd],
                start_new_session=True,
                env=environment,
            )
        process.returncode = 0  # or Python would warn of a child that nobody waits for
        return Process.started(process.pid)


def _wait_until_ready(
    client: Client, deployment: Deployment, log: Path, seconds: float | None
) -> None:
    """Raises FastGenError if the server ends, or is not ready in time."""
    deadline = math.inf if seconds is None else time.monotonic() + seconds
    with contextlib.closing(PhaseBars()) as on_phase:
        while True:
            if not deployment.process.is_running:
                problem = "ended while it started"
                break
            if time.monotonic() > deadline:
                problem = f"was not ready within start_timeout={seconds:g} s"
                break
            with contextlib.suppress(FastGenError):  # it does not answer yet
                health = client.status()
                on_phase(health.get("phase", ""), health.get("done", 0), health.get("of", 0))
                if health.get("phase") == "ready":
                    return
            time.sleep(POLL)
    raise FastGenError(
        f"the server of {deployment.name!r} {problem}; its last lines:\n{last_lines(log)}"
    )
