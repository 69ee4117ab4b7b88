"""Kept: the newest responses of each client, for those that go on from one of them."""

import threading
from collections import OrderedDict
from typing import Any, NamedTuple

import orjson

from fastgen_jax.server.errors import ApiError

MAX_RESPONSES = 1000  # of one client
MAX_BYTES = 32 * 2**20  # of one client, as JSON; the newest one is kept whatever its size


class Entry(NamedTuple):
    """A response as it was sent, and the conversation that it ends."""

    response: bytes
    messages: list[dict[str, Any]]
    n_bytes: int


class Kept:
    """Responses by client and id; the oldest go first. Threads may share it.

    INVARIANT: a client has at most MAX_RESPONSES of them, and more than MAX_BYTES only in one. What
    conversations share is counted in each, so that memory is never more.
    """

    def __init__(self):
        self._entries: dict[bytes, OrderedDict[str, Entry]] = {}
        self._n_bytes: dict[bytes, int] = {}
        self._lock = threading.Lock()

    def put(
        self, owner: bytes, before: list[dict[str, Any]], id: str, response: bytes, said: dict
    ) -> None:
        """Keeps a response that says `said` after the messages before."""
        messages = [*before, said]
        entry = Entry(response, messages, len(response) + len(orjson.dumps(messages)))
        with self._lock:
            entries = self._entries.setdefault(owner, OrderedDict())
            entries[id] = entry
            n_bytes = self._n_bytes.get(owner, 0) + entry.n_bytes
            while len(entries) > 1 and (len(entries) > MAX_RESPONSES or n_bytes > MAX_BYTES):
                n_bytes -= entries.popitem(last=False)[1].n_bytes
            self._n_bytes[owner] = n_bytes

    def get(self, owner: bytes, id: str) -> Entry | None:
        with self._lock:
            return self._entries.get(owner, {}).get(id)

    def delete(self, owner: bytes, id: str) -> bool:
        """Forgets the response; False if there is none."""
        with self._lock:
            entry = self._entries.get(owner, {}).pop(id, None)
            if entry is not None:
                self._n_bytes[owner] -= entry.n_bytes
            return entry is not None

    def messages(self, owner: bytes, id: str | None) -> list[dict[str, Any]]:
        """The conversation that ends with this response; none without an id.

        Raises:
            ApiError: it was never kept, or is not any more.
        """
        if id is None:
            return []
        entry = self.get(owner, id)
        if entry is None:
            raise ApiError(
                400,
                f"there is no response {id!r:.80}, or none any more; send the whole conversation "
                "as input",
                param="previous_response_id",
                code="previous_response_not_found",
            )
        return entry.messages
