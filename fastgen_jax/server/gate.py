"""What every HTTP request passes before its route: request id, Host, origin, key, readiness.

Pure ASGI, so that streams pass through untouched. Refusing is the default: a path that is not
open, known to the router or not, needs a key when keys are set.

An overloaded server does little else than refuse, while the engine wants the same interpreter: so
a refusal waits for nothing and makes no system call, at which the engine would take its turn.
"""

import ipaddress
import re
import socket
import time

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastgen_jax.server import admin
from fastgen_jax.server.config import ServerConfig
from fastgen_jax.server.cors import Cors
from fastgen_jax.server.door import ANYBODY, Door, request_id_of
from fastgen_jax.server.errors import CLIENT_GONE, ApiError, invalid
from fastgen_jax.server.origin import Origin, current
from fastgen_jax.server.responses import send_error
from fastgen_jax.server.service import Service
from fastgen_jax.server.web import PAGES

OPEN_PATHS = frozenset({"/livez", "/health/live", "/health", "/ready", "/health/ready", "/ping"})
QUEUEING_PATHS = frozenset(
    {"/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/embeddings"}
)
PASSED = "fastgen.passed"  # in the scope: the Gate that lets the request pass
TIMEOUT = re.compile(r"[0-9]{1,9}(?:\.[0-9]{1,9})?")
HOST_NAME = re.compile(r"[a-z0-9](?:[a-z0-9.-]{0,251}[a-z0-9])?")


class Gate:
    """ASGI app around the routes. INVARIANT: service.n_inflight counts the POST requests inside."""

    def __init__(self, app: ASGIApp, service: Service, config: ServerConfig):
        self.app = app
        self.service = service
        self.door = Door(service, config)
        self.admin_paths = admin.PATHS if config.admin_key is not None else frozenset()
        self.open_paths = OPEN_PATHS | (PAGES.keys() if config.web else frozenset())
        self.checks_host = config.uds is None and is_loopback(config.host)
        self.allowed_hosts = frozenset(host.lower() for host in config.allowed_host)
        self.cors = Cors(config.allowed_origin)

    async def __call__(self, scope: Scope, receive: Receive, send: Send):
        if scope["type"] != "http":
            return
        has_passed = scope.get(PASSED) is self  # the connection has asked before it made a task
        refusal = None if has_passed else self.refusal(scope)
        if refusal is not None:
            await send_error(refusal, send)
        else:
            await self._pass(scope, receive, send)

    def refusal(self, scope: Scope) -> ApiError | None:
        """What the request is answered at once, before its body is read; None if it may pass."""
        headers = Headers(scope=scope)
        request_id = request_id_of(headers.get("x-request-id", ""))
        is_preflight = self.cors.is_preflight(scope["method"], headers)
        added = {"x-request-id": request_id}
        added |= self.cors.answer(headers, is_preflight=is_preflight)
        origin = Origin(
            request_id, f"{scope['method']} {scope['path']}", headers.get("traceparent", ""),
            headers.get("tracestate", ""),
        )  # fmt: skip
        scope["state"] = {
            "request_id": request_id, "client": ANYBODY, "is_preflight": is_preflight,
            "headers": added, "timeout": None, "origin": origin,
        }  # fmt: skip
        try:
            self._check(scope, headers)
        except ApiError as error:
            error.headers |= added
            self.service.journal.refused(origin, error)
            return error
        scope[PASSED] = self
        return None

    def _check(self, scope: Scope, headers: Headers):
        name = _host_name(headers.get("host", ""))
        if self.checks_host and not self._is_known_host(name):
            raise _unknown_host(name)
        if scope["state"]["is_preflight"]:
            return
        if scope["path"] in self.admin_paths:
            self.door.check_admin(headers.get("authorization", ""))
        elif scope["path"] not in self.open_paths:
            scope["state"]["client"] = self.door.client_of(headers.get("authorization", ""))
        if scope["method"] == "POST":  # before the body is read, or its route looked for
            scope["state"]["timeout"] = _timeout(headers.getlist("x-request-timeout"))
            queues = scope["path"] in QUEUEING_PATHS
            self.door.check_work(scope["state"]["client"], queues=queues)

    async def _pass(self, scope: Scope, receive: Receive, send: Send):
        fields = scope["state"]["headers"].items()
        added = [(name.encode(), value.encode()) for name, value in fields]

        started, status = time.monotonic(), CLIENT_GONE

        async def send_with_headers(message: Message):
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                fields = self._limits(scope) | dict(message["headers"])
                message["headers"] = [*fields.items(), *added]
            await send(message)

        app = Response(status_code=204) if scope["state"]["is_preflight"] else self.app
        is_post, origin = scope["method"] == "POST", scope["state"]["origin"]
        current.set(origin)
        self.service.n_inflight += is_post
        try:
            await app(scope, receive, send_with_headers)
        finally:
            self.service.n_inflight -= is_post
            self.service.journal.answered(origin, status, time.monotonic() - started)

    def _limits(self, scope: Scope) -> dict[bytes, bytes]:
        """What the answer says of the client's limits, when it begins."""
        if scope["method"] != "POST" or scope["path"] not in QUEUEING_PATHS:
            return {}
        fields = self.door.limits(scope["state"]["client"]).items()
        return {name.encode(): value.encode() for name, value in fields}

    def _is_known_host(self, name: str) -> bool:
        """Addresses are; names are not: a foreign page that resolves to loopback sends its own."""
        return name in ("", "localhost") or name in self.allowed_hosts or _is_address(name)


def _timeout(given: list[str]) -> float | None:
    """Seconds that the client gives its request."""
    if not given:
        return None
    value = ", ".join(given)
    if not TIMEOUT.fullmatch(value) or float(value) == 0:
        message = (
            f"X-Request-Timeout must be a number of seconds above 0, such as 2.5, not {value!r:.40}"
        )
        raise invalid(message, "x-request-timeout")
    return float(value)


def _host_name(host: str) -> str:
    """A Host header without its port."""
    name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
    return name.strip("[]").lower()


def _unknown_host(name: str) -> ApiError:
    """Repeats the name, which anybody may have chosen, only if it is one."""
    name = name if HOST_NAME.fullmatch(name) else "NAME"
    message = f"this Host header is not accepted; to accept it, start with --allowed-host {name}"
    return ApiError(403, message, type="permission_error", code="host_not_allowed")


def is_loopback(host: str) -> bool:
    """Whether who listens on `host`, by whatever name, hears this machine only."""
    try:
        address = socket.getaddrinfo(host, None, flags=socket.AI_PASSIVE)[0][4][0]
    except OSError:  # nobody can listen there
        return True
    found = ipaddress.ip_address(str(address).partition("%")[0])
    return (getattr(found, "ipv4_mapped", None) or found).is_loopback


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
