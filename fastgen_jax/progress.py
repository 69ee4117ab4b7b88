"""PhaseBars: progress bars of a start, where stderr is a terminal."""

from typing import Any


class PhaseBars:
    """A bar for the phase that the engine is in; called as its `on_phase`, closed after it."""

    def __init__(self):
        self._phase: str | None = None
        self._bar: Any = None

    def __call__(self, phase: str, done: int, total: int) -> None:
        from tqdm import tqdm

        if phase != self._phase:
            self.close()
            if phase == "ready":
                return
            # disable=None: silent unless stderr is a terminal
            self._bar = tqdm(desc=phase, total=total, disable=None)
            self._phase = phase
        self._bar.total = total
        self._bar.update(done - self._bar.n)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        self._bar = None
