"""The Ray Serve application: an ingress that takes requests in, and replicas that answer them."""

from typing import Any

import ray  # pyright: ignore[reportMissingImports]
from ray import serve  # pyright: ignore[reportMissingImports]
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, RequestRouterConfig  # pyright: ignore[reportMissingImports]

from fastgen_jax.cluster.config import ClusterConfig
from fastgen_jax.cluster.ingress import Ingress
from fastgen_jax.cluster.replica import Replica
from fastgen_jax.cluster.router import TokenRouter
from fastgen_jax.cluster.scaling import TokenPolicy
from fastgen_jax.engine.config import EngineConfig
from fastgen_jax.server.config import ServerConfig
from fastgen_jax.server.loading import check_model

HEALTH_PERIOD = 2.0  # seconds; after three failures in a row Ray replaces a replica
HEALTH_TIMEOUT = 10.0
UPSCALE_DELAY = 5.0  # seconds that a replica must have been missing
DRAIN_POLL = 0.2  # seconds
OURS = RequestRouterConfig(request_router_class=TokenRouter)
LAST_WORDS = 5.0  # seconds that a replica has to end what drain_timeout left
N_SMALL = 64  # requests that need no room in the engine: /health, /metrics, /tokenize
MAX_INGRESS = 100_000  # requests in one ingress; replicas refuse what is too much


def application(
    engine_config: EngineConfig,
    server_config: ServerConfig,
    cluster_config: ClusterConfig,
    routing: RequestRouterConfig = OURS,
) -> serve.Application:
    """What serve.run takes. Ray must run already where it matters what devices there are."""
    check_model(engine_config.model)
    shutdown = {
        "graceful_shutdown_wait_loop_s": DRAIN_POLL,
        "graceful_shutdown_timeout_s": server_config.drain_timeout + LAST_WORDS,
    }
    replicas = serve.deployment(
        Replica,
        name="replica",
        ray_actor_options=_resources(engine_config, cluster_config),
        max_ongoing_requests=engine_config.max_queued_requests + N_SMALL,
        max_queued_requests=engine_config.max_queued_requests,
        request_router_config=routing,
        health_check_period_s=HEALTH_PERIOD,
        health_check_timeout_s=HEALTH_TIMEOUT,
        **_count(cluster_config),
        **shutdown,
    )
    ingress = serve.deployment(
        serve.ingress()(Ingress),
        name="ingress",
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=MAX_INGRESS,
        health_check_period_s=HEALTH_PERIOD,
        **shutdown,
    )
    burst = engine_config.max_queued_requests  # what a lost replica may have held
    return ingress.bind(replicas.bind(engine_config, server_config), server_config, burst)


def _resources(engine_config: EngineConfig, cluster_config: ClusterConfig) -> dict[str, Any]:
    """What Ray sets aside for a replica: accelerators, if the cluster has any."""
    there = ray.cluster_resources() if ray.is_initialized() else {}
    options: dict[str, Any] = {"num_cpus": cluster_config.replica_cpus}
    if "GPU" in there:
        options["num_gpus"] = engine_config.tensor_parallel_size
    elif "TPU" in there:
        options["resources"] = {"TPU": engine_config.tensor_parallel_size}
    return options


def _count(cluster_config: ClusterConfig) -> dict[str, Any]:
    most = cluster_config.max_replicas
    if most is None:
        return {"num_replicas": cluster_config.replicas}
    policy = AutoscalingPolicy(
        policy_function=TokenPolicy,
        policy_kwargs={"waiting_tokens": cluster_config.waiting_tokens},
    )
    scaling = AutoscalingConfig(
        min_replicas=cluster_config.replicas,
        max_replicas=most,
        upscale_delay_s=min(UPSCALE_DELAY, cluster_config.scale_down_delay),
        downscale_delay_s=cluster_config.scale_down_delay,
        policy=policy,
    )
    return {"autoscaling_config": scaling}
