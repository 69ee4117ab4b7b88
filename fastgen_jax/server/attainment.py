"""Whether answers come as a service level asks: DeepSpeed-FastGen's definition, live.

A request meets it (Holmes et al., 2024, arXiv:2401.08671, and its benchmark's source) if
its first token comes within n_prompt / prompt_rate seconds, and the exponential moving average of
the times between its tokens, of span 16, is below 1 / token_rate after each of them. Effective
throughput is how many such requests end a second. Knows numbers only; one writer, the event loop.
"""

import math
import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

TOKEN_RATES = (2.0, 4.0, 6.0)  # tokens/s, those of the paper
PROMPT_RATE = 512.0  # prompt tokens/s
WINDOW = 60  # seconds
SPAN = 16
KEPT = 1 - 2 / (SPAN + 1)  # weight of the average so far beside a new value's 1


class Pace:
    """The moving average of the times between a sample's tokens, as pandas' ewm(span=16) has it.

    INVARIANT: after times t_1 ... t_n the average is sum_i KEPT**(n-i) t_i / sum_i KEPT**(n-i), and
    `slowest` the greatest that it has been; 0 before there is any.
    """

    __slots__ = ("_sum", "_weight", "slowest")

    def __init__(self):
        self._sum = self._weight = self.slowest = 0.0

    def add(self, seconds: float):
        self._sum = total = seconds + KEPT * self._sum
        self._weight = weight = 1 + KEPT * self._weight
        if total > self.slowest * weight:
            self.slowest = total / weight


class SLA(NamedTuple):
    """What is asked of an answer; a level for each of `token_rates`.

    Args:
        first_token: seconds for the first token of any prompt, in place of prompt_rate.
    """

    token_rates: tuple[float, ...] = TOKEN_RATES
    prompt_rate: float = PROMPT_RATE
    first_token: float | None = None

    def met(self, n_prompt: int, first: float, slowest: float) -> list[bool]:
        """Which levels an answer meets.

        Args:
            first: seconds until its first token.
            slowest: seconds, of its Pace.
        """
        limit = n_prompt / self.prompt_rate if self.first_token is None else self.first_token
        return [first <= limit and slowest < 1 / rate for rate in self.token_rates]


class _Second(NamedTuple):
    """What ended within one second: of each level, how many counted and how many met it."""

    number: int
    n: list[int]
    n_met: list[int]


class Attainment:
    """Samples that ended within the newest `window` seconds, the current one included.

    A sample that failed has met nothing. One whose client left counts where it was late already.
    What was refused before it began is not counted here.
    """

    def __init__(
        self,
        sla: SLA | None = None,
        window: int = WINDOW,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.sla = SLA() if sla is None else sla
        self.window = window
        self._clock = clock
        self._started = clock()
        self._seconds: deque[_Second] = deque(maxlen=window)

    def ended(self, n_prompt: int, first: float, slowest: float, *, is_whole: bool = True):
        """One more sample; not a whole one if its client left."""
        second = self._second()
        for level, is_met in enumerate(self.sla.met(n_prompt, first, slowest)):
            if is_whole or not is_met:
                second.n[level] += 1
                second.n_met[level] += is_met

    def failed(self):
        self.ended(0, math.inf, math.inf)

    def shares(self) -> list[float]:
        """Of the samples that ended, by level; not a number if none did."""
        n, n_met, _ = self._sums()
        return [met / all if all else math.nan for met, all in zip(n_met, n, strict=True)]

    def throughputs(self) -> list[float]:
        """Samples a second that met each level."""
        _, n_met, seconds = self._sums()
        return [met / seconds if seconds > 0 else 0.0 for met in n_met]

    def _second(self) -> _Second:
        number = int(self._clock())
        if not self._seconds or self._seconds[-1].number != number:
            n_levels = len(self.sla.token_rates)
            self._seconds.append(_Second(number, [0] * n_levels, [0] * n_levels))
        return self._seconds[-1]

    def _sums(self) -> tuple[list[int], list[int], float]:
        """Of each level, how many counted and met it, and seconds in which they did."""
        now = self._clock()
        first = int(now) - self.window + 1
        seconds = [second for second in self._seconds if second.number >= first]
        levels = range(len(self.sla.token_rates))
        n = [sum(second.n[level] for second in seconds) for level in levels]
        n_met = [sum(second.n_met[level] for second in seconds) for level in levels]
        return n, n_met, now - max(first, self._started)
