"""Door: who sends a request, and whether work is welcome, asked before anything of it is read.

The same for every front end: HTTP's Gate brings headers to it, gRPC its metadata.
"""

import hashlib
import hmac
import random
import re
from typing import NamedTuple

from fastgen_jax.server.config import ServerConfig
from fastgen_jax.server.errors import ApiError
from fastgen_jax.server.service import Service

REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


class Client(NamedTuple):
    """Who sends a request.

    Args:
        owner: the digest of its key: what is kept for it is kept under that; b"" without keys.
        tenant: clients of one tenant share cached prompts.
    """

    owner: bytes = b""
    tenant: bytes = b""


ANYBODY = Client()


class Keys:
    """The keys of one configuration, as digests."""

    def __init__(self, config: ServerConfig):
        self._key_digests = [_digest(key) for key in config.api_key]
        self._admin_digests = [_digest(config.admin_key)] if config.admin_key is not None else []
        self._shares_prefixes = config.share_prefix_cache

    def client_of(self, authorization: str) -> Client:
        """Whose key `authorization` ("Bearer KEY") holds; ANYBODY where no keys are set.

        Raises:
            ApiError: 401: it is none of ours.
        """
        if not self._key_digests:
            return ANYBODY
        given = _matched(authorization, self._key_digests, "API key")
        return Client(given, b"" if self._shares_prefixes else given)

    def check_admin(self, authorization: str):
        """Raises ApiError, 401, unless `authorization` holds the admin key."""
        _matched(authorization, self._admin_digests, "admin key")


class Door:
    """Knows the keys of one service and asks it for its readiness."""

    def __init__(self, service: Service, config: ServerConfig):
        self.service = service
        keys = Keys(config)
        self.client_of, self.check_admin = keys.client_of, keys.check_admin

    def check_work(self, client: Client, *, queues: bool):
        """Asks for new work of a client, which `queues` in the engine or not.

        Raises:
            ApiError: 503: none is taken now; 429: none of this client's, or the queue is full.
        """
        refusal = self.service.refusal()
        if refusal is not None:
            raise refusal
        if queues:
            self.service.limits.of(client.owner).check()
            self.service.check_queue()

    def limits(self, client: Client) -> dict[str, str]:
        """What an answer tells a client of its limits; nothing where it has none."""
        return self.service.limits.of(client.owner).headers()


def request_id_of(given: str) -> str:
    """The client's own id, if it is one that logs and answers can hold; else a new one."""
    return given if REQUEST_ID.fullmatch(given) else f"{random.getrandbits(128):032x}"


def _matched(authorization: str, digests: list[bytes], kind: str) -> bytes:
    """The digest of the key that `authorization` holds. Raises ApiError if it is none of these."""
    scheme, _, key = authorization.partition(" ")
    given = _digest(key.strip() if scheme.lower() == "bearer" else "")
    matches = [hmac.compare_digest(given, digest) for digest in digests]
    if not any(matches):
        raise ApiError(
            401,
            f"a valid {kind} is needed: send 'Authorization: Bearer KEY'",
            type="authentication_error",
            code="invalid_api_key",
            headers={"www-authenticate": "Bearer"},
        )
    return given


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
