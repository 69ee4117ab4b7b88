"""Driver: the one thread that steps an LLM's engine, for all who wait for something of it.

Whoever calls generate or stream, from whatever thread or event loop, starts a Generation here, and
what they asked runs in the same steps. The thread submits, reads and detokenises between two steps,
so that one caller's batches are the same in every run. It lives as long as there is work: an idle
engine is held by its LLM alone.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from fastgen_jax.errors import QueueFull
from fastgen_jax.generation import Ended, Generation

if TYPE_CHECKING:
    from fastgen_jax.engine.engine import Engine


class Driver:
    """Thread-safe. Each Generation that is started is told exactly one Ended.

    INVARIANT: `_thread` is alive and the only one that steps; None: there is no work.
    """

    def __init__(self, engine: Engine):
        self._engine = engine
        self._lock = threading.Lock()  # of the next three
        self._thread: threading.Thread | None = None
        self._generations: list[Generation] = []  # changed by the thread alone
        self._arrived: list[Generation] = []
        self._cancelled: list[Generation] = []
        self._owners: dict[int, Generation] = {}  # of live requests

    def start(self, generation: Generation) -> None:
        with self._lock:
            if self._thread is None:
                thread = threading.Thread(target=self._run, name="fastgen-llm")
                thread.start()
                self._thread = thread
            self._arrived.append(generation)

    def cancel(self, generation: Generation) -> bool:
        """Ends a generation soon; whether it is yet to be told so."""
        with self._lock:
            if generation in self._arrived:
                self._arrived.remove(generation)
            elif generation in self._generations:
                self._cancelled.append(generation)
                return True
            return False

    # The thread.

    def _run(self) -> None:
        while self._take_in():
            try:
                self._submit()
                self._step()
            except BaseException as error:  # everybody who waits hears of it
                self._fail(error)
            self._tell()

    def _take_in(self) -> bool:
        """Whether there is work for this thread; one that its starter was torn from has none."""
        with self._lock:
            if self._thread is not threading.current_thread():
                return False
            self._generations += self._arrived
            cancelled = self._cancelled
            self._arrived, self._cancelled = [], []
        for generation in cancelled:
            generation.end(self._engine, None)
        return True

    def _submit(self) -> None:
        """Submits what the engine has room for: what goes first, then of whom least runs."""
        while waiting := [g for g in self._generations if g.waiting]:
            generation = min(waiting, key=lambda g: (g.waiting[0].request.priority, len(g.live)))
            try:
                request_id = generation.submit_next(self._engine)
            except QueueFull as error:
                if self._engine.has_work:
                    return
                generation.end(self._engine, error)
            else:
                self._owners[request_id] = generation

    def _step(self) -> None:
        if not self._engine.has_work:
            assert not self._owners, f"the engine lost requests {list(self._owners)}"
            return
        for output in self._engine.step():
            generation = self._owners.get(output.request_id)
            if generation is not None:
                generation.push(output, self._engine)
                if output.request_id not in generation.live:
                    del self._owners[output.request_id]

    def _fail(self, error: BaseException) -> None:
        """Ends all; without waiting for the engine, if it fails again."""
        for generation in self._generations:
            if generation.error is not None:
                generation.live.clear()
            generation.end(self._engine, error)
        self._owners = {id: g for g in self._generations for id in g.live}

    def _tell(self) -> None:
        """Tells what there is to tell, and forgets who has been told all."""
        told, over = self._generations, [g for g in self._generations if g.is_over]
        with self._lock:
            self._generations = [g for g in told if not g.is_over]
            is_last = not self._generations and not self._arrived
            if is_last:
                self._thread = None  # from here on there may be another one
        thread = threading.current_thread() if is_last else None
        for generation in told:
            generation.tell_news()
        for generation in over:
            generation.tell(Ended(generation.error, thread))
