"""What callers have done to an engine between two of its steps, and wait for: other weights, sleep.

The engine's thread, or the caller's where nobody steps, takes them in the order in which they came.
"""

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

from fastgen_jax.config import show
from fastgen_jax.errors import ConfigError

# What becomes of requests that have begun when the weights change.
IN_FLIGHT = {
    "recompute": "they go on, and what they have cached is computed again with the new weights",
    "drain": "they end with the old weights first, while those that wait go on waiting",
    "keep": "they go on, and what they have cached stays as the old weights made it",
}


@dataclass(eq=False)
class Change:
    """Something that the engine does once, when nothing is on its way to the device.

    last: ids of the requests that end before it, if it drains; None: that is not known yet.
    """

    apply: Callable[[], None]
    in_flight: str = "recompute"
    done: Future[None] = field(default_factory=Future)
    last: frozenset[int] | None = None

    def __post_init__(self):
        if self.in_flight not in IN_FLIGHT:
            raise ConfigError(
                f"in_flight must be one of {', '.join(IN_FLIGHT)}, got {show(self.in_flight)}"
            )

    def run(self) -> None:
        """Whoever waits is told what comes of it, an exception too; nothing, if nobody waits."""
        if not self.done.set_running_or_notify_cancel():
            return
        try:
            self.apply()
        except BaseException as error:
            self.done.set_exception(error)
        else:
            self.done.set_result(None)
