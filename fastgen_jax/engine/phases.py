"""What the host does in a step, phase by phase: seconds of each, and events in a profiler's trace.

Where nobody traces, an event costs a fraction of a microsecond.
"""

import time
from types import TracebackType

import jax

PHASES = ("plan", "pack", "dispatch", "wait", "commit", "mask")


class Phase:
    """`with phase:` adds the seconds inside to `seconds[name]`."""

    def __init__(self, name: str, seconds: dict[str, float]):
        self._name, self._seconds = name, seconds

    def __enter__(self) -> None:
        self._event = jax.profiler.TraceAnnotation(self._name)
        self._event.__enter__()
        self._started = time.perf_counter()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._seconds[self._name] += time.perf_counter() - self._started
        self._event.__exit__(kind, error, traceback)


class Phases:
    """A Phase for each of PHASES, of which one at a time is entered."""

    def __init__(self):
        self.seconds: dict[str, float] = dict.fromkeys(PHASES, 0.0)
        self.plan, self.pack, self.dispatch, self.wait, self.commit, self.mask = (
            Phase(name, self.seconds) for name in PHASES
        )

    def step(self, number: int) -> jax.profiler.StepTraceAnnotation:
        """The event of a whole step, as profilers look for."""
        return jax.profiler.StepTraceAnnotation("step", step_num=number)
