"""Wire: requests to one server over HTTP, whose every refusal comes out as one of our errors."""

import contextlib
import ipaddress
import json
import ssl
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx2
import orjson

from fastgen_jax.errors import (
    ConfigError,
    ContextLengthExceeded,
    EngineStopped,
    FastGenError,
    InvalidRequest,
    QueueFull,
    RequestError,
)

CONNECT_SECONDS = 10.0  # answers take as long as they take: the server has timeouts for them
STATUS_SECONDS = 10.0
N_CONNECTIONS = 256  # at once; what is beyond them waits for one
REFUSALS = {
    "invalid_request_error": InvalidRequest,
    "authentication_error": RequestError,
    "permission_error": RequestError,
}


class Wire:
    """Speaks to the server at `url`; holds no connection, so that it may be used in any thread."""

    def __init__(self, url: str, api_key: str | None = None, *, tls_cert: str | None = None):
        """tls_cert: a file with the one certificate to trust; default: those that the machine does.

        Raises:
            ConfigError: it is no URL.
        """
        self.url = url.rstrip("/")
        self.api_key = api_key
        scheme, host = _parts(url)
        is_near = _is_loopback(host)  # which no proxy of the environment is for
        trust = _trust_only(tls_cert) if tls_cert else scheme == "https"
        self._options: dict[str, Any] = {"trust_env": not is_near, "verify": trust}

    def open(self) -> httpx2.AsyncClient:
        """What the other methods take as `http`."""
        key = {"authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        return httpx2.AsyncClient(
            base_url=self.url,
            headers={"content-type": "application/json", **key},
            timeout=httpx2.Timeout(None, connect=CONNECT_SECONDS),
            limits=httpx2.Limits(max_connections=N_CONNECTIONS),
            **self._options,
        )

    async def get(self, http: httpx2.AsyncClient, path: str) -> dict[str, Any]:
        with self._told():
            return self._answer(await http.get(path))

    async def post(self, http: httpx2.AsyncClient, path: str, body: Any) -> dict[str, Any]:
        with self._told():
            return self._answer(await http.post(path, content=json.dumps(body)))

    async def stream(
        self, http: httpx2.AsyncClient, path: str, body: Any
    ) -> AsyncIterator[dict[str, Any]]:
        """The events of an answer. INVARIANT: ends without an error only if all of them came."""
        with self._told():
            async with http.stream("POST", path, content=json.dumps(body)) as response:
                if response.status_code != 200:
                    await response.aread()
                    self._answer(response)
                async for event in httpx2.EventSource(response):
                    if event.data == "[DONE]":
                        return
                    yield self._checked(200, event.data)
        raise FastGenError(f"{self.url} has cut its answer short; see its log")

    def health(self) -> dict[str, Any]:
        """What /health says, ready or not."""
        with self._told():
            answer = httpx2.get(self.url + "/health", timeout=STATUS_SECONDS, **self._options)
            return self._fields(answer.status_code, answer.content)

    def _answer(self, response: httpx2.Response) -> dict[str, Any]:
        seconds = response.headers.get("retry-after", "")
        retry_after = float(seconds) if seconds.isdigit() else 1.0
        return self._checked(response.status_code, response.content, retry_after)

    def _checked(self, status: int, data: str | bytes, retry_after: float = 1.0) -> dict[str, Any]:
        """An answer's or event's fields.

        Raises:
            FastGenError: it is an error, as the class that its type means.
        """
        fields = self._fields(status, data)
        error = fields.get("error")
        if isinstance(error, dict):
            raise _error(error, retry_after)
        if status != 200:
            raise self._foreign(status, data)
        return fields

    def _fields(self, status: int, data: str | bytes) -> dict[str, Any]:
        with contextlib.suppress(ValueError):
            if isinstance(fields := orjson.loads(data), dict):
                return fields
        raise self._foreign(status, data)

    def _foreign(self, status: int, data: str | bytes) -> FastGenError:
        return FastGenError(
            f"{self.url} answered {status} with {data[:200]!r}, which is no answer of a server of "
            "fastgen_jax; check the URL"
        )

    @contextlib.contextmanager
    def read(self) -> Iterator[None]:
        """What is looked up in an answer within this, and is not there, is a FastGenError."""
        try:
            yield
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise FastGenError(
                f"{self.url} answered without what a server of fastgen_jax tells ({error!r:.100}); "
                "check the URL"
            ) from error

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except httpx2.HTTPError as error:
            cause = f"{type(error).__name__}: {error}".rstrip(": ")
            raise FastGenError(f"{self.url} cannot be reached, or no more ({cause})") from error


def _error(error: dict[str, Any], retry_after: float) -> FastGenError:
    message, kind, param = error.get("message", ""), error.get("type"), error.get("param")
    match kind:
        case _ if error.get("code") == "context_length_exceeded":
            return ContextLengthExceeded(message, param=param)
        case "rate_limit_error":
            return QueueFull(message, retry_after=retry_after)
        case "service_unavailable":
            return EngineStopped(message)
    if kind in REFUSALS:
        return REFUSALS[kind](message, param=param)
    return FastGenError(message)


def _parts(url: str) -> tuple[str, str]:
    """Scheme and host of a URL of HTTP. Raises ConfigError for another."""
    try:
        parsed = httpx2.URL(url)
    except httpx2.InvalidURL:
        parsed = httpx2.URL()
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise ConfigError(f"{url!r:.200} is no URL of a server; give one as http://host:port")
    return parsed.scheme, parsed.host


def _trust_only(tls_cert: str) -> ssl.SSLContext:
    """Trust in one certificate, which then says nothing by the name of the machine."""
    context = ssl.create_default_context(cafile=tls_cert)
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    return context


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
