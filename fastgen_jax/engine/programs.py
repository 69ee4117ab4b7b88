"""The compiled programs of an engine: which there are, and the thread that makes those to come.

A batch takes the smallest shape that holds it and whose programs are there. The largest holds every
batch, so that an engine can work as soon as it has that one; the others only save padding.
"""

import contextlib
import ctypes
import logging
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fastgen_jax.engine.batch import MaskedShape, Shape

log = logging.getLogger("fastgen_jax.engine")

PATIENT = 5  # niceness of the thread that compiles while others serve; more would starve it

Key = Shape | MaskedShape


def return_freed_memory() -> None:
    """Makes glibc give the system what has been freed: compiling leaves it hundreds of megabytes.

    Elsewhere it does nothing.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


class Programs:
    """INVARIANT: once `compile` has returned, the last of `ready` holds every batch. What is in
    `ready` has its own program and the one that draws its constrained rows.

    Args:
        make: compiles the program of a key. Any thread may call it.
        shapes: in the order of their size.
        masked: the key of the program that draws the constrained rows of a shape.
    """

    def __init__(
        self,
        make: Callable[[Key], Any],
        shapes: list[Shape],
        masked: Callable[[Shape], MaskedShape],
    ):
        self._make, self._masked = make, masked
        self._left = [*shapes]  # neither ready nor known to fail
        self.ready: list[Shape] = []  # replaced, never changed: any thread may hold one
        self.made: dict[Key, Any] = {}
        self.n_wanted = len(self._keys(shapes))
        self.n_failed = 0  # shapes that cannot be compiled
        self._is_closed = False
        self._thread: threading.Thread | None = None

    @property
    def n_made(self) -> int:
        return len(self.made)

    @property
    def is_compiling(self) -> bool:
        """Whether the thread is at work."""
        return self._thread is not None and self._thread.is_alive()

    def compile(self, which: str, on_done: Callable[[int, int], None]) -> None:
        """Compiles all programs, or (which "first") those of the largest shape, on as many threads
        as help. Raises what goes wrong.
        """
        shapes = [*reversed(self._left)][: 1 if which == "first" else None]
        keys = self._keys(shapes)
        with ThreadPoolExecutor(2) as pool:
            jobs = [pool.submit(self._make, key) for key in keys]
            for n_done, (key, job) in enumerate(zip(keys, jobs, strict=True)):
                on_done(n_done, len(keys))
                self.made[key] = job.result()
            on_done(len(keys), len(keys))
        self.ready = shapes[::-1]
        self._left = [shape for shape in self._left if shape not in shapes]
        return_freed_memory()

    def go_on(self) -> None:
        """Has a thread compile the rest, one after the other: the smallest first, as most steps
        after a start are those of a few decodes.
        """
        if self._left:
            self._thread = threading.Thread(
                target=_compile_all, args=(weakref.ref(self),), name="fastgen-compile"
            )
            self._thread.start()

    def compile_next(self) -> bool:
        """Makes one more shape ready; False if there is none. What goes wrong is logged, and the
        shape's batches go on taking a larger one.
        """
        if self._is_closed or not self._left:
            return False
        shape = self._left[0]
        try:
            for key in (self._masked(shape), shape):
                if key not in self.made:
                    self.made[key] = self._make(key)
        except Exception as error:
            self.n_failed += 1
            log.exception(
                "the program of %d tokens could not be compiled (%s); its batches are padded to a "
                "larger one", shape.n_tokens, type(error).__name__,
            )  # fmt: skip
        else:
            self.ready = sorted([*self.ready, shape], key=lambda ready: ready.n_tokens)
        self._left = self._left[1:]
        return bool(self._left)

    def close(self) -> None:
        """Frees all programs, once the one that is being compiled is there: nothing can interrupt
        a compiler.
        """
        self.stop()
        if self._thread is not None:
            self._thread.join()
        self.made.clear()
        self.ready, self._left = [], []

    def stop(self) -> None:
        """Has no further program compiled."""
        self._is_closed = True

    def _keys(self, shapes: Iterable[Shape]) -> list[Key]:
        """Each once; those that draw are small, and come last."""
        return list(dict.fromkeys([*shapes, *map(self._masked, shapes)]))


def _compile_all(reference: weakref.ref[Programs]) -> None:
    """Ends early if nobody holds the programs any more, or the interpreter ends."""
    started = time.monotonic()
    yield_to_others()
    while threading.main_thread().is_alive():
        programs = reference()
        if programs is None:
            return
        if not programs.compile_next():
            seconds = time.monotonic() - started
            log.info(
                "compile  %d of %d programs, the last after %.1f s more",
                programs.n_made, programs.n_wanted, seconds,
            )  # fmt: skip
            break
        del programs
    return_freed_memory()


def yield_to_others() -> None:
    """Lowers the priority of this thread, where the system has priorities of threads. Those of
    XLA's own that generate code keep theirs.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), PATIENT)
