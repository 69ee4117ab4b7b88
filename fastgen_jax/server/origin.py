"""Origin: whose work is under way, for whoever tells of it: the log and traces.

A front end sets `current` at the top of a request's task. What the task calls sees it, and so do
the threads that it hands text to.
"""

from contextvars import ContextVar
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastgen_jax.server.generation import Generation


class Origin:
    """One request of a client.

    INVARIANT: only `generation` changes, once: the Service sets it when the engine takes the work.

    Args:
        request_id: as the client hears it; "" for nobody's work.
        route: what was asked for, as "POST /v1/completions".
        traceparent, tracestate: of the client's span, as W3C's Trace Context writes them.
    """

    __slots__ = ("generation", "request_id", "route", "traceparent", "tracestate")

    def __init__(self, request_id: str, route: str, traceparent: str = "", tracestate: str = ""):
        self.request_id = request_id
        self.route = route
        self.traceparent = traceparent
        self.tracestate = tracestate
        self.generation: Generation | None = None


current: ContextVar[Origin | None] = ContextVar("origin", default=None)


def request_id() -> str:
    """Of the request under way; "" if there is none."""
    origin = current.get()
    return origin.request_id if origin is not None else ""
