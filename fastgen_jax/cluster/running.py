"""The command line's form of the application: starts Ray if need be, deploys, waits, drains."""

import importlib.util
import logging
import math
import os
import signal
import time
from types import FrameType
from typing import Any

from fastgen_jax.cluster.config import ClusterConfig
from fastgen_jax.engine.config import EngineConfig
from fastgen_jax.errors import ConfigError, FastGenError
from fastgen_jax.server.config import ServerConfig
from fastgen_jax.server.listen import bind, url_of
from fastgen_jax.server.loading import model_names
from fastgen_jax.server.report import curl

log = logging.getLogger("fastgen_jax.server")

APPLICATION = "fastgen"


class Stopped(Exception):
    """A signal has come."""


def run_cluster(
    engine_config: EngineConfig, server_config: ServerConfig, cluster_config: ClusterConfig
) -> int:
    """Serves until a signal, then lets running requests end; returns the exit code.

    Raises:
        ConfigError: Ray is not there, or the address is taken.
        FastGenError: the replicas cannot start.
    """
    if importlib.util.find_spec("ray") is None:
        raise ConfigError(
            "replicas need Ray Serve, which is not installed; pip install 'fastgen-jax[ray]'"
        )
    import ray  # pyright: ignore[reportMissingImports]
    from ray import serve  # pyright: ignore[reportMissingImports]

    started, is_local = time.monotonic(), cluster_config.ray_address is None
    url, http = _address(server_config, is_local=is_local)
    start_ray(cluster_config)
    serve.start(proxy_location="HeadOnly" if is_local else "EveryNode", http_options=http)
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, _stop)
    deployed = None
    try:
        from fastgen_jax.cluster.application import application

        log.info("listen   %s is open; replicas load", url)
        app = application(engine_config, server_config, cluster_config)
        serve.run(app, name=APPLICATION)
        deployed = _deployed()
        model = model_names(engine_config.model, server_config)[0]
        log.info("ready    in %.1f s; try:\n%s", time.monotonic() - started, curl(url, model))
        while True:
            signal.pause()
    except Stopped:
        log.info("stopping: running requests may end")
    except RuntimeError as error:
        raise FastGenError(f"{error}; the log above has the reason") from None
    finally:
        if deployed is None or deployed == _deployed():  # else it is no longer ours
            serve.delete(APPLICATION)
        if is_local:
            serve.shutdown()
        ray.shutdown()
    return 0


def _deployed() -> float | None:
    """When what runs now was deployed."""
    from ray import serve  # pyright: ignore[reportMissingImports]

    application = serve.status().applications.get(APPLICATION)
    return application.last_deployed_time_s if application else None


def _address(config: ServerConfig, *, is_local: bool) -> tuple[str, dict[str, Any]]:
    """Where clients find the server, and Ray's options for it; a taken port is found at once."""
    if not is_local:
        return f"http://{config.host}:{config.port}", {"host": config.host, "port": config.port}
    with bind(config.host, config.port) as listener:
        port = listener.getsockname()[1]
        return url_of(listener, config.host), {"host": config.host, "port": port}


def start_ray(config: ClusterConfig):
    """Joins a cluster, or makes one of this machine, which has as many CPUs as replicas ask for:
    where there are fewer, they share them.
    """
    import ray  # pyright: ignore[reportMissingImports]

    if config.ray_address is not None:
        ray.init(address=config.ray_address, logging_level="warning")
        return
    most = config.max_replicas or config.replicas
    ray.init(
        address="local",
        include_dashboard=False,
        logging_level="warning",
        num_cpus=max(os.cpu_count() or 1, math.ceil(most * config.replica_cpus)),
    )


def _stop(sig: int, frame: FrameType | None):
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, signal.SIG_DFL)  # the second signal ends the process
    raise Stopped
