"""Which web pages may use the server: what browsers ask and want to see (https://fetch.spec.whatwg.org,
section 3.3, and https://wicg.github.io/private-network-access).

INVARIANT: credentials are never allowed; the server knows keys, which a page sends itself, and no
cookies. What a request says is compared and not repeated.
"""

from starlette.datastructures import Headers

from fastgen_jax.server.limits import HEADERS

ANSWER = {"access-control-expose-headers": ", ".join(("x-request-id", "retry-after", *HEADERS))}
# A star stands for every header but Authorization.
PREFLIGHT = {
    "access-control-allow-methods": "GET, HEAD, POST, DELETE",
    "access-control-allow-headers": "authorization, content-type, x-request-id, "
    "x-request-timeout, *",
    "access-control-max-age": "600",
}


class Cors:
    """Headers for pages of the allowed origins; none where none is allowed."""

    def __init__(self, allowed: tuple[str, ...]):
        self.allowed = frozenset(allowed)

    def is_preflight(self, method: str, headers: Headers) -> bool:
        """Whether a browser asks if a page of an allowed origin may ask. It sends no key along."""
        asks = method == "OPTIONS" and "access-control-request-method" in headers
        return asks and self._allows(headers.get("origin", ""))

    def answer(self, headers: Headers, *, is_preflight: bool) -> dict[str, str]:
        """What the answer to a request carries, whatever else it says."""
        if not self.allowed:
            return {}
        vary = {} if "*" in self.allowed else {"vary": "Origin"}
        origin = headers.get("origin", "")
        if not self._allows(origin):
            return vary
        allow = {"access-control-allow-origin": origin if vary else "*"}
        if not is_preflight:
            return vary | allow | ANSWER
        if headers.get("access-control-request-private-network") == "true":
            allow["access-control-allow-private-network"] = "true"
        return vary | allow | PREFLIGHT

    def _allows(self, origin: str) -> bool:
        return origin in self.allowed or ("*" in self.allowed and origin != "")
