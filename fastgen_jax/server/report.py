"""StartupReport: the lines that tell how a start goes."""

import json
import logging
import shlex
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastgen_jax.engine.engine import Engine
    from fastgen_jax.server.service import Service

log = logging.getLogger("fastgen_jax.server")

PHASES = ("loading", "compiling", "ready")
PROGRESS_EVERY = 5.0  # seconds between lines within one phase


class StartupReport:
    """About six lines with times, from the open port to a line to paste.

    Args:
        url: where the server is, through the Unix socket `uds` if there is one; "": no line.
    """

    def __init__(self, url: str, model_name: str, started: float, uds: str | None = None):
        self.url = url
        self.uds = uds
        self.model_name = model_name
        self.started = started
        self._phase = ""
        self._phase_started = started
        self._last_line = started
        self._total = 0

    def opened(self):
        place = self.uds or self.url
        log.info("listen   %s is open; /health tells when %s is ready", place, self.model_name)

    def phase(self, service: "Service", name: str, done: int, total: int):
        """Called at each step of the load; logs the ends of phases, and a long phase's progress."""
        if name not in PHASES:
            return
        now = time.monotonic()
        if name != self._phase:
            self._log_end(now)
            if name == "loading":
                self._log_device()
            self._phase, self._phase_started, self._last_line = name, now, now
        elif now - self._last_line > PROGRESS_EVERY:
            self._last_line = now
            log.info("%-9s %d/%d", name, done, total)
        self._total = total
        if name == "ready" and service.backend is not None:
            self._log_ready(service.backend.engine, now)

    def _log_end(self, now: float):
        seconds = now - self._phase_started
        if self._phase == "loading":
            log.info("load     weights of %s in %.1f s", self.model_name, seconds)
        elif self._phase == "compiling":
            log.info("compile  %d programs in %.1f s", self._total, seconds)

    def _log_device(self):
        import jax

        devices = jax.devices()
        seconds = time.monotonic() - self.started
        log.info("device   %d x %s in %.1f s", len(devices), devices[0].device_kind, seconds)

    def _log_ready(self, engine: "Engine", now: float):
        model, config = engine.model_config, engine.config
        log.info(
            "model    %s: %d layers, hidden %d, vocabulary %d, %s, max_model_len %d",
            model.family, model.n_layers, model.hidden_size, model.vocab_size, config.dtype,
            config.max_model_len,
        )  # fmt: skip
        assert config.num_kv_blocks
        assert config.block_size
        assert config.max_model_len
        n_tokens = config.num_kv_blocks * config.block_size
        log.info(
            "KV cache %d blocks of %d = %d tokens in %s: %.1f requests of full length at once",
            config.num_kv_blocks, config.block_size, n_tokens, config.cache_dtype,
            n_tokens / config.max_model_len,
        )  # fmt: skip
        line = f"; try:\n{curl(self.url, self.model_name, self.uds)}" if self.url else ""
        log.info("ready    in %.1f s%s", now - self.started, line)


def curl(url: str, model_name: str, uds: str | None = None) -> str:
    """A line to paste."""
    body = {"model": model_name, "prompt": "Once upon a time", "max_tokens": 32}
    data = shlex.quote(json.dumps(body))  # whatever the directory is called
    command = f"curl --unix-socket {shlex.quote(uds)}" if uds else "curl"
    return f"{command} {url}/v1/completions -H 'Content-Type: application/json' -d {data}"
