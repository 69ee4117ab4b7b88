"""Uploads: how many bytes of request bodies the server holds, all together."""

import contextlib
from collections.abc import Iterator

from fastgen_jax.server.errors import ApiError

RETRY_AFTER = 1  # seconds; the next bodies are tokenised by then


class Uploads:
    """Counts bodies from their first byte until they are prompts in the engine's queue.

    Only the event loop touches it. INVARIANT: n_held is the sum of the open uploads' n_bytes, never
    more than max_bytes, and 0 when none is open.
    """

    def __init__(self, max_bytes: int):
        self.max_bytes = max_bytes
        self.n_held = 0

    @contextlib.contextmanager
    def open(self) -> Iterator["Upload"]:
        """One body, held until the end of the `with` statement, whatever ends it."""
        upload = Upload(self)
        try:
            yield upload
        finally:
            self.n_held -= upload.n_bytes


class Upload:
    """What is held of one body."""

    def __init__(self, uploads: Uploads):
        self._uploads = uploads
        self.n_bytes = 0

    def check(self, n_bytes: int):
        """Raises ApiError if so many bytes more are more than the server would hold."""
        if self._uploads.n_held + n_bytes > self._uploads.max_bytes:
            raise ApiError(
                429,
                f"bodies of {self._uploads.n_held} bytes are being received or tokenized, the "
                f"limit is {self._uploads.max_bytes}; try again later",
                type="rate_limit_error",
                code="too_many_uploads",
                headers={"retry-after": str(RETRY_AFTER)},
            )

    def take(self, n_bytes: int):
        """Counts bytes that have come; raises as `check` does, and counts none then."""
        self.check(n_bytes)
        self.n_bytes += n_bytes
        self._uploads.n_held += n_bytes
