"""POST /start_profile and /stop_profile: a trace of the server at work, where --profile says so.

It shows the engine's phases and steps, the server's own work and the programs' parts by name
(jax.named_scope), with times, on host and device: no text and no tokens. It is written below the
directory when it ends, as jax.profiler writes it: for XProf (TensorBoard) and Perfetto.
"""

import asyncio
import contextlib
import logging
from contextlib import AbstractContextManager
from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import Response

from fastgen_jax.server.errors import ApiError

log = logging.getLogger("fastgen_jax.server")

LONGEST = 60.0  # seconds; a trace is held in memory until it ends


class Profiler:
    """INVARIANT: at most one trace is recorded, for at most LONGEST seconds."""

    def __init__(self, directory: str | None):
        self._directory = directory
        self._changing = asyncio.Lock()
        self._limit: asyncio.TimerHandle | None = None  # while a trace is recorded

    def event(self, name: str) -> AbstractContextManager:
        """What is done inside is an event of the trace, if there is one."""
        if self._limit is None:
            return contextlib.nullcontext()
        import jax

        return jax.profiler.TraceAnnotation(name)

    async def start(self, request: Request) -> Response:
        """Begins a trace. 409 while there is one."""
        async with self._changing:
            if self._limit is not None:
                raise ApiError(409, "a profile is being recorded; POST /stop_profile ends it")
            await asyncio.to_thread(_start, self._directory)
            loop = asyncio.get_running_loop()
            self._limit = loop.call_later(LONGEST, lambda: loop.create_task(self.close()))
        return _json({"seconds_at_most": LONGEST})

    async def stop(self, request: Request) -> Response:
        """Ends the trace and writes it. 409 where there is none."""
        if not await self.close():
            raise ApiError(409, "no profile is being recorded; POST /start_profile begins one")
        return _json({"directory": self._directory})

    async def close(self) -> bool:
        """Ends the trace, if there is one, and says whether there was."""
        async with self._changing:
            if self._limit is None:
                return False
            self._limit.cancel()
            self._limit = None
            await asyncio.to_thread(_stop)
        log.info("profile written below %s", self._directory)
        return True


def _start(directory: str | None) -> None:
    import jax

    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # every call of a function would be an event
    jax.profiler.start_trace(str(directory), profiler_options=options)


def _stop() -> None:
    import jax

    jax.profiler.stop_trace()


def _json(value: dict[str, Any]) -> Response:
    return Response(orjson.dumps(value), media_type="application/json")
