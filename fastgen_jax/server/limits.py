"""Limits: what one client may have in the engine at once, and of tokens in a minute.

A client is the digest of its key, so that there are as many accounts as keys; who comes without a
key is one client with all others. Only the event loop asks and counts: between the answer of
`Account.check` and `Account.enter` nobody else comes in.
"""

import math
import time
from collections.abc import Callable

from fastgen_jax.server.errors import ApiError

MINUTE = 60.0  # seconds
ENDS_SOON = 1.0  # seconds after which it is worth asking whether one of the requests has ended
KINDS = ("requests", "tokens")
HEADERS = tuple(f"x-ratelimit-{what}-{kind}" for kind in KINDS for what in
                ("limit", "remaining", "reset"))  # fmt: skip

Clock = Callable[[], float]


class Bucket:
    """Tokens that may be used; it holds those of a minute and is refilled steadily.

    INVARIANT: level <= size. It is in debt after a request that took more than it held, which
    nobody knows before the request ends.
    """

    def __init__(self, size: int, clock: Clock):
        self.size = size
        self._clock = clock
        self._level, self._time = float(size), clock()

    @property
    def level(self) -> float:
        now = self._clock()
        refill = (now - self._time) * self.size / MINUTE
        self._level, self._time = min(self._level + refill, float(self.size)), now
        return self._level

    def take(self, n_tokens: int):
        self._level = self.level - n_tokens

    def seconds_to(self, level: float) -> float:
        """Until it holds so many, if nobody takes any."""
        return max(level - self.level, 0.0) * MINUTE / self.size


class Account:
    """What one client uses of its limits.

    INVARIANT: n_requests <= max_requests.

    Args:
        max_requests, max_tokens: requests at once and tokens a minute; None: any number.
        n_refused: refusals by kind, which are counted here.
    """

    def __init__(
        self,
        max_requests: int | None,
        max_tokens: int | None,
        n_refused: dict[str, int],
        clock: Clock,
    ):
        self.n_requests = 0
        self.max_requests = max_requests
        self.bucket = Bucket(max_tokens, clock) if max_tokens is not None else None
        self.n_refused = n_refused

    def check(self):
        """Asks whether another request may enter.

        Raises:
            ApiError: 429: the client has as many as it may, or has used up its tokens.
        """
        if self.max_requests is not None and self.n_requests >= self.max_requests:
            have = f"{self.n_requests} requests of this API key run or wait"
            message = f"{have}, the limit is {self.max_requests}; try again when one has ended"
            raise self._refusal("requests", message, ENDS_SOON)
        if self.bucket is not None and (seconds := self.bucket.seconds_to(1)):
            used = f"this API key has used up its {self.bucket.size} tokens a minute"
            raise self._refusal("tokens", f"{used}; try again in {spelled(seconds)}", seconds)

    def enter(self, n_prompt_tokens: int):
        """One more request, which `check` let in."""
        self.n_requests += 1
        self.charge(n_prompt_tokens)

    def leave(self):
        """One has ended."""
        self.n_requests -= 1

    def charge(self, n_tokens: int):
        if self.bucket is not None:
            self.bucket.take(n_tokens)

    def headers(self) -> dict[str, str]:
        """The limits that there are, under OpenAI's names, what is left, and when all will be."""
        values: list[tuple[str, int, float, float]] = []
        if self.max_requests is not None:
            n_left = self.max_requests - self.n_requests
            values.append(("requests", self.max_requests, n_left, self.n_requests and ENDS_SOON))
        if self.bucket is not None:
            size, level = self.bucket.size, self.bucket.level
            values.append(("tokens", size, level, self.bucket.seconds_to(size)))
        return {
            f"x-ratelimit-{what}-{kind}": value
            for kind, limit, left, seconds in values
            for what, value in (
                ("limit", str(limit)),
                ("remaining", str(max(int(left), 0))),
                ("reset", spelled(seconds)),
            )
        }

    def _refusal(self, kind: str, message: str, seconds: float) -> ApiError:
        self.n_refused[kind] += 1
        return ApiError(
            429,
            message,
            type="rate_limit_error",
            code="rate_limit_exceeded",
            headers={"retry-after": str(math.ceil(seconds))} | self.headers(),
        )


class Limits:
    """The accounts of all clients.

    Args:
        max_requests, max_tokens: of each client; None: any number.
        n_refused: refusals by KINDS.
    """

    def __init__(
        self,
        max_requests: int | None,
        max_tokens: int | None,
        n_refused: dict[str, int],
        clock: Clock = time.monotonic,
    ):
        self._accounts: dict[bytes, Account] = {}
        self._of_each = max_requests, max_tokens, n_refused, clock

    def of(self, owner: bytes) -> Account:
        """The account of a client that the door knows."""
        if owner not in self._accounts:
            self._accounts[owner] = Account(*self._of_each)
        return self._accounts[owner]


def spelled(seconds: float) -> str:
    """A time as in OpenAI's headers: 250ms, 12s, 6m0s."""
    milliseconds = math.ceil(seconds * 1000)
    if 0 < milliseconds < 1000:
        return f"{milliseconds}ms"
    minutes, rest = divmod(math.ceil(seconds), 60)
    return f"{minutes}m{rest}s" if minutes else f"{rest}s"
