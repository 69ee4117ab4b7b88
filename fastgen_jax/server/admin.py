"""Admin: the routes of the program that trains what is served. There are none without --admin-key.

They give the engine new weights, let it sleep and wake it, one thing at a time, and the log tells
of each. A checkpoint is of safetensors and below a directory that the operator names; all that is
wrong with it is one error, and nothing was changed.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import orjson
from pydantic import BaseModel, ConfigDict
from starlette.requests import Request
from starlette.responses import Response

from fastgen_jax.errors import FastGenError, RequestError
from fastgen_jax.server import origin, protocol
from fastgen_jax.server.config import ServerConfig
from fastgen_jax.server.errors import ApiError, from_engine, invalid
from fastgen_jax.server.service import UPDATING, Service
from fastgen_jax.server.stream import read_json

if TYPE_CHECKING:
    from fastgen_jax.engine.engine import Engine

log = logging.getLogger("fastgen_jax.server")

LEVELS = {"1": 1, "2": 2}
OF_GET, OF_POST = (
    ("/is_sleeping",),
    ("/update_weights", "/sleep", "/wake_up", "/reset_prefix_cache"),
)
PATHS = frozenset(OF_GET + OF_POST)


class UpdateRequest(BaseModel):
    """Body of POST /update_weights."""

    model_config = ConfigDict(strict=True, extra="forbid")

    path: str
    in_flight: Literal["recompute", "drain", "keep"] = "recompute"


class Admin:
    """The endpoints. INVARIANT: at most one of them is at work."""

    def __init__(self, service: Service, config: ServerConfig):
        self.service = service
        self.config = config
        self._lock = threading.Lock()  # held by who is at work

    async def update_weights(self, request: Request) -> Response:
        """Has the engine take a checkpoint's weights."""
        with self.service.uploads.open() as upload:
            body = await read_json(request, self.config.max_body_bytes, upload)
            spec = protocol.parse(UpdateRequest, body)
        root, updates = self.config.weights_root, self.service.metrics.weight_updates
        if root is None:
            message = "this server takes no weights; start it with --weights-root DIRECTORY"
            raise ApiError(403, message, type="permission_error", code="no_weights_root")

        def update(engine: "Engine"):
            directory = checkpoint_below(Path(root), spec.path)
            try:
                engine.update_weights(str(directory), in_flight=spec.in_flight)
            except RequestError:
                raise
            except FastGenError as error:  # the machine's paths are nobody's business
                raise invalid(str(error).replace(str(directory), spec.path), "path") from error

        try:
            await self._do(f"update_weights {spec.path!r:.200} {spec.in_flight}", UPDATING, update)
        except ApiError as error:
            updates["refused"] += error.status == 400
            raise
        updates["done"] += 1
        return _json({"weight_version": updates["done"]})

    async def sleep(self, request: Request) -> Response:
        """Frees the KV cache, and on level 2 the weights, on level 1 the device's copy of them."""
        given = request.query_params.get("level", "1")
        if given not in LEVELS:
            raise invalid(f"level must be {' or '.join(LEVELS)}, got {given!r:.40}", "level")
        level = LEVELS[given]
        await self._do(f"sleep {level}", "falling asleep", lambda e: e.sleep(level), level)
        return self._state()

    async def wake_up(self, request: Request) -> Response:
        """Undoes `sleep`: what waited goes on."""
        await self._do("wake_up", "waking up", lambda engine: engine.wake_up())
        return self._state()

    async def is_sleeping(self, request: Request) -> Response:
        return self._state()

    async def reset_prefix_cache(self, request: Request) -> Response:
        """Forgets the prompts that are cached."""
        await self._do("reset_prefix_cache", "", lambda engine: engine.reset_prefix_cache())
        return self._state()

    def _state(self) -> Response:
        return _json({"is_sleeping": self.service.metrics.sleep_level > 0})

    async def _do(self, what: str, phase: str, change: "Callable[[Engine], None]", level: int = 0):
        """Makes a change of the engine beside the event loop, to its end, whoever leaves meanwhile.

        Args:
            phase: what /health calls it; "": it does not matter to who asks for tokens.
            level: the sleep that the engine falls into.

        Raises:
            ApiError: another change is made (409), or the engine refused this one.
        """
        engine = self.service.require_backend().engine
        if not self._lock.acquire(blocking=False):
            message = "another change of the engine is being made; try again when it has ended"
            raise ApiError(409, message, code="busy", headers={"retry-after": "1"})
        self.service.change = phase or self.service.change
        await asyncio.shield(asyncio.to_thread(self._change, engine, what, change, level))

    def _change(self, engine: "Engine", what: str, change: "Callable[[Engine], None]", level: int):
        started, ending = time.monotonic(), "failed"
        try:
            change(engine)
            ending = "done"
        except RequestError as error:
            raise from_engine(error) from None
        except ApiError as error:
            ending = f"refused: {error.message}"
            raise
        except FastGenError as error:
            ending = f"refused: {error}"
            raise invalid(str(error)) from None
        finally:
            self._observe(engine, level)
            self._lock.release()
            self._tell(what, ending, time.monotonic() - started)

    def _observe(self, engine: "Engine", level: int):
        """What the engine is now, whatever was asked: one that lost its weights sleeps too."""
        metrics = self.service.metrics
        metrics.sleep_level = (level or metrics.sleep_level or 2) if engine.is_sleeping else 0
        self.service.change = "sleeping" if engine.is_sleeping else ""

    def _tell(self, what: str, ending: str, seconds: float):
        fields = {"request_id": origin.request_id(), "admin": what, "ending": ending[:1000]}
        level = logging.INFO if ending == "done" else logging.WARNING
        log.log(
            level, "admin %s: %.1000r in %.1f s", what, ending, seconds, extra={"fields": fields}
        )


def checkpoint_below(root: Path, path: str) -> Path:
    """The directory that `path` names, from the root on or in full.

    Raises:
        ApiError: it is not below the root, has files that are not, or no safetensors.
    """
    try:
        root = root.resolve()
        directory = (root / path).resolve()
        is_ours = directory.is_relative_to(root) and directory.is_dir()
        files = [file.resolve() for file in directory.iterdir()] if is_ours else []
    except (OSError, ValueError, RuntimeError):  # too long, NUL, links in a circle
        is_ours, files = False, []
    if not is_ours:
        raise invalid("path must name a directory below the one of --weights-root", "path")
    if not all(file.is_relative_to(root) for file in files):
        raise invalid("the directory has links that leave the one of --weights-root", "path")
    if not any(file.name.endswith(".safetensors") for file in directory.iterdir()):
        raise invalid(
            "the directory has no .safetensors files; weights are read from these", "path"
        )
    return directory


def _json(value: dict[str, Any]) -> Response:
    return Response(orjson.dumps(value), media_type="application/json")
