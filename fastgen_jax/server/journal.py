"""Journal: what is told of a request once it has ended: metrics, a line of the log, a trace.

Every front end tells it here, so that none is told of twice or not at all.
"""

import logging
from typing import TYPE_CHECKING, Any

from fastgen_jax.errors import ConfigError
from fastgen_jax.server.errors import ApiError
from fastgen_jax.server.metrics import Metrics
from fastgen_jax.server.origin import Origin

if TYPE_CHECKING:
    from fastgen_jax.server.tracing import Tracer

log = logging.getLogger("fastgen_jax.access")

MAX_ROUTE = 200  # characters of a path that are told


class Journal:
    """Lines are for machines: in a log of text, only those who debug see them.

    Args:
        tells_requests: whether the log has a line for each POST.
        tracer: gets the requests that reached the engine.
    """

    def __init__(self, metrics: Metrics, *, tells_requests: bool, tracer: "Tracer | None" = None):
        self.metrics = metrics
        self.tracer = tracer
        self.level = logging.INFO if tells_requests else logging.DEBUG

    def close(self):
        """Sends what is still to be told."""
        if self.tracer is not None:
            self.tracer.close()

    def refused(self, origin: Origin, error: ApiError):
        """A request was refused before any work. Under attack these are many: as warnings they are
        told once a second, with their number.
        """
        method, _, path = origin.route.partition(" ")
        if method != "POST":
            return
        self.metrics.answered(path, error.status)
        if log.isEnabledFor(self.level):
            level = logging.WARNING if self.level == logging.INFO else self.level
            message = f"refused with {error.status} {error.code}"  # of a closed set, as kinds are
            fields = _fields(origin, error.status) | {"error": error.code}
            log.log(level, message, extra={"fields": fields})

    def answered(self, origin: Origin, status: int, seconds: float):
        """A request that was let in has its answer, or its client has left."""
        method, _, path = origin.route.partition(" ")
        is_post = method == "POST"
        if is_post:
            self.metrics.answered(path, status, seconds)
        if self.tracer is not None:
            self.tracer.request(origin, status)
        level = self.level if is_post else logging.DEBUG
        if log.isEnabledFor(level):
            route = origin.route[:MAX_ROUTE]
            fields = _fields(origin, status) | {"seconds": round(seconds, 4)} | _work(origin)
            log.log(level, "%r %d in %.3f s", route, status, seconds, extra={"fields": fields})


def tracer_to(endpoint: str | None, model_name: str) -> "Tracer | None":
    """None unless an endpoint was named.

    Raises:
        ConfigError: the packages that it needs are not there.
    """
    if endpoint is None:
        return None
    try:
        from fastgen_jax.server.tracing import Tracer
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"traces to {endpoint} need {error.name}, which is not installed; "
            "pip install 'fastgen-jax[otel]', or start without an endpoint"
        ) from None
    return Tracer(endpoint, model_name)


def _fields(origin: Origin, status: int) -> dict[str, Any]:
    method, _, path = origin.route[:MAX_ROUTE].partition(" ")
    names = {"request_id": origin.request_id, "method": method, "path": path, "status": status}
    return {name: value for name, value in names.items() if value}


def _work(origin: Origin) -> dict[str, Any]:
    """What the engine did for it."""
    generation = origin.generation
    if generation is None:
        return {}
    work = {
        "engine_ids": generation.request_ids,  # as the engine's own lines name it
        "prompt_tokens": generation.n_prompt_tokens,
        "cached_tokens": generation.n_reused_tokens,
        "generated_tokens": generation.n_tokens,
    }
    error = generation.error
    return work if error is None else work | {"error": error.code or error.type}
